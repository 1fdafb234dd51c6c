from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.core.principal import Limits
from gateway.core.ratelimit import PARTS, Counts
from gateway.core.standing import go_duration, headers


def go(nanoseconds: int) -> str:
    """``time.Duration.String`` of Go 1.22 (src/time/time.go, format), digit by digit from the end."""
    if nanoseconds == 0:
        return "0s"
    text, left = "s", nanoseconds

    def fraction(left: int, digits: int, text: str) -> tuple[int, str]:
        shown = False
        for _ in range(digits):
            digit = left % 10
            shown = shown or digit != 0
            text = f"{digit}{text}" if shown else text
            left //= 10
        return left, f".{text}" if shown else text

    if nanoseconds < 1_000_000_000:
        digits, text = (0, "ns") if left < 1000 else (3, "µs") if left < 1_000_000 else (6, "ms")
        left, text = fraction(left, digits, text)
        return f"{left}{text}"
    left, text = fraction(left, 9, text)
    text = f"{left % 60}{text}"
    left //= 60
    if left > 0:
        text = f"{left % 60}m{text}"
        left //= 60
        if left > 0:
            text = f"{left}h{text}"
    return text


@given(st.integers(0, 2000) | st.integers(0, 10**10) | st.integers(0, 10**6).map(lambda seconds: seconds * 1000))
def test_a_duration_is_written_as_go_writes_it(milliseconds: int) -> None:
    assert go_duration(milliseconds).decode() == go(milliseconds * 1_000_000)


def test_go_itself_was_read_right() -> None:
    # The examples of Go's own tests and documents.
    assert [go(1), go(1100), go(2_200_000), go(3_300_000_000)] == ["1ns", "1.1µs", "2.2ms", "3.3s"]
    assert [go(245_000_000_000), go(245_001_000_000), go(18_367_001_000_000)] == ["4m5s", "4m5.001s", "5h6m7.001s"]


def test_all_six_headers_say_how_a_key_stands() -> None:
    assert dict(headers(Limits(60, 6000), Counts(90_000, 600 * PARTS))) == {
        b"x-ratelimit-limit-requests": b"60",
        b"x-ratelimit-remaining-requests": b"58",
        b"x-ratelimit-reset-requests": b"1.5s",
        b"x-ratelimit-limit-tokens": b"6000",
        b"x-ratelimit-remaining-tokens": b"5400",
        b"x-ratelimit-reset-tokens": b"6s",
    }


def test_what_is_owed_is_no_negative_remainder_and_takes_its_time() -> None:
    found = dict(headers(Limits(tokens=60), Counts(tokens=120 * PARTS)))
    assert found[b"x-ratelimit-remaining-tokens"] == b"0"
    assert found[b"x-ratelimit-reset-tokens"] == b"2m0s"


def test_a_limit_that_a_key_does_not_have_has_no_headers() -> None:
    assert {name.rpartition(b"-")[2] for name, _ in headers(Limits(requests=1, concurrency=1), Counts())} == {b"requests"}
    assert headers(Limits(requests=0), Counts())[2][1] == b"0s"
