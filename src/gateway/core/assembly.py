"""A completion or a response put together from its stream.

llama-server ends a generation at once when a *stream's* connection closes, but may run a
non-streamed one to its end. So a client's plain request goes to it as a stream, and the whole
answer is assembled here: the fields are those that the server itself would have sent.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from . import sse
from .errors import UNDECODABLE

_TOO_DEEP: Final = "an event is nested too deeply"


class Broken(ValueError):
    """The stream is not one that a chat completion can be made of."""


class StreamError(ValueError):
    """The backend ended its stream with an error event; ``body`` is that event's JSON, ``status`` its code."""

    def __init__(self, body: bytes, status: int) -> None:
        super().__init__(body.decode("utf-8", "replace"))
        self.body = body
        self.status = status


class Assembler:
    """Feed it the stream's bytes, then ask for the `answer`.

    ``limit`` bounds the bytes taken in, in total; ``object`` is what the answer is called. Raises `Broken` and `StreamError`.
    """

    def __init__(self, limit: int, object: str = "chat.completion") -> None:
        self._object = object
        self._decoder = sse.Decoder(limit)
        self._left = limit
        self._answer: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}
        self._done = False

    def feed(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left < 0:
            raise Broken("the answer is too large")
        for event in self._decoder.feed(data):
            if event.data == sse.DONE:
                self._done = True
            elif event.data is not None and event.data != b"null":  # llama-server's, of several prompts
                self._chunk(event.data)

    def answer(self) -> bytes:
        """The completion as JSON, once the stream has ended."""
        if not self._done:
            raise Broken("the stream ended before [DONE]")
        choices = [self._choices[index] for index in sorted(self._choices)]
        try:
            return msgspec.json.encode({"choices": choices, **self._answer, "object": self._object})
        except RecursionError:
            raise Broken(_TOO_DEEP) from None

    def _chunk(self, data: bytes) -> None:
        try:
            chunk = msgspec.json.decode(data, type=dict[str, Any])
        except UNDECODABLE as error:
            raise Broken(f"an event is not a JSON object: {error}") from None
        if chunk.get("error") is not None:
            raise _stream_error(data, chunk["error"])
        choices = chunk.pop("choices", None)
        self._answer.update((name, value) for name, value in chunk.items() if value is not None)
        for choice in choices if isinstance(choices, list) else ():
            if not isinstance(choice, dict) or not isinstance(choice.get("index"), int):
                raise Broken("a choice has no index")
            try:
                self._choice(choice)
            except RecursionError:  # what can be read is not always shallow enough to be put together
                raise Broken(_TOO_DEEP) from None

    def _choice(self, part: dict[str, Any]) -> None:
        index = part["index"]
        if index not in self._choices:
            self._choices[index] = {"finish_reason": None, "index": index}
            if self._object == "chat.completion":
                self._choices[index]["message"] = {"role": "assistant", "content": None}
            else:
                self._choices[index]["logprobs"] = None
        choice = self._choices[index]
        for name, value in part.items():
            if name == "delta":
                message = choice.get("message")
                if not isinstance(message, dict):
                    raise Broken("a delta where there is no message")
                merge(message, value if isinstance(value, dict) else {})
            elif value is not None:
                merge(choice, {name: value})


_REPLACED = frozenset(["role", "id", "type", "index", "finish_reason", "name"])
"""Strings that a later chunk repeats rather than continues."""


def merge(whole: dict[str, Any], delta: dict[str, Any]) -> None:
    """Fold one delta into ``whole``: text is appended, objects merged, list items matched by ``index``."""
    for name, value in delta.items():
        known = whole.get(name)
        if isinstance(known, str) and isinstance(value, str) and name not in _REPLACED:
            whole[name] = known + value
        elif isinstance(known, dict) and isinstance(value, dict):
            merge(known, value)
        elif isinstance(value, list) and isinstance(known, list | None):
            whole[name] = _merged(known or [], value)
        elif value is not None or name not in whole:
            whole[name] = value


def _merged(known: list[Any], items: list[Any]) -> list[Any]:
    """Tool calls come in parts that carry an ``index``; log probabilities are new items each time."""
    for item in items:
        index = item.pop("index", None) if isinstance(item, dict) else None
        if isinstance(index, int) and 0 <= index < len(known) and isinstance(known[index], dict):
            merge(known[index], item)
        else:
            known.append(item)
    return known


class _Event(msgspec.Struct):
    type: str = ""
    response: msgspec.Raw = msgspec.Raw()
    error: Any = None
    code: Any = None


class ResponseAssembler:
    """The same of a response's stream, whose last event has the whole response."""

    def __init__(self, limit: int) -> None:
        self._decoder = sse.Decoder(limit)
        self._left = limit
        self._answer: bytes | None = None

    def feed(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left < 0:
            raise Broken("the answer is too large")
        for event in self._decoder.feed(data):
            if event.data is not None and event.data != sse.DONE:
                self._event(event.data)

    def _event(self, data: bytes) -> None:
        try:
            event = msgspec.json.decode(data, type=_Event)
            told = msgspec.json.decode(data) if event.type == "error" else None
        except UNDECODABLE as error:
            raise Broken(f"an event is not what it should be: {error}") from None
        if event.error is not None:
            raise _stream_error(data, event.error)
        if told is not None:
            raise _stream_error(msgspec.json.encode({"error": told}), {"code": event.code})
        if event.response and event.type in ("response.completed", "response.incomplete", "response.failed"):
            self._answer = bytes(event.response)

    def answer(self) -> bytes:
        """The ``response`` as JSON, once the stream has ended."""
        if self._answer is None:
            raise Broken("the stream ended before the response was completed")
        return self._answer


def _stream_error(data: bytes, error: object) -> StreamError:
    status = error.get("code") if isinstance(error, dict) else None
    return StreamError(data, status if isinstance(status, int) and 400 <= status < 600 else 500)
