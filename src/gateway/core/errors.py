"""Every way a request can fail, and whose fault it is.

One table gives the HTTP status, the OpenAI error type and the fault of each code; the same
code stands in the body, the metric's label, the log line and the trace.
"""

from __future__ import annotations

import math
from typing import Final, Literal, NamedTuple

import msgspec

Fault = Literal["caller", "policy", "backend", "gateway"]

UNDECODABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for JSON that is malformed, not UTF-8, of another shape, or nested too deeply."""

MAX_RETRY_AFTER: Final = 120.0
"""Seconds. The openai SDK ignores a Retry-After above this."""


class Code(NamedTuple):
    """What a code means on the wire."""

    status: int
    type: str
    fault: Fault


CODES: Final[dict[str, Code]] = {
    "invalid_json": Code(400, "invalid_request_error", "caller"),
    "missing_required_parameter": Code(400, "invalid_request_error", "caller"),
    "invalid_type": Code(400, "invalid_request_error", "caller"),
    "invalid_value": Code(400, "invalid_request_error", "caller"),
    "unknown_parameter": Code(400, "invalid_request_error", "caller"),
    "context_length_exceeded": Code(400, "invalid_request_error", "caller"),
    "bad_http": Code(400, "invalid_request_error", "caller"),
    "missing_api_key": Code(401, "invalid_request_error", "caller"),
    "invalid_api_key": Code(401, "invalid_request_error", "caller"),
    "model_not_allowed": Code(403, "permission_error", "policy"),
    "admin_required": Code(403, "permission_error", "policy"),
    "model_not_found": Code(404, "invalid_request_error", "caller"),
    "unknown_url": Code(404, "invalid_request_error", "caller"),
    "method_not_allowed": Code(405, "invalid_request_error", "caller"),
    "request_timeout": Code(408, "invalid_request_error", "caller"),
    "request_too_large": Code(413, "invalid_request_error", "caller"),
    "unsupported_media_type": Code(415, "invalid_request_error", "caller"),
    "rate_limit_exceeded": Code(429, "rate_limit_error", "policy"),
    "insufficient_quota": Code(429, "insufficient_quota", "policy"),
    "queue_full": Code(429, "rate_limit_error", "gateway"),
    "headers_too_large": Code(431, "invalid_request_error", "caller"),
    "rejected_by_backend": Code(400, "invalid_request_error", "caller"),
    "client_cancelled": Code(499, "client_error", "caller"),
    "internal_error": Code(500, "server_error", "gateway"),
    "backend_unreachable": Code(502, "server_error", "backend"),
    "backend_error": Code(502, "server_error", "backend"),
    "backend_protocol_error": Code(502, "server_error", "backend"),
    "no_backend": Code(503, "service_unavailable_error", "gateway"),
    "queue_timeout": Code(503, "service_unavailable_error", "gateway"),
    "draining": Code(503, "service_unavailable_error", "gateway"),
    "too_many_viewers": Code(503, "service_unavailable_error", "gateway"),
    "no_signing_keys": Code(503, "service_unavailable_error", "gateway"),
    "limits_unavailable": Code(503, "service_unavailable_error", "gateway"),
    "connect_timeout": Code(504, "server_error", "backend"),
    "first_byte_timeout": Code(504, "server_error", "backend"),
    "idle_timeout": Code(504, "server_error", "backend"),
    "total_timeout": Code(504, "server_error", "backend"),
}
"""``rejected_by_backend`` and ``client_cancelled`` are for log and metrics alone: a backend's own
4xx is passed through with its own status, and a client that has gone reads no answer."""


BACKENDS_DOING: Final = frozenset(code for code, row in CODES.items() if row.fault == "backend") - {"total_timeout"}
"""Failures that are held against a backend, and after which another may be asked; the total timeout may be the request's own
doing."""


class GatewayError(Exception):
    """A request ends here, for a reason that has a name.

    ``code`` is a key of `CODES`; ``param`` the path of the field at fault (``messages[0].role``);
    ``retry_after`` seconds until a retry makes sense, and ``should_retry`` what the status alone does not tell of that;
    ``allow`` the methods a 405 names; ``detail`` is for the log alone, ``found``, what the caller sent, for the caller alone.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        should_retry: bool | None = None,
        allow: tuple[str, ...] = (),
        detail: str = "",
        found: str = "",
    ) -> None:
        super().__init__(message)
        self.code = code
        self.found = found
        self.status, self.type, self.fault = CODES[code]
        self.message = message
        self.param = param
        self.retry_after = retry_after
        self.should_retry = should_retry
        self.allow = allow
        self.detail = detail

    @property
    def told(self) -> str:
        """What the client is told; the log gets ``message``."""
        return f"{self.message.removesuffix('.')}{self.found}." if self.found else self.message

    def body(self) -> bytes:
        """The OpenAI error object, as JSON."""
        error = {"message": self.told, "type": self.type, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    def headers(self) -> list[tuple[str, str]]:
        """The headers that go with the status (RFC 9110 sections 10.2.1, 10.2.3 and 11.6.1)."""
        found = [("Allow", ", ".join(self.allow))] if self.allow else []
        if self.status == 401:
            found.append(("WWW-Authenticate", "Bearer"))
        if self.retry_after is not None:
            wait = min(max(self.retry_after, 0.0), MAX_RETRY_AFTER)
            found.append(("Retry-After", str(math.ceil(wait))))
            if wait < 1.0 or self.fault == "policy":  # a limit's wait is known to the millisecond
                found.append(("Retry-After-Ms", str(math.ceil(round(wait * 1000, 6)))))
        if self.should_retry is not None:
            found.append(("X-Should-Retry", "true" if self.should_retry else "false"))
        return found


def internal_error() -> GatewayError:
    """What is told of a bug: nothing of it, but where to look."""
    return GatewayError("internal_error", "The gateway failed; its log has the request id.")


class BackendFailed(GatewayError):
    """A backend did not give a whole, well-formed answer in time.

    ``detail`` names what happened in the operating system's words; it goes to the log, never to the
    client. ``said`` is the backend's own explanation; it goes to the client, who may have caused it,
    and never to the log, since it may quote the prompt.
    """

    def __init__(self, code: str, message: str, *, detail: str = "", said: str = "", retry_after: float | None = None) -> None:
        super().__init__(code, message, retry_after=retry_after, detail=detail)
        self.said = said

    @property
    def told(self) -> str:
        return f"{self.message.removesuffix('.')}: {self.said}" if self.said else self.message
