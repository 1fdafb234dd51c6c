"""How many tokens a message used, and how it ended, as a backend says that speaks Anthropic's Messages API itself.

The counterpart of `usage`, which reads chat completions. Anthropic's ``input_tokens`` do not include those from a cache.
"""

from __future__ import annotations

from typing import Final

import msgspec

from . import sse
from .errors import UNDECODABLE
from .usage import Usage, tokens


class _Usage(msgspec.Struct):
    input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    output_tokens: int | None = None


class _Message(msgspec.Struct):
    usage: _Usage | None = None
    stop_reason: str | None = None


class _Event(msgspec.Struct):
    type: str
    message: _Message | None = None
    delta: _Message | None = None
    usage: _Usage | None = None


_message: Final = msgspec.json.Decoder(_Message).decode
_event: Final = msgspec.json.Decoder(_Event).decode


def _usage(said: _Usage) -> Usage:
    cached = tokens(said.cache_read_input_tokens)
    prompt = tokens(said.input_tokens) + cached + tokens(said.cache_creation_input_tokens)
    return Usage(prompt, tokens(said.output_tokens), cached)


def of_message(body: bytes) -> tuple[Usage, str | None]:
    """Usage and stop reason of a whole message. Raises one of `UNDECODABLE` if it is no JSON object."""
    message = _message(body)
    return _usage(message.usage) if message.usage is not None else Usage(), message.stop_reason


class MessageMeter:
    """Folds the events of one stream, as `UsageMeter` does; ``done`` once ``message_stop`` was seen."""

    def __init__(self) -> None:
        self.first_token: float | None = None
        self.last_token: float | None = None
        self.finish_reason: str | None = None
        self.done = False
        self.failed = False
        self._said = _Usage()
        self._deltas = 0

    @property
    def whole(self) -> bool:
        """Only its last event says so."""
        return self.done or self.failed

    @property
    def usage(self) -> Usage:
        """What the backend reported, else an estimate: one token for each delta."""
        found = _usage(self._said)
        if self.done or found.completion_tokens >= self._deltas:
            return found
        return Usage(found.prompt_tokens, self._deltas, found.cached_tokens, estimated=True)

    def see(self, event: sse.Event, now: float) -> bool:
        """Take one event into account. False: no event is there for the counts alone."""
        if event.data is None:
            return False
        try:
            seen = _event(event.data)
        except UNDECODABLE:
            return False  # not ours to judge: it is relayed as it came
        if seen.type == "content_block_delta":
            self._deltas += 1
            self.last_token = now
            if self.first_token is None:
                self.first_token = now
        elif seen.type == "message_start" and seen.message is not None:
            self._take(seen.message.usage)
        elif seen.type == "message_delta":
            self._take(seen.usage)
            if seen.delta is not None:
                self.finish_reason = seen.delta.stop_reason
        elif seen.type == "message_stop":
            self.done = True
        elif seen.type == "error":
            self.failed = True
        return False

    def _take(self, usage: _Usage | None) -> None:
        """The counts are totals; one that is not said again stays."""
        for name in _Usage.__struct_fields__:
            value = getattr(usage, name, None)
            if value is not None:
                setattr(self._said, name, value)
