from __future__ import annotations

import pytest

from gateway.core.otel_settings import Target, is_wanted, read

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


def test_by_default_everything_goes_to_this_machine() -> None:
    found = read({}, "1.2")
    assert found.traces == Target("http://localhost:4318/v1/traces", (), 10.0, False)
    assert found.metrics == Target("http://localhost:4318/v1/metrics", (), 10.0, False)
    assert (found.ratio, found.by_parent) == (1.0, True)
    assert (found.delay, found.queue, found.batch, found.export_timeout, found.metric_interval) == (5.0, 2048, 512, 30.0, 60.0)
    assert (found.attributes["service.name"], found.attributes["service.version"]) == ("inference-gateway", "1.2")
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
    found = read(
        {
            ENDPOINT: "http://all:4318/",
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://own/as-it-is",
            "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20x,X-A=1",
            "OTEL_EXPORTER_OTLP_METRICS_HEADERS": "x-b=2",
            "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": "2500",
            "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
            "OTEL_EXPORTER_OTLP_METRICS_COMPRESSION": "none",
        },
        "1",
    )
    assert found.traces == Target("https://own/as-it-is", (("authorization", "Bearer x"), ("x-a", "1")), 2.5, True)
    assert found.metrics == Target("http://all:4318/v1/metrics", (("x-b", "2"),), 10.0, False)


def test_a_signal_may_be_off() -> None:
    found = read({"OTEL_TRACES_EXPORTER": "none", "OTEL_METRICS_EXPORTER": "otlp"}, "1")
    assert found.traces is None
    assert found.metrics is not None


def test_who_sends() -> None:
    given = {"OTEL_RESOURCE_ATTRIBUTES": "service.name=a,deployment.environment.name=lab%2C1", "OTEL_SERVICE_NAME": "b"}
    found = read(given, "1").attributes
    assert (found["service.name"], found["deployment.environment.name"]) == ("b", "lab,1")
    assert read({"OTEL_RESOURCE_ATTRIBUTES": "service.name=a"}, "1").attributes["service.name"] == "a"


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
    found = read({"OTEL_TRACES_SAMPLER": name, "OTEL_TRACES_SAMPLER_ARG": argument}, "1")
    assert (found.ratio, found.by_parent, found.warnings) == (ratio, by_parent, ())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_TRACES_SAMPLER", "jaeger_remote"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "-1"),
        ("OTEL_BSP_SCHEDULE_DELAY", "soon"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "0"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "1.5"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "\u0661"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_RESOURCE_ATTRIBUTES", "=1"),
    ],
)
def test_what_makes_no_sense_is_a_warning_and_the_default_stands(name: str, value: str) -> None:
    found = read({name: value}, "1")
    assert found.warnings
    assert all(name in warning for warning in found.warnings)
    assert found._replace(warnings=()) == read({}, "1")


@pytest.mark.parametrize("url", ["collector:4317", "grpc://c", "http://", "http://user:secret@c", "http://[", "http://c:99999"])
def test_an_address_that_is_none_turns_the_signal_off_and_is_not_repeated(url: str) -> None:
    found = read({ENDPOINT: url}, "1")
    assert found.traces is None
    assert found.metrics is None
    assert "secret" not in str(found.warnings)


def test_headers_that_are_none_are_left_out_in_silence_about_their_values() -> None:
    found = read({"OTEL_EXPORTER_OTLP_HEADERS": "secret-without-name,a=b%0d%0ac,d=e"}, "1")
    assert found.traces is not None
    assert found.traces.headers == (("d", "e"),)
    assert "secret" not in str(found.warnings)


def test_a_ratio_that_is_none_is_one() -> None:
    for text in ("x", "-1", "1.5", "nan"):
        found = read({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": text}, "1")
        assert (found.ratio, len(found.warnings)) == (1.0, 1)
