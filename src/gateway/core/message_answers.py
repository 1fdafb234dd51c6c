"""What a backend answers to a chat completion, told in the words of Anthropic's Messages API."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import msgspec

from .error_forms import anthropic_body, said
from .errors import UNDECODABLE
from .message_stream import Chunk, MessageStream, Said, ToolCall, message_fields, stop_of, usage_of
from .usage import Usage

_decode: Final = msgspec.json.Decoder(Chunk).decode


class Translation(NamedTuple):
    """How the answers to one request are told. ``model`` and ``stops`` are the request's."""

    request_id: str
    model: str
    stops: tuple[str, ...]

    def answer(self, body: bytes, usage: Usage) -> bytes:
        """The Message of a whole chat completion. Raises ValueError if it is none."""
        try:
            completion = _decode(body)
        except UNDECODABLE as problem:
            raise ValueError(str(problem)) from None
        if not completion.choices or completion.choices[0].message is None:
            raise ValueError("an answer without a message")
        choice, message = completion.choices[0], completion.choices[0].message
        reason, sequence = stop_of(choice.finish_reason, choice.matched, self.stops, tools=bool(message.tool_calls))
        fields = message_fields(self._id, completion.model or self.model)
        content = list(_blocks(message, self._id))
        ends = {"stop_reason": reason, "stop_sequence": sequence}
        return msgspec.json.encode({**fields, "content": content, **ends, "usage": usage_of(usage)})

    def refusal(self, status: int, body: bytes) -> bytes:
        """The error of a backend that answered with this HTTP status (4xx)."""
        return anthropic_body(status, said(body) or f"The backend refused the request with status {status}.", self.request_id)

    def stream(self) -> MessageStream:
        """The events of a stream that begins."""
        return MessageStream(self._id, self.model, self.stops, self.request_id)

    @property
    def _id(self) -> str:
        return f"msg_{self.request_id}"


def _blocks(message: Said, id: str) -> Iterator[dict[str, Any]]:
    if message.thought:
        yield {"type": "thinking", "thinking": message.thought, "signature": ""}
    text = message.content or message.refusal
    if text:
        yield {"type": "text", "text": text}
    for number, call in enumerate(message.tool_calls or (), 1):
        function = call.function
        tool_id = call.id or f"toolu_{id}_{number}"
        yield {"type": "tool_use", "id": tool_id, "name": function.name or "", "input": _input(call)}


def _input(call: ToolCall) -> dict[str, Any]:
    """The arguments, parsed. What is not a JSON object stands under ``arguments``, for the tool to refuse."""
    arguments = call.function.arguments or "{}"
    try:
        return msgspec.json.decode(arguments, type=dict[str, Any])
    except UNDECODABLE:
        return {"arguments": arguments}
