from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.core import sse
from gateway.core.message_usage import MessageMeter, of_message
from gateway.core.usage import Usage

START = {"type": "message_start", "message": {"usage": {"input_tokens": 4, "cache_read_input_tokens": 5, "output_tokens": 1}}}
DELTA = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hi"}}
END = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 7}}
STOP = {"type": "message_stop"}


def metered(*events: Any) -> MessageMeter:
    meter = MessageMeter()
    for now, one in enumerate(events):
        for event in sse.Decoder().feed(sse.encode(one if isinstance(one, bytes) else json.dumps(one).encode())):
            assert not meter.see(event, float(now))
    return meter


def test_a_whole_stream() -> None:
    meter = metered(START, DELTA, DELTA, END, STOP)
    assert meter.usage == Usage(9, 7, 5)
    assert (meter.first_token, meter.last_token, meter.finish_reason) == (1.0, 2.0, "end_turn")
    assert (meter.done, meter.failed, meter.whole) == (True, False, True)


def test_it_is_not_whole_before_its_last_event() -> None:
    assert not metered(START, DELTA, END).whole


def test_an_error_is_seen() -> None:
    meter = metered(START, {"type": "error", "error": {"message": "x"}})
    assert (meter.failed, meter.done) == (True, False)


def test_a_backend_that_does_not_count_is_counted_by_its_deltas() -> None:
    assert metered({"type": "message_start"}, DELTA, DELTA).usage == Usage(0, 2, 0, estimated=True)


def test_totals_that_come_later_replace_those_before() -> None:
    later = {
        "type": "message_delta",
        "delta": {},
        "usage": {"input_tokens": 20, "cache_read_input_tokens": 0, "output_tokens": 3},
    }
    assert metered(START, later).usage == Usage(20, 3, 0)


@pytest.mark.parametrize(
    "data", [b"nonsense", b"[]", b'{"type": 7}', b'{"type":"message_delta","usage":{"output_tokens":"x"}}']
)
def test_what_cannot_be_read_is_passed_over(data: bytes) -> None:
    assert metered(START, data).usage == Usage(9, 1, 5)


def test_a_whole_message() -> None:
    usage = {"input_tokens": 4, "cache_read_input_tokens": 5, "cache_creation_input_tokens": 1, "output_tokens": 7}
    assert of_message(json.dumps({"stop_reason": "end_turn", "usage": usage}).encode()) == (Usage(10, 7, 5), "end_turn")
    assert of_message(b"{}") == (Usage(), None)
