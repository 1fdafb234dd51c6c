"""The parts that only some settings ask for: who asks for keys, who counts limits, the ledger. What they need in addition is
imported when they are made."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from twisted.application.service import Service
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger

from .core.auth import Auth
from .core.readers import SettingsError
from .core.settings import Settings
from .delivery import DAY, Delivery
from .guard import Guard
from .jwks import Jwks
from .keys_file import KeysFile
from .ledger import Ledger
from .ledger_place import database_at, journal_at
from .limiter import Limiter, LocalLimiter
from .metrics import INFERENCE_ROUTES
from .net.agent import BackendClient
from .process import StartError, is_loopback

if TYPE_CHECKING:
    from .core.jwt_tokens import Verifier

_log: Final = Logger("gateway.service")


def ledger_of(settings: Settings, reactor: Any) -> Ledger | None:
    """The ledger, if there is to be one. Nothing is asked of its database yet: it may be away. Raises `StartError`."""
    if not settings.ledger:
        return None
    try:
        database = database_at(settings.ledger)
        journal = journal_at(settings.ledger, settings.ledger_journal_file, settings.ledger_journal)
    except SettingsError as problem:
        raise StartError(str(problem)) from None

    def tell(problem: str) -> None:
        reactor.callFromThread(_log.warn, "{problem}", problem=problem)

    delivery = Delivery(database, journal, settings.ledger_keep * DAY, time.time, tell)
    return Ledger(delivery, reactor, time.time, flush=settings.ledger_flush, routes=INFERENCE_ROUTES, prices=settings.prices)


def limiter_of(settings: Settings, reactor: Any) -> Limiter:
    """Who counts what limits allow. Raises `StartError`."""
    if settings.redis_url is None:
        return LocalLimiter(reactor.seconds, time.time)
    try:
        from .redis_limiter import RedisLimiter  # noqa: PLC0415 - an optional part
    except ImportError:
        raise StartError("GATEWAY_REDIS_URL needs txredisapi: pip install 'inference-gateway[redis]'") from None
    fail_open = settings.limits_fail == "open"
    return RedisLimiter(settings.redis_url, reactor, time.time, settings.redis_timeout, fail_open=fail_open)


def guard_of(settings: Settings, reactor: Any, client: BackendClient) -> tuple[Guard | None, list[Service]]:
    """Who asks for keys, if there are any, and what must run for it; ``client`` fetches an issuer's. Raises `StartError`."""
    verified = settings.jwt_key or settings.jwt_key_file or settings.jwt_jwks_url
    if not settings.keys and not verified:
        if not is_loopback(settings.host) and not settings.insecure_open:
            raise StartError(
                f"--host {settings.host} is not loopback, and nobody is asked for a key: "
                "set GATEWAY_KEYS or GATEWAY_JWT_..., or say --insecure-open"
            )
        return None, []
    verifier = _make_verifier(settings) if verified else None
    auth = Auth(verifier)
    jwks, running = None, list[Service]()
    if settings.jwt_jwks_url and verifier is not None:
        use = partial(_use_signers, verifier, auth)
        jwks = Jwks(settings.jwt_jwks_url, client, reactor, use)
        running.append(jwks)
    if settings.keys:
        try:
            in_thread = partial(deferToThreadPool, reactor, reactor.getThreadPool())
            running.append(KeysFile(Path(settings.keys), reactor, auth.use_keys, in_thread))
        except SettingsError as problem:
            raise StartError(f"GATEWAY_KEYS: {problem}") from None
    return Guard(auth, time.time, jwks=jwks, metrics_open=settings.metrics_open), running


def _make_verifier(settings: Settings) -> Verifier:
    """Verifies tokens by the key that the settings name; by none yet if it is to be fetched. Raises `StartError`."""
    try:
        from .core import jwt_tokens  # noqa: PLC0415 - an optional part
    except ImportError:
        raise StartError("GATEWAY_JWT_...: PyJWT is not installed: pip install 'inference-gateway[jwt]'") from None
    rules = jwt_tokens.Rules(
        settings.jwt_algorithms, settings.jwt_issuer, settings.jwt_audience, settings.jwt_leeway, dict(settings.jwt_claims)
    )
    if settings.jwt_key:
        return jwt_tokens.Verifier(rules, [jwt_tokens.secret_signer(settings.jwt_key)])
    if settings.jwt_key_file:
        try:
            return jwt_tokens.Verifier(rules, jwt_tokens.read_signers(Path(settings.jwt_key_file).read_bytes()))
        except (OSError, ValueError) as problem:
            why = problem.strerror if isinstance(problem, OSError) else problem
            raise StartError(f"GATEWAY_JWT_KEY_FILE: {settings.jwt_key_file}: {why}") from None
    return jwt_tokens.Verifier(rules)


def _use_signers(verifier: Verifier, auth: Auth, body: bytes) -> None:
    """Verify by what a JWK set says from now on. Raises ValueError."""
    if verifier.use(body):
        auth.forget_tokens()
