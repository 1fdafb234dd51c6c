"""What OpenTelemetry's own environment variables say to us; all others (endpoints, headers, certificates, compression,
timeouts, the resource) the SDK's exporters read for themselves.

Source: the specification's "Environment Variable Specification". As it wants, a value that makes no sense is a warning and
counts as not given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from .trace_context import SAMPLERS

QUEUE = 8192
"""Spans, where the specification has 2048: two seconds of a busy gateway."""

BATCH = 128
"""Spans, where the specification has 512: to put together so many keeps the interpreter for 12 ms, and 128 for 2."""

Signal = Literal["traces", "metrics"]
Protocol = Literal["http/protobuf", "grpc"]


class OtelSettings(NamedTuple):
    """``traces`` and ``metrics``: how that signal leaves; None if it does not. ``ratio`` and ``by_parent``: see `Tracing`.
    Times in seconds. ``queue``, ``batch``: spans that may wait, and that go in one request. ``warnings``: what made no
    sense."""

    traces: Protocol | None
    metrics: Protocol | None
    ratio: float
    by_parent: bool
    delay: float
    queue: int
    batch: int
    metric_interval: float
    warnings: tuple[str, ...]


def is_wanted(setting: str, environ: Mapping[str, str]) -> bool:
    """Whether there is telemetry: ``on``, ``off``, or ``auto`` if somebody says where it is to go."""
    if setting == "off" or environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    signals = ("", "TRACES_", "METRICS_")
    return setting == "on" or any(environ.get(f"OTEL_EXPORTER_OTLP_{signal}ENDPOINT") for signal in signals)


def read(environ: Mapping[str, str]) -> OtelSettings:
    """The settings."""
    found = _Reader(environ)
    queue = found.number("OTEL_BSP_MAX_QUEUE_SIZE", QUEUE)
    ratio, by_parent = found.sampler()
    return OtelSettings(
        traces=found.protocol("traces"),
        metrics=found.protocol("metrics"),
        ratio=ratio,
        by_parent=by_parent,
        delay=found.number("OTEL_BSP_SCHEDULE_DELAY", 5000) / 1000,
        queue=queue,
        batch=min(found.number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", BATCH), queue),
        metric_interval=found.number("OTEL_METRIC_EXPORT_INTERVAL", 60000) / 1000,
        warnings=tuple(found.warnings),
    )


class _Reader:
    """Reads variables, and notes what makes no sense."""

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

    def protocol(self, signal: Signal) -> Protocol | None:
        if self.text(f"OTEL_{signal.upper()}_EXPORTER").lower() == "none":
            return None
        own = f"OTEL_EXPORTER_OTLP_{signal.upper()}_PROTOCOL"
        found = self.text(own) or self.text("OTEL_EXPORTER_OTLP_PROTOCOL")
        if found == "grpc":
            return "grpc"
        if found not in {"", "http/protobuf"}:
            self.warnings.append("OTEL_EXPORTER_OTLP_PROTOCOL is neither http/protobuf, which is used, nor grpc")
        return "http/protobuf"

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
