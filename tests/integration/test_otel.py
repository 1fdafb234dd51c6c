"""What an OpenTelemetry collector gets from a real gateway."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .asking import DONE, HELLO, STREAM, Asking, Request, answers, ask, metric, streams, table
from .backends import Connection, backend, completion, event
from .collector import collector, over_grpc, tree, values
from .processes import PATIENCE, Running, free_port, wait_for

GOLDEN = Path(__file__).with_name("golden")
TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"


@contextmanager
def gateway(directory: Path, backends: str, *options: str, **environment: str) -> Iterator[Running]:
    """One whose backends are in order, so that no request waits for that."""
    (directory / "gateway.toml").write_text(backends)
    with Running(directory, "--config", "gateway.toml", *options, **environment) as running:
        wait_for(lambda: all(one["state"] == "healthy" for one in running.get("/metrics")[1]["backends"]))
        yield running


def is_golden(name: str, spans: list[Any], **names: object) -> None:
    """The spans are as in the file, with names for what another run would not have."""
    path = GOLDEN / f"{name}.txt"
    found = tree(spans, {str(what): f"<{called}>" for called, what in names.items()}) + "\n"
    assert found == path.read_text()


def spans_of(running: Running, outcome: str) -> float:
    return metric(running, f'gateway_otel_spans_total{{outcome="{outcome}"}}')


def in_order(spans: list[Any]) -> bool:
    """Each span lies within its parent, but for the clock's last digits."""
    by_id = {span.span_id: span for span in spans}
    for span in spans:
        assert span.start_time_unix_nano <= span.end_time_unix_nano
        parent = by_id.get(span.parent_span_id)
        if parent is not None:
            assert parent.start_time_unix_nano <= span.start_time_unix_nano + 1000
            assert span.end_time_unix_nano <= parent.end_time_unix_nano + 1000
    return True


def test_a_plain_request(tmp_path: Path) -> None:
    with collector() as receiver, backend(answers) as server:
        with gateway(tmp_path, table("a", server.url), **receiver.environment()) as running:
            body = {**HELLO, "max_tokens": 9, "temperature": 0.5, "top_p": 1}
            parent = f"00-{TRACE}-{SPAN}-01"
            assert ask(running, body, x_request_id="plain", traceparent=parent, tracestate="v=1").status == 200
            spans = receiver.trace("plain")
            is_golden("plain", spans, gateway=running.port, a=server.url.rpartition(":")[2])
    assert in_order(spans)
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    assert spans[0].parent_span_id.hex() == SPAN
    assert spans[0].trace_state == "v=1"
    sent = server.posts[0][1]
    assert sent[b"traceparent"].decode() == f"00-{TRACE}-{spans[-1].span_id.hex()}-01"
    assert sent[b"tracestate"] == b"v=1"
    assert receiver.resources[0]["service.name"] == "inference-gateway"
    assert set(receiver.metrics) >= {"gen_ai.client.token.usage", "gen_ai.client.operation.duration"}  # said at the end


def test_a_stream(tmp_path: Path) -> None:
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2,"total_tokens":9}}\n\n'
    with collector() as receiver, backend(streams("one", "two", usage=usage)) as server:
        with gateway(tmp_path, table("a", server.url), **receiver.environment()) as running:
            ask(running, STREAM, x_request_id="stream")
            spans = receiver.trace("stream")
            is_golden("stream", spans, gateway=running.port, a=server.url.rpartition(":")[2])
    assert in_order(spans)
    server_span, operation, _ = spans
    assert server_span.parent_span_id == b""
    first = next(one for one in operation.events if one.name == "gateway.first_token")
    assert operation.start_time_unix_nano <= first.time_unix_nano <= operation.end_time_unix_nano
    assert "gen_ai.server.time_to_first_token" in receiver.metrics


def test_a_retry_on_another_backend(tmp_path: Path) -> None:
    posts: list[bytes] = []

    def first_fails(connection: Connection, request: Request) -> None:
        posts.append(request[1][b"traceparent"])
        connection.answer(completion()) if len(posts) > 1 else connection.answer(b"{}", b"500 Oops")

    with collector() as receiver, backend(first_fails) as one, backend(first_fails) as other:
        tables = table("b1", one.url) + table("b2", other.url)
        with gateway(tmp_path, tables, **receiver.environment()) as running:
            reply = ask(running, x_request_id="retry")
            spans = receiver.trace("retry")
            ports = {"b1": one.url.rpartition(":")[2], "b2": other.url.rpartition(":")[2]}
            last = reply.backend
            first = "b1" if last == "b2" else "b2"
            names = {
                "gateway": running.port,
                "first-port": ports[first],
                "last-port": ports[last],
                "first": first,
                "last": last,
            }
            is_golden("retry", spans, **names)
    assert in_order(spans)
    assert [parent.decode().split("-")[2] for parent in posts] == [span.span_id.hex() for span in spans[2:]]


def test_a_client_that_leaves(tmp_path: Path) -> None:
    def forever(connection: Connection, _: Request) -> None:
        connection.start_stream()
        connection.chunk(event("one"))
        connection.gone()

    with collector() as receiver, backend(forever) as server:
        with gateway(tmp_path, table("a", server.url), **receiver.environment()) as running:
            client = running.connect()
            body = json.dumps(STREAM).encode()
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: g\r\nX-Request-ID: left\r\nContent-Length: %d\r\n\r\n"
            client.sendall(head % len(body) + body)
            while b"one" not in client.recv(65536):
                pass
            client.close()
            spans = receiver.trace("left")
            is_golden("client-left", spans, gateway=running.port, a=server.url.rpartition(":")[2])
            assert metric(running, "gateway_backend_cancel_seconds_count") == 1
            assert 0 < metric(running, "gateway_backend_cancel_seconds_sum") < PATIENCE
    assert in_order(spans)


def test_a_full_queue(tmp_path: Path) -> None:
    release = threading.Event()

    def holds(connection: Connection, _: Request) -> None:
        release.wait(30)
        connection.answer(completion())

    with collector() as receiver, backend(holds) as server:
        environment = receiver.environment(GATEWAY_QUEUE_REQUESTS="1")
        with gateway(tmp_path, table("a", server.url, slots=1), **environment) as running:
            first = Asking(running)
            wait_for(lambda: server.posts)
            second = Asking(running, x_request_id="waited")
            wait_for(lambda: running.get("/metrics")[1]["queued"] == 1)
            assert ask(running, x_request_id="full").code == "queue_full"
            release.set()
            assert (first.reply().status, second.reply().status) == (200, 200)
            port = server.url.rpartition(":")[2]
            is_golden("queue-full", receiver.trace("full"), gateway=running.port, a=port)
            spans = receiver.trace("waited")
            is_golden("waited", spans, gateway=running.port, a=port)
    attempt, waited = spans[-1], spans[1].events[0]
    assert waited.time_unix_nano == attempt.start_time_unix_nano
    assert values(waited.attributes)["gateway.queue.wait"] > 0


def test_an_error_in_mid_stream(tmp_path: Path) -> None:
    def breaks(connection: Connection, _: Request) -> None:
        connection.start_stream()
        connection.chunk(event("one"))
        connection.reset()

    with collector() as receiver, backend(breaks) as server:
        with gateway(tmp_path, table("a", server.url), **receiver.environment()) as running:
            assert DONE not in ask(running, STREAM, x_request_id="broke").body
            spans = receiver.trace("broke")
            is_golden("mid-stream", spans, gateway=running.port, a=server.url.rpartition(":")[2])
    assert in_order(spans)


def test_what_has_no_route_has_one_span(tmp_path: Path) -> None:
    with collector() as receiver, backend(answers) as server:
        with gateway(tmp_path, table("a", server.url), **receiver.environment()) as running:
            ask(running, path="/nowhere?token=secret", x_request_id="lost")
            spans = receiver.trace("lost")
            is_golden("no-route", spans, gateway=running.port)


@pytest.mark.parametrize(
    "environment",
    [
        {"OTEL_TRACES_SAMPLER": "always_off"},
        {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0"},
        {"OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_SDK_DISABLED": "true"},
        {"GATEWAY_OTEL": "off"},
    ],
    ids=str,
)
def test_what_nobody_wants_is_not_sent(tmp_path: Path, environment: dict[str, str]) -> None:
    with collector() as receiver, backend(answers) as server:
        sent = receiver.environment(**{"OTEL_METRICS_EXPORTER": "none"} | environment)
        with gateway(tmp_path, table("a", server.url), "--log-format", "json", **sent) as running:
            parent = f"00-{TRACE}-{SPAN}-01"
            assert ask(running, x_request_id="quiet", traceparent=parent).status == 200
            assert running.access("quiet")["trace_id"] == TRACE
    assert server.posts[0][1][b"traceparent"].decode() == parent  # its caller's trace goes on
    assert receiver.requests == []


def test_a_caller_that_does_not_record_is_followed(tmp_path: Path) -> None:
    with collector() as receiver, backend(answers) as server:
        with gateway(tmp_path, table("a", server.url), "--log-format", "json", **receiver.environment()) as running:
            parent = f"00-{TRACE}-{SPAN}-00"
            ask(running, x_request_id="unsampled", traceparent=parent)
            ask(running, x_request_id="sampled")
            assert len(receiver.trace("sampled")) == 3
            line = running.access("unsampled")
    assert (line["trace_id"], line["span_id"]) == (TRACE, SPAN)
    assert server.posts[0][1][b"traceparent"].decode() == parent
    assert TRACE not in {span.trace_id.hex() for span in receiver.spans}


def test_the_log_line_names_the_span(tmp_path: Path) -> None:
    with collector() as receiver, backend(answers) as server:
        with gateway(tmp_path, table("a", server.url), "--log-format", "json", **receiver.environment()) as running:
            ask(running, x_request_id="r")
            line = running.access("r")
            span = receiver.trace("r")[0]
    assert (line["trace_id"], line["span_id"]) == (span.trace_id.hex(), span.span_id.hex())


def test_headers_and_compression_are_as_the_variables_say(tmp_path: Path) -> None:
    more = {"OTEL_EXPORTER_OTLP_HEADERS": "x-team=a%20b", "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip", "OTEL_SERVICE_NAME": "edge"}
    with collector() as receiver, backend(answers) as server:
        with gateway(tmp_path, table("a", server.url), **receiver.environment(**more)) as running:
            ask(running, x_request_id="r")
            assert len(receiver.trace("r")) == 3
    path, headers = receiver.requests[0]
    assert (path, headers["x-team"], headers["content-encoding"]) == ("/v1/traces", "a b", "gzip")
    assert receiver.resources[0]["service.name"] == "edge"


def test_spans_and_metrics_over_grpc(tmp_path: Path) -> None:
    with collector() as receiver, over_grpc(receiver) as url, backend(answers) as server:
        more = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": url,
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
            "OTEL_EXPORTER_OTLP_HEADERS": "x-a=b",
        }
        with gateway(tmp_path, table("a", server.url), **receiver.environment(**more)) as running:
            body = {**HELLO, "max_tokens": 9, "temperature": 0.5, "top_p": 1}
            ask(running, body, x_request_id="plain")
            is_golden("plain", receiver.trace("plain"), gateway=running.port, a=server.url.rpartition(":")[2])
            assert wait_for(lambda: spans_of(running, "exported")) == 3
    path, headers = receiver.requests[0]
    assert (path, headers["x-a"]) == ("grpc", "b")
    assert "gen_ai.client.operation.duration" in receiver.metrics


def test_a_redirection_is_no_success(tmp_path: Path) -> None:
    with collector() as receiver, backend(answers) as server:
        receiver.status = 302
        with gateway(tmp_path, table("a", server.url), **receiver.environment()) as running:
            ask(running)
            assert (wait_for(lambda: spans_of(running, "failed")), spans_of(running, "exported")) == (3, 0)


def test_a_collector_that_is_down_costs_no_request_and_what_is_lost_is_counted(tmp_path: Path) -> None:
    port = free_port()
    more = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}", "OTEL_BSP_SCHEDULE_DELAY": "50"}
    more |= {"OTEL_EXPORTER_OTLP_TIMEOUT": "0.5", "OTEL_BSP_MAX_QUEUE_SIZE": "6", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "6"}
    with backend(answers) as server, gateway(tmp_path, table("a", server.url), **more) as running:
        for _ in range(10):
            assert ask(running).status == 200
        wait_for(lambda: spans_of(running, "failed") + spans_of(running, "dropped") == 30)
        assert spans_of(running, "exported") == 0
        assert running.lines().count("spans could not be sent") == 1
        with collector(port) as receiver:
            ask(running, x_request_id="again")
            assert len(receiver.trace("again")) == 3
            assert wait_for(lambda: spans_of(running, "exported")) == 3


def test_spans_that_a_collector_will_not_have_now_are_sent_again(tmp_path: Path) -> None:
    with collector() as receiver, backend(answers) as server:
        receiver.status = 503
        with gateway(tmp_path, table("a", server.url), **receiver.environment()) as running:
            ask(running, x_request_id="r")
            wait_for(lambda: receiver.requests)
            receiver.status = 200
            assert len(receiver.trace("r")) == 3
            assert (wait_for(lambda: spans_of(running, "exported")), spans_of(running, "failed")) == (3, 0)


def test_spans_that_a_collector_rejects_are_counted(tmp_path: Path) -> None:
    with collector() as receiver, backend(answers) as server:
        receiver.rejects = 2
        with gateway(tmp_path, table("a", server.url), **receiver.environment()) as running:
            ask(running)
            assert (wait_for(lambda: spans_of(running, "failed")), spans_of(running, "exported")) == (2, 1)
            receiver.status = 400
            ask(running)
            assert wait_for(lambda: spans_of(running, "failed") == 5)
            assert "OpenTelemetry: 2 spans could not be sent" in running.lines()
        assert "OpenTelemetry: 3 spans could not be sent" in running.lines()  # the last word


def test_what_waits_is_sent_at_the_end(tmp_path: Path) -> None:
    with collector() as receiver, backend(answers) as server:
        with gateway(tmp_path, table("a", server.url), **receiver.environment(OTEL_BSP_SCHEDULE_DELAY="600000")) as running:
            for number in range(20):
                ask(running, x_request_id=f"r{number}")
            assert receiver.spans == []
        assert len(receiver.spans) == 60


def test_a_collector_that_never_answers_does_not_hold_up_the_end(tmp_path: Path) -> None:
    def silent(connection: Connection, _: Request) -> None:
        connection.gone()

    with backend(silent) as deaf, backend(answers) as server:
        more = {"OTEL_EXPORTER_OTLP_ENDPOINT": deaf.url, "OTEL_BSP_SCHEDULE_DELAY": "50", "OTEL_METRIC_EXPORT_INTERVAL": "100"}
        with gateway(tmp_path, table("a", server.url), **more) as running:
            ask(running)
            wait_for(lambda: len(deaf.posts) == 2)  # spans and metrics
        assert "0 spans could not be sent, 3 had no room: the gateway stops" in running.lines()
