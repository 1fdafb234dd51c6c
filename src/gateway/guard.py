"""Asks who sends a request, before anything of it is read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from twisted.web.server import Request

from .core.auth import Auth, UnknownSigner
from .core.errors import GatewayError
from .core.record import Record
from .jwks import Jwks
from .net.headers import last_of, pairs_of

OPEN: Final = frozenset(["/healthz", "/readyz", "/openapi.json", "/dashboard"])
"""The dashboard's page is the same for everybody, and asks for a key itself; what it shows is not."""

METRICS: Final = "/metrics"
ADMIN: Final = ("/admin/", "/dashboard/")
RETRY_SECONDS: Final = 5.0


class Guard:
    """Every route asks for credentials, unless it is known to be open; those under `ADMIN`, and `METRICS`, for an admin's.

    ``unix_now`` gives Unix seconds; ``jwks`` are the signing keys of tokens, where those are fetched.
    """

    def __init__(
        self, auth: Auth, unix_now: Callable[[], float], *, jwks: Jwks | None = None, metrics_open: bool = False
    ) -> None:
        self._auth = auth
        self._now = unix_now
        self._jwks = jwks
        self._open = OPEN | {METRICS} if metrics_open else OPEN

    def admit(self, request: Request, record: Record) -> Awaitable[None] | None:
        """Write into the record who sends the request. Raises `GatewayError`. What is returned is to be awaited: there is
        something only if a token names a signing key that has to be fetched first."""
        if record.route in self._open:
            return None
        try:
            self._identify(request, record)
        except UnknownSigner:
            if self._jwks is None:
                raise
            return self._identify_later(request, record, self._jwks)
        return None

    def _identify(self, request: Request, record: Record) -> None:
        headers = request.requestHeaders
        record.principal = principal = self._auth.identify(last_of(headers), pairs_of(headers), self._now())
        if not principal.admin and (record.route.startswith(ADMIN) or record.route == METRICS):
            raise GatewayError("admin_required", "This route is for keys with admin.")

    async def _identify_later(self, request: Request, record: Record, jwks: Jwks) -> None:
        await jwks.refreshed()
        try:
            self._identify(request, record)
        except UnknownSigner:
            if jwks.fetched:
                raise
            message = "Tokens cannot be verified yet: the keys that they are signed with could not be fetched."
            raise GatewayError("no_signing_keys", message, retry_after=RETRY_SECONDS) from None
