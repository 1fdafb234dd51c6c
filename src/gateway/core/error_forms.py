"""How a caller is told of an error: in OpenAI's words, or in Anthropic's where it speaks the Messages API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import msgspec

from . import sse
from .errors import UNDECODABLE, GatewayError


class ErrorForm(NamedTuple):
    """``body`` makes the JSON of an error for a request of this id; ``event`` makes that JSON an event of a stream."""

    body: Callable[[GatewayError, str], bytes]
    event: Callable[[bytes], bytes]


OPENAI: Final = ErrorForm(lambda error, request_id: error.body(), sse.encode)


def response_event(body: bytes) -> bytes:
    """OpenAI's error object as the last event of a response's stream (API reference, "Streaming events", ``error``)."""
    try:
        found = msgspec.json.decode(body, type=dict[str, Any]).get("error")
    except UNDECODABLE:  # a backend's own
        found = None
    error = found if isinstance(found, dict) else {}
    told = {"type": "error", "code": error.get("code"), "message": error.get("message", ""), "param": error.get("param")}
    return b"event: error\n" + sse.encode(msgspec.json.encode({**told, "sequence_number": 0}))


RESPONSES: Final = ErrorForm(lambda error, request_id: error.body(), response_event)

ANTHROPIC_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
"""HTTP status to the type of the error (Anthropic's API reference, "Errors")."""


def anthropic_type(status: int) -> str:
    """The type of an error with this status."""
    return ANTHROPIC_TYPES.get(status) or ("invalid_request_error" if 400 <= status < 500 else "api_error")


def anthropic_body(status: int, message: str, request_id: str) -> bytes:
    """Anthropic's error object, as JSON."""
    error = {"type": anthropic_type(status), "message": message}
    return msgspec.json.encode({"type": "error", "error": error, "request_id": request_id})


def anthropic_event(body: bytes) -> bytes:
    """The same as the last event of a stream."""
    return b"event: error\ndata: " + body + b"\n\n"


ANTHROPIC: Final = ErrorForm(lambda error, request_id: anthropic_body(error.status, error.told, request_id), anthropic_event)


def said(body: bytes) -> str:
    """The message of a backend's own error body, in whatever form; what else it may hold is not repeated."""
    try:
        found = msgspec.json.decode(body, type=dict[str, Any])
    except UNDECODABLE:
        return ""
    error = found.get("error", found)
    message = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    return message if isinstance(message, str) else ""
