"""Tells systemd how the service stands, as sd_notify(3) says; where there is no systemd, nobody."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from typing import Any, Final

from twisted.application.service import Service
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger

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
