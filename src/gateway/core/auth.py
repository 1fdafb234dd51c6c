"""Who sends a request: its credentials, looked up or verified.

A caller is told whether credentials are missing or not valid, never why: unknown, malformed, expired and revoked look
alike, and take the same way. The log gets the reason, in words that hold nothing of what was sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from .api_keys import ApiKey, digest
from .errors import GatewayError
from .principal import Principal

if TYPE_CHECKING:
    from .jwt_tokens import Verifier  # [jwt]

MAX_TOKENS: Final = 10_000
"""Verified tokens that are remembered."""

_BEARER: Final = b"Bearer "
_SCHEME: Final = re.compile(rb"bearer(?: +|$)", re.IGNORECASE)  # RFC 9110 section 11.1: schemes know no case
_JWT: Final = re.compile(rb"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+){2}")  # RFC 7515 section 3.1; an empty signature is none


def missing() -> GatewayError:
    """No credentials."""
    return GatewayError("missing_api_key", "No API key: send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'.")


def invalid(detail: str) -> GatewayError:
    """Credentials that are not valid. ``detail``, for the log alone, holds nothing that the caller sent."""
    return GatewayError("invalid_api_key", "The API key is not valid.", detail=detail)


class UnknownSigner(GatewayError):
    """A token names a signing key that is not known, or not yet: after a fetch of the keys it may be valid."""

    def __init__(self) -> None:
        super().__init__("invalid_api_key", "The API key is not valid.", detail="the token's signing key is unknown")


def credentials(last: Mapping[bytes, bytes], pairs: Sequence[tuple[bytes, bytes]]) -> bytes:
    """The key or token of a request. ``last`` has each header's last value by its lower-case name, ``pairs`` all of them.
    Raises `GatewayError`: where two say something, no two readers might agree on which one counts."""
    authorization, key = last.get(b"authorization"), last.get(b"x-api-key")
    if len(last) != len(pairs):
        names = [name for name, _ in pairs]
        if names.count(b"authorization") > 1 or names.count(b"x-api-key") > 1:
            raise invalid("a header with credentials came more than once")
    if authorization:
        found = authorization[7:] if authorization.startswith(_BEARER) else _after_scheme(authorization)
        if key and key != found:
            raise invalid("Authorization and x-api-key differ")
    else:
        found = key or b""
    if not found:
        raise missing()
    return found


def _after_scheme(authorization: bytes) -> bytes:
    scheme = _SCHEME.match(authorization)
    if scheme is None:
        raise invalid("Authorization has another scheme than Bearer")
    return authorization[scheme.end() :]


class Auth:
    """Knows callers by their keys and, with a ``verifier``, by their tokens.

    What is known is looked up by its SHA-256, so there is nothing to compare with a secret in constant time: how long a
    look-up takes depends on digests, and whoever could make digests that begin like a given one could break SHA-256. Keys
    and tokens themselves are not kept beyond their request.
    """

    def __init__(self, verifier: Verifier | None = None) -> None:
        self._verifier = verifier
        self._keys: dict[bytes, Principal] = {}
        self._tokens: dict[bytes, Principal] = {}

    def use_keys(self, keys: Iterable[ApiKey]) -> None:
        """From now on these are the keys."""
        self._keys = {key.hash: key.principal for key in keys}

    def forget_tokens(self) -> None:
        """Verify every token anew: other keys sign from now on."""
        self._tokens.clear()

    def identify(self, last: Mapping[bytes, bytes], pairs: Sequence[tuple[bytes, bytes]], now: float) -> Principal:
        """Who sends these headers (see `credentials`), at ``now`` in Unix seconds. Raises `GatewayError` missing_api_key or
        invalid_api_key, of which an `UnknownSigner` may be right once the signing keys have been fetched anew."""
        sent = credentials(last, pairs)
        hashed = digest(sent)
        principal = self._keys.get(hashed) or self._tokens.get(hashed)
        if principal is None:
            return self._verified(sent, hashed, now)
        if principal.expires <= now:
            self._tokens.pop(hashed, None)
            raise invalid(f"{principal.id} has expired or was revoked")
        return principal

    def _verified(self, sent: bytes, hashed: bytes, now: float) -> Principal:
        if self._verifier is None or not _JWT.fullmatch(sent):
            raise invalid("no such key")
        principal = self._verifier.verify(sent, now)
        if len(self._tokens) >= MAX_TOKENS:
            del self._tokens[next(iter(self._tokens))]  # the one that came first is likely to expire first
        self._tokens[hashed] = principal
        return principal
