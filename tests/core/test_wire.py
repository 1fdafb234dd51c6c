from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core import answers, sse, wire
from gateway.core.endpoints import CHAT
from gateway.core.errors import GatewayError
from gateway.core.usage import Usage

HELLO = [{"role": "user", "content": "hello"}]


def problem(body: Any) -> GatewayError:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(GatewayError) as caught:
        CHAT.schema.read(raw)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"", "invalid_json", None),
        (b"   ", "invalid_json", None),
        (b"{", "invalid_json", None),
        (b'{"messages": [{"role": "user", "content": "x"}]} trailing', "invalid_json", None),
        (b'{"messages": NaN}', "invalid_json", None),
        (b'{"messages": [{"role": "\xff"}]}', "invalid_json", None),
        (b'{"a":' * 100_000, "invalid_json", None),
        (b'{"messages": [{"role": "user"}], "\xff": 1}', "invalid_json", None),
        (b"[]", "invalid_type", None),
        (b'"hello"', "invalid_type", None),
        (b"null", "invalid_type", None),
        ({}, "missing_required_parameter", "messages"),
        ({"messages": None}, "invalid_type", "messages"),
        ({"messages": "hello"}, "invalid_type", "messages"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": ["hello"]}, "invalid_type", "messages[0]"),
        ({"messages": [*HELLO, {"content": "x"}]}, "missing_required_parameter", "messages[1].role"),
        ({"messages": [{"role": 7, "content": "x"}]}, "invalid_type", "messages[0].role"),
        ({"messages": [{"role": "user", "content": 7}]}, "invalid_type", "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "invalid_type", "messages[0].content[0]"),
        (
            {"messages": [{"role": "user", "content": [{"text": "x"}]}]},
            "missing_required_parameter",
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
            "invalid_type",
            "messages[0].content[0].text",
        ),
        ({"messages": HELLO, "model": 5}, "invalid_type", "model"),
        ({"messages": HELLO, "stream": "yes"}, "invalid_type", "stream"),
        ({"messages": HELLO, "stream_options": []}, "invalid_type", "stream_options"),
        ({"messages": HELLO, "stream_options": {"include_usage": 1}}, "invalid_type", "stream_options.include_usage"),
    ],
)
def test_a_bad_request_is_refused_by_the_name_of_its_field(body: Any, code: str, param: str | None) -> None:
    error = problem(body)
    assert (error.code, error.param) == (code, param)
    assert param is None or param in error.message


def test_the_message_says_what_was_expected_and_what_was_found() -> None:
    error = problem({"messages": "hello"})
    assert error.message == "Invalid type for 'messages': expected 'array', got 'string'."


def test_what_engines_have_beyond_openai_passes() -> None:
    chat = CHAT.schema.read(json.dumps({"messages": HELLO, "top_k": 5, "grammar": {"root": []}, "model": "m"}).encode())
    assert chat.model == "m"


@settings(deadline=None)  # the first body that is refused describes the types
@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x))
)
def test_any_json_is_read_or_refused_and_nothing_else(value: Any) -> None:
    for body in (value, {"messages": value}, {"messages": [{"role": "user", "content": value}]}):
        try:
            CHAT.schema.read(json.dumps(body).encode())
        except GatewayError as error:
            assert error.status == 400


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused_and_nothing_else(body: bytes) -> None:
    with pytest.raises(GatewayError):
        CHAT.schema.read(body)


def test_text_of_a_message_is_that_of_its_text_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "b"}]
    chat = CHAT.schema.read(json.dumps({"messages": [{"role": "user", "content": parts}, {"role": "assistant"}]}).encode())
    assert [message.text() for message in chat.messages] == ["a\nb", ""]


def test_asking_for_a_stream_changes_two_fields_and_no_other_byte() -> None:
    body = b'{"temperature": 0.70000, "messages": [{"role":"user",  "content":"\\u00e9"}], "stream_options": {"x": 1}}'
    changed = wire.as_stream(body)
    assert b"0.70000" in changed
    assert b'{"role":"user",  "content":"\\u00e9"}' in changed
    assert json.loads(changed) == {**json.loads(body), "stream": True, "stream_options": {"x": 1, "include_usage": True}}
    assert "stream" not in json.loads(wire.with_usage(body))
    assert json.loads(wire.with_usage(b'{"stream_options": null}')) == {"stream_options": {"include_usage": True}}


@pytest.mark.parametrize("body", [b'{"\\ud800": 1}', b'{"stream_options": ' + b"[" * 100_000, b'{"stream_options": 5}'])
def test_what_cannot_be_rewritten_is_the_callers_fault(body: bytes) -> None:
    with pytest.raises(GatewayError) as caught:
        wire.with_usage(body)
    assert (caught.value.status, caught.value.fault) == (400, "caller")


def test_headers_of_one_connection_do_not_travel() -> None:
    headers = [
        (b"connection", b"keep-alive, X-Secret-Hop"),
        (b"keep-alive", b"timeout=5"),
        (b"transfer-encoding", b"chunked"),
        (b"x-secret-hop", b"1"),
        (b"host", b"gateway"),
        (b"authorization", b"Bearer user-key"),
        (b"x-api-key", b"user-key"),
        (b"cookie", b"a=b"),
        (b"accept-encoding", b"gzip"),
        (b"x-request-id", b"abc"),
        (b"if-none-match", b'"a"'),
        (b"range", b"bytes=0-1"),
        (b"traceparent", b"00-1-2-01"),
        (b"x-session-id", b"s1"),
        (b"x-many", b"1"),
        (b"x-many", b"2"),
    ]
    kept = [(b"traceparent", b"00-1-2-01"), (b"x-session-id", b"s1"), (b"x-many", b"1"), (b"x-many", b"2")]
    assert wire.forwardable(headers, authorization=False) == kept
    credentials = [(b"authorization", b"Bearer user-key"), (b"x-api-key", b"user-key")]
    assert wire.forwardable(headers, authorization=True) == credentials + kept


def test_of_a_backends_headers_only_those_meant_for_the_client_come_back() -> None:
    headers = [(b"content-type", b"a/b"), (b"set-cookie", b"sid=1"), (b"server", b"x"), (b"retry-after", b"3")]
    assert wire.returnable(headers) == [(b"content-type", b"a/b"), (b"retry-after", b"3")]


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        (None, False),
        (b"", False),
        (b"abc-123_./:", True),
        (b"x" * 128, True),
        (b"x" * 129, False),
        (b"a b", False),
        (b"a\tb", False),
        (b"a\x00b", False),
        ("é".encode(), False),
        (b"a\r\nSet-Cookie: x", False),
    ],
)
def test_only_a_short_printable_request_id_is_taken_over(header: bytes | None, accepted: bool) -> None:
    assert (wire.accepted_request_id(header) is not None) == accepted


def test_a_stream_of_chunks_spells_the_answer() -> None:
    raw = b"".join(answers.chat_stream("id1", 5, "echo", ["Echo:", " hi"], Usage(1, 2), include_usage=True))
    *chunks, done = [event.data or b"" for event in sse.Decoder().feed(raw)]
    assert done == sse.DONE
    decoded = [json.loads(chunk) for chunk in chunks]
    assert {chunk["object"] for chunk in decoded} == {"chat.completion.chunk"}
    assert {chunk["id"] for chunk in decoded} == {"id1"}
    assert decoded[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["delta"].get("content") for chunk in decoded[1:3]] == ["Echo:", " hi"]
    assert decoded[3]["choices"][0] == {"index": 0, "delta": {}, "finish_reason": "stop"}
    assert decoded[4]["choices"] == []
    assert decoded[4]["usage"] == {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    assert all(chunk["usage"] is None for chunk in decoded[:4])


def test_a_client_that_did_not_ask_for_usage_gets_no_null_usage_either() -> None:
    raw = b"".join(answers.chat_stream("id1", 5, "echo", ["x"], Usage(1, 1), include_usage=False))
    *chunks, usage, _ = sse.Decoder().feed(raw)
    assert not [chunk for chunk in chunks if b"usage" in chunk.raw]
    assert json.loads(usage.data or b"")["choices"] == []


def test_a_model_is_found_by_its_id_or_an_alias() -> None:
    listing = json.dumps({"data": [{"id": "org/a", "aliases": ["small"]}, {"id": "b"}, {"no": "id"}, 5]}).encode()
    assert json.loads(wire.find_model(listing, "org/a"))["id"] == "org/a"
    assert json.loads(wire.find_model(listing, "small"))["id"] == "org/a"
    with pytest.raises(GatewayError) as caught:
        wire.find_model(listing, "c")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


@pytest.mark.parametrize("listing", [b"", b"[]", b"{}", b'{"data": 5}'])
def test_what_is_no_model_list_is_said_to_be_none(listing: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        wire.models(listing)
