"""One connection to Redis (or Valkey): scripts are sent in order, and each is answered soon or the connection counts as lost.

A lost one is tried again each second, by nobody's request: while Redis is away it costs a request nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.endpoints import HostnameEndpoint, wrapClientTLS
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.protocol import Factory
from twisted.internet.ssl import optionsForClientTLS
from twisted.logger import Logger
from twisted.python.failure import Failure
from txredisapi import RedisProtocol, ResponseError

from .core.readers import RedisServer
from .net.deadlines import Deadlines

_log: Final = Logger("gateway.redis")

RETRY: Final = 1.0
"""Seconds between two attempts to connect."""

CONNECT_TIMEOUT: Final = 5.0

UNHURRIED: Final = 0.01
"""Seconds that what nobody waits for may wait itself, to be sent along with others: a write is the dearest part of a call."""

_MOST: Final = 2**53
"""Up to here Redis' scripts count exactly."""

_LUA: Final = Path(__file__).with_name("lua")


class Away(Exception):
    """Redis cannot be asked, or was asked and has not answered: whether it did what it was asked nobody knows."""


class Refused(Away):
    """Redis has answered with an error, or what is there is no Redis."""


class Script:
    """A Lua script, by its name. It answers with so many ``numbers``; with None, with a single one."""

    def __init__(self, name: str, numbers: int | None = None) -> None:
        self.numbers = numbers
        self.source = (_LUA / "account.lua").read_bytes() + (_LUA / f"{name}.lua").read_bytes()
        self.sha = hashlib.sha1(self.source, usedforsecurity=False).hexdigest()


RESERVE: Final = Script("reserve", 7)
SETTLE: Final = Script("settle")
RENEW: Final = Script("renew")


class _Call:
    """A script that has been sent; ``result`` may be cancelled, and the answer is then nobody's."""

    def __init__(self, script: Script, arguments: Sequence[object]) -> None:
        self.script = script
        self.arguments = arguments
        self.gone = False
        self.result: Deferred[list[int]] = Deferred(self._cancel)

    def _cancel(self, _: object) -> None:
        self.gone = True


class Link:
    """``up``: Redis can be asked. ``came`` is called when it can be again. An answer takes at most ``timeout`` seconds."""

    def __init__(self, server: RedisServer, clock: Any, timeout: float, came: Callable[[], None]) -> None:
        self.up = False
        self._server = server
        self._clock: IReactorTime = clock
        self._came = came
        self._deadlines: Deadlines[_Call] = Deadlines(clock, timeout, self._too_late)
        self._endpoint: Any = HostnameEndpoint(clock, server.host, server.port, CONNECT_TIMEOUT)
        if server.tls:
            self._endpoint = wrapClientTLS(optionsForClientTLS(server.host), self._endpoint)
        self._timer: IDelayedCall | None = None
        self._connecting: Deferred[None] | None = None
        self._protocol: Any = None
        self._reason: str | None = None
        self._stopped = True
        self._written: list[bytes] = []
        self._flush: IDelayedCall | None = None

    # --- the connection

    def start(self) -> None:
        self._stopped = False
        self._connect()

    def stop(self) -> None:
        self._stopped = True
        self.up = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._connecting is not None:
            self._connecting.cancel()
        self._drop()

    def _connect(self) -> None:
        self._timer = None
        self._connecting = ensureDeferred(self._connected()).addTimeout(CONNECT_TIMEOUT, self._clock)
        self._connecting.addErrback(self._failed)

    async def _connected(self) -> None:
        """Connect, and have the scripts there before the first request needs them."""
        server = self._server
        protocol = self._protocol = await self._endpoint.connect(Factory.forProtocol(RedisProtocol))
        protocol.whenDisconnected().addCallback(self._lost)
        if server.password is not None:
            await protocol.auth(server.password, server.username)
        if server.database:
            await protocol.select(server.database)
        for script in (RESERVE, SETTLE, RENEW):
            await protocol.script_load(script.source)
        self._connecting = None
        self.up = True
        self._reason = None
        _log.info("Redis at {where} counts what limits allow", where=server.where)
        self._came()

    def _failed(self, failure: Failure) -> None:
        self._connecting = None
        self._away(failure.getErrorMessage() or type(failure.value).__name__)

    def _lost(self, protocol: object) -> None:
        if protocol is self._protocol and self._connecting is None:
            self._away("the connection was lost")

    def _too_late(self, call: _Call) -> None:
        self._away(f"no answer within {self._deadlines.seconds:g} s")

    def _away(self, reason: str) -> None:
        """It is said once, however often it is tried in vain; never with the password."""
        self.up = False
        self._drop()
        if self._stopped:
            return
        if self._reason is None:
            _log.warn("Redis at {where} is away: {reason}", where=self._server.where, reason=reason)
        self._reason = reason
        if self._timer is None:
            self._timer = self._clock.callLater(RETRY, self._connect)

    def _drop(self) -> None:
        protocol, self._protocol = self._protocol, None
        self._written.clear()
        self._stop_flush()
        if protocol is not None and protocol.transport is not None:
            protocol.transport.abortConnection()

    # --- what is asked

    def call(self, script: Script, *arguments: object, hurry: bool = True) -> Deferred[list[int]]:
        """Two keys and what the script takes. Fails with `Away`. Without ``hurry`` it is sent with the next that is in one, or
        `UNHURRIED` seconds later."""
        call = _Call(script, (2, *arguments))
        if self.up and self._is_ahead():
            self._away("it answers what it was not asked")
        if not self.up:
            call.result.errback(Away())
            return call.result
        self._write(call, "EVALSHA", script.sha)
        self._deadlines.start(call)
        if hurry:
            self._send()
        elif self._flush is None:
            self._flush = self._clock.callLater(UNHURRIED, self._send)
        return call.result

    def _is_ahead(self) -> bool:
        """An answer is there to which there is no question: no later one could be told whose it is."""
        return bool(self._protocol.replyQueue.pending)

    def _write(self, call: _Call, command: str, script: str | bytes) -> None:
        self._written.append(_encoded((command, script, *call.arguments)))
        self._protocol.replyQueue.get().addCallback(self._answered, call)

    def _send(self) -> None:
        self._stop_flush()
        written = b"".join(self._written)
        self._written.clear()
        self._protocol.transport.write(written)

    def _stop_flush(self) -> None:
        if self._flush is not None:
            if self._flush.active():
                self._flush.cancel()
            self._flush = None

    def _answered(self, answer: Any, call: _Call) -> None:
        """With the script's own answer, Redis' error, or that the connection was lost."""
        if not isinstance(answer, Exception) and not _is_answer(answer, call.script):
            answer = ResponseError("what no script of the gateway's does")
        refused = isinstance(answer, ResponseError)
        if refused and str(answer).startswith("NOSCRIPT") and self.up and not self._is_ahead():
            self._write(call, "EVAL", call.script.source)  # a restart or a failover has lost it; this puts it back
            self._send()
            return
        self._deadlines.stop(call)
        if refused:
            self._away(f"it says {str(answer)[:200]}")
        if call.gone:
            return
        if isinstance(answer, Exception):
            call.result.errback(Refused() if refused else Away())
        else:
            call.result.callback(answer)


def _is_answer(answer: Any, script: Script) -> bool:
    """It is what the script answers: numbers that a script of Redis can count with."""
    found = [answer] if script.numbers is None else answer
    if not isinstance(found, list) or (script.numbers is not None and len(found) != script.numbers):
        return False
    return all(isinstance(one, int) and abs(one) <= _MOST for one in found)


def _encoded(words: Sequence[object]) -> bytes:
    """A command as Redis reads it (RESP)."""
    parts = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    return b"*%d\r\n" % len(parts) + b"".join([b"$%d\r\n%b\r\n" % (len(part), part) for part in parts])
