"""What the gateway needs of its process: a bound socket, files, a log, a place for its pidfile."""

from __future__ import annotations

import ipaddress
import os
import resource
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from .core.settings import Settings
from .logs import LineObserver, RotatedFile, StandardOutput

BACKLOG: Final = 4096
SPARE_FILES: Final = 100


class StartError(Exception):
    """The gateway cannot start, for a reason that is one line."""


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, not yet listening on the reactor. Raises `StartError`."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        both = address[0] == "::" and socket.has_dualstack_ipv6()
        listening = socket.create_server(address[:2], family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except OSError as problem:
        # create_server puts the address into strerror, which this line already names; a look-up has words of its own.
        own_words = isinstance(problem, socket.gaierror)
        why = os.strerror(problem.errno) if problem.errno and not own_words else problem.strerror or problem
        raise StartError(f"cannot listen on {host} port {port} (--host, --port): {why}") from None
    listening.setblocking(False)
    return listening


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address, or a name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def allow_files(wanted: int) -> None:
    """Each client and each backend connection is an open file; many systems allow 1,024 unless asked for more."""
    wanted += SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def log_observer(twistd: Mapping[str, Any], settings: Settings) -> LineObserver | None:
    """Where log lines go: as twistd was told, but in lines of ours. None: twistd was told to log elsewhere.
    Raises `StartError`."""
    if "nodaemon" not in twistd or twistd.get("syslog") or twistd.get("logger"):
        return None
    path = twistd.get("logfile") or ("-" if twistd.get("nodaemon") else "twistd.log")
    if path == "-":
        if not twistd.get("nodaemon"):
            raise StartError("a daemon cannot log to standard output: give twistd --logfile a path, or -n")
        return LineObserver(StandardOutput(), settings.log_format)
    try:
        file = RotatedFile(Path(path), settings.log_file_size, settings.log_files)
    except OSError as problem:
        raise StartError(f"cannot write the log file {path}: {problem.strerror}") from None
    return LineObserver(file, settings.log_format)


def check_pidfile(path: str | None) -> None:
    """Raises `StartError` where twistd itself would find out only as a daemon."""
    if path and not os.access(Path(path).absolute().parent, os.W_OK):
        raise StartError(f"cannot write the pidfile {path} (twistd --pidfile)")
