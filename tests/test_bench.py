"""The parts of the benchmark that could be wrong without anyone seeing it in the figures."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from bench import capacity, overload
from bench.backend import COMPLETION, LAST, STREAM, stamped
from bench.load import quantiles
from bench.measure import Result, median
from bench.report import markdown, restore, save
from bench.wire import Reader, chat_request, status_of

MESSAGES = [
    chat_request(100, stream=False),
    COMPLETION,
    STREAM + stamped() + stamped() + LAST,
    b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n",
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n",
]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100, 100_000])
def test_messages_are_cut_apart_however_they_come(size: int) -> None:
    heads: list[bytes] = []
    reader = Reader(heads.append)
    data = b"".join(MESSAGES)
    for start in range(0, len(data), size):
        reader.feed(data[start : start + size])
    assert heads == [message.partition(b"\r\n\r\n")[0] for message in MESSAGES]


def test_a_message_counts_when_its_last_byte_has_come() -> None:
    for message in MESSAGES:
        heads: list[bytes] = []
        reader = Reader(heads.append)
        reader.feed(message[:-1])
        assert heads == []
        reader.feed(message[-1:])
        assert len(heads) == 1


def test_what_is_not_http_is_an_error() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        Reader(lambda _: None).feed(STREAM + b"what\r\n")
    assert status_of(b"HTTP/1.1 404 Not Found") == 404
    assert status_of(b"what") == 0


def test_figures() -> None:
    assert quantiles([]) == {}
    assert quantiles([number / 1000 for number in range(100)]) == {"p50": 50.0, "p99": 99.0}
    assert median([{"a": 1.0}, {"a": 5.0, "b": 2.0}, {"a": 3.0}]) == {"a": 3.0, "b": 2.0}


def test_a_table_is_made_again_from_the_file(tmp_path: Path) -> None:
    results = [
        Result("requests", "32 x 1 KiB", "gateway", {"cpu_us": 200.0, "rate": 10.0}),
        Result("requests", "32 x 1 KiB", "nginx", {"cpu_us": 50.0}, Counter({"status 502": 3})),
        Result("requests", "failed", "haproxy", {}, {"failed": 1}),
    ]
    save(tmp_path / "results.json", {"cpu": "one"}, results)
    assert restore(tmp_path / "results.json") == ({"cpu": "one"}, results)
    rows = list(markdown(results))[5:]
    assert rows[0].startswith("| 32 x 1 KiB | gateway | 200.0 | 1.00 | 10 |")
    assert rows[1].startswith("| 32 x 1 KiB | nginx | 50.0 | 0.25 |")
    assert rows[1].endswith("| 3 status 502 |")
    assert rows[2].endswith("| 1 failed |")


def test_what_streams_take_is_what_a_hand_calculates() -> None:
    given = capacity.Inputs(
        request_us=300,
        extras_us=200,
        event_us=50,
        stream_kib=20,
        process_mib=60,
        redis_us=40,
        row_us=100,
        answer_tokens=500,
        load=0.5,
        server_streams=64,
        connections=16384,
        backends=256,
    )
    found = capacity.need(100_000, 20, given)
    assert (found.events, found.requests) == (2_000_000, 4_000)
    assert found.cores == pytest.approx(100 + 2)
    assert (found.by_cpu, found.by_connections, found.servers, found.groups) == (204, 7, 1563, 7)
    assert found.processes == 204
    assert found.mib == pytest.approx(60 + 100_000 / 204 * 20 / 1024)
    assert found.files == 2 * 491
    assert (found.redis_cores, found.row_cores) == pytest.approx((0.16, 0.4))


def test_silent_streams_are_counted_by_connections() -> None:
    assert capacity.need(100_000, 0).processes == 7


def test_the_document_has_the_tables_of_today() -> None:
    text = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text("utf-8")
    assert capacity.written(text) == text, "write them anew: python -m bench.capacity docs/scaling.md"


def test_an_overload_is_measured_and_the_bound_of_the_queue_holds(tmp_path: Path) -> None:
    plan = overload.Plan(loads=(1.0, 3.0), slots=4, service=0.05, queue=10, warm_up=0.2, seconds=0.5)
    with overload.gateway(plan, tmp_path) as there:
        most, found = asyncio.run(overload.measure(there, plan))
    assert 0.0 < most <= 1.5 * overload.BACKENDS * plan.slots / plan.service
    assert found[1].goodput > 0.0
    assert 0 < found[1].deepest <= plan.queue
    assert "status 429" in found[1].refused(2)
    rows = list(overload.table(found, plan))
    assert [row.count("|") for row in rows] == [rows[0].count("|")] * 4
