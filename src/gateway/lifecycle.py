"""How a gateway's process begins and ends: signals, its pidfile, systemd, whoever started it, and who comes after it."""

from __future__ import annotations

import atexit
import faulthandler
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from socket import socket
from typing import Any, Final

from twisted.internet.abstract import FileDescriptor
from twisted.internet.defer import Deferred
from twisted.internet.main import CONNECTION_DONE
from twisted.logger import ILogObserver, Logger
from twisted.python.failure import Failure

from .inherited import Inherited
from .log_file import LogFile
from .logs import LineObserver
from .notify import Notify, Pulse
from .offspring import Handover, Program

WHERE: Final = signal.SIGQUIT
"""A worker says on standard error where its threads are, even when it hangs, and goes on: its parent logs that."""

HANDOVER_SETTLE: Final = 5.0
"""Seconds at least in which a process that has handed its sockets over still answers on the connections that it has, so that
their clients are told to open others."""

_log: Final = Logger("gateway.service")


class Lifecycle:
    """The process, as the service that runs in it sees it. ``twistd`` has twistd's own options, ``arguments`` what stood
    behind them.

    ``handed_over``: another process has the sockets, and takes new connections. ``hurry`` fires when the stop that is under way
    is to take no more time.
    """

    def __init__(
        self,
        reactor: Any,
        twistd: dict[str, Any],
        arguments: Sequence[str],
        inherited: Inherited,
        observer: LineObserver | None,
    ) -> None:
        self.inherited = inherited
        self.observer = observer
        self.notify = Notify(os.environ if inherited.worker is None else {}, reactor)
        self.handed_over = False
        self.hurry: Deferred[None] = Deferred()
        self.program = Program(twistd, arguments, self._file.path if self._file is not None else None)
        self._reactor = reactor
        self._twistd = twistd
        self._stopping = False
        self._handover: Handover | None = None
        alive = inherited.ready if inherited.worker is not None else None
        self._pulse = None if alive is None else Pulse(alive, reactor)
        self._starter = None if inherited.starter is None else _EndOfFile(inherited.starter, self._orphaned, reactor)

    @property
    def _file(self) -> LogFile | None:
        write = self.observer.write if self.observer is not None else None
        return write if isinstance(write, LogFile) else None

    def log_for(self, application: Any) -> None:
        """Have twistd log as the gateway does, unless it was told to log elsewhere."""
        if self.observer is not None:
            application.setComponent(ILogObserver, self.observer)

    # --- it runs

    def run(
        self,
        sockets: Mapping[str, socket],
        reload: Callable[[], object],
        pass_on: Callable[[int], object] = lambda number: None,
    ) -> None:
        """The service does its work from now on: signals mean something, and those who wait for it are told.

        ``sockets`` are those that listen, at any time; ``reload`` reads the settings again, ``pass_on`` tells workers of a
        signal too.
        """
        by_systemd = self.inherited.by_systemd
        handover = self._handover = Handover(
            self.program, self._reactor, self._twistd, sockets, self.notify, self.leave, by_systemd=by_systemd
        )
        is_worker = self.inherited.worker is not None
        at_terminal = not is_worker and sys.stdin is not None and sys.stdin.isatty()

        def rotate() -> None:
            self._reopen() if is_worker else self._rotate()
            pass_on(signal.SIGUSR1)

        self._on(signal.SIGTERM, self.stop)
        # Ctrl-C at a terminal comes to all processes of a group: workers wait for what their parent makes of it.
        self._on(signal.SIGINT, (lambda: None) if is_worker else self.stop)
        # Hanging up ends a program at its terminal, and is for a daemon a word about its settings.
        self._on(signal.SIGHUP, self.stop if at_terminal else reload)
        self._on(signal.SIGUSR1, rotate)
        self._on(signal.SIGUSR2, self.leave if is_worker else handover.begin)
        self._write_pidfile()
        self.inherited.tell_ready()
        self.notify.startService()
        if self._pulse is not None:
            self._pulse.startService()
            faulthandler.register(WHERE, 2)
        if self._starter is not None:
            self._starter.startReading()

    def _on(self, number: int, act: Callable[[], object]) -> None:
        """twistd's own handlers would end the process with the signal's status, or without a drain."""
        signal.signal(number, lambda *_: self._reactor.callFromThread(act))

    def _write_pidfile(self) -> None:
        """A successor's, which from now on is twistd's to remove."""
        path = self.inherited.pidfile
        if not path:
            return
        try:
            new = Path(f"{path}.new")
            new.write_text(str(os.getpid()), "ascii")
            new.replace(path)
        except OSError as problem:
            _log.error("the pidfile {path} cannot be written: {why}", path=path, why=problem.strerror)
        else:
            self._twistd["pidfile"] = path

    def _rotate(self) -> None:
        if self._file is not None:
            self._file.rotate()
        else:
            _log.warn("SIGUSR1: there is no log file to rotate")

    def _reopen(self) -> None:
        if self._file is not None:
            self._file.reopen()

    # --- it ends

    def stop(self) -> None:
        """The first time lets requests finish; a second one does not."""
        if not self._stopping:
            self._stopping = True
            if self._handover is not None:
                self._handover.stop()
            self._reactor.stop()
        elif not self.hurry.called:
            _log.warn("second signal: requests in flight are ended now")
            self.hurry.callback(None)

    def leave(self) -> None:
        """Others have the sockets: finish what is here, and go."""
        if not self._stopping:
            self.handed_over = True
            self.stop()

    def fail(self) -> None:
        """Stop, and end with status 1, which twistd alone would not."""
        if not self._stopping:
            atexit.register(_exit_with_one)
            self.stop()

    def _orphaned(self) -> None:
        _log.warn("the parent of this worker is gone: it stops")
        if not self._stopping:
            self.stop()

    def closing(self) -> None:
        """The stop begins."""
        if not self.handed_over:
            self.notify.say("STOPPING=1")
        if self._starter is not None:
            self._starter.stopReading()

    def closed(self) -> None:
        """The last thing, but for the last line of the log."""
        self.notify.stopService()
        if self._pulse is not None and self._pulse.running:
            self._pulse.stopService()
        if self.observer is not None:
            self.observer.close()


def _exit_with_one() -> None:
    sys.stdout.flush()
    os._exit(1)


class _EndOfFile(FileDescriptor):
    """Calls ``then`` when nobody can write to the pipe any more."""

    def __init__(self, number: int, then: Callable[[], object], reactor: Any) -> None:
        super().__init__(reactor)
        os.set_blocking(number, False)
        self._number = number
        self._then = then

    def fileno(self) -> int:
        return self._number

    def doRead(self) -> Exception | None:
        """Nobody writes; an end of file may show in either way."""
        try:
            data = os.read(self._number, 4096)
        except BlockingIOError:
            return None
        return None if data else CONNECTION_DONE

    def connectionLost(self, reason: Failure) -> None:
        super().connectionLost(reason)
        self._then()
