from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core import sse
from gateway.core.message_answers import Translation
from gateway.core.usage import Usage, UsageMeter

TRANSLATION = Translation("r1", "m", ("END",))
USAGE = Usage(10, 4, 6)
DONE = sse.encode(sse.DONE)


def chunk(delta: dict[str, Any] | None = None, finish_reason: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": delta or {}, "finish_reason": finish_reason, **more}
    return sse.encode(json.dumps({"id": "c", "model": "tiny", "choices": [choice]}).encode())


def call(index: int | None = 0, id: str | None = None, name: str | None = None, arguments: str | None = None) -> dict[str, Any]:
    """The delta of a piece of a tool call."""
    given = {"index": index, "id": id, "function": {"name": name, "arguments": arguments}}
    return {"tool_calls": [{key: value for key, value in given.items() if value is not None}]}


def events(told: bytes) -> list[tuple[str, Any]]:
    """(event, data) of each; the event's name is its data's type, as Anthropic's are."""
    found = []
    for event in sse.Decoder().feed(told):
        assert event.data is not None
        data = json.loads(event.data)
        name = event.raw.split(b"\n")[0].removeprefix(b"event: ").decode()
        assert name == data["type"]
        found.append((name, data))
    return found


def told(*raw: bytes, usage: Usage = USAGE) -> list[tuple[str, Any]]:
    """What a client sees of these events and of a whole end."""
    stream = TRANSLATION.stream()
    return events(b"".join(stream.see(event) for event in sse.Decoder().feed(b"".join(raw))) + stream.end(usage))


def message(seen: list[tuple[str, Any]]) -> dict[str, Any]:
    """The message that a client puts together of a stream; checks that the stream is well formed."""
    names = [name for name, _ in seen if name != "ping"]
    assert names[0] == "message_start"
    assert names[-2:] == ["message_delta", "message_stop"]
    built: dict[str, Any] = {**seen[0][1]["message"]}
    blocks: list[dict[str, Any]] = built["content"]
    open_index: int | None = None
    for name, data in seen[1:]:
        if name == "content_block_start":
            assert open_index is None
            assert data["index"] == len(blocks)
            open_index = data["index"]
            blocks.append({**data["content_block"], "json": ""})
        elif name == "content_block_delta":
            assert data["index"] == open_index
            delta = data["delta"]
            kinds = {
                "text_delta": ("text", "text"),
                "thinking_delta": ("thinking", "thinking"),
                "input_json_delta": ("partial_json", "json"),
            }
            source, target = kinds[delta["type"]]
            blocks[-1][target] += delta[source]
        elif name == "content_block_stop":
            assert data["index"] == open_index
            open_index = None
        elif name == "message_delta":
            assert open_index is None
            built |= {**data["delta"], "usage": data["usage"]}
    for block in blocks:
        text = block.pop("json")
        if block["type"] == "tool_use":
            block["input"] = json.loads(text or "{}")
    return built


def test_the_events_of_a_text_as_they_stand_on_the_wire() -> None:
    stream = TRANSLATION.stream()
    raw = chunk({"role": "assistant", "content": ""}) + chunk({"content": 'Say "hi"\n'}) + chunk({}, "stop") + DONE
    out = b"".join(stream.see(event) for event in sse.Decoder().feed(raw)) + stream.end(USAGE)
    assert out.decode() == (
        'event: message_start\ndata: {"type":"message_start","message":{"id":"msg_r1","type":"message","role":"assistant",'
        '"model":"tiny","content":[],"stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":0,'
        '"cache_creation_input_tokens":0,"cache_read_input_tokens":0,"output_tokens":0}}}\n\n'
        'event: ping\ndata: {"type":"ping"}\n\n'
        'event: content_block_start\ndata: {"type":"content_block_start","index":0,'
        '"content_block":{"type":"text","text":""}}\n\n'
        'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
        '"delta":{"type":"text_delta","text":"Say \\"hi\\"\\n"}}\n\n'
        'event: content_block_stop\ndata: {"type":"content_block_stop","index":0}\n\n'
        'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},'
        '"usage":{"input_tokens":4,"cache_creation_input_tokens":0,"cache_read_input_tokens":6,"output_tokens":4}}\n\n'
        'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    )


def test_thoughts_text_and_parallel_tools_are_blocks_in_their_order() -> None:
    seen = told(
        chunk({"reasoning_content": "let "}),
        chunk({"reasoning": "me", "content": ""}),
        chunk({"content": "Look"}),
        chunk(call(0, "a", "weather", "")),
        chunk(call(0, arguments='{"city":')),
        chunk(call(0, arguments='"Oslo"}')),
        chunk(call(1, "b", "time", "{}")),
        chunk({}, "tool_calls"),
        DONE,
    )
    built = message(seen)
    assert built["content"] == [
        {"type": "thinking", "thinking": "let me", "signature": ""},
        {"type": "text", "text": "Look"},
        {"type": "tool_use", "id": "a", "name": "weather", "input": {"city": "Oslo"}},
        {"type": "tool_use", "id": "b", "name": "time", "input": {}},
    ]
    assert built["stop_reason"] == "tool_use"


def test_calls_that_all_have_the_same_number_are_told_apart_by_their_ids() -> None:
    pieces = [call(0, "a", "f", '{"x":'), call(0, arguments="1}"), call(0, "b", "g", '{"y":'), call(0, arguments="2}")]
    blocks = message(told(*map(chunk, pieces), chunk({}, "stop")))["content"]
    assert [(block["id"], block["input"]) for block in blocks] == [("a", {"x": 1}), ("b", {"y": 2})]


def test_calls_without_number_or_id_get_ids_of_their_own() -> None:
    delta = {"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    [block] = message(told(chunk(delta), chunk({}, "stop")))["content"]
    assert block["id"].startswith("toolu_")


def test_a_call_that_is_taken_up_again_is_an_error_and_not_a_wrong_argument() -> None:
    seen = told(*map(chunk, [call(0, "a", "f", "{"), call(1, "b", "g", "{"), call(0, arguments="}"), call(1, arguments="}")]))
    assert [name for name, _ in seen][-1] == "error"
    assert "message_stop" not in dict(seen)


@pytest.mark.parametrize(
    ("finish_reason", "more", "expected"),
    [
        ("stop", {}, ("end_turn", None)),
        ("length", {}, ("max_tokens", None)),
        ("content_filter", {}, ("refusal", None)),
        ("stop", {"stop_reason": "END"}, ("stop_sequence", "END")),
        ("stop", {"matched_stop": "END"}, ("stop_sequence", "END")),
        ("stop", {"matched_stop": 151645}, ("end_turn", None)),
        ("stop", {"stop_reason": "other"}, ("end_turn", None)),
        (None, {}, ("end_turn", None)),
    ],
)
def test_why_it_ended(finish_reason: str | None, more: dict[str, Any], expected: tuple[str, str | None]) -> None:
    built = message(told(chunk({"content": "x"}), chunk({}, finish_reason, **more), DONE))
    assert (built["stop_reason"], built["stop_sequence"]) == expected
    whole = {"choices": [{"message": {"content": "x"}, "finish_reason": finish_reason, **more}]}
    answer = json.loads(TRANSLATION.answer(json.dumps(whole).encode(), USAGE))
    assert (answer["stop_reason"], answer["stop_sequence"]) == expected


def test_a_stream_without_a_word_is_an_empty_message() -> None:
    assert message(told(DONE))["content"] == []


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        ({"message": "too long", "code": 400}, "invalid_request_error", "too long"),
        ({"message": "out of memory"}, "api_error", "out of memory"),
        ("boom", "api_error", "boom"),
    ],
)
def test_an_error_of_the_backend_ends_the_stream(error: Any, kind: str, text: str) -> None:
    seen = told(chunk({"content": "x"}), sse.encode(json.dumps({"error": error}).encode()), chunk({"content": "y"}), DONE)
    assert seen[-1] == ("error", {"type": "error", "error": {"type": kind, "message": text}, "request_id": "r1"})


def test_comments_are_pings_once_the_message_has_begun() -> None:
    stream = TRANSLATION.stream()
    [comment] = sse.Decoder().feed(b": waiting\n\n")
    assert stream.see(comment) == b": waiting\n\n"
    [event] = sse.Decoder().feed(chunk({"content": "x"}))
    stream.see(event)
    assert events(stream.see(comment)) == [("ping", {"type": "ping"})]


def test_a_whole_answer() -> None:
    tools = [{"id": "a", "function": {"name": "f", "arguments": '{"x": 1}'}}, {"function": {"name": "g", "arguments": "[1"}}]
    said = {"role": "assistant", "content": "hi", "reasoning_content": "hm", "tool_calls": tools}
    body = {"model": "tiny", "choices": [{"message": said, "finish_reason": "tool_calls"}]}
    assert json.loads(TRANSLATION.answer(json.dumps(body).encode(), USAGE)) == {
        "id": "msg_r1",
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [
            {"type": "thinking", "thinking": "hm", "signature": ""},
            {"type": "text", "text": "hi"},
            {"type": "tool_use", "id": "a", "name": "f", "input": {"x": 1}},
            {"type": "tool_use", "id": "toolu_msg_r1_2", "name": "g", "input": {"arguments": "[1"}},
        ],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": {"input_tokens": 4, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 6, "output_tokens": 4},
    }


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"choices":[]}', b'{"choices":[{}]}'])
def test_what_is_no_answer_is_said(body: bytes) -> None:
    with pytest.raises(ValueError):
        TRANSLATION.answer(body, USAGE)


@pytest.mark.parametrize(
    ("status", "body", "kind", "text"),
    [
        (400, b'{"error":{"message":"too long","type":"exceed_context_size_error"}}', "invalid_request_error", "too long"),
        (404, b'{"object":"error","message":"no such model"}', "not_found_error", "no such model"),
        (422, b'{"detail":"what"}', "invalid_request_error", "what"),
        (429, b"<html>", "rate_limit_error", "The backend refused the request with status 429."),
    ],
)
def test_what_a_backend_refuses(status: int, body: bytes, kind: str, text: str) -> None:
    found = json.loads(TRANSLATION.refusal(status, body))
    assert found == {"type": "error", "error": {"type": kind, "message": text}, "request_id": "r1"}


def numbered(deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each tool call with an id of its own."""
    for number, delta in enumerate(deltas):
        for one in delta.get("tool_calls", ()):
            one["id"] = f"id{number}"
    return deltas


DELTAS = st.lists(
    st.one_of(
        st.builds(lambda text: {"content": text}, st.text()),
        st.builds(lambda text: {"reasoning_content": text}, st.text()),
        st.builds(
            lambda number, text: call(None, f"id{number}", f"f{number}", json.dumps({"x": text})), st.integers(), st.text()
        ),
    ),
    max_size=12,
).map(numbered)


@settings(deadline=None)
@given(DELTAS, st.lists(st.integers(1, 40), max_size=30), st.booleans())
def test_any_stream_cut_anywhere_gives_the_same_well_formed_message(
    deltas: list[dict[str, Any]], cuts: list[int], crlf: bool
) -> None:
    raw = b"".join(map(chunk, deltas)) + chunk({}, "stop") + DONE
    raw = raw.replace(b"\n", b"\r\n") if crlf else raw
    stream, decoder, meter, out = TRANSLATION.stream(), sse.Decoder(), UsageMeter(), b""
    for size in [*cuts, len(raw)]:
        for event in decoder.feed(raw[:size]):
            meter.see(event, 0.0)
            out += stream.see(event)
        raw = raw[size:]
    assert meter.done
    blocks = message(events(out + stream.end(meter.usage)))["content"]
    for kind, field, source in (("text", "text", "content"), ("thinking", "thinking", "reasoning_content")):
        said = "".join(delta.get(source, "") for delta in deltas)
        assert "".join(block[field] for block in blocks if block["type"] == kind) == said
    asked = [delta["tool_calls"][0]["function"] for delta in deltas if "tool_calls" in delta]
    found = [block for block in blocks if block["type"] == "tool_use"]
    assert [(one["name"], one["input"]) for one in found] == [(one["name"], json.loads(one["arguments"])) for one in asked]


@settings(deadline=None)
@given(st.lists(st.binary(max_size=60) | DELTAS.map(lambda deltas: b"".join(map(chunk, deltas))), max_size=8))
def test_whatever_a_backend_streams_nothing_follows_an_error(pieces: list[bytes]) -> None:
    stream, decoder, out = TRANSLATION.stream(), sse.Decoder(), b""
    for piece in pieces:
        for event in decoder.feed(sse.encode(piece) if not piece.startswith(b"data: ") else piece):
            out += stream.see(event)
    names = [name for name, _ in events(out + stream.end(USAGE))]
    assert ("error" in names) != ("message_stop" in names)
    assert names[-1] in ("error", "message_stop")
