"""A stream of chat completion chunks, told as the events of Anthropic's Messages API (its reference, "Streaming").

`MessageStream` is fed the backend's events one by one and gives the bytes that a client of ours is to see. Blocks are open
one at a time, in the order in which their first delta came: ::

    message_start (content_block_start content_block_delta* content_block_stop)* message_delta message_stop
    ... or, at any point of it, error and nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec

from . import sse
from .error_forms import anthropic_body, anthropic_event
from .errors import UNDECODABLE
from .usage import Usage

PING: Final = b'event: ping\ndata: {"type":"ping"}\n\n'
_MESSAGE_STOP: Final = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
_BLOCK_START: Final = b'event: content_block_start\ndata: {"type":"content_block_start","index":%d,"content_block":%b}\n\n'
_BLOCK_DELTA: Final = (
    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":{"type":"%b","%b":%b}}\n\n'
)
_BLOCK_STOP: Final = b'event: content_block_stop\ndata: {"type":"content_block_stop","index":%d}\n\n'

_STOP_REASONS: Final = {
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}


class _Kind(NamedTuple):
    """A kind of block: what starts an empty one, the type of its deltas, and their field."""

    block: bytes
    delta: bytes
    field: bytes


_TEXT: Final = _Kind(b'{"type":"text","text":""}', b"text_delta", b"text")
_THINKING: Final = _Kind(b'{"type":"thinking","thinking":"","signature":""}', b"thinking_delta", b"thinking")
_TOOL: Final = _Kind(b"", b"input_json_delta", b"partial_json")


def stop_of(finish_reason: str | None, matched: object, stops: Sequence[str], *, tools: bool) -> tuple[str, str | None]:
    """(stop_reason, stop_sequence). ``matched``: what the engine says ended it, if it does; ``tools``: some are called."""
    if tools and finish_reason == "stop":  # not every engine says tool_calls
        return "tool_use", None
    if isinstance(matched, str) and matched in stops:
        return "stop_sequence", matched
    return _STOP_REASONS.get(finish_reason or "", "end_turn"), None


def usage_of(usage: Usage) -> dict[str, int]:
    """Anthropic's ``usage``: what was read from a cache does not count as input there."""
    return {
        "input_tokens": max(usage.prompt_tokens - usage.cached_tokens, 0),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def message_fields(id: str, model: str) -> dict[str, Any]:
    """What every Message has."""
    return {"id": id, "type": "message", "role": "assistant", "model": model}


class Function(msgspec.Struct, frozen=True):
    """What is to be called; of a stream's, a piece of it."""

    name: str | None = None
    arguments: str | None = None


class ToolCall(msgspec.Struct):
    """A call of a tool, or a piece of one."""

    index: int | None = None
    id: str | None = None
    function: Function = Function()


class Said(msgspec.Struct):
    """What the model said, all of it or a piece. Engines differ in where its thoughts stand."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None

    @property
    def thought(self) -> str | None:
        return self.reasoning_content or self.reasoning


class Choice(msgspec.Struct):
    """One answer; vLLM's ``stop_reason`` and SGLang's ``matched_stop`` are the text that ended it, or a token's number."""

    delta: Said | None = None
    message: Said | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    matched_stop: Any = None

    @property
    def matched(self) -> object:
        return self.stop_reason if self.stop_reason is not None else self.matched_stop


class Chunk(msgspec.Struct):
    """A chunk of a chat completion, or a whole one."""

    choices: list[Choice] | None = None
    model: str | None = None
    error: Any = None


_decode: Final = msgspec.json.Decoder(Chunk).decode
_encode: Final = msgspec.json.encode


class MessageStream:
    """One stream. ``id`` names the message, ``model`` the model if the backend does not; ``stops`` are the request's own."""

    def __init__(self, id: str, model: str, stops: Sequence[str], request_id: str) -> None:
        self._id = id
        self._model = model
        self._stops = stops
        self._request_id = request_id
        self._begun = False
        self._ended = self.failed = False
        self._kind: _Kind | None = None  # of the block that is open
        self._index = -1  # its place
        self._calls = 0  # of tools, so far
        self._call_id: str | None = None  # the last one's, as the backend gave it
        self._last_call = self._highest_call = -1  # its index, and the highest of all
        self._finish_reason: str | None = None
        self._matched: object = None

    def see(self, event: sse.Event) -> bytes:
        """What one event of the backend's is to the client."""
        data = event.data
        if data is None:
            return PING if self._begun and not self._ended else event.raw
        if data == sse.DONE or self._ended:
            return b""
        try:
            chunk = _decode(data)
        except UNDECODABLE:
            return self.fail(502, "The backend sent an event that is no chunk of a chat completion.")
        if chunk.error is not None:
            return self._failed(chunk.error)
        out = [] if self._begun else [self._start(chunk.model or self._model)]
        for choice in chunk.choices or ():
            self._take(choice, out)
        return out[0] if len(out) == 1 else b"".join(out)

    def end(self, usage: Usage) -> bytes:
        """The answer is whole: its end, once."""
        if self._ended:
            return b""
        out = [] if self._begun else [self._start(self._model)]
        self._close(out)
        self._ended = True
        reason, sequence = stop_of(self._finish_reason, self._matched, self._stops, tools=self._calls > 0)
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        told = _encode({"type": "message_delta", "delta": delta, "usage": usage_of(usage)})
        out += [b"event: message_delta\ndata: " + told + b"\n\n", _MESSAGE_STOP]
        return b"".join(out)

    def fail(self, status: int, message: str) -> bytes:
        """The answer ends here and is not whole: an error of this HTTP status."""
        self._ended = self.failed = True
        return anthropic_event(anthropic_body(status, message, self._request_id))

    def _failed(self, error: object) -> bytes:
        found = error if isinstance(error, dict) else {"message": error}
        code, message = found.get("code"), found.get("message")
        status = code if isinstance(code, int) and 400 <= code < 600 else 500
        return self.fail(status, message if isinstance(message, str) else "The backend failed.")

    # --- blocks

    def _start(self, model: str) -> bytes:
        self._begun = True
        fields = {**message_fields(self._id, model), "content": [], "stop_reason": None, "stop_sequence": None}
        told = _encode({"type": "message_start", "message": {**fields, "usage": usage_of(Usage())}})
        return b"event: message_start\ndata: " + told + b"\n\n" + PING

    def _take(self, choice: Choice, out: list[bytes]) -> None:
        said = choice.delta
        if said is not None:
            if thought := said.thought:
                self._add(_THINKING, thought, out)
            if text := said.content or said.refusal:
                self._add(_TEXT, text, out)
            for call in said.tool_calls or ():
                self._call(call, out)
        if choice.finish_reason is not None:
            self._finish_reason, self._matched = choice.finish_reason, choice.matched

    def _add(self, kind: _Kind, text: str, out: list[bytes]) -> None:
        if self._kind is not kind:
            self._open(kind, kind.block, out)
        out.append(_BLOCK_DELTA % (self._index, kind.delta, kind.field, _encode(text)))

    def _open(self, kind: _Kind, block: bytes, out: list[bytes]) -> None:
        self._close(out)
        self._index += 1
        self._kind = kind
        out.append(_BLOCK_START % (self._index, block))

    def _close(self, out: list[bytes]) -> None:
        if self._kind is not None:
            out.append(_BLOCK_STOP % self._index)
            self._kind = None

    def _call(self, call: ToolCall, out: list[bytes]) -> None:
        if self._ended:
            return
        if self._is_another(call):
            if call.id is None and call.index is not None and call.index <= self._highest_call:
                out.append(self.fail(502, "The backend went back to a tool call that it had left."))
                return
            self._calls += 1
            self._call_id = call.id
            self._last_call = self._last_call + 1 if call.index is None else call.index
            self._highest_call = max(self._highest_call, self._last_call)
            id = call.id or f"toolu_{self._id}_{self._calls}"
            block = {"type": "tool_use", "id": id, "name": call.function.name or "", "input": {}}
            self._open(_TOOL, _encode(block), out)
        if call.function.arguments:
            self._add(_TOOL, call.function.arguments, out)

    def _is_another(self, call: ToolCall) -> bool:
        """It is not the one whose block is open. Some engines number all calls 0, some do not number them."""
        if self._kind is not _TOOL or (call.id and self._call_id and call.id != self._call_id):
            return True
        return call.index is not None and call.index != self._last_call
