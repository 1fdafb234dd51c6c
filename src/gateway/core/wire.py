"""Requests and answers on the wire: what is changed in a body, which headers travel, lists of models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from .asking import Request
from .endpoints import Endpoint
from .errors import UNDECODABLE, GatewayError
from .message_answers import Translation
from .schema import Asked, Schema, not_json

# --- requests ---------------------------------------------------------------------------------


class Call(msgspec.Struct):
    """One request as a backend is to see it: ``body`` is what the client sent, byte for byte, unless there is a ``translation``
    for the answer too, and ``asked`` what the gateway has read of it. ``generates``: it costs the backend a generation.
    ``native``: the same as Anthropic's API has it. ``original``: what the client asked, if the settings made this of it.
    """

    endpoint: Endpoint
    body: bytes
    asked: Request
    request_id: str
    headers: list[tuple[bytes, bytes]] = []
    translation: Translation | None = None
    generates: bool = True
    native: bytes | None = None
    original: Call | None = None

    def forget(self) -> None:
        """Its answer has begun, and nobody is to be asked again: a long prompt is not kept for as long as the answer takes."""
        self.body, self.native, self.asked = b"", None, _FORGOTTEN
        if self.original is not None:
            self.original.forget()


_FORGOTTEN: Final = Request()


class BackendChange(Asked, forbid_unknown_fields=True):
    """What an operator may change about a backend while the gateway runs."""

    draining: bool


CHANGE: Final = Schema(BackendChange)


def as_stream(body: bytes, *, usage: bool = True) -> bytes:
    """The same request, asking for a stream (with usage); every other field keeps its own bytes."""
    return _rewritten(body, usage=usage, stream=True)


def with_usage(body: bytes) -> bytes:
    """The same request with ``stream_options.include_usage`` on; the rest keeps its own bytes."""
    return _rewritten(body, usage=True)


def _rewritten(body: bytes, *, usage: bool, **changes: object) -> bytes:
    try:
        fields: dict[str, Any] = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        options = msgspec.json.decode(fields.get("stream_options", b"null"), type=dict[str, msgspec.Raw] | None) or {}
    except UNDECODABLE as error:  # a name that is no text, say
        raise not_json(body, error) from None
    if usage:
        changes["stream_options"] = {**options, "include_usage": True}
    return msgspec.json.encode({**fields, **changes})


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
        if id in names_of(entry):
            return msgspec.json.encode(entry)
    raise GatewayError("model_not_found", f"The model '{id[:200]}' does not exist: GET /v1/models lists those that do.")


def names_of(entry: Mapping[str, Any]) -> list[str]:
    """The id of a model's entry, and its aliases."""
    aliases = entry.get("aliases")
    return [entry["id"], *(one for one in (aliases if isinstance(aliases, list) else ()) if isinstance(one, str))]


def models(listing: bytes) -> list[dict[str, Any]]:
    """The entries of a model list that have an ``id``. Raises one of `UNDECODABLE` if it is no such list."""
    data = msgspec.json.decode(listing, type=dict[str, Any]).get("data")
    if not isinstance(data, list):
        raise msgspec.ValidationError("no `data` list")
    return [entry for entry in data if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
