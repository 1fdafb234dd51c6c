"""Each fault a backend can have, at each phase of its answer: what the client of a plain answer and of a stream gets.

``TABLE`` is also the one in docs/faults.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, NamedTuple

import pytest

from gateway.core.errors import BACKENDS_DOING

from .asking import Reply, ask, metric, table, until
from .backends import ScriptedBackend
from .counting import everything_is_given_back, grown, open_descriptors, resident, rows_of
from .faulty import FAULTS, answers_well, deaf, fails_as_named
from .processes import Running, free_port, wait_for

UNREACHABLE = "502 backend_unreachable"
BROKEN = "502 backend_protocol_error"
FAILED = "502 backend_error"
LATE_CONNECTION = "504 connect_timeout"
LATE_BEGIN = "504 first_byte_timeout"
LATE = "504 idle_timeout"
CUT = "200, then backend_protocol_error"
STALLED = "200, then idle_timeout"
TOLD = "200, then backend_error"
GOOD = "200"
NONE = "-"


class Row(NamedTuple):
    """What is expected of a fault.

    A stream's ``200, then code`` is: status 200, the content so far, one error event with that code, and no ``[DONE]``.
    """

    fault: str
    phase: str
    plain: str
    stream: str


TABLE = [
    Row("refuse", "before the headers", UNREACHABLE, UNREACHABLE),
    Row("never accept", "before the headers", LATE_CONNECTION, LATE_CONNECTION),
    Row("accept, never read", "before the headers", LATE_BEGIN, LATE_BEGIN),
    Row("silence", "before the headers", LATE_BEGIN, LATE_BEGIN),
    Row("silence", "in the headers", LATE_BEGIN, LATE_BEGIN),
    Row("silence", "before the body", LATE_BEGIN, LATE_BEGIN),
    Row("silence", "in the body", LATE, STALLED),
    Row("silence", "at the end", LATE, GOOD),
    Row("FIN", "before the headers", UNREACHABLE, UNREACHABLE),
    Row("FIN", "in the headers", BROKEN, BROKEN),
    Row("FIN", "before the body", BROKEN, BROKEN),
    Row("FIN", "in the body", BROKEN, CUT),
    Row("FIN", "at the end", BROKEN, GOOD),
    Row("RST", "before the headers", UNREACHABLE, UNREACHABLE),
    Row("RST", "in the headers", BROKEN, BROKEN),
    Row("RST", "before the body", BROKEN, BROKEN),
    Row("RST", "in the body", BROKEN, CUT),
    Row("RST", "at the end", BROKEN, GOOD),
    Row("garbage", "before the headers", BROKEN, BROKEN),
    Row("garbage", "in the headers", BROKEN, BROKEN),
    Row("garbage", "before the body", BROKEN, BROKEN),
    Row("garbage", "in the body", BROKEN, CUT),
    Row("garbage", "at the end", BROKEN, GOOD),
    Row("HTTP/0.9", "before the headers", BROKEN, BROKEN),
    Row("10,000 x 100", "before the headers", BROKEN, BROKEN),
    Row("10,000 x 103", "before the headers", BROKEN, BROKEN),
    Row("three 102, then slowly", "before the headers", GOOD, GOOD),
    Row("an endless status line", "in the headers", BROKEN, BROKEN),
    Row("an endless header", "in the headers", BROKEN, BROKEN),
    Row("endless headers", "in the headers", BROKEN, BROKEN),
    Row("5,000 headers", "in the headers", GOOD, GOOD),
    Row("two lengths", "in the headers", BROKEN, BROKEN),
    Row("a length and chunks", "in the headers", BROKEN, BROKEN),
    Row("a length that is no number", "in the headers", BROKEN, BROKEN),
    Row("a negative length", "in the headers", BROKEN, BROKEN),
    Row("status 99999", "in the headers", BROKEN, BROKEN),
    Row("status 999", "in the headers", BROKEN, BROKEN),
    Row("status 000", "in the headers", BROKEN, BROKEN),
    Row("status 101", "in the headers", BROKEN, BROKEN),
    Row("status 302", "in the headers", BROKEN, BROKEN),
    Row("status 204 with a body", "in the headers", BROKEN, BROKEN),
    Row("status 500", "in the headers", FAILED, FAILED),
    Row("a gzip bomb", "before the body", BROKEN, BROKEN),
    Row("gzip that it does not speak of", "before the body", BROKEN, BROKEN),
    Row("a byte at a time", "in the body", GOOD, GOOD),
    Row("chunks of a byte", "in the body", GOOD, GOOD),
    Row("no length", "in the body", GOOD, GOOD),
    Row("a length too short", "in the body", BROKEN, CUT),
    Row("a length too long", "in the body", BROKEN, CUT),
    Row("a length too long, then silence", "in the body", LATE, STALLED),
    Row("a chunk size that is no number", "in the body", BROKEN, CUT),
    Row("a negative chunk size", "in the body", BROKEN, CUT),
    Row("a chunk size of 20 digits", "in the body", BROKEN, CUT),
    Row("a chunk longer than its size", "in the body", BROKEN, CUT),
    Row("an endless chunk size", "in the body", BROKEN, CUT),
    Row("an answer over the limit", "in the body", BROKEN, NONE),
    Row("an endless trailer", "at the end", BROKEN, CUT),
    Row("nothing but its end", "before the body", NONE, BROKEN),
    Row("half a first event", "in the body", NONE, BROKEN),
    Row("an endless first event", "in the body", NONE, BROKEN),
    Row("an endless event", "in the body", NONE, CUT),
    Row("an error event", "in the body", NONE, TOLD),
    Row("invalid UTF-8", "in the body", NONE, GOOD),
    Row("an event that is no JSON", "in the body", NONE, GOOD),
    Row("CRLF, a byte at a time", "in the body", NONE, GOOD),
    Row("half an event", "at the end", NONE, CUT),
    Row("no end", "at the end", NONE, CUT),
    Row("no [DONE]", "at the end", NONE, GOOD),
    Row("[DONE] alone", "at the end", NONE, GOOD),
    Row("events after [DONE]", "at the end", NONE, GOOD),
    Row("pings for ever after [DONE]", "at the end", NONE, GOOD),
]

UNHEARD = ["refuse", "never accept", "accept, never read"]
"""Faults of a backend that does not learn which model is asked for."""


class Cell(NamedTuple):
    """One request of the matrix."""

    model: str
    stream: bool
    expected: str

    @property
    def id(self) -> str:
        return re.sub(r"\W+", "-", f"{self.model} {'stream' if self.stream else 'plain'}")


def model_of(row: Row) -> str:
    """Under which name the faulty backend has it."""
    return row.fault if row.fault in FAULTS or row.fault in UNHEARD else f"{row.fault} {row.phase}"


CELLS = [
    Cell(model_of(row), stream, expected)
    for row in TABLE
    for stream, expected in ((False, row.plain), (True, row.stream))
    if expected != NONE
]
QUICK = [cell for cell in CELLS if "timeout" not in cell.expected and "ever" not in cell.model and cell.model not in UNHEARD]
"""Those that nobody waits for."""

SETTINGS = {
    "GATEWAY_CONNECT_TIMEOUT": "1s",
    "GATEWAY_FIRST_BYTE_TIMEOUT": "2s",
    "GATEWAY_IDLE_TIMEOUT": "2s",
    "GATEWAY_MAX_ANSWER": "1MiB",
    "GATEWAY_BREAKER_FAILURES": "1000",
    "GATEWAY_RETRY_BUDGET": "1",
    "GATEWAY_PROBE_INTERVAL": "1h",
    "GATEWAY_LOG_FORMAT": "json",
    "GATEWAY_POLICY": "device",
    "GATEWAY_CONFIG": "g.toml",
}


class Setup(NamedTuple):
    """A gateway before backends with faults; ``well``: before one without, too, which is asked second."""

    gateway: Running
    well: bool
    descriptors: int

    def ask(self, cell: Cell, number: int = 0) -> Reply:
        body = {"model": cell.model, "messages": [{"role": "user", "content": "x"}], "stream": cell.stream}
        return ask(self.gateway, body, X_Request_ID=f"{cell.id}-{number}")

    def ask_all(self, cells: Sequence[Cell], number: int = 0) -> list[Reply]:
        with ThreadPoolExecutor(24) as threads:
            return list(threads.map(lambda cell: self.ask(cell, number), cells))


@pytest.fixture(scope="module", params=["alone", "beside a well one"])
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    directory = tmp_path_factory.mktemp("matrix")
    well = request.param != "alone"
    with ExitStack() as stack:
        faulty = ScriptedBackend(fails_as_named, models=sorted(FAULTS))
        stack.callback(faulty.stop)
        urls = [
            f"http://127.0.0.1:{free_port()}",
            stack.enter_context(deaf(accepts=False)),
            stack.enter_context(deaf(accepts=True)),
        ]
        tables = [table("faulty", faulty.url, cost_factor=0.1, slots=64)]
        tables += [table(f"unheard{n}", url, models=[UNHEARD[n]], cost_factor=0.1, slots=64) for n, url in enumerate(urls)]
        names = ["faulty"]
        if well:
            second = ScriptedBackend(answers_well, models=[*sorted(FAULTS), *UNHEARD])
            stack.callback(second.stop)
            tables.append(table("well", second.url, slots=64))
            names.append("well")
        (directory / "g.toml").write_text("".join(tables))
        gateway = stack.enter_context(Running(directory, **SETTINGS))
        until(gateway, "healthy", *names)
        wait_for(lambda: metric(gateway, "gateway_connections ") == 1)
        yield Setup(gateway, well, open_descriptors(gateway))


def outcome(reply: Reply, stream: bool) -> str:
    """An answer in the words of the table."""
    if reply.status != 200:
        return f"{reply.status} {reply.code}"
    if not stream:
        return GOOD if json.loads(reply.body)["choices"][0]["message"]["content"] == "ab" else repr(reply.body)
    events = [one.removeprefix(b"data: ") for one in reply.body.replace(b"\r\n", b"\n").split(b"\n\n") if one]
    errors = [one for one in events if one.startswith(b'{"error"')]
    if not errors:
        return GOOD if b"".join(reply.body.split()).count(b"[DONE]") <= 1 else repr(reply.body)
    if errors != events[-1:] or b"[DONE]" in events or b'"a"' not in events[0] or b'"b"' not in events[1]:
        return repr(reply.body)
    code = json.loads(errors[0])["error"]["code"]
    return f"200, then {'backend_error' if code == 'boom' else code}"


def expected(cell: Cell, well: bool) -> str:
    """What nobody has seen a byte of, the other backend answers."""
    return GOOD if well and not cell.expected.startswith("200") else cell.expected


def is_asked_again(cell: Cell, well: bool) -> bool:
    """Its first attempt fails before a byte of an answer, and there is another backend. (What cannot be reached at all is
    known to be out of order there, and is not asked first.)"""
    return well and not cell.expected.startswith("200") and cell.model not in UNHEARD


def logged(gateway: Running) -> dict[str, dict[str, Any]]:
    """The access log's lines by request id."""
    lines = [json.loads(line) for line in gateway.lines().splitlines() if line.startswith("{")]
    return {line["request_id"]: line for line in lines if "request_id" in line}


def test_every_fault_has_its_answer_and_its_line_in_the_log(setup: Setup) -> None:
    replies = setup.ask_all(CELLS)
    found = {cell.id: outcome(reply, cell.stream) for cell, reply in zip(CELLS, replies, strict=True)}
    wanted = {cell.id: expected(cell, setup.well) for cell in CELLS}
    assert {id: (what, wanted[id]) for id, what in found.items() if what != wanted[id]} == {}
    wait_for(lambda: {f"{cell.id}-0" for cell in CELLS} <= logged(setup.gateway).keys())
    lines = logged(setup.gateway)
    for cell, reply in zip(CELLS, replies, strict=True):
        line, code = lines[f"{cell.id}-0"], cell.expected.split()[-1]
        if is_asked_again(cell, setup.well):
            assert (reply.backend, reply.headers["x-gateway-attempts"], line["retried"]) == ("well", "2", code), cell.id
        elif expected(cell, setup.well) != GOOD:
            assert (line["code"], line["fault"]) == (code, "backend"), cell.id
        else:
            assert "code" not in line, cell.id


def test_every_failure_is_counted_by_its_code(setup: Setup) -> None:
    cells = [cell for cell in CELLS if not setup.well or cell.model not in UNHEARD]
    codes = [(cell.expected.split()[-1], is_asked_again(cell, setup.well)) for cell in cells]
    for code in BACKENDS_DOING:
        of_requests = metric(setup.gateway, rf'gateway_requests_total\{{.*code="{code}",fault="backend"')
        of_attempts = metric(setup.gateway, rf'gateway_retries_total\{{code="{code}"')
        assert (of_requests, of_attempts) == (codes.count((code, False)), codes.count((code, True)))


def test_after_the_faults_everything_is_given_back(setup: Setup) -> None:
    everything_is_given_back(setup.gateway, setup.descriptors)


def test_faults_leave_no_memory_behind(setup: Setup) -> None:
    setup.ask_all(QUICK, 1)
    samples = []
    for number in range(2, 8):
        replies = setup.ask_all(QUICK, number)
        assert [outcome(reply, cell.stream) for cell, reply in zip(QUICK, replies, strict=True)] == [
            expected(cell, setup.well) for cell in QUICK
        ]
        samples.append(resident(setup.gateway))
    assert grown(samples) < 16 << 20, samples
    everything_is_given_back(setup.gateway, setup.descriptors)


def test_the_documentation_has_this_table() -> None:
    assert rows_of("## Backends") == [Row._fields, *[tuple(row) for row in TABLE]]
