"""What stands between a listening socket and the `Server` behind it: TLS, and the word of proxies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from .core.forwarded import Proxies
from .core.readers import SettingsError
from .core.settings import Settings
from .net.proxied import Proxied
from .net.server import Server
from .net.tls import Identities, Identity, TLSFactory, identity
from .watched import InThread, Watched

MAX_PEM: Final = 4 * 1024 * 1024

_log: Final = Logger("gateway.edge")


class Edge(Collector):
    """Makes of each `Server` what listens, by the names of `process.listening`. ``wall`` gives seconds since 1970. A metrics
    collector. Raises `SettingsError`."""

    def __init__(
        self,
        settings: Settings,
        server: Server,
        admin: Server,
        clock: IReactorTime,
        wall: Callable[[], float],
        in_thread: InThread,
    ) -> None:
        self._identities = Identities()
        self._proxied: Proxied | None = None
        self.factories: dict[str, Any] = {"http": server, "unix": server, "admin": admin}
        self._watched: Watched[Identity] | None = None
        self._wall = wall
        if settings.tls_cert:
            self._watched = self._watch(settings, clock, in_thread)
            for name in ("http", "admin"):
                self.factories[name] = TLSFactory(self._identities, False, self.factories[name], clock)
        if settings.proxy_protocol and settings.trusted_proxies:
            proxies = Proxies(settings.trusted_proxies)
            self._proxied = Proxied(self.factories["http"], proxies, clock, settings.max_connections)
            self.factories["http"] = self._proxied

    def _watch(self, settings: Settings, clock: IReactorTime, in_thread: InThread) -> Watched[Identity]:
        files = _files_of(settings)
        paths = list(dict.fromkeys(file for file in files if file is not None))

        def told(found: Identity) -> str:
            return f"certificate of {found.subject}, good until {found.not_after:%Y-%m-%d %H:%M} UTC"

        return Watched(paths, clock, lambda: _identity(*files), self._use, in_thread, told=told, what="certificates")

    def start(self) -> None:
        """Read the certificate's files again when they change."""
        if self._watched is not None:
            self._watched.startService()

    def stop(self) -> None:
        """No longer."""
        if self._watched is not None:
            self._watched.stopService()

    def _use(self, found: Identity) -> None:
        now = datetime.fromtimestamp(self._wall(), UTC)
        if not found.not_before <= now <= found.not_after:
            span = f"good from {found.not_before:%Y-%m-%d} to {found.not_after:%Y-%m-%d}"
            _log.warn("the certificate of {subject} is {span}: clients will refuse it", subject=found.subject, span=span)
        self._identities.now = found

    def collect(self) -> Iterator[Metric]:
        """When the certificate ends, and how many came without a header of the PROXY protocol."""
        if self._watched is not None:
            name = "gateway_tls_certificate_not_after_seconds"
            yield GaugeMetricFamily(
                name, "When the certificate expires, since 1970.", value=self._identities.now.not_after.timestamp()
            )
        if self._proxied is not None:
            name = "gateway_proxy_protocol_refused"
            yield CounterMetricFamily(name, "Connections without a valid PROXY header.", value=self._proxied.refused)


def check_files(settings: Settings) -> None:
    """Raises `SettingsError` if clients could not be shown what the files have."""
    if settings.tls_cert:
        _identity(*_files_of(settings))


def _files_of(settings: Settings) -> tuple[Path, Path, Path | None]:
    """Of the certificate, its key, and the authorities of clients. A daemon changes its directory."""
    cert, ca = settings.tls_cert or "", settings.tls_client_ca
    return Path(cert).absolute(), Path(settings.tls_key or cert).absolute(), Path(ca).absolute() if ca else None


def _identity(chain: Path, key: Path, ca: Path | None) -> Identity:
    try:
        return identity(_read(chain), _read(key), _read(ca) if ca else None)
    except SettingsError:
        raise
    except ValueError as problem:
        paths = dict.fromkeys(str(file) for file in (chain, key, ca) if file is not None)
        raise SettingsError(f"{', '.join(paths)}: {problem}") from None


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_PEM)
    except OSError as problem:
        raise SettingsError(f"{path}: cannot be read: {problem.strerror or problem}") from None
