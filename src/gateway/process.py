"""What the gateway needs of its process: bound sockets, files, a log, a place for its pidfile."""

from __future__ import annotations

import errno
import ipaddress
import os
import resource
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from twisted.logger import Logger

from . import __version__
from .core.auth_settings import asks_for_keys
from .core.readers import SettingsError
from .core.settings import Settings
from .inherited import NOTHING, Inherited, sockets_of
from .log_file import LogFile, StandardOutput
from .logs import LineObserver

BACKLOG: Final = 4096
SPARE_FILES: Final = 100

_log: Final = Logger("gateway.service")


class StartError(Exception):
    """The gateway cannot start, for a reason that is one line."""


@contextmanager
def start_errors(setting: str = "") -> Iterator[None]:
    """What is wrong with the settings, found out within the block, is a `StartError` that begins with the setting."""
    try:
        yield
    except SettingsError as problem:
        raise StartError(f"{setting}: {problem}" if setting else str(problem)) from None


Place = tuple[str, int] | Path
"""Where a socket listens: host and port, or the path of a UNIX socket."""


def listening(settings: Settings, inherited: Inherited = NOTHING) -> dict[str, socket.socket]:
    """The sockets of a gateway, which are yet to be given to the reactor, by what they are for: ``http`` and ``unix`` for
    clients, ``admin`` for who operates it (``admin/1`` and so on for further workers). What was handed over is taken, the
    rest bound. Raises `StartError`."""
    try:
        given = sockets_of(inherited.sockets)
    except OSError as problem:
        raise StartError(f"cannot use the sockets handed over: {problem}") from None
    if inherited.worker is not None:
        return given
    made: dict[str, socket.socket] = {}
    try:
        for name, place in _places(settings):
            taken = given.get(name)
            if taken is not None and (inherited.by_systemd or _is_at(taken, place)):
                made[name] = given.pop(name)
            elif name != "http" or not inherited.by_systemd:
                made[name] = _listen(name, place, settings)
    except StartError:
        for one in made.values():
            one.close()
        raise
    if inherited.by_systemd:
        return made | given
    for left in given.values():  # the settings are others by now
        left.close()
    return made


def _places(settings: Settings) -> Iterator[tuple[str, Place]]:
    if settings.port is not None:
        yield "http", (settings.host, settings.port)
    if settings.admin_port is not None:
        for number in range(settings.workers):
            port = settings.admin_port + number if settings.admin_port else 0
            yield f"admin/{number}" if number else "admin", (settings.admin_host, port)
    if settings.unix_socket is not None:
        yield "unix", Path(settings.unix_socket).absolute()


def _is_at(one: socket.socket, place: Place) -> bool:
    """A successor takes it over; otherwise the settings want another one by now."""
    if isinstance(place, Path):
        return bool(one.getsockname() == str(place))
    host, port = one.getsockname()[:2]
    try:
        wanted = socket.getaddrinfo(*place, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][4][0]
    except OSError:
        return False
    return bool(wanted == host and place[1] in (0, port))


def stands_at(sockets: Mapping[str, socket.socket]) -> dict[str, Any]:
    """Where the sockets really are, as settings: what is open to others must not be taken for loopback."""
    found: dict[str, Any] = {}
    for name, host, port in (("http", "host", "port"), ("admin", "admin_host", "admin_port")):
        if name in sockets:
            found[host], found[port] = sockets[name].getsockname()[:2]
    return found


def _listen(name: str, place: Place, settings: Settings) -> socket.socket:
    if isinstance(place, Path):
        return listen_unix(place, settings.unix_socket_mode)
    return listen(*place, "--host, --port" if name == "http" else "--admin-host, --admin-port")


def listen(host: str, port: int, told_by: str = "--host, --port") -> socket.socket:
    """A bound socket, not yet listening on the reactor. Raises `StartError`."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        both = address[0] == "::" and socket.has_dualstack_ipv6()
        listening = socket.create_server(address[:2], family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except OSError as problem:
        # create_server puts the address into strerror, which this line already names; a look-up has words of its own.
        own_words = isinstance(problem, socket.gaierror)
        why = os.strerror(problem.errno) if problem.errno and not own_words else problem.strerror or problem
        raise StartError(f"cannot listen on {host} port {port} ({told_by}): {why}") from None
    listening.setblocking(False)
    return listening


def listen_unix(path: Path, mode: int) -> socket.socket:
    """A socket bound to this path, for whom its mode lets. One that was left behind there is removed, but never one that is
    listened on, nor another kind of file. Raises `StartError`."""
    listening = socket.socket(socket.AF_UNIX)
    before = os.umask(0o777)  # so that nobody gets in before the mode is set
    try:
        if path.is_socket():
            _remove_stale(path)
        listening.bind(str(path))
        path.chmod(mode)
        listening.listen(BACKLOG)
    except OSError as problem:
        listening.close()
        raise StartError(f"cannot listen on {path} (--unix-socket): {problem.strerror or problem}") from None
    finally:
        os.umask(before)
    listening.setblocking(False)
    return listening


def _remove_stale(path: Path) -> None:
    """Raises OSError if somebody listens there."""
    with socket.socket(socket.AF_UNIX) as caller:
        caller.setblocking(False)
        try:
            caller.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:  # listened on, and its backlog is full
            pass
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def remove_unix(listening: socket.socket) -> None:
    """Take the file of a UNIX socket away, at the end of who listens on it."""
    with suppress(OSError):
        Path(listening.getsockname()).unlink()


def url_of(name: str, bound: socket.socket, *, tls: bool) -> str:
    """Where clients find a socket of `listening`, for people."""
    if bound.family == socket.AF_UNIX:
        return f"unix:{bound.getsockname()}"
    host, port = bound.getsockname()[:2]
    url = f"http{'s' if tls else ''}://" + (f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    return f"{url} (admin)" if name.startswith("admin") else url


def is_open(settings: Settings) -> str:
    """Which option lets others than this machine's reach the gateway; empty if nothing does."""
    if settings.port is not None and not is_loopback(settings.host):
        return f"--host {settings.host}"
    if settings.admin_port is not None and not is_loopback(settings.admin_host):
        return f"--admin-host {settings.admin_host}"
    return ""


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
        file = LogFile(Path(path), settings.log_file_size, settings.log_files)
    except OSError as problem:
        raise StartError(f"cannot write the log file {path}: {problem.strerror}") from None
    return LineObserver(file, settings.log_format)


def check_pidfile(path: str | None) -> None:
    """Raises `StartError` where twistd itself would find out only as a daemon."""
    if path and not os.access(Path(path).absolute().parent, os.W_OK):
        raise StartError(f"cannot write the pidfile {path} (twistd --pidfile)")


def tell_running(settings: Settings, sockets: Mapping[str, socket.socket], what: str = "") -> None:
    """Said last: who reads it may send requests, and signals."""
    if not asks_for_keys(settings):
        where = settings.host if settings.port is not None else settings.unix_socket
        _log.warn("nobody is asked for a key: whoever reaches {where} may use all of it", where=where)
    _log.info(
        "inference-gateway {version} listens on {places}, backend {backend}{what}",
        version=__version__,
        places=", ".join(url_of(name, bound, tls=bool(settings.tls_cert)) for name, bound in sockets.items()),
        backend=", ".join(own.url for own in settings.backends) or "none: requests are echoed",
        what=what and f", {what}",
    )
