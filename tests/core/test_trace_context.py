from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.trace_context import Following, Parent, Trace, Tracing, read

ID = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"
GOOD = f"00-{ID}-{SPAN}-01".encode()
LOW = "0" * 15 + "1" + "0" * 16
HIGH = "0" * 15 + "1" + "f" * 16


def headers(parent: bytes, *states: bytes) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"g"), (b"traceparent", parent), *[(b"tracestate", state) for state in states]]


def bits(number: int) -> int:
    return random.Random(number).getrandbits(number)


def test_a_callers_trace_is_read() -> None:
    assert read(headers(GOOD, b"a=1,b=2", b"c=3")) == Parent(ID, SPAN, True, "a=1,b=2,c=3")
    assert read(headers(f"00-{ID}-{SPAN}-00".encode())) == Parent(ID, SPAN, False, "")
    assert read(headers(f"00-{ID}-{SPAN}-ff".encode())) == Parent(ID, SPAN, True, "")
    assert read(headers(f"cc-{ID}-{SPAN}-01-what-will-be".encode())) == Parent(ID, SPAN, True, "")


@pytest.mark.parametrize(
    "parent",
    [
        b"",
        b"00",
        GOOD.upper(),
        GOOD[:-1],
        GOOD + b"1",
        GOOD + b"-more",
        GOOD + b"\x00",
        b"ff" + GOOD[2:],
        b"0x" + GOOD[2:],
        f"00-{'0' * 32}-{SPAN}-01".encode(),
        f"00-{ID}-{'0' * 16}-01".encode(),
        f"cc-{ID}-{SPAN}-01.what".encode(),
        GOOD + b"," + GOOD,
        b"\xff" * 55,
    ],
)
def test_a_malformed_parent_counts_as_none(parent: bytes) -> None:
    assert read(headers(parent, b"a=1")) is None
    trace = Tracing(1.0, bits).begin(headers(parent, b"a=1"))
    assert trace is not None
    assert (trace.parent_id, trace.state) == ("", "")


def test_two_parents_count_as_none() -> None:
    assert read([*headers(GOOD), (b"traceparent", GOOD)]) is None


@pytest.mark.parametrize(
    ("states", "kept"),
    [
        ([b"a=1 , b=2"], "a=1,b=2"),
        ([b"a=1,,b=2", b""], "a=1,b=2"),
        ([b"0tenant@vendor=x y"], "0tenant@vendor=x y"),
        ([b"a=1,a=2"], ""),
        ([b"A=1"], ""),
        ([b"a=1\xff"], ""),
        ([b"a=x=y"], ""),
        ([b"a"], ""),
        ([b"a="], ""),
        ([b",".join(b"k%d=v" % number for number in range(33))], ""),
        ([b"a=" + b"v" * 256, b"b=" + b"v" * 256], ""),
    ],
)
def test_a_state_goes_on_if_it_is_by_the_rules(states: list[bytes], kept: str) -> None:
    parent = read(headers(GOOD, *states))
    assert parent is not None
    assert parent.state == kept


@given(st.binary(max_size=80), st.binary(max_size=600))
def test_whatever_comes_nothing_breaks(parent: bytes, state: bytes) -> None:
    found = read(headers(parent, state))
    assert found is None or (len(found.state) <= 512 and found.state.isascii())


@pytest.mark.parametrize(
    ("ratio", "by_parent", "parent", "sampled"),
    [
        (1.0, True, None, True),
        (0.0, True, None, None),
        (1.0, True, f"00-{ID}-{SPAN}-00", False),
        (0.0, True, f"00-{ID}-{SPAN}-01", True),
        (1.0, False, f"00-{ID}-{SPAN}-00", True),
        (0.0, False, f"00-{ID}-{SPAN}-01", False),
        (0.5, False, f"00-{LOW}-{SPAN}-00", True),
        (0.5, False, f"00-{HIGH}-{SPAN}-01", False),
    ],
)
def test_what_is_recorded(ratio: float, by_parent: bool, parent: str | None, sampled: bool | None) -> None:
    trace = Tracing(ratio, bits, by_parent=by_parent).begin(headers(parent.encode()) if parent else ())
    assert (trace and trace.sampled) == sampled


def test_a_ratio_is_kept() -> None:
    source = random.Random(7)
    tracing = Tracing(0.25, source.getrandbits)
    assert 2300 < sum(tracing.begin(()) is not None for _ in range(10_000)) < 2700


def test_an_attempt_tells_the_backend_of_its_own_span() -> None:
    trace = Tracing(1.0, bits).begin(headers(GOOD, b"a=1"))
    assert trace is not None
    first = dict(trace.onward(headers(GOOD, b"a=1"), 0))
    second = dict(trace.onward(headers(GOOD, b"a=1"), 1))
    assert first[b"traceparent"] == f"00-{ID}-{trace.first + 2:016x}-01".encode()
    assert second[b"traceparent"] == f"00-{ID}-{trace.first + 3:016x}-01".encode()
    assert (first[b"tracestate"], first[b"host"]) == (b"a=1", b"g")


def test_who_records_nothing_still_knows_the_callers_trace() -> None:
    assert Following().begin(headers(GOOD)) == Trace(ID, SPAN, False)
    assert Following().begin(headers(b"nonsense")) is None
    assert Following().begin(()) is None
    assert Trace(ID, SPAN, False).span_id == SPAN
    assert Trace(ID, SPAN, True, first=255).span_id == "00000000000000ff"


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ((9, 0.5, 1), (9, 0.5, 1.0)),
        ((-1, [1], True), (None, None, None)),
        ((2**63, 10**400, {"a": 1}), (None, None, None)),
    ],
)
def test_what_is_asked_is_kept_if_it_is_a_number(asked: tuple[int, object, object], kept: object) -> None:
    trace = Trace(ID, "", True)
    trace.ask(*asked)
    assert trace.asked == kept


@pytest.mark.parametrize(
    ("data", "kept"),
    [
        (b'{"id":"chatcmpl-1","model":"m"}', ("chatcmpl-1", "m")),
        (b'{"type":"response.created","response":{"id":"resp_1","model":"m"}}', ("resp_1", "m")),
        (b'{"id":7,"model":{}}', ("", "")),
        (b'{"id":"' + b"x" * 500 + b'"}', ("x" * 128, "")),
        (b"[DONE]", ("", "")),
        (b"\xff", ("", "")),
        (b"[" * 100_000, ("", "")),
    ],
    ids=range(7),
)
def test_what_an_answer_calls_itself(data: bytes, kept: object) -> None:
    trace = Trace(ID, "", True)
    trace.answered(data)
    assert (trace.answer_id, trace.answer_model) == kept
