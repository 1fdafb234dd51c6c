"""How the settings of where clients come in are read, and which of them go together."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from . import readers
from .forwarded import UNIX

if TYPE_CHECKING:
    from .settings import Settings

_PORT: Final = readers.whole_number(0, 65535)
MAX_UNIX_PATH: Final = 107
"""Bytes of a path in Linux' sockaddr_un, less the zero at its end."""


def port(value: Any) -> int | None:
    """A TCP port, or None for ``off``."""
    if str(value).strip().lower() == "off":
        return None
    try:
        found: int = _PORT(value)
    except ValueError as problem:
        raise ValueError(f"{problem}, or off") from None
    return found


def unix_path(value: Any) -> str:
    """Where a UNIX socket is to be."""
    path = readers.text(value)
    if not 0 < len(path.encode("utf-8")) <= MAX_UNIX_PATH or path.endswith("/"):
        raise ValueError(f"the path of a socket, of at most {MAX_UNIX_PATH} bytes")
    return path


def mode(value: Any) -> int:
    """The permissions of a file, in octal."""
    if not isinstance(value, str) or not re.fullmatch(r"0?[0-7]{3}", value.strip()):
        raise ValueError("a mode in octal such as '0660'")
    return int(value, 8)


def problem(settings: Settings) -> str | None:
    """What of these settings does not go together, and the remedy."""
    if settings.port is None and settings.unix_socket is None:
        return "--port off: give GATEWAY_UNIX_SOCKET, or a port"
    if settings.admin_port and settings.admin_port == settings.port:
        return f"--admin-port {settings.admin_port}: is the --port too: give another one"
    if not settings.tls_cert:
        for option, value in (("--tls-key", settings.tls_key), ("--tls-client-ca", settings.tls_client_ca)):
            if value:
                return f"{option}: is of no use without GATEWAY_TLS_CERT"
    if settings.proxy_protocol and not any(one != UNIX for one in settings.trusted_proxies or ()):
        return "--proxy-protocol: name the proxies in GATEWAY_TRUSTED_PROXIES: nobody else may say whose a connection is"
    return None
