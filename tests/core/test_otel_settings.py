from __future__ import annotations

import pytest

from gateway.core.otel_settings import is_wanted, read

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


def test_the_defaults_are_the_specifications_but_for_the_queues() -> None:
    found = read({})
    assert (found.traces, found.metrics) == ("http/protobuf", "http/protobuf")
    assert (found.ratio, found.by_parent) == (1.0, True)
    assert (found.delay, found.queue, found.batch, found.metric_interval) == (5.0, 8192, 128, 60.0)
    assert found.warnings == ()


@pytest.mark.parametrize(
    ("setting", "environ", "wanted"),
    [
        ("auto", {}, False),
        ("auto", {ENDPOINT: "http://c:4318"}, True),
        ("auto", {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c/x"}, True),
        ("auto", {ENDPOINT: "http://c", "OTEL_SDK_DISABLED": "TRUE"}, False),
        ("auto", {ENDPOINT: "http://c", "OTEL_SDK_DISABLED": "1"}, True),
        ("on", {}, True),
        ("on", {"OTEL_SDK_DISABLED": "true"}, False),
        ("off", {ENDPOINT: "http://c"}, False),
    ],
)
def test_it_is_on_when_somebody_says_where_to(setting: str, environ: dict[str, str], wanted: bool) -> None:
    assert is_wanted(setting, environ) is wanted


def test_a_signals_own_variable_goes_before_that_for_all() -> None:
    found = read({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "http/protobuf"})
    assert (found.traces, found.metrics) == ("grpc", "http/protobuf")


def test_a_signal_may_be_off() -> None:
    found = read({"OTEL_TRACES_EXPORTER": "none", "OTEL_METRICS_EXPORTER": "otlp"})
    assert found.traces is None
    assert found.metrics is not None


@pytest.mark.parametrize(
    ("name", "argument", "ratio", "by_parent"),
    [
        ("always_on", "", 1.0, False),
        ("always_off", "", 0.0, False),
        ("traceidratio", "0.25", 0.25, False),
        ("parentbased_always_off", "", 0.0, True),
        ("parentbased_traceidratio", "0.5", 0.5, True),
        ("TraceIdRatio", "", 1.0, False),
    ],
)
def test_samplers(name: str, argument: str, ratio: float, by_parent: bool) -> None:
    found = read({"OTEL_TRACES_SAMPLER": name, "OTEL_TRACES_SAMPLER_ARG": argument})
    assert (found.ratio, found.by_parent, found.warnings) == (ratio, by_parent, ())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_TRACES_SAMPLER", "jaeger_remote"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "-1"),
        ("OTEL_BSP_SCHEDULE_DELAY", "soon"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "0"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "1.5"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "\u0661"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
    ],
)
def test_what_makes_no_sense_is_a_warning_and_the_default_stands(name: str, value: str) -> None:
    found = read({name: value})
    assert found.warnings
    assert all(name in warning for warning in found.warnings)
    assert found._replace(warnings=()) == read({})


def test_a_ratio_that_is_none_is_one() -> None:
    for text in ("x", "-1", "1.5", "nan"):
        found = read({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": text})
        assert (found.ratio, len(found.warnings)) == (1.0, 1)
