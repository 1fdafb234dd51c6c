"""Tells who watches the process how it stands: systemd, as sd_notify(3) says, and a worker its parent."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from twisted.application.service import Service
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

PULSE: Final = 1.0
"""Seconds from one sign of life of a worker to the next."""

_log: Final = Logger("gateway.notify")


class Notify(Service):
    """Says what it is told, and once running that the reactor turns, twice in the time that systemd waits for that."""

    def __init__(self, environ: Mapping[str, str], clock: Any) -> None:
        self._path = environ.get("NOTIFY_SOCKET", "")
        self._clock = clock
        self._timer: IDelayedCall | None = None
        given = environ.get("WATCHDOG_USEC", "")
        self._interval = int(given) / 2e6 if self._path and given.isdecimal() else 0.0

    def startService(self) -> None:
        super().startService()
        self.say("READY=1")
        self._alive()

    def stopService(self) -> None:
        super().stopService()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def reloading(self) -> None:
        """New settings are being read; `startService` or "READY=1" ends it."""
        self.say("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def say(self, *lines: str) -> None:
        """Send these lines. That it did not work is logged, and no more."""
        if not self._path:
            return
        address = "\0" + self._path[1:] if self._path.startswith("@") else self._path
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as to:
                to.sendto("\n".join(lines).encode(), address)
        except OSError as problem:
            _log.warn("systemd cannot be told {what}: {why}", what=lines[0], why=os.strerror(problem.errno or 0))

    def _alive(self) -> None:
        if self._interval > 0:
            self.say("WATCHDOG=1")
            self._timer = self._clock.callLater(self._interval, self._alive)


class Pulse(Service):
    """Writes a byte to a pipe as long as the reactor turns; the pipe is closed at the end."""

    def __init__(self, pipe: int, clock: IReactorTime) -> None:
        os.set_blocking(pipe, False)
        self._pipe = pipe
        self._clock = clock
        self._timer: IDelayedCall | None = None

    def startService(self) -> None:
        super().startService()
        self._beat()

    def stopService(self) -> None:
        super().stopService()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        os.close(self._pipe)

    def _beat(self) -> None:
        with suppress(BlockingIOError, BrokenPipeError):  # nobody reads it: the parent hangs, or is gone
            os.write(self._pipe, b".")
        self._timer = self._clock.callLater(PULSE, self._beat)
