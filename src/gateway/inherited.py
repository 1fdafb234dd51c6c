"""What a gateway's process gets from whoever started it: sockets that listen already, and whom to tell that it runs.

systemd hands sockets over as sd_listen_fds(3) says. A gateway that starts another one, as its worker or in its own place,
puts what it hands over into one variable of the environment.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from typing import Any, Final

import msgspec
from twisted.internet.endpoints import serverFromString

VARIABLE: Final = "INFERENCE_GATEWAY_INHERITED"
NAMES: Final = ("http", "admin", "unix")
"""What each socket is for."""

_READY: Final = b"READY=1\n"


class Inherited(msgspec.Struct, frozen=True, omit_defaults=True):
    """The numbers of open files, and what else this process is told.

    ``by_systemd``: units say where the sockets are, and not the settings. ``ready``: `tell_ready` writes there, and a worker
    that it is alive. ``starter``: at its end of file whoever started this process is gone. ``stderr``: takes the place of
    standard error once this process runs. ``worker`` is which of ``workers`` this one is, and in ``shares`` each of them says
    how many connections it has; ``pidfile`` is to name this process once it runs.
    """

    sockets: dict[str, int] = {}
    by_systemd: bool = False
    ready: int | None = None
    starter: int | None = None
    stderr: int | None = None
    worker: int | None = None
    workers: int = 1
    shares: int | None = None
    pidfile: str = ""

    @property
    def is_started(self) -> bool:
        """Another gateway has started this one, and files may be in use by it."""
        return self.ready is not None

    def shown(self) -> str:
        """As `VARIABLE` has it."""
        return msgspec.json.encode(self).decode("ascii")

    def tell_ready(self) -> None:
        """Tell whoever started this process that it runs."""
        if self.ready is not None:
            with suppress(BrokenPipeError):  # whoever that was is gone; a worker sees that in another way too
                os.write(self.ready, _READY)
            if self.worker is None:
                os.close(self.ready)
        if self.stderr is not None:
            os.dup2(self.stderr, 2)
            os.close(self.stderr)


NOTHING: Final = Inherited()


def inherit(environ: MutableMapping[str, str], reactor: Any) -> Inherited:
    """What this process gets; the environment's variables of it are taken away, as they are not for others. Raises ValueError
    if it is not clear what a socket is for."""
    own = environ.pop(VARIABLE, None)
    if own is not None:
        return msgspec.json.decode(own, type=Inherited)
    names = environ.pop("LISTEN_FDNAMES", "")
    numbers = _from_systemd(reactor) if names else []  # none if they are another process's
    return Inherited(_places(numbers, names.split(":")), by_systemd=True) if numbers else NOTHING


def _from_systemd(reactor: Any) -> list[int]:
    """Twisted reads the other two variables, LISTEN_PID and LISTEN_FDS, when it is imported, and takes them away."""
    found: list[int] = []
    with suppress(IndexError):
        while True:
            endpoint: Any = serverFromString(reactor, f"systemd:domain=INET:index={len(found)}")
            found.append(endpoint.fileno)
    return found


def _places(numbers: list[int], names: list[str]) -> dict[str, int]:
    """Names that say what a socket is for count; the others are "http" and "admin" in the order of the unit file."""
    found: dict[str, int] = {}
    for number, given in zip(numbers, names, strict=True):
        free = ("unix",) if _family(number) == socket.AF_UNIX else NAMES[:2]
        name = given if given in NAMES else next((one for one in free if one not in found), given)
        if name in found or name not in NAMES:
            raise ValueError(f"systemd's socket '{name}': name each of them http, admin or unix, once (FileDescriptorName=)")
        found[name] = number
    return found


def _family(number: int) -> int:
    with socket.socket(fileno=os.dup(number)) as probe:
        return probe.family


def sockets_of(numbers: Mapping[str, int]) -> dict[str, socket.socket]:
    """The sockets behind these numbers; raises OSError for one that is none, or does not listen."""
    found: dict[str, socket.socket] = {}
    for name, number in numbers.items():
        one = socket.socket(fileno=number)
        if not one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise OSError(f"file {number} ({name}) is no socket that listens")
        one.set_inheritable(False)
        one.setblocking(False)
        found[name] = one
    return found
