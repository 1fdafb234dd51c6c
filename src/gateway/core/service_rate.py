"""How fast each backend reads prompts, learned from first tokens.

The work of a prompt with ``u`` uncached and ``c`` cached tokens is ``u * (1 + ATTENTION * (c + u / 2))``, in tokens: attention
looks at all that stands before. A backend takes ``fixed + work * seconds_per_token`` seconds for it, and it reads prompts
one after another, so what one took is the time since the first token before it, or since it was sent if that was later.
"""

from __future__ import annotations

from typing import Final

ATTENTION: Final = 2.5e-5
_PRIOR: Final = 1 / 4000  # seconds per token before anything is known
_DECAY: Final = 0.98  # of a backend's evidence, with each sample
_SHRINK: Final = 20_000.0  # tokens of evidence at which a backend's own rate counts as much as the pool's
_BAND: Final = (0.8, 1.25)  # a backend this close to the pool has the pool's rate: noise must not tell equals apart
_REFRESH: Final = 8  # samples between two looks at all backends
_SERIAL: Final = 0.5  # a prompt behind another must take this part of its time alone, else they are read side by side


def work(uncached: float, cached: float) -> float:
    """Tokens of work, attention counted, to read a prompt of which this much is cached."""
    return uncached * (1.0 + ATTENTION * (cached + 0.5 * uncached))


class ServiceRates:
    """``seconds[i]`` per token of work and ``fixed[i]`` seconds per prompt on backend ``i``."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.fixed: list[float] = []
        self.serial: list[bool] = []
        """There is evidence that a prompt behind another waits for it, so that holding it back costs nothing."""
        self._work: list[float] = []
        self._time: list[float] = []
        self._alone: list[list[float]] = []  # work, seconds of prompts that met no other
        self._behind: list[list[float]] = []  # work, seconds, samples of those that waited behind one
        self._weight: list[float] = []
        self._pool_work = 8000.0
        self._pool_time = 8000.0 * _PRIOR
        self._pool = _PRIOR  # seconds per token of all, as of the last look at all: equals stay equal in between
        self._samples = 0
        self.looks = 0
        """At all backends: whenever it grows, any of them may have another rate."""

    def add(self, weight: float) -> None:
        """One more backend, thought to be ``weight`` times as fast as others until it shows."""
        for row in (self.seconds, self.fixed, self._work, self._time, self._weight):
            row.append(0.0)
        self.serial.append(False)
        self._alone.append([])
        self._behind.append([])
        self.forget(len(self.seconds) - 1, weight)

    def forget(self, i: int, weight: float) -> None:
        """Backend ``i`` is another one now."""
        self._work[i] = self._time[i] = self.fixed[i] = 0.0
        self._weight[i] = weight
        self._alone[i], self._behind[i] = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
        self.serial[i] = False
        self._settle(i)

    def expect(self, i: int, weight: float) -> None:
        """Backend ``i`` is thought to be ``weight`` times as fast as others, but for what it has shown."""
        self._weight[i] = weight
        self._settle(i)

    @property
    def known(self) -> bool:
        """Some backend has been seen to work."""
        return self._samples >= _REFRESH

    def observe(self, i: int, uncached: int, cached: int, took: float, overlapped: float) -> None:
        """A first token: backend ``i`` took so many seconds; the prompt had waited ``overlapped`` seconds behind another."""
        tokens = work(max(uncached, 1), cached)
        self._samples += 1
        mean = self._pool_work * 0.02
        if tokens < mean * 0.25:  # next to nothing to read: what it took is what any prompt takes
            self.fixed[i] += 0.05 * (max(took - tokens * self.seconds[i], 0.0) - self.fixed[i])
        else:
            self.fixed[i] *= 0.99  # without such prompts, nobody can tell
        took_more = max(took - self.fixed[i], 1e-6)
        self._work[i] = self._work[i] * _DECAY + tokens
        self._time[i] = self._time[i] * _DECAY + took_more
        keep = 1.0 - (1.0 - _DECAY) / len(self.seconds)
        self._pool_work = self._pool_work * keep + tokens
        self._pool_time = self._pool_time * keep + took_more
        self._judge(i, tokens, took_more, overlapped)
        if self._samples % _REFRESH == 0:
            self.looks += 1
            self._pool = self._pool_time / self._pool_work
            for j in range(len(self.seconds)):
                self._settle(j)
        else:
            self._settle(i)

    def _judge(self, i: int, tokens: float, took: float, overlapped: float) -> None:
        """Side by side, or one after another?"""
        if overlapped <= 0.0:
            sums = self._alone[i]
        elif overlapped >= 0.5 * took:
            sums = self._behind[i]
        else:
            return
        sums[0] = sums[0] * _DECAY + tokens
        sums[1] = sums[1] * _DECAY + took
        sums[2] += 1
        alone, behind = self._alone[i], self._behind[i]
        if alone[2] >= 2 and behind[2] >= 4:
            self.serial[i] = behind[1] * alone[0] >= _SERIAL * alone[1] * behind[0]

    def _settle(self, i: int) -> None:
        pool = self._pool
        mine = self._work[i]
        prior = pool / self._weight[i]
        own = (self._time[i] + _SHRINK * prior) / (mine + _SHRINK)
        self.seconds[i] = pool if _BAND[0] < own / pool < _BAND[1] else own
