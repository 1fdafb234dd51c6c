from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core import sse
from gateway.core.assembly import Assembler, Broken, ResponseAssembler, StreamError

HEAD = {"id": "c1", "created": 5, "model": "m", "object": "chat.completion.chunk", "system_fingerprint": "b1"}


def chunk(index: int = 0, finish_reason: str | None = None, **delta: Any) -> bytes:
    choice = {"index": index, "delta": delta, "finish_reason": finish_reason}
    return sse.encode(json.dumps({**HEAD, "choices": [choice]}).encode())


def assembled(*parts: bytes) -> dict[str, Any]:
    assembler = Assembler(1_000_000)
    for part in parts:
        assembler.feed(part)
    answer: dict[str, Any] = json.loads(assembler.answer())
    return answer


DONE = sse.encode(sse.DONE)


def test_the_answer_has_the_text_of_all_deltas_and_what_the_last_chunks_add() -> None:
    last = {**HEAD, "choices": [], "usage": {"prompt_tokens": 3}, "timings": {"cache_n": 1}}
    answer = assembled(
        chunk(role="assistant", content=None),
        chunk(content="he"),
        chunk(content="llo"),
        chunk(finish_reason="stop"),
        sse.encode(json.dumps(last).encode()),
        DONE,
    )
    assert answer == {
        **HEAD,
        "object": "chat.completion",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hello"}}],
        "usage": {"prompt_tokens": 3},
        "timings": {"cache_n": 1},
    }


def test_tool_calls_that_come_in_parts_are_put_together() -> None:
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}
    answer = assembled(
        chunk(role="assistant", content=None),
        chunk(tool_calls=[call]),
        chunk(tool_calls=[{"index": 0, "function": {"arguments": '{"city": '}}]),
        chunk(tool_calls=[{"index": 0, "function": {"arguments": '"Rome"}'}}]),
        chunk(tool_calls=[{**call, "index": 1, "id": "call_2"}]),
        chunk(finish_reason="tool_calls"),
        DONE,
    )
    message = answer["choices"][0]["message"]
    assert message["content"] is None
    function = {"name": "weather", "arguments": '{"city": "Rome"}'}
    assert message["tool_calls"] == [
        {"id": "call_1", "type": "function", "function": function},
        {"id": "call_2", "type": "function", "function": {"name": "weather", "arguments": ""}},
    ]


def test_several_choices_and_reasoning_are_kept_apart() -> None:
    answer = assembled(
        chunk(1, reasoning_content="hm "),
        chunk(0, content="a"),
        chunk(1, reasoning_content="so"),
        chunk(1, content="b"),
        chunk(1, "stop"),
        chunk(0, "length"),
        DONE,
    )
    messages = [choice["message"] for choice in answer["choices"]]
    assert messages == [
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "hm so"},
    ]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "stop"]


def test_log_probabilities_of_all_chunks_are_listed() -> None:
    parts = []
    for token in ("a", "b"):
        choice = {"index": 0, "delta": {"content": token}, "logprobs": {"content": [{"token": token, "logprob": -1}]}}
        parts.append(sse.encode(json.dumps({**HEAD, "choices": [choice]}).encode()))
    answer = assembled(*parts, chunk(finish_reason="stop"), DONE)
    assert [one["token"] for one in answer["choices"][0]["logprobs"]["content"]] == ["a", "b"]


def test_a_stream_without_its_end_is_no_answer() -> None:
    with pytest.raises(Broken):
        assembled(chunk(content="a"), chunk(finish_reason="stop"))


def test_an_error_event_is_raised_with_its_status() -> None:
    with pytest.raises(StreamError) as caught:
        assembled(chunk(content="a"), sse.encode(b'{"error": {"code": 400, "message": "too long"}}'))
    assert caught.value.status == 400
    with pytest.raises(StreamError) as caught:
        assembled(sse.encode(b'{"error": "out of memory"}'))
    assert caught.value.status == 500


@pytest.mark.parametrize("data", [b"oops", b"[]", b'{"choices": [5]}', b'{"choices": [{"delta": {}}]}'])
def test_what_is_not_a_chunk_breaks_the_answer(data: bytes) -> None:
    with pytest.raises(Broken):
        assembled(sse.encode(data), DONE)


def from_below(frames: int, call: Callable[[], Any]) -> Any:
    return from_below(frames - 1, call) if frames else call()


@pytest.mark.parametrize("depth", [100, 400, 900, 2000, 5000])
def test_what_is_nested_deeply_is_put_together_or_breaks_the_answer(depth: int) -> None:
    deep = b'{"choices":[{"index":0,"delta":' + b'{"a":' * depth + b"1" + b"}" * depth + b"}]}"
    for frames in (0, 600, 800):
        assembler = Assembler(100_000)
        with contextlib.suppress(Broken):
            assembler.feed(sse.encode(deep) + sse.encode(deep) + DONE)
            from_below(frames, assembler.answer)


def test_an_answer_without_bound_is_stopped() -> None:
    assembler = Assembler(1000)
    with pytest.raises((Broken, sse.TooLong)):
        for _ in range(100):
            assembler.feed(chunk(content="x" * 50))


@given(st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=8))
def test_any_json_in_a_stream_gives_an_answer_or_one_of_two_errors(value: Any) -> None:
    for data in (
        value,
        {"choices": [{"index": 0, "delta": value}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": value}}]},
    ):
        event = sse.encode(json.dumps(data).encode())
        with contextlib.suppress(Broken, StreamError):
            assembled(event, event, DONE)


def test_a_plain_completion_is_put_together_too() -> None:
    assembler = Assembler(10_000, "text_completion")
    for text, finish_reason in (("a", None), (" b", None), ("", "stop")):
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
        assembler.feed(sse.encode(json.dumps({"id": "c", "choices": [choice]}).encode()))
    assembler.feed(sse.encode(b"null"))
    assembler.feed(DONE)
    assert json.loads(assembler.answer()) == {
        "choices": [{"index": 0, "text": "a b", "logprobs": None, "finish_reason": "stop"}],
        "id": "c",
        "object": "text_completion",
    }


def typed(type: str, **fields: Any) -> bytes:
    return f"event: {type}\n".encode() + sse.encode(json.dumps({"type": type, **fields}).encode())


@pytest.mark.parametrize("status", ["completed", "incomplete", "failed"])
def test_a_response_is_that_of_its_last_event_in_its_own_bytes(status: str) -> None:
    assembler = ResponseAssembler(10_000)
    assembler.feed(typed("response.created", response={"status": "in_progress"}))
    with pytest.raises(Broken):
        assembler.answer()
    whole = typed(f"response.{status}", response={"status": status, "output": []})
    for at in range(len(whole)):
        assembler.feed(whole[at : at + 1])
    assert json.loads(assembler.answer()) == {"status": status, "output": []}


@pytest.mark.parametrize(
    ("event", "status"),
    [
        (typed("error", code=429, message="no"), 429),
        (typed("error", code="server_error", message="no"), 500),
        (sse.encode(b'{"error": {"code": 503, "message": "no"}}'), 503),
    ],
)
def test_an_error_in_a_response_is_raised(event: bytes, status: int) -> None:
    with pytest.raises(StreamError) as caught:
        ResponseAssembler(10_000).feed(event)
    assert caught.value.status == status
    assert json.loads(caught.value.body)["error"]["message"] == "no"


@pytest.mark.parametrize("data", [b"data: 5\n\n", b"data: {\n\n", b"data: " + b"x" * 200])
def test_a_response_that_is_none_is_broken(data: bytes) -> None:
    with pytest.raises((Broken, sse.TooLong)):
        ResponseAssembler(100).feed(data)
