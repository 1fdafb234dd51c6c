from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from gateway.core import sse
from gateway.core.usage import ResponsesMeter, Usage, UsageMeter, of_answer


def event(chunk: Any) -> sse.Event:
    data = chunk if isinstance(chunk, bytes) else json.dumps(chunk).encode()
    return sse.Event(data, sse.encode(data))


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


def test_usage_comes_from_the_usage_chunk_which_is_told_apart() -> None:
    meter = UsageMeter()
    counts = {"prompt_tokens": 7, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 5}}
    assert not meter.see(event(delta(role="assistant", content="")), 1.0)
    assert not meter.see(event({**delta(content="a"), "usage": None}), 2.0)
    assert not meter.see(event(delta(content="b")), 3.0)
    assert meter.see(event({"choices": [], "usage": counts}), 4.0)
    assert not meter.see(event(b"[DONE]"), 4.0)
    assert meter.usage == Usage(7, 2, 5)
    assert (meter.first_token, meter.last_token) == (2.0, 3.0)
    assert meter.done


def test_reasoning_tokens_are_some_of_the_completions() -> None:
    counts = {"prompt_tokens": 7, "completion_tokens": 20, "completion_tokens_details": {"reasoning_tokens": 15}}
    meter = UsageMeter()
    assert meter.see(event({"choices": [], "usage": counts}), 1.0)
    assert meter.usage == Usage(7, 20, reasoning_tokens=15)
    assert of_answer(json.dumps({"choices": [], "usage": counts}).encode())[0] == meter.usage
    counts["completion_tokens_details"] = {"reasoning_tokens": None}
    assert meter.see(event({"choices": [], "usage": counts}), 1.0)
    assert meter.usage == Usage(7, 20)


def test_llama_server_tells_its_usage_in_the_timings_of_the_last_chunk() -> None:
    meter = UsageMeter()
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}
    assert not meter.see(event({**last, "timings": {"cache_n": 25, "prompt_n": 1, "predicted_n": 4}}), 1.0)
    assert meter.usage == Usage(26, 4, 25)
    assert meter.finish_reason == "length"


def test_tokens_of_a_stream_that_never_says_are_estimated_from_its_deltas() -> None:
    meter = UsageMeter()
    for text in ("a", "b", "c"):
        meter.see(event(delta(content=text)), 1.0)
    assert meter.usage == Usage(completion_tokens=3, estimated=True)
    assert not meter.whole


def test_reasoning_and_tool_calls_are_tokens_too() -> None:
    meter = UsageMeter()
    meter.see(event(delta(reasoning_content="hm")), 1.0)
    meter.see(event(delta(tool_calls=[{"index": 0, "function": {"arguments": "{"}}])), 2.0)
    assert meter.usage.completion_tokens == 2


def test_an_error_event_ends_the_answer_as_failed() -> None:
    meter = UsageMeter()
    meter.see(event({"error": {"message": "out of memory"}}), 1.0)
    assert meter.failed
    assert meter.whole


@pytest.mark.parametrize("data", [b"not json", b"[1, 2]", b'{"choices": "x"}', b'{"choices": [{"delta": 5}]}', b""])
def test_what_it_cannot_read_does_not_disturb_it(data: bytes) -> None:
    meter = UsageMeter()
    assert not meter.see(event(data), 1.0)
    assert meter.usage == Usage(estimated=True)


def test_a_comment_is_no_token() -> None:
    meter = UsageMeter()
    assert not meter.see(sse.Event(None, b": keep-alive\n\n"), 1.0)
    assert meter.first_token is None


def test_a_whole_answer_tells_usage_and_finish_reason() -> None:
    body = {"choices": [{"message": {}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}
    assert of_answer(json.dumps(body).encode()) == (Usage(3, 4), "stop")
    assert of_answer(b'{"usage": "none of your business"}') == (Usage(), None)
    with pytest.raises(msgspec.DecodeError):
        of_answer(b'{"usage": ')


def test_a_plain_completions_text_counts() -> None:
    meter = UsageMeter()
    for at, text in enumerate(["", "a", "b"]):
        assert not meter.see(event({"choices": [{"index": 0, "text": text, "finish_reason": None}]}), float(at))
    assert meter.usage == Usage(completion_tokens=2, estimated=True)
    assert (meter.first_token, meter.last_token) == (1.0, 2.0)
    assert meter.see(event({"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 2}}), 3.0)


def test_a_response_tells_all_of_itself_in_its_last_event() -> None:
    meter = ResponsesMeter()
    assert not meter.see(event({"type": "response.created", "response": {"status": "in_progress"}}), 0.0)
    assert not meter.see(event({"type": "response.output_text.delta", "delta": "a"}), 1.0)
    assert not meter.see(event(b"not json"), 1.5)
    assert not meter.whole
    assert meter.usage == Usage(completion_tokens=1, estimated=True)
    counts = {"input_tokens": 7, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 5}}
    meter.see(event({"type": "response.completed", "response": {"status": "completed", "usage": counts}}), 2.0)
    assert meter.done
    assert not meter.failed
    assert (meter.usage, meter.finish_reason, meter.first_token) == (Usage(7, 2, 5), "completed", 1.0)


@pytest.mark.parametrize(
    "last", [{"type": "error", "message": "no"}, {"type": "response.failed", "response": {}}, {"error": {"message": "no"}}]
)
def test_a_response_that_fails_is_seen_to(last: Any) -> None:
    meter = ResponsesMeter()
    meter.see(event(last), 1.0)
    assert meter.failed
    assert meter.whole


def test_a_whole_response_tells_its_usage_and_its_status() -> None:
    usage = {"input_tokens": 7, "output_tokens": 2}
    assert of_answer(json.dumps({"status": "incomplete", "usage": usage}).encode()) == (Usage(7, 2), "incomplete")
