"""What finished requests teach: how long prompts and answers are, how much of a prompt was cached, how fast backends are."""

from __future__ import annotations

from typing import Final

from .backends import Backends
from .policy import cached_tokens
from .tickets import Ticket
from .usage import Usage

UNKNOWN_CACHE: Final = 1_500_000
"""Tokens that a cache of unknown size is thought to hold, until usage shows how many it does."""

LARGEST_CACHE: Final = 8_000_000
"""Tokens of one backend's cache that are mirrored at most. In the shortest blocks (256 characters) that is 125,000 entries."""

SMALLEST_CACHE: Final = 4096
_SILENT: Final = 20  # answers without a cached token, of prompts thought to be cached: the backend does not say
_FEW: Final = 8  # answers: with fewer nobody knows how long they take


class Feedback:
    """Beliefs about backend ``i`` beside its load and its speed."""

    def __init__(self, backends: Backends) -> None:
        self._backends = backends
        self.units_per_token = 4.0
        """Of a prompt's blocks: characters in a token."""
        self.predicted = 0
        self.actual = 0
        self._told: list[int] = []  # size of the cache, 0 if it was not told
        self._tokens: list[float] = []  # size of the cache, told or learned
        self._hits: list[float] = []  # part of the prompt tokens that are cached
        self._misses: list[int] = []  # answers that should have had cached tokens before any had
        self._says: list[bool] = []  # it reports cached tokens
        self._units = 4000.0
        self._unit_tokens = 1000.0
        self._sized_for = 4.0  # characters in a token, when the caches were last measured in them
        self._output = 256.0
        self._stays = 0
        self._lag = [0.0, 0.0]  # seconds that whole answers, and first tokens, took longer than the prompt work predicted
        self._told_of = [0, 0]  # how many of them were seen

    def forget(self, i: int) -> None:
        """Place ``i`` is another backend's now."""
        if i == len(self._told):
            for counts in (self._told, self._misses):
                counts.append(0)
            self._tokens.append(0.0)
            self._hits.append(0.0)
            self._says.append(False)
        self._told[i] = self._misses[i] = 0
        self._hits[i], self._says[i] = 0.0, False
        self._resize(i, UNKNOWN_CACHE)

    def tell_size(self, i: int, kv_tokens: int) -> None:
        """Backend ``i``'s cache holds so many tokens; 0: nobody knows, and usage will show."""
        self._backends.kv_tokens[i] = kv_tokens
        if kv_tokens != self._told[i]:
            self._told[i] = kv_tokens
            self._resize(i, kv_tokens or UNKNOWN_CACHE)

    def estimate(self, ticket: Ticket) -> None:
        """How many tokens the ticket's prompt and answer may have."""
        if ticket.prompt_tokens <= 0:
            ticket.prompt_tokens = int(ticket.prompt.total / self.units_per_token) + 1
        output, most = self._output, ticket.max_tokens
        ticket.tokens = ticket.prompt_tokens + (output if most is None or most > output else most)

    def usual(self, ticket: Ticket, i: int) -> int:
        """Tokens of a prompt whose text was not looked at that backend ``i`` has cached, if it is like others."""
        return 0 if ticket.prompt.keys else int(ticket.prompt_tokens * self._hits[i])

    def takes(self, ticket: Ticket) -> float:
        """Seconds from a grant to what the client waits for, a first token or a whole answer, for a ticket whose prompt work is
        predicted; 0: too few have been seen."""
        return max(ticket.seconds + self._lag[ticket.streams], 0.0) if self._told_of[ticket.streams] >= _FEW else 0.0

    def learn(self, ticket: Ticket, now: float, usage: Usage | None) -> float:
        """Take a finished ticket into account. The token work that it was."""
        i = ticket.lane
        if usage is None:
            if ticket.first_token_at is None:  # nobody knows that the backend did anything
                self._backends.index.forget(i, ticket.prompt, ticket.known)
                return 0.0
            return ticket.charged
        seen = ticket.first_token_at if ticket.streams else now
        if seen is not None:
            self._told_of[ticket.streams] += 1
            share = max(0.05, 1.0 / self._told_of[ticket.streams])
            self._lag[ticket.streams] += share * (seen - ticket.granted_at - ticket.seconds - self._lag[ticket.streams])
        self._output += 0.01 * (usage.completion_tokens - self._output)
        if usage.estimated or not usage.prompt_tokens:
            return ticket.charged
        if ticket.prompt.keys:
            self._measure(ticket, usage)
        cached = self._cache(i, ticket, usage)
        if ticket.told and ticket.first_token_at is not None:
            self._stayed(now - ticket.first_token_at)
            took = ticket.first_token_at - ticket.started
            self._backends.rates.observe(i, usage.prompt_tokens - cached, cached, took, ticket.overlapped)
        elif not ticket.streams:
            self._stayed(max(now - ticket.granted_at - ticket.seconds, 0.0))
        return usage.prompt_tokens - cached + usage.completion_tokens

    def _stayed(self, seconds: float) -> None:
        """An answer took so long after its first token. The mean of all at first: what nobody has seen must not keep requests
        away from their caches."""
        self._stays += 1
        self._backends.residence += max(0.01, 1.0 / self._stays) * (seconds - self._backends.residence)

    def _measure(self, ticket: Ticket, usage: Usage) -> None:
        """Characters in a token. The caches are measured anew if that is another number than was thought."""
        self._units = self._units * 0.99 + ticket.prompt.total
        self._unit_tokens = self._unit_tokens * 0.99 + usage.prompt_tokens
        self.units_per_token = self._units / self._unit_tokens
        if not 0.9 < self.units_per_token / self._sized_for < 1.1:
            self._sized_for = self.units_per_token
            for i, tokens in enumerate(self._tokens):
                self._resize(i, tokens)

    def _cache(self, i: int, ticket: Ticket, usage: Usage) -> int:
        """Prompt tokens that were cached: as said, or as predicted if the backend never says."""
        said, predicted = min(usage.cached_tokens, usage.prompt_tokens), ticket.cached_tokens
        self.predicted += predicted
        self.actual += said
        self._says[i] = self._says[i] or said > 0
        if not self._says[i] and predicted:
            self._misses[i] += 1
            if self._misses[i] >= _SILENT:
                return min(predicted, usage.prompt_tokens)
        self._hits[i] += 0.05 * (said / usage.prompt_tokens - self._hits[i])
        if predicted and not self._told[i]:
            whole = cached_tokens(ticket, ticket.known - 1)
            if said < whole:  # the mirror promised more than was there
                self._resize(i, self._tokens[i] * 0.97)
            elif said >= predicted and ticket.known > 4:
                self._resize(i, self._tokens[i] * 1.004)
        return said

    def _resize(self, i: int, tokens: float) -> None:
        self._tokens[i] = min(max(tokens, SMALLEST_CACHE), LARGEST_CACHE)
        self._backends.index.resize(i, self._tokens[i] * self.units_per_token)
