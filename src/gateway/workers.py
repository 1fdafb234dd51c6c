"""Several workers on the same sockets, and a parent that only watches: it starts them, starts them again, passes signals on.

Each worker is a whole gateway. What they share is what the sockets and the settings share; docs/operations.md tells.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Mapping
from typing import Any, Final

from twisted.application.service import Service
from twisted.internet.defer import Deferred, DeferredList, ensureDeferred, succeed
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger

from .core.settings import Settings
from .inherited import Inherited
from .lifecycle import HANDOVER_SETTLE, WHERE, Lifecycle
from .net.shares import is_gone, shared_file
from .offspring import Child, NotStarted, Program
from .process import StartError, allow_files, remove_unix, tell_running

BACKOFF: Final = (0.5, 30.0)
"""Seconds until a worker that ended is started again: at first, and at most."""

STEADY: Final = 60.0
"""After a worker that ran so long the waits begin anew."""

LOOKS: Final = 5
"""A worker is ended that has given no sign of life at so many looks in a row."""

FILES_OF_WORKER: Final = 4
"""Open files of the parent for each: three pipes, and a port for operators."""

WHERE_SECONDS: Final = 2.0
"""What a worker that hangs gets to say where."""

PATIENCE: Final = 15.0
"""Seconds over the time a worker may take to stop until it is killed."""

_log: Final = Logger("gateway.workers")


class Workers(Service):
    """As many workers of this program as the settings say."""

    name = "inference-gateway"

    def __init__(self, settings: Settings, reactor: Any, sockets: Mapping[str, socket.socket], lifecycle: Lifecycle) -> None:
        self.lifecycle = lifecycle
        self._settings = settings
        self._sockets = dict(sockets)
        self._reactor = reactor
        self._stopping = self._begun = False
        allow_files(FILES_OF_WORKER * settings.workers)
        try:
            self._shares = shared_file(settings.workers)
        except OSError as problem:
            raise StartError(f"GATEWAY_WORKERS: no memory to share: {problem}") from problem
        self._places = [
            _Place(self, lifecycle.program, number, settings, self._shares, reactor) for number in range(settings.workers)
        ]

    def setServiceParent(self, parent: Any) -> None:
        self.lifecycle.log_for(parent)
        super().setServiceParent(parent)

    def startService(self) -> None:
        super().startService()
        self._reactor.callWhenRunning(self._start)

    def _start(self) -> None:
        for place in self._places:
            place.start()

    def sockets_for(self, number: int) -> dict[str, socket.socket]:
        """What a worker listens on: all of them, but of the ports for operators its own."""
        own = {name: one for name, one in self._sockets.items() if not name.startswith("admin")}
        admin = self._sockets.get(f"admin/{number}" if number else "admin")
        return own if admin is None else {**own, "admin": admin}

    def came_up(self) -> None:
        """One more runs. Only when all do is it said: who reads it may send requests, and signals."""
        if self._begun or not all(place.runs for place in self._places):
            return
        self._begun = True
        self.lifecycle.run(self._sockets, lambda: self._pass_on(signal.SIGHUP), self._pass_on)
        tell_running(self._settings, self._sockets, f"{len(self._places)} workers")

    def gave_up(self) -> None:
        """One has ended. As long as not all have run that is the end; later it is tried again."""
        if not self._begun and not self._stopping:
            _log.error("a worker does not start: all stop")
            self.lifecycle.fail()

    @property
    def restarts(self) -> bool:
        """A worker that has ended is started again."""
        return self._begun and not self._stopping

    def _send(self, number: int) -> None:
        for place in self._places:
            place.send(number)

    def _pass_on(self, number: int) -> None:
        """To those that know what it means: it would end one that is just starting."""
        for place in self._places:
            if place.runs:
                place.send(number)

    def stopService(self) -> Deferred[None]:
        return ensureDeferred(self._stop())

    async def _stop(self) -> None:
        """Each worker drains; they are told what the parent was told."""
        self._stopping = True
        lifecycle, settings = self.lifecycle, self._settings
        lifecycle.closing()
        ends = [place.stop(signal.SIGUSR2 if lifecycle.handed_over else signal.SIGTERM) for place in self._places]
        lifecycle.hurry.addCallback(lambda _: self._send(signal.SIGTERM))
        patience = settings.grace + max(settings.drain_settle, HANDOVER_SETTLE) + PATIENCE
        last = self._reactor.callLater(patience, self._send, signal.SIGKILL)
        await DeferredList(ends)
        if last.active():
            last.cancel()
        for name, one in self._sockets.items():
            if name == "unix" and not lifecycle.handed_over:
                remove_unix(one)
            one.close()
        os.close(self._shares)
        super().stopService()
        lifecycle.closed()
        _log.info("stopped, and all workers with it")


class _Place:
    """One worker, and whoever comes after it."""

    def __init__(self, workers: Workers, program: Program, number: int, settings: Settings, shares: int, reactor: Any) -> None:
        self._workers = workers
        self._program = program
        self._inherited = Inherited(worker=number, workers=settings.workers, shares=shares)
        self._number = number
        self._shares = shares
        self._timeout = settings.worker_timeout
        self._reactor = reactor
        self._called = f"worker {number + 1} of {settings.workers}"
        self._child: Child | None = None
        self._again: IDelayedCall | None = None
        self._watch: IDelayedCall | None = None
        self._backoff = BACKOFF[0]
        self._started = 0.0
        self._silent = 0
        self.runs = False

    def start(self) -> None:
        self._again = None
        self._started = self._reactor.seconds()
        child = self._child = Child(self._called)
        self._program.start(self._reactor, child, self._inherited, self._workers.sockets_for(self._number))
        child.ready.addCallbacks(self._ready, lambda failure: failure.trap(NotStarted))  # `_ended` is told of that too
        child.ended.addCallback(self._ended)

    def _ready(self, _: None) -> None:
        self.runs = True
        self._silent = 0
        if self._timeout and self._child is not None:
            self._watch = self._reactor.callLater(self._timeout / LOOKS, self._look, self._child)
        self._workers.came_up()

    def _look(self, child: Child) -> None:
        """Is it alive? Looks are counted, and not the time: the whole machine may have stood still."""
        self._silent = 0 if child.heard else self._silent + 1
        child.heard = False
        if self._silent < LOOKS:
            self._watch = self._reactor.callLater(self._timeout / LOOKS, self._look, child)
            return
        _log.error("{called} has hung for {seconds:g} s, and is ended", called=self._called, seconds=self._timeout)
        child.send(WHERE)
        self._watch = self._reactor.callLater(WHERE_SECONDS, child.send, signal.SIGKILL)

    def _ended(self, how: str) -> str:
        self._child, self.runs = None, False
        if self._watch is not None and self._watch.active():
            self._watch.cancel()
        is_gone(self._shares, self._number)
        if not self._workers.restarts:
            self._workers.gave_up()
        else:
            if self._reactor.seconds() - self._started >= STEADY:
                self._backoff = BACKOFF[0]
            _log.error("{called} ended with {how}, and is started again", called=self._called, how=how)
            self._again = self._reactor.callLater(self._backoff, self.start)
            self._backoff = min(2 * self._backoff, BACKOFF[1])
        return how

    def send(self, number: int) -> None:
        if self._child is not None:
            self._child.send(number)

    def stop(self, number: int) -> Deferred[Any]:
        """Fires when there is no process any more."""
        if self._again is not None:
            self._again.cancel()
            self._again = None
        if self._child is None:
            return succeed(None)
        self._child.send(number)
        gone: Deferred[None] = Deferred()
        self._child.ended.addCallback(lambda _: gone.callback(None))
        return gone
