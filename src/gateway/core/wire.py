"""OpenAI chat completions on the wire: a strict reader, builders, and which headers travel."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec

from . import sse
from .errors import UNDECODABLE, GatewayError
from .usage import Usage

CHAT_COMPLETIONS: Final = "/v1/chat/completions"


# --- requests ---------------------------------------------------------------------------------


NOTHING: Final = msgspec.Raw()


class Part(msgspec.Struct):
    """One part of a message's content; only ``text`` parts carry ``text``."""

    type: str
    text: str | None = None


class Message(msgspec.Struct):
    """One message of the conversation; any role is the engine's to judge."""

    role: str
    content: str | list[Part] | None = None
    tool_calls: msgspec.Raw = NOTHING

    def text(self) -> str:
        """The text of the content; parts that are not text have none."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content if part.text is not None)
        return self.content or ""


class StreamOptions(msgspec.Struct):
    """How a stream is to be sent."""

    include_usage: bool | None = None


class ChatRequest(msgspec.Struct):
    """What the gateway itself reads of a request; engines have more fields, which pass through."""

    messages: list[Message]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    tools: msgspec.Raw = NOTHING
    prompt_cache_key: str | None = None
    user: str | None = None

    @property
    def most_tokens(self) -> int | None:
        """The longest answer that is asked for, in tokens."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def prompt(self) -> str:
        """The text that a prompt cache goes by: tools first, then the messages in order, each with its role.

        A request that continues another begins with the other's text. Parts that are not text count by their type.
        """
        pieces = [bytes(self.tools).decode("utf-8")]
        for message in self.messages:
            content = message.content
            pieces.append(message.role)
            if isinstance(content, str):
                pieces.append(content)
            elif content is not None:
                pieces += [part.text if part.text is not None else part.type for part in content]
            if message.tool_calls:
                pieces.append(bytes(message.tool_calls).decode("utf-8"))
        return "\x1f".join(pieces)


class Call(msgspec.Struct):
    """One request as a backend is to see it: ``body`` is what the client sent, byte for byte."""

    path: str
    body: bytes
    chat: ChatRequest
    request_id: str
    headers: list[tuple[bytes, bytes]] = []

    @property
    def stream(self) -> bool:
        return bool(self.chat.stream)

    @property
    def include_usage(self) -> bool:
        options = self.chat.stream_options
        return options is not None and bool(options.include_usage)


_chat_decoder: Final = msgspec.json.Decoder(ChatRequest)
_AT: Final = re.compile(r"(?P<what>.*?)(?: - at `(?P<path>[^`]*)`)?", re.DOTALL)
_MISSING: Final = re.compile(r"Object missing required field `(?P<field>[^`]*)`")

_TYPES: Final = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
_TYPE: Final = re.compile(r"\b(?:str|int|float|bool)\b")


def parse_chat(body: bytes) -> ChatRequest:
    """Read a chat completion request.

    Raises `GatewayError`: ``invalid_json``, or ``missing_required_parameter``, ``invalid_type``,
    ``invalid_value`` with ``param`` as the path of the field.
    """
    chat = _decoded(_chat_decoder, body)
    if not chat.messages:
        raise GatewayError("invalid_value", "'messages' is empty: send at least one message.", param="messages")
    return chat


class BackendChange(msgspec.Struct, forbid_unknown_fields=True):
    """What an operator may change about a backend while the gateway runs."""

    draining: bool


_change_decoder: Final = msgspec.json.Decoder(BackendChange)


def parse_change(body: bytes) -> BackendChange:
    """Read a change to a backend. Raises `GatewayError`, as `parse_chat` does."""
    return _decoded(_change_decoder, body)


_Read = TypeVar("_Read")


def _decoded(decoder: msgspec.json.Decoder[_Read], body: bytes) -> _Read:
    try:
        if not body.isascii():
            body.decode("utf-8")  # JSON is UTF-8 everywhere (RFC 8259), also in the fields that nobody reads here
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _validation_error(str(error)) from None
    except UNDECODABLE as error:
        raise _not_json(body, error) from None


def _not_json(body: bytes, error: Exception) -> GatewayError:
    if isinstance(error, RecursionError):
        return GatewayError("invalid_json", "The request body is nested too deeply.")
    what = str(error).removeprefix("JSON is malformed: ") if body.strip() else "it is empty"
    return GatewayError("invalid_json", f"The request body is not valid JSON: {what}.")


def _validation_error(text: str) -> GatewayError:
    found = _AT.fullmatch(text)
    what, path = (found["what"], found["path"] or "") if found else (text, "")
    param = path.removeprefix("$").removeprefix(".")
    missing = _MISSING.fullmatch(what)
    if missing:
        param = f"{param}.{missing['field']}" if param else missing["field"]
        return GatewayError("missing_required_parameter", f"Missing required parameter: '{param}'.", param=param)
    subject = f"'{param}'" if param else "the request body"
    what = _TYPE.sub(lambda word: _TYPES[word[0]], what.replace("`", "'"))
    return GatewayError("invalid_type", f"Invalid type for {subject}: {what[:1].lower()}{what[1:]}.", param=param or None)


def as_stream(body: bytes) -> bytes:
    """The same request, asking for a stream with usage; every other field keeps its own bytes."""
    return _rewritten(body, stream=True)


def with_usage(body: bytes) -> bytes:
    """The same request with ``stream_options.include_usage`` on; the rest keeps its own bytes."""
    return _rewritten(body)


def _rewritten(body: bytes, **changes: object) -> bytes:
    try:
        fields: dict[str, Any] = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        options = msgspec.json.decode(fields.get("stream_options", b"null"), type=dict[str, msgspec.Raw] | None) or {}
    except UNDECODABLE as error:  # a name that is no text, say
        raise _not_json(body, error) from None
    return msgspec.json.encode({**fields, **changes, "stream_options": {**options, "include_usage": True}})


# --- headers ----------------------------------------------------------------------------------

_HOP_BY_HOP: Final = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection"
    b" te trailer transfer-encoding upgrade".split()
)
"""RFC 9110 section 7.6.1: these concern one connection and never travel."""

_NOT_FORWARDED: Final = _HOP_BY_HOP | {
    b"host",
    b"content-length",
    b"content-type",  # set anew: the body was read as JSON, whatever its label said
    b"expect",
    b"accept-encoding",  # the relay reads what passes: identity only
    b"authorization",  # the caller's credentials are for the gateway
    b"x-api-key",
    b"cookie",
    b"x-request-id",  # replaced by the one that this request goes by
    *b"if-match if-none-match if-modified-since if-unmodified-since if-range range".split(),  # 206 and 304 are no answers
}

_RETURNED: Final = frozenset(
    [b"content-type", b"content-language", b"retry-after", b"retry-after-ms", b"x-should-retry", b"openai-processing-ms"]
)
"""What comes back of a backend's headers. The rest (Server, Set-Cookie, CORS...) is the backend's own affair."""


_NOT_FORWARDED_WITH_CREDENTIALS: Final = _NOT_FORWARDED - {b"authorization", b"x-api-key"}


def forwardable(headers: Sequence[tuple[bytes, bytes]], *, authorization: bool) -> list[tuple[bytes, bytes]]:
    """Of the client's (lower-case name, value) headers those that go on to a backend.

    ``authorization``: the caller's credentials too. Hop-by-hop headers stay, and those that Connection names
    (RFC 9110 section 7.6.1).
    """
    stay = _NOT_FORWARDED_WITH_CREDENTIALS if authorization else _NOT_FORWARDED
    kept = [pair for pair in headers if pair[0] not in stay]
    if b"connection" not in dict(headers):
        return kept
    named = {token.strip().lower() for name, value in headers if name == b"connection" for token in value.split(b",")}
    return [pair for pair in kept if pair[0] not in named]


def returnable(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Of a backend's (lower-case name, value) headers those that come back to the client."""
    return [pair for pair in headers if pair[0] in _RETURNED]


_REQUEST_ID: Final = re.compile(rb"[!-~]{1,128}")


def accepted_request_id(header: bytes | None) -> str | None:
    """The client's X-Request-ID if it is 1 to 128 printable ASCII characters without space, else None."""
    return header.decode("ascii") if header and _REQUEST_ID.fullmatch(header) else None


# --- answers ----------------------------------------------------------------------------------


def usage_object(usage: Usage) -> dict[str, int]:
    """OpenAI's ``usage`` object."""
    prompt, completion = usage.prompt_tokens, usage.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def chat_completion(id: str, created: int, model: str, content: str, usage: Usage) -> bytes:
    """A whole ``chat.completion``; ``created`` in Unix seconds."""
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    answer = {"id": id, "object": "chat.completion", "created": created, "model": model}
    return msgspec.json.encode({**answer, "choices": [choice], "usage": usage_object(usage)})


def chat_stream(
    id: str, created: int, model: str, pieces: Iterable[str], usage: Usage, *, include_usage: bool
) -> Iterator[bytes]:
    """The same as SSE events: the role, one chunk a piece, the finish reason, usage, ``[DONE]``.

    As in OpenAI's streams, the chunks before the last have a ``usage`` of null if the client asked for usage.
    """
    head = {"id": id, "object": "chat.completion.chunk", "created": created, "model": model}
    if include_usage:
        head["usage"] = None

    def chunk(delta: Mapping[str, str], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return sse.encode(msgspec.json.encode({**head, "choices": [choice]}))

    yield chunk({"role": "assistant", "content": ""})
    for piece in pieces:
        yield chunk({"content": piece})
    yield chunk({}, "stop")
    yield sse.encode(msgspec.json.encode({**head, "choices": [], "usage": usage_object(usage)}))
    yield sse.encode(sse.DONE)


# --- models -----------------------------------------------------------------------------------


def model_list(ids: Iterable[str], created: int) -> bytes:
    """A ``list`` of models in OpenAI's form."""
    return listing([{"id": id, "object": "model", "created": created, "owned_by": "gateway"} for id in ids])


def listing(entries: Sequence[Mapping[str, Any]]) -> bytes:
    """Entries of models as a ``list`` in OpenAI's form."""
    return msgspec.json.encode({"object": "list", "data": entries})


def find_model(listing: bytes, id: str) -> bytes:
    """One entry of a model list, by its ``id`` or one of its ``aliases``. Raises `GatewayError` model_not_found."""
    for entry in models(listing):
        aliases = entry.get("aliases")
        if entry["id"] == id or (isinstance(aliases, list) and id in aliases):
            return msgspec.json.encode(entry)
    raise GatewayError("model_not_found", f"The model '{id[:200]}' does not exist: GET /v1/models lists those that do.")


def models(listing: bytes) -> list[dict[str, Any]]:
    """The entries of a model list that have an ``id``. Raises one of `UNDECODABLE` if it is no such list."""
    data = msgspec.json.decode(listing, type=dict[str, Any]).get("data")
    if not isinstance(data, list):
        raise msgspec.ValidationError("no `data` list")
    return [entry for entry in data if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
