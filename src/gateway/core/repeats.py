"""Log lines that say the same again and again."""

from __future__ import annotations

from typing import Final

MAX_REPEATS: Final = 5
SECONDS: Final = 60.0
MAX_TEXTS: Final = 200
"""Different ones that are told apart within that time."""


class Repeats:
    """Of lines that say the same `MAX_REPEATS` are said in `SECONDS`, and then how many were not. Times are seconds."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], int] = {}
        self._until = 0.0

    def may_say(self, namespace: str, text: str, now: float) -> bool:
        """Whether to say it once more; `over` is asked first. Beyond `MAX_TEXTS` different ones, all count as one."""
        if not self._seen:
            self._until = now + SECONDS
        what = (namespace, text)
        if what not in self._seen and len(self._seen) >= MAX_TEXTS:
            what = (namespace, "different warnings")
        count = self._seen[what] = self._seen.get(what, 0) + 1
        return count <= MAX_REPEATS

    def over(self, now: float) -> list[tuple[str, str]]:
        """(namespace, text) that tells what was not said, when its minute is over."""
        if not self._seen or now < self._until:
            return []
        seen, self._seen = self._seen, {}
        return [
            (namespace, f"{count - MAX_REPEATS} times more within {SECONDS:g} s: {text}")
            for (namespace, text), count in seen.items()
            if count > MAX_REPEATS
        ]
