"""How many tokens a request used, and how it ended, read off the answer as it passes."""

from __future__ import annotations

from typing import Final

import msgspec

from . import sse
from .errors import UNDECODABLE

CHARACTERS: Final = 4
"""Of a text, or bytes of its JSON, in one token where no tokenizer is at hand: about what English takes. Images count as their
bytes."""


class Usage(msgspec.Struct, frozen=True):
    """Token counts of one request; ``reasoning_tokens`` are some of its completion's. ``estimated``: counted from the deltas,
    as the backend never said."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    estimated: bool = False
    reasoning_tokens: int = 0


class _Details(msgspec.Struct):
    """Of a prompt or of a completion."""

    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct):
    """Of completions by their names, of responses by theirs."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None


class _Timings(msgspec.Struct):
    """llama-server's own report; it needs no ``stream_options.include_usage``."""

    cache_n: int = 0
    prompt_n: int = 0
    predicted_n: int = 0


class _Delta(msgspec.Struct):
    content: object = None
    reasoning_content: object = None
    reasoning: object = None
    tool_calls: object = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None
    text: object = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    timings: _Timings | None = None
    error: object = None
    status: object = None


class _Event(msgspec.Struct):
    """One event of a response's stream."""

    type: object = None
    response: _Chunk | None = None
    error: object = None


_MOST: Final = 2**40
_decode: Final = msgspec.json.Decoder(_Chunk).decode
_decode_event: Final = msgspec.json.Decoder(_Event).decode
_ENDS: Final = frozenset(["response.completed", "response.incomplete", "response.failed"])


def _usage(chunk: _Chunk) -> Usage | None:
    if chunk.usage is not None:
        said = chunk.usage
        read = said.prompt_tokens_details or said.input_tokens_details
        made = said.completion_tokens_details or said.output_tokens_details
        prompt = (said.prompt_tokens if said.input_tokens is None else said.input_tokens) or 0
        completion = (said.completion_tokens if said.output_tokens is None else said.output_tokens) or 0
        cached = (read.cached_tokens or 0) if read else 0
        reasoning = (made.reasoning_tokens or 0) if made else 0
        if 0 <= prompt < _MOST and 0 <= completion < _MOST and 0 <= cached < _MOST and 0 <= reasoning < _MOST:
            return Usage(prompt, completion, cached, False, reasoning)
        return Usage(tokens(prompt), tokens(completion), tokens(cached), False, tokens(reasoning))
    if chunk.timings is not None:
        timings = chunk.timings
        return Usage(tokens(timings.cache_n + timings.prompt_n), tokens(timings.predicted_n), tokens(timings.cache_n))
    return None


def tokens(said: int | None) -> int:
    """A number of tokens that can be one, whatever the backend says: sums of them stay exact as floats."""
    return min(max(said or 0, 0), _MOST)


class UsageMeter:
    """Folds the events of one stream into tokens, finish reason and the time of the first token.

    ``first_token`` and ``last_token`` are the caller's ``now`` of the first and the last event that
    carried generated text; ``done`` is True once ``[DONE]`` was seen, ``failed`` once the backend
    sent an error event.
    """

    def __init__(self) -> None:
        self.first_token: float | None = None
        self.last_token: float | None = None
        self.finish_reason: str | None = None
        self.done = False
        self.failed = False
        self._reported: Usage | None = None
        self._deltas = 0

    @property
    def whole(self) -> bool:
        """The answer has an end of its own: ``[DONE]``, a finish reason, or the backend's error."""
        return self.done or self.finish_reason is not None or self.failed

    @property
    def usage(self) -> Usage:
        """What the backend reported, else an estimate: one token for each delta."""
        if self._reported is not None:
            return self._reported
        return Usage(completion_tokens=self._deltas, estimated=True)

    def see(self, event: sse.Event, now: float) -> bool:
        """Take one event into account; True if it is the usage chunk (no choices, only counts)."""
        data = event.data
        if data is None:
            return False
        if data == sse.DONE:
            self.done = True
            return False
        try:
            chunk = _decode(data)
        except UNDECODABLE:
            return False  # not ours to judge: it is relayed as it came
        if chunk.error is not None:
            self.failed = True
        if chunk.usage is not None or chunk.timings is not None:
            self._reported = _usage(chunk)
        for choice in chunk.choices or ():
            if choice.finish_reason is not None:
                self.finish_reason = choice.finish_reason
            delta = choice.delta
            if delta is None:
                if choice.text:
                    self._token(now)
            elif delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls:
                self._token(now)
        return chunk.usage is not None and chunk.choices == []

    def _token(self, now: float) -> None:
        self._deltas += 1
        self.last_token = now
        if self.first_token is None:
            self.first_token = now


class ResponsesMeter(UsageMeter):
    """The same of a response's stream: its events have types, and the last one, which is no ``[DONE]``, the whole response."""

    def see(self, event: sse.Event, now: float) -> bool:
        """Take one event into account; none is of usage alone."""
        if event.data is None or event.data == sse.DONE:
            return False
        try:
            found = _decode_event(event.data)
        except UNDECODABLE:
            return False
        type = found.type if isinstance(found.type, str) else None
        if type in _ENDS:
            self.done = True
            if found.response is not None:
                self._reported = _usage(found.response) or self._reported
                status = found.response.status
                self.finish_reason = status if isinstance(status, str) else None
        elif type is not None and type.endswith(".delta"):
            self._token(now)
        if type in ("error", "response.failed") or (type is None and found.error is not None):
            self.failed = True
        return False


def of_answer(body: bytes) -> tuple[Usage, str | None]:
    """Usage and finish reason of a whole answer. Raises one of `UNDECODABLE` if it is no JSON object."""
    try:
        chunk = _decode(body)
    except msgspec.ValidationError:
        msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        return Usage(), None
    finish = None
    for choice in chunk.choices or ():
        finish = finish or choice.finish_reason
    if finish is None and isinstance(chunk.status, str):
        finish = chunk.status  # of a response
    return _usage(chunk) or Usage(), finish
