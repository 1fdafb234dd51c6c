"""What OpenTelemetry's own environment variables say.

Source: the specification's "Environment Variable Specification" and "OTLP Exporter Configuration". As it wants, a value
that makes no sense is a warning and counts as not given. OTLP goes over HTTP as protobuf.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from .trace_context import SAMPLERS

DEFAULT_ENDPOINT = "http://localhost:4318"


class Target(NamedTuple):
    """Where one signal goes. ``timeout`` in seconds for one request; ``compress`` with gzip."""

    url: str
    headers: tuple[tuple[str, str], ...]
    timeout: float
    compress: bool


class OtelSettings(NamedTuple):
    """``traces`` and ``metrics`` None: that signal does not leave. ``ratio`` and ``by_parent``: see `Tracing`. Times in
    seconds. ``queue``, ``batch``: spans that may wait, and that go in one request. ``warnings``: what made no sense."""

    traces: Target | None
    metrics: Target | None
    ratio: float
    by_parent: bool
    attributes: Mapping[str, str]
    delay: float
    queue: int
    batch: int
    export_timeout: float
    metric_interval: float
    warnings: tuple[str, ...]


def is_wanted(setting: str, environ: Mapping[str, str]) -> bool:
    """Whether there is telemetry: ``on``, ``off``, or ``auto`` if somebody says where it is to go."""
    if setting == "off" or environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    signals = ("", "TRACES_", "METRICS_")
    return setting == "on" or any(environ.get(f"OTEL_EXPORTER_OTLP_{signal}ENDPOINT") for signal in signals)


def read(environ: Mapping[str, str], version: str) -> OtelSettings:
    """The settings; ``version`` is the gateway's."""
    found = _Reader(environ)
    queue = found.number("OTEL_BSP_MAX_QUEUE_SIZE", 2048)
    ratio, by_parent = found.sampler()
    return OtelSettings(
        traces=found.target("traces"),
        metrics=found.target("metrics"),
        ratio=ratio,
        by_parent=by_parent,
        attributes=found.resource(version),
        delay=found.number("OTEL_BSP_SCHEDULE_DELAY", 5000) / 1000,
        queue=queue,
        batch=min(found.number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512), queue),
        export_timeout=found.number("OTEL_BSP_EXPORT_TIMEOUT", 30000) / 1000,
        metric_interval=found.number("OTEL_METRIC_EXPORT_INTERVAL", 60000) / 1000,
        warnings=tuple(found.warnings),
    )


class _Reader:
    """Reads variables, and notes what makes no sense. Values of headers, which may be secret, are never in a warning."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self.warnings: list[str] = []

    def text(self, name: str) -> str:
        return self._environ.get(name, "").strip()

    def number(self, name: str, default: int) -> int:
        """A whole number from 1 on."""
        text = self.text(name)
        if text and not (text.isascii() and text.isdigit() and int(text[:12]) > 0):
            self.warnings.append(f"{name} is not a whole number from 1 on: {default} is used")
            return default
        return int(text[:12]) if text else default

    def of_signal(self, signal: str, what: str) -> str:
        """A variable of the OTLP exporter: the signal's own, or that for all."""
        return self.text(f"OTEL_EXPORTER_OTLP_{signal.upper()}_{what}") or self.text(f"OTEL_EXPORTER_OTLP_{what}")

    def target(self, signal: str) -> Target | None:
        if self.text(f"OTEL_{signal.upper()}_EXPORTER").lower() == "none":
            return None
        own = self.text(f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT")
        url = own or f"{(self.text('OTEL_EXPORTER_OTLP_ENDPOINT') or DEFAULT_ENDPOINT).rstrip('/')}/v1/{signal}"
        if not _is_url(url):
            self.warnings.append(f"OTEL_EXPORTER_OTLP_ENDPOINT is not an http or https URL without credentials: no {signal}")
            return None
        if self.of_signal(signal, "PROTOCOL") not in {"", "http/protobuf"}:
            self.warnings.append("OTEL_EXPORTER_OTLP_PROTOCOL: only http/protobuf is there, and is used")
        compression = self.of_signal(signal, "COMPRESSION")
        return Target(url, self.headers(signal), self.timeout(signal), compression == "gzip")

    def timeout(self, signal: str) -> float:
        own = f"OTEL_EXPORTER_OTLP_{signal.upper()}_TIMEOUT"
        return self.number(own if self.text(own) else "OTEL_EXPORTER_OTLP_TIMEOUT", 10000) / 1000

    def headers(self, signal: str) -> tuple[tuple[str, str], ...]:
        own = f"OTEL_EXPORTER_OTLP_{signal.upper()}_HEADERS"
        pairs = self.pairs(own if self.text(own) else "OTEL_EXPORTER_OTLP_HEADERS")
        return tuple(
            (name.lower(), value) for name, value in pairs.items() if f"{name}{value}".isascii() and value.isprintable()
        )

    def pairs(self, name: str) -> dict[str, str]:
        """``a=b,c=d``, percent-encoded."""
        found: dict[str, str] = {}
        for pair in self.text(name).split(","):
            key, equals, value = pair.partition("=")
            if equals and key.strip():
                found[unquote(key.strip())] = unquote(value.strip())
            elif pair.strip():
                self.warnings.append(f"{name} has a part that is not name=value, which is left out")
        return found

    def resource(self, version: str) -> dict[str, str]:
        given = self.pairs("OTEL_RESOURCE_ATTRIBUTES")
        found = {"service.name": "inference-gateway", "service.version": version, **given}
        if self.text("OTEL_SERVICE_NAME"):
            found["service.name"] = self.text("OTEL_SERVICE_NAME")
        own = {"telemetry.sdk.name": "inference-gateway", "telemetry.sdk.language": "python", "telemetry.sdk.version": version}
        return {name: value for name, value in found.items() if name.isascii()} | own

    def sampler(self) -> tuple[float, bool]:
        name = self.text("OTEL_TRACES_SAMPLER").lower() or "parentbased_always_on"
        if name not in SAMPLERS:
            self.warnings.append("OTEL_TRACES_SAMPLER is none of " + ", ".join(SAMPLERS) + ": parentbased_always_on is used")
            name = "parentbased_always_on"
        ratio, by_parent = SAMPLERS[name]
        return self.ratio() if ratio is None else ratio, by_parent

    def ratio(self) -> float:
        text = self.text("OTEL_TRACES_SAMPLER_ARG")
        try:
            ratio = float(text or "1")
        except ValueError:
            ratio = -1.0
        if not 0.0 <= ratio <= 1.0:
            self.warnings.append("OTEL_TRACES_SAMPLER_ARG is not a number from 0 to 1: 1 is used")
            return 1.0
        return ratio


def _is_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.username is None and parts.port != 0
    except ValueError:
        return False
