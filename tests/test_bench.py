"""The parts of the benchmark that could be wrong without anyone seeing it in the figures."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

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
