"""The proxies that are measured: the gateway's variants, and the peers that this machine has."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.processes import BenchFailed, Cores, family, free_port, running, wait_until_ready
from bench.wire import KEY, chat_request

GATEWAY = "gateway"
"""The variant that the others are compared with."""
ROUTERS = ("sglang-router", "vllm-router")
"""The peers that are made for the same purpose."""
READY_TIMEOUT = 60.0


@dataclass(frozen=True)
class Variant:
    """The gateway with other settings than its defaults; ``{backend}`` in one is the backend's URL."""

    environment: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    """By name, in the directory that it runs in."""


_KEY = f'[[keys]]\nid = "bench"\ntenant = "bench"\nhash = "{sha256(KEY.encode()).hexdigest()}"\n'
_LEDGER = {"GATEWAY_LEDGER": "usage.sqlite"}
_OTEL = {"OTEL_EXPORTER_OTLP_ENDPOINT": "{backend}"}  # which takes whatever it is sent for a request, and answers it
_LIMITS = "rpm = 1000000000\ntpm = 1000000000000\nconcurrency = 1000000\n"

VARIANTS = {
    GATEWAY: Variant(),
    "gateway+json": Variant({"GATEWAY_LOG_FORMAT": "json"}),
    "gateway+keys": Variant(options=("--keys", "keys.toml"), files={"keys.toml": _KEY}),
    "gateway+limits": Variant(options=("--keys", "keys.toml"), files={"keys.toml": _KEY + _LIMITS}),
    "gateway+ledger": Variant(_LEDGER),
    "gateway+otel": Variant(_OTEL),
    "gateway+all": Variant(_LEDGER | _OTEL, ("--keys", "keys.toml"), {"keys.toml": _KEY + _LIMITS}),
}
"""To measure what a part costs, give it a row. Names have no commas: --proxies takes them in a list.

What is set in the environment of the benchmark holds for all of them.
"""

NGINX = """
worker_processes 1; daemon off; pid {run}/pid; error_log stderr error; worker_rlimit_nofile {files};
events {{ worker_connections {files}; }}
http {{
  access_log off; keepalive_requests 1000000000; keepalive_timeout 3600;
  client_body_temp_path {run}/client; proxy_temp_path {run}/proxy; fastcgi_temp_path {run}/fastcgi;
  uwsgi_temp_path {run}/uwsgi; scgi_temp_path {run}/scgi;
  # A prompt of a MiB stays in memory, as it does in the others.
  client_max_body_size 32m; client_body_buffer_size 2m;
  upstream backend {{ server 127.0.0.1:{backend}; keepalive 4096; keepalive_requests 1000000000; keepalive_timeout 3600; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://backend; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_read_timeout 3600;
    }}
  }}
}}
"""

HAPROXY = """
global
  nbthread 1
  maxconn {connections}
defaults
  mode http
  option http-keep-alive
  option http-no-delay
  http-reuse always
  timeout connect 5s
  timeout client 3600s
  timeout server 3600s
  timeout http-keep-alive 3600s
frontend front
  bind 127.0.0.1:{port} backlog 4096
  default_backend back
backend back
  server one 127.0.0.1:{backend} pool-max-conn -1
"""


@dataclass(frozen=True)
class Place:
    """Where a proxy is to run."""

    program: str
    port: int
    backend: int
    run: Path
    files: int

    @property
    def backend_url(self) -> str:
        """As most of them want it."""
        return f"http://127.0.0.1:{self.backend}"


def _nginx(place: Place) -> list[str]:
    file = place.run / "nginx.conf"
    file.write_text(NGINX.format(**vars(place)))
    return [place.program, "-c", str(file), "-e", "stderr"]


def _haproxy(place: Place) -> list[str]:
    file = place.run / "haproxy.cfg"
    file.write_text(HAPROXY.format(connections=place.files // 2 - 100, **vars(place)))
    return [place.program, "-db", "-f", str(file)]


def _router(place: Place, *more: str) -> list[str]:
    # Their metrics have a port of their own, and one of them opens it to the world.
    where = ["--host", "127.0.0.1", "--port", str(place.port), "--worker-urls", place.backend_url]
    metrics = ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
    return [place.program, *more, *where, *metrics, "--policy", "round_robin"]


def _sglang(place: Place) -> list[str]:
    return [*_router(place, "launch"), "--log-level", "warn"]


def _vllm(place: Place) -> list[str]:
    return [*_router(place), "--log-level", "warning"]


PEERS: dict[str, Callable[[Place], list[str]]] = {
    "nginx": _nginx,
    "haproxy": _haproxy,
    "sglang-router": _sglang,
    "vllm-router": _vllm,
}


@dataclass(frozen=True)
class Proxy:
    """Something to measure: a program, and how it is started."""

    name: str
    program: str
    command: Callable[[Place], list[str]]
    environment: Callable[[Place], Mapping[str, str]] = lambda _: {}


def _gateway(name: str, variant: Variant, twistd: str) -> Proxy:
    def command(place: Place) -> list[str]:
        for file, text in variant.files.items():
            (place.run / file).write_text(text)
        return [place.program, "-n", "--pidfile=", "--logfile=gateway.log", "inference-gateway", *variant.options]

    def environment(place: Place) -> dict[str, str]:
        own = {name: value.format(backend=place.backend_url) for name, value in variant.environment.items()}
        return {"BACKEND_URL": place.backend_url, "PORT": str(place.port), **own}

    return Proxy(name, twistd, command, environment)


def _search_path(directory: str | None) -> str:
    """Where programs are: a directory that was named, beside Python, and where the shell finds them."""
    usual = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), "/usr/sbin"]
    return os.pathsep.join([directory, *usual] if directory else usual)


def found(directory: str | None) -> tuple[list[Proxy], list[str]]:
    """(proxies, names of peers that this machine does not have)."""
    path = _search_path(directory)
    twistd = shutil.which("twistd", path=str(Path(sys.executable).parent)) or shutil.which("twistd")
    if twistd is None:
        raise BenchFailed("there is no twistd beside this Python: `make bench` uses the right one")
    proxies = [_gateway(name, variant, twistd) for name, variant in VARIANTS.items()]
    missing = []
    for name, command in PEERS.items():
        if program := shutil.which(name, path=path):
            proxies.append(Proxy(name, program, command))
        else:
            missing.append(name)
    return proxies, missing


@dataclass(frozen=True)
class Running:
    """A proxy that answers."""

    name: str
    port: int
    pids: list[int]
    """It and its children."""


@contextmanager
def started(proxy: Proxy, backend: int, stream: bool, cores: Cores, files: int) -> Iterator[Running]:
    """A proxy before this backend, ready, for as long as the block lasts."""
    with TemporaryDirectory(prefix="bench-") as name:
        run = Path(name)
        run.chmod(0o755)  # nginx, started as root, has workers that are not
        place = Place(proxy.program, free_port(), backend, run, files)
        with running(proxy.command(place), cores.proxy, run / "output.log", run, proxy.environment(place)) as process:
            wait_until_ready(proxy.name, process, place.port, chat_request(64, stream), run, READY_TIMEOUT)
            yield Running(proxy.name, place.port, family(process.pid))
