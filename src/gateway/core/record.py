"""What happened to one request: written by the flow as it goes, read once by every observer."""

from __future__ import annotations

from typing import Final

import msgspec

from .error_forms import OPENAI, ErrorForm
from .errors import Fault, GatewayError
from .principal import ANYBODY, Principal
from .tickets import Ticket
from .trace_context import Trace
from .usage import Usage


class Try(msgspec.Struct):
    """One attempt: a backend was ``asked`` for, had the request (``sent``), and began a stream or gave its whole answer
    (``replied``; 0: never). ``code`` of one that failed at ``ended``; `CANCELLED` if nobody wanted it any more."""

    backend: str
    asked: float
    sent: float
    replied: float = 0.0
    ended: float = 0.0
    code: str = ""

    def fail(self, problem: BaseException, now: float) -> None:
        """It ended with this before there was a reply."""
        self.ended = now
        self.code = problem.code if isinstance(problem, GatewayError) else CANCELLED


CANCELLED: Final = "cancelled"


class Record(msgspec.Struct, eq=False):
    """One request. Times are seconds on the monotonic clock; ``queued`` are those it waited for its last backend, ``decision``
    says why it got that one, ``retries`` the codes of the attempts that failed before; ``left`` is when its client went away
    before the end, ``error_form`` how it is told of errors; ``served_model``, if there are settings for ``model``, is what a
    backend was asked for; bytes are those of the bodies."""

    request_id: str
    method: str
    route: str
    started: float
    client: str = ""
    principal: Principal = ANYBODY
    model: str = ""
    served_model: str = ""
    fell_back: bool = False
    stream: bool = False
    backend: str = ""
    decision: str = ""
    queued: float = 0.0
    attempts: int = 0
    retries: list[str] = []
    tries: list[Try] = []
    trace: Trace | None = None
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
    left: float = 0.0
    error_form: ErrorForm = OPENAI
    session: str = ""
    received_bytes: int = 0
    sent_bytes: int = 0

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

    def retried(self, failure: GatewayError, now: float) -> None:
        """An attempt failed, and another follows."""
        self.retries = [*self.retries, failure.code]
        for attempt in self.tries:
            if attempt.backend == self.backend and not attempt.code:  # its stream broke before its first event
                attempt.fail(failure, now)

    def failed(self, error: GatewayError) -> None:
        """The request ended with this error; a status already on the wire stays."""
        self.status = self.status or error.status
        self.code = error.code
        self.fault = error.fault
        self.message = error.message
        self.detail = error.detail
