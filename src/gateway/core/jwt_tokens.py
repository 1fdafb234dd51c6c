"""JSON Web Tokens (RFC 7519, with the advice of RFC 8725): signature and claims, to a principal.

A key has one algorithm, by its own type, so a token cannot choose how it is verified: an RSA key never is the secret of an
HMAC, and ``none`` is the algorithm of no key. Claims are checked here rather than by PyJWT, whose clock cannot be given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import jwt
import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from . import api_keys, readers
from .auth import UnknownSigner, invalid
from .auth_settings import PARTS
from .errors import UNDECODABLE
from .principal import Limits, Principal
from .tickets import PRIORITIES

MAX_SIGNERS: Final = 100
MIN_RSA_BITS: Final = 2048
MAX_RSA_BITS: Final = 8192
MAX_SECONDS: Final = 2**53
_PUBLIC: Final = {"RSA": ("n", "e"), "EC": ("crv", "x", "y"), "OKP": ("crv", "x")}


class Signer(NamedTuple):
    """A key that signs tokens. ``kid`` None: whatever kid a token names, this is meant."""

    kid: str | None
    algorithm: str
    key: Any


def secret_signer(secret: str) -> Signer:
    """A secret that signs with HS256."""
    return Signer(None, "HS256", secret.encode("utf-8"))


def read_signers(text: bytes) -> tuple[Signer, ...]:
    """Public keys: one in PEM, or a JWK set or single JWK (RFC 7517). Raises ValueError with what is wrong.

    Keys of a set that cannot be used here are passed over, as section 5 says; so are secrets, which have no place in it.
    """
    if not text.lstrip().startswith(b"{"):
        return (_signer_of_pem(text),)
    try:
        found = msgspec.json.decode(text, type=dict[str, Any])
    except UNDECODABLE as error:
        raise ValueError(f"it is not a JWK set: {error}") from None
    entries = found.get("keys", [found])
    if not isinstance(entries, list) or len(entries) > MAX_SIGNERS:
        raise ValueError(f"it is not a JWK set of at most {MAX_SIGNERS} keys")
    signers = tuple(signer for entry in entries if (signer := _signer_of_jwk(entry)) is not None)
    if not signers:
        raise ValueError("it has no public key for RS256 (2048 bits or more), ES256 or EdDSA (Ed25519)")
    return signers


def _signer_of_pem(text: bytes) -> Signer:
    try:
        key = load_pem_public_key(text)
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("it is neither a public key in PEM nor a JWK set") from None
    algorithm = _algorithm_of(key)
    if algorithm is None:
        raise ValueError("it is a public key of another kind than RSA (2048 bits or more), P-256 or Ed25519")
    return Signer(None, algorithm, key)


def _signer_of_jwk(entry: Any) -> Signer | None:
    if not isinstance(entry, dict) or entry.get("use", "sig") != "sig":
        return None
    kind = entry.get("kty")
    if not isinstance(kind, str) or kind not in _PUBLIC:
        return None
    public = {"kty": kind, **{name: entry.get(name) for name in _PUBLIC[kind]}}
    try:
        key = jwt.PyJWK(public).key
    except (jwt.PyJWTError, ValueError, TypeError, AttributeError):
        return None
    algorithm, kid = _algorithm_of(key), entry.get("kid")
    if algorithm is None or entry.get("alg", algorithm) != algorithm or not isinstance(kid, str | None):
        return None
    return Signer(kid, algorithm, key)


def _algorithm_of(key: object) -> str | None:
    if isinstance(key, RSAPublicKey):
        return "RS256" if MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS else None
    if isinstance(key, EllipticCurvePublicKey):
        return "ES256" if isinstance(key.curve, SECP256R1) else None
    return "EdDSA" if isinstance(key, Ed25519PublicKey) else None


class Rules(NamedTuple):
    """What a token must be. ``leeway`` in seconds; ``claims`` names the claim of each part of a principal."""

    algorithms: Sequence[str]
    issuer: str | None
    audience: str | None
    leeway: float
    claims: Mapping[str, str]


class Verifier:
    """Verifies tokens by ``signers``, which may be replaced at any time."""

    def __init__(self, rules: Rules, signers: Iterable[Signer] = ()) -> None:
        self._rules = rules
        self._jws = {name: jwt.PyJWS(algorithms=[name]) for name in rules.algorithms}
        self.signers = tuple(signers)

    def use(self, text: bytes) -> bool:
        """Verify by the keys of a JWK set from now on; whether they differ from those of before. Raises ValueError."""
        found = read_signers(text)
        changed = found != self.signers
        self.signers = found
        return changed

    def verify(self, token: bytes, now: float) -> Principal:
        """Whose token it is, at ``now`` in Unix seconds. Raises `GatewayError` invalid_api_key."""
        try:
            header = jwt.get_unverified_header(token)
            signer = self._signer(header.get("alg"), header.get("kid"))
            payload = self._jws[signer.algorithm].decode(token, signer.key, [signer.algorithm])
            claims = msgspec.json.decode(payload, type=_Claims)
        except UNDECODABLE:
            raise invalid("the token's claims are not a JSON object") from None
        except (jwt.PyJWTError, ValueError) as problem:
            raise invalid(f"not a token with a good signature ({type(problem).__name__})") from None
        self._check(claims, now)
        return self._principal(claims)

    def _signer(self, algorithm: object, kid: object) -> Signer:
        if not isinstance(algorithm, str) or algorithm not in self._jws:
            raise invalid("the token's algorithm is not among those allowed")
        fitting = [one for one in self.signers if one.algorithm == algorithm and (kid is None or one.kid in (None, kid))]
        if len(fitting) > 1 and kid is not None:
            fitting = [one for one in fitting if one.kid == kid]
        if not fitting:
            raise UnknownSigner
        if len(fitting) > 1:
            raise invalid("the token does not tell which key signed it")
        return fitting[0]

    def _check(self, claims: _Claims, now: float) -> None:
        rules = self._rules
        expires = _seconds(claims.get("exp"))
        if expires is None:
            raise invalid("the token has no exp")
        if expires + rules.leeway <= now:
            raise invalid("the token has expired")
        if "nbf" in claims:
            begins = _seconds(claims["nbf"])
            if begins is None or begins - rules.leeway > now:
                raise invalid("the token is not valid yet")
        if rules.issuer is not None and claims.get("iss") != rules.issuer:
            raise invalid("the token is from another issuer")
        audience = claims.get("aud", [])
        # Section 4.1.3: who is not among those a token is for refuses it; without a name of our own, that is any.
        if (
            audience != rules.audience
            and rules.audience not in (audience if isinstance(audience, list) else [])
            and (rules.audience is not None or "aud" in claims)
        ):
            raise invalid("the token is for another audience")

    def _principal(self, claims: _Claims) -> Principal:
        names = self._rules.claims
        given = {part: claims[name] for part, name in names.items() if claims.get(name) is not None}
        try:
            subject = _name(claims.get("sub") or given.get("tenant"))
            read = {part: _PARTS[part](value) for part, value in given.items()}
        except ValueError:
            raise invalid("a claim of the token does not have the form it should") from None
        get = read.get
        return Principal(
            key=f"jwt:{subject}",
            id=f"jwt:{subject}",
            tenant=get("tenant", subject),
            models=get("models"),
            priority=PRIORITIES.index(get("priority", "interactive")),
            weight=get("weight", 1.0),
            limits=Limits(get("rpm"), get("tpm"), get("concurrency"), get("budget")),
            admin=get("admin", False),
            expires=claims["exp"] + self._rules.leeway,
        )


_Claims = dict[str, Any]


def _seconds(value: object) -> float | None:
    """A NumericDate; true and strings are none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 <= value <= MAX_SECONDS else None  # type: ignore[operator, arg-type]


def _name(value: object) -> str:
    """Whom a token is about, as it may stand in a log line."""
    if not isinstance(value, str) or not 0 < len(value) <= 256 or not value.isprintable():
        raise ValueError("a printable text of at most 256 characters")
    return value


def _models(value: object) -> tuple[str, ...]:
    """A list, or names with spaces between them, as in the scope claim of RFC 8693."""
    found: tuple[str, ...] = readers.names(value.split() if isinstance(value, str) else value)
    return found


_FIELDS: Final = {field.name: field.read for field in api_keys.FIELDS}
_PARTS: Final = {part: _FIELDS[part] for part in PARTS} | {"tenant": _name, "models": _models}
