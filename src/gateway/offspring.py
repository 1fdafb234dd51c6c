"""Starts another gateway with the sockets of this one: as a worker of it, or to take its place."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from socket import socket
from typing import Any, Final

from msgspec.structs import replace
from twisted.internet.defer import Deferred
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure

from .inherited import VARIABLE, Inherited
from .notify import Notify

START_SECONDS: Final = 60.0
"""A gateway that does not run after this time will not."""

MAX_LINE: Final = 4096
_STDERR, _READY, _STARTER, _LATER_STDERR, _FIRST_SOCKET = 2, 3, 4, 5, 6
_RUN: Final = "from twisted.scripts.twistd import run; run()"
_KEPT: Final = ("logger", "reactor", "prefix")

_log: Final = Logger("gateway.offspring")


class NotStarted(Exception):
    """It ended before it ran; how."""


class Child(ProcessProtocol):
    """A gateway's process that this one has started; ``called`` is what log lines call it.

    ``ready`` fires when it runs, and fails with `NotStarted` if it ends before; ``ended`` fires with how it ended. ``heard``:
    it has given a sign of life since this was last set to False.
    """

    transport: Any = None
    heard = False

    def __init__(self, called: str) -> None:
        self.ready: Deferred[None] = Deferred()
        self.ended: Deferred[str] = Deferred()
        self._called = called
        self._partial = b""

    @property
    def pid(self) -> int:
        return int(self.transport.pid)

    def send(self, number: int) -> None:
        """A signal, if there is a process."""
        if self.transport is not None and self.transport.pid:
            self.transport.signalProcess(number)

    def childDataReceived(self, childFD: int, data: bytes) -> None:  # noqa: N803 - twisted's own name
        if childFD == _READY:
            self.heard = True
            if not self.ready.called:
                self.ready.callback(None)
        elif childFD == _STDERR:
            *lines, rest = (self._partial + data).split(b"\n")
            self._partial = rest[-MAX_LINE:]
            for line in lines:
                self._tell(line)

    def _tell(self, line: bytes) -> None:
        if line.strip():
            _log.error("{called}: {line}", called=self._called, line=line[:MAX_LINE].decode("utf-8", "replace"))

    def processEnded(self, reason: Failure) -> None:
        self._tell(self._partial)
        status: Any = reason.value
        self.over(f"signal {status.signal}" if status.signal else f"status {status.exitCode}")

    def over(self, how: str) -> None:
        """There is no process, or none any more."""
        if not self.ready.called:
            self.ready.errback(NotStarted(how))
        self.ended.callback(how)


class Program:
    """How this gateway was started, so that another one can be started the same way.

    ``twistd`` has twistd's own options, ``arguments`` what stood behind them; ``log_file`` None is standard output. The
    directory is that of the start, for the sake of relative paths; a new process stays in the foreground of this one.
    """

    def __init__(self, twistd: Mapping[str, Any], arguments: Sequence[str], log_file: Path | None) -> None:
        self._directory = str(Path.cwd())
        self._command = [sys.executable, "-P", "-c", _RUN, "-n", "--pidfile=", f"--logfile={log_file or '-'}"]
        if twistd.get("syslog"):
            self._command.append("--syslog")
        self._command += [f"--{name}={twistd[name]}" for name in _KEPT if twistd.get(name)]
        self._command += ["inference-gateway", *arguments]

    def start(self, reactor: Any, child: Child, inherited: Inherited, sockets: Mapping[str, socket]) -> None:
        """Start one that gets these sockets. It is killed if it takes too long."""
        files: dict[int, Any] = {0: 0, 1: 1, _STDERR: "r", _READY: "r"}
        if inherited.worker is None:
            files[_LATER_STDERR] = 2
            inherited = replace(inherited, ready=_READY, stderr=_LATER_STDERR)
        else:
            files[_STARTER] = "w"
            inherited = replace(inherited, ready=_READY, starter=_STARTER)
        places = {name: _FIRST_SOCKET + place for place, name in enumerate(sockets)}
        files |= {places[name]: one.fileno() for name, one in sockets.items()}
        if inherited.shares is not None:
            place = _FIRST_SOCKET + len(sockets)
            files[place] = inherited.shares
            inherited = replace(inherited, shares=place)
        environ = {name: value for name, value in os.environ.items() if name != "WATCHDOG_PID"}
        environ[VARIABLE] = replace(inherited, sockets=places).shown()
        try:
            reactor.spawnProcess(child, sys.executable, self._command, environ, self._directory, childFDs=files)
        except OSError as problem:  # no memory, no more processes
            child.over(str(problem))
            return
        patience = reactor.callLater(START_SECONDS, child.send, signal.SIGKILL)

        def decided(result: Any) -> Any:
            if patience.active():
                patience.cancel()
            return result

        child.ready.addBoth(decided)


class Handover:
    """Starts the program anew, as it is on the disk by now, and leaves to it once it runs.

    ``sockets`` are those that listen, ``leave`` is called when the successor runs. ``twistd``: its pidfile
    is the successor's from then on.
    """

    def __init__(
        self,
        program: Program,
        reactor: Any,
        twistd: dict[str, Any],
        sockets: Mapping[str, socket],
        notify: Notify,
        leave: Callable[[], object],
        *,
        by_systemd: bool,
    ) -> None:
        self._program = program
        self._reactor = reactor
        self._twistd = twistd
        self._sockets = sockets
        self._notify = notify
        self._leave = leave
        self._by_systemd = by_systemd
        self._successor: Child | None = None
        self._stopping = False

    def begin(self) -> None:
        """If it does not come to run, all is as before."""
        if self._stopping:
            return
        if self._successor is not None:
            _log.warn("SIGUSR2: a successor has been started already")
            return
        if os.getpid() == 1:
            _log.warn("SIGUSR2: a container ends with its first process: replace the container")
            return
        _log.info("SIGUSR2: a successor is being started")
        successor = self._successor = Child("successor")
        inherited = Inherited(pidfile=self._twistd.get("pidfile") or "", by_systemd=self._by_systemd)
        self._program.start(self._reactor, successor, inherited, self._sockets)
        successor.ready.addCallbacks(lambda _: self._go(successor), self._failed)

    def stop(self) -> None:
        """This process ends, and is to have no successor; one that runs already is none of ours any more."""
        self._stopping = True
        if self._successor is not None and not self._successor.ready.called:
            self._successor.send(signal.SIGKILL)

    def _go(self, successor: Child) -> None:
        if self._stopping:  # it said so just before it was killed
            successor.send(signal.SIGKILL)
            return
        _log.info("the successor runs, process {pid}", pid=successor.pid)
        successor.ended.addCallback(lambda how: _log.error("the successor has ended with {how}", how=how))
        self._twistd["pidfile"] = ""
        self._notify.say(f"MAINPID={successor.pid}", "WATCHDOG=1")  # what it said itself until now was not heard
        self._leave()

    def _failed(self, failure: Failure) -> None:
        failure.trap(NotStarted)
        self._successor = None
        if not self._stopping:
            _log.error("the successor ended with {how} before it ran: this process goes on", how=failure.getErrorMessage())
