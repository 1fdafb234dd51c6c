"""What happened to one request: written by the flow as it goes, read once by every observer."""

from __future__ import annotations

import msgspec

from .error_forms import OPENAI, ErrorForm
from .errors import Fault, GatewayError
from .principal import ANYBODY, Principal
from .tickets import Ticket
from .usage import Usage


class Record(msgspec.Struct, eq=False):
    """One request. Times are seconds on the monotonic clock; ``queued`` are those it waited for its last backend, ``decision``
    says why it got that one, ``retries`` the codes of the attempts that failed before; ``error_form`` is how its client is told
    of errors; ``served_model``, if there are settings for ``model``, is what a backend was asked for."""

    request_id: str
    method: str
    route: str
    started: float
    client: str = ""
    principal: Principal = ANYBODY
    model: str = ""
    served_model: str = ""
    stream: bool = False
    backend: str = ""
    decision: str = ""
    queued: float = 0.0
    attempts: int = 0
    retries: list[str] = []
    predicted_cached_tokens: int = 0
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
    error_form: ErrorForm = OPENAI

    @property
    def tenant(self) -> str:
        """Whose request it is; empty while nobody is asked."""
        return self.principal.tenant

    @property
    def key(self) -> str:
        """The id of the key or token that it came with, which is no secret."""
        return self.principal.id

    @property
    def duration(self) -> float:
        """Seconds from the request's last byte in to its answer's last byte out."""
        return self.ended - self.started

    def chosen(self, ticket: Ticket) -> None:
        """The request has this backend; called again for each further attempt, and for the one of two that was quicker."""
        self.backend = ticket.backend or ""
        self.decision = ticket.decision
        self.queued = ticket.granted_at - ticket.arrived
        self.predicted_cached_tokens = ticket.cached_tokens

    def retried(self, failure: GatewayError) -> None:
        """An attempt failed, and another follows."""
        self.retries = [*self.retries, failure.code]

    def failed(self, error: GatewayError) -> None:
        """The request ended with this error; a status already on the wire stays."""
        self.status = self.status or error.status
        self.code = error.code
        self.fault = error.fault
        self.message = error.message
        self.detail = error.detail
