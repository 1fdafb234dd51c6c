"""How the settings of authentication are read, and which of them go together."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from . import readers

if TYPE_CHECKING:
    from .settings import Settings

ALGORITHMS: Final = ("RS256", "ES256", "EdDSA", "HS256")
MIN_SECRET: Final = 32
"""Characters: RFC 7518 section 3.2 wants as many bits as the hash has."""

PARTS: Final = ("tenant", "models", "priority", "weight", "rpm", "tpm", "concurrency", "budget", "admin")
"""What a token's claims may say."""

_BY_OWN_NAME: Final = tuple(part for part in PARTS if part != "admin")  # some issuers let users choose claims of such names


def secret(value: Any) -> str:
    """A secret that signs tokens. (A public key in PEM, given here by mistake, has spaces: it would be no secret.)"""
    if not isinstance(value, str) or not re.fullmatch(r"[!-~]{32,1024}", value):
        raise ValueError(f"a secret of at least {MIN_SECRET} printable ASCII characters without spaces")
    return value


def algorithms(value: Any) -> tuple[str, ...]:
    """Algorithms with commas between them."""
    found = tuple(dict.fromkeys(part.strip() for part in readers.text(value).split(",") if part.strip()))
    if not found or not set(found) <= set(ALGORITHMS):
        raise ValueError("a list of " + ", ".join(ALGORITHMS))
    return found


def claims(value: Any) -> tuple[tuple[str, str], ...]:
    """``part=claim`` pairs with commas between them; a part that is not named goes by its own name, but for admin."""
    named = dict(_pair(pair) for pair in readers.text(value).split(",") if pair.strip())
    return tuple(({part: part for part in _BY_OWN_NAME} | named).items())


def _pair(pair: str) -> tuple[str, str]:
    part, _, claim = (side.strip() for side in pair.partition("="))
    if part not in PARTS or not claim:
        raise ValueError("pairs such as tenant=org,models=scope; what stands before the = is one of " + ", ".join(PARTS))
    return part, claim


def jwks_url(value: Any) -> str:
    """Whoever answers under this URL decides who is let in: it takes TLS, but on this machine."""
    expected = "an https URL (http only to loopback), without user or fragment"
    url = readers.text(value)
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ValueError(expected) from None
    local = parts.scheme == "http" and parts.hostname in ("127.0.0.1", "::1", "localhost")
    if not (local or parts.scheme == "https") or not parts.hostname or not re.fullmatch(r"[!-~]+", url):
        raise ValueError(expected)
    if parts.username is not None or parts.fragment:
        raise ValueError(expected)
    return url


def takes_tokens(settings: Settings) -> bool:
    """Whoever has a JWT may be let in."""
    return bool(settings.jwt_key or settings.jwt_key_file or settings.jwt_jwks_url)


def asks_for_keys(settings: Settings) -> bool:
    """Not everybody is let in."""
    return bool(settings.keys) or takes_tokens(settings)


def problem(settings: Settings) -> str | None:
    """What of these settings does not go together, and the remedy."""
    sources = [name for name in ("jwt_key", "jwt_key_file", "jwt_jwks_url") if getattr(settings, name)]
    if len(sources) > 1:
        return " and ".join(f"GATEWAY_{name.upper()}" for name in sources) + ": give one of them"
    if (settings.jwt_issuer or settings.jwt_audience) and not sources:
        return "--jwt-issuer, --jwt-audience: nothing to verify tokens by: give GATEWAY_JWT_KEY, _KEY_FILE or _JWKS_URL too"
    if settings.jwt_jwks_url and not (settings.jwt_issuer and settings.jwt_audience):
        return "GATEWAY_JWT_JWKS_URL: give GATEWAY_JWT_ISSUER and GATEWAY_JWT_AUDIENCE too: its keys sign for others as well"
    if settings.jwt_key and "HS256" not in settings.jwt_algorithms:
        return "GATEWAY_JWT_KEY: is for HS256, which is not among GATEWAY_JWT_ALGORITHMS"
    if settings.keys and settings.forward_authorization:
        return "GATEWAY_FORWARD_AUTHORIZATION would show the keys of GATEWAY_KEYS to the backends: switch it off"
    return None
