"""What happened to one request: written by the flow as it goes, read once by every observer."""

from __future__ import annotations

import msgspec

from .errors import BackendFailed, Fault, GatewayError
from .usage import Usage


class Record(msgspec.Struct, eq=False):
    """One request. Times are seconds on the monotonic clock."""

    request_id: str
    method: str
    route: str
    started: float
    client: str = ""
    model: str = ""
    stream: bool = False
    backend: str = ""
    attempts: int = 0
    status: int = 0
    code: str = ""
    fault: Fault | None = None
    message: str = ""
    detail: str = ""
    usage: Usage = Usage()
    finish_reason: str | None = None
    first_token: float | None = None
    last_token: float | None = None
    ended: float = 0.0

    @property
    def duration(self) -> float:
        """Seconds from the request's last byte in to its answer's last byte out."""
        return self.ended - self.started

    def sent_to(self, backend: str) -> None:
        """The request goes to this backend; called again for each further attempt."""
        self.backend = backend
        self.attempts += 1

    def failed(self, error: GatewayError) -> None:
        """The request ended with this error; a status already on the wire stays."""
        self.status = self.status or error.status
        self.code = error.code
        self.fault = error.fault
        self.message = error.message
        self.detail = error.detail if isinstance(error, BackendFailed) else ""
