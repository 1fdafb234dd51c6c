"""What each endpoint takes and refuses, by the path of the field."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core import endpoints
from gateway.core.endpoints import CHAT, COMPLETIONS, DETOKENIZE, EMBEDDINGS, ENDPOINTS, RERANK, RESPONSES, TOKENIZE, Endpoint
from gateway.core.errors import GatewayError
from gateway.core.schema import MAX_WALK

HELLO = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
LEAST: dict[Endpoint, dict[str, Any]] = {
    CHAT: {"messages": HELLO},
    COMPLETIONS: {"prompt": "hello"},
    EMBEDDINGS: {"input": "hello"},
    RESPONSES: {"input": "hello"},
    RERANK: {"query": "q", "documents": ["d"]},
    endpoints.RERANK_OF_OLD: {"query": "q", "documents": ["d"]},
    TOKENIZE: {"content": "hello"},
    DETOKENIZE: {"tokens": [1]},
}


def refusal(endpoint: Endpoint, body: Any, *, strict: bool = False) -> GatewayError:
    schema = endpoint.schema.strict if strict else endpoint.schema
    with pytest.raises(GatewayError) as caught:
        schema.read(body if isinstance(body, bytes) else json.dumps(body).encode())
    assert caught.value.status == 400
    return caught.value


def part(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, fields]}]}


@pytest.mark.parametrize(
    ("endpoint", "more", "code", "param"),
    [
        (CHAT, {"temperature": 2.5}, "invalid_value", "temperature"),
        (CHAT, {"temperature": "hot"}, "invalid_type", "temperature"),
        (CHAT, {"top_p": -0.1}, "invalid_value", "top_p"),
        (CHAT, {"presence_penalty": 3}, "invalid_value", "presence_penalty"),
        (CHAT, {"frequency_penalty": -3}, "invalid_value", "frequency_penalty"),
        (CHAT, {"n": 0}, "invalid_value", "n"),
        (CHAT, {"n": 1.5}, "invalid_type", "n"),
        (CHAT, {"max_tokens": -2}, "invalid_value", "max_tokens"),
        (CHAT, {"max_completion_tokens": 2**31}, "invalid_value", "max_completion_tokens"),
        (CHAT, {"seed": 2**63}, "invalid_value", "seed"),
        (CHAT, {"stop": list("abcde")}, "invalid_value", "stop"),
        (CHAT, {"stop": ["a", 1]}, "invalid_type", "stop[1]"),
        (CHAT, {"logit_bias": {"1": 5, "2": 101}}, "invalid_value", "logit_bias.2"),
        (CHAT, {"logit_bias": {"1": 5, "2": "x"}}, "invalid_type", "logit_bias.2"),
        (CHAT, {"metadata": {"a": "b", "c": 5}}, "invalid_type", "metadata.c"),
        (CHAT, {"top_logprobs": 2}, "invalid_value", "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
        (CHAT, {"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
        (CHAT, {"parallel_tool_calls": "yes"}, "invalid_type", "parallel_tool_calls"),
        (CHAT, {"response_format": {"type": "xml"}}, "invalid_value", "response_format.type"),
        (CHAT, {"response_format": {}}, "missing_required_parameter", "response_format.type"),
        (CHAT, {"response_format": {"type": "json_schema"}}, "missing_required_parameter", "response_format.json_schema"),
        (
            CHAT,
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "missing_required_parameter",
            "response_format.json_schema.name",
        ),
        (CHAT, {"tools": [{"type": "function"}]}, "missing_required_parameter", "tools[0].function"),
        (CHAT, {"tools": [TOOL, {"type": "function", "function": {}}]}, "missing_required_parameter", "tools[1].function.name"),
        (CHAT, {"tools": [{"type": "saw"}]}, "invalid_value", "tools[0].type"),
        (CHAT, {"tool_choice": "required"}, "invalid_value", "tool_choice"),
        (CHAT, {"tools": [TOOL], "tool_choice": "always"}, "invalid_value", "tool_choice"),
        (
            CHAT,
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "invalid_value",
            "tool_choice.function.name",
        ),
        (CHAT, {"messages": [{"role": "boss", "content": "x"}]}, "invalid_value", "messages[0].role"),
        (CHAT, {"messages": [*HELLO, {"role": "user"}]}, "missing_required_parameter", "messages[1].content"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "missing_required_parameter", "messages[0].tool_call_id"),
        (CHAT, {"messages": [{"role": "function", "content": "x"}]}, "missing_required_parameter", "messages[0].name"),
        (
            CHAT,
            {"messages": [{"role": "assistant", "tool_calls": [CALL, {**CALL, "id": 5}]}]},
            "invalid_type",
            "messages[0].tool_calls[1].id",
        ),
        (CHAT, part(type="image_url", image_url={}), "missing_required_parameter", "messages[0].content[1].image_url.url"),
        (CHAT, part(type="image_url", image_url={"url": 5}), "invalid_type", "messages[0].content[1].image_url.url"),
        (CHAT, part(type="image_url", image_url="http://x"), "invalid_type", "messages[0].content[1].image_url"),
        (
            CHAT,
            part(type="image_url", image_url={"url": "x", "detail": "max"}),
            "invalid_value",
            "messages[0].content[1].image_url.detail",
        ),
        (
            CHAT,
            part(type="input_audio", input_audio={"data": ""}),
            "missing_required_parameter",
            "messages[0].content[1].input_audio.format",
        ),
        (CHAT, part(type="smell"), "invalid_value", "messages[0].content[1].type"),
        (COMPLETIONS, {"prompt": None}, "invalid_type", "prompt"),
        (COMPLETIONS, {"prompt": []}, "invalid_value", "prompt"),
        (COMPLETIONS, {"prompt": ["a", 1]}, "invalid_value", "prompt[1]"),
        (COMPLETIONS, {"prompt": [1, -1]}, "invalid_value", "prompt[1]"),
        (COMPLETIONS, {"prompt": [[1], [2, "x"]]}, "invalid_type", "prompt[1][1]"),
        (COMPLETIONS, {"best_of": 1, "n": 2}, "invalid_value", "best_of"),
        (COMPLETIONS, {"best_of": 2, "stream": True}, "invalid_value", "best_of"),
        (COMPLETIONS, {"stream_options": {}}, "invalid_value", "stream_options"),
        (EMBEDDINGS, {"input": ""}, "invalid_value", "input"),
        (EMBEDDINGS, {"input": ["a", ""]}, "invalid_value", "input[1]"),
        (EMBEDDINGS, {"input": [[]]}, "invalid_value", "input[0]"),
        (EMBEDDINGS, {"dimensions": 0}, "invalid_value", "dimensions"),
        (EMBEDDINGS, {"encoding_format": "hex"}, "invalid_value", "encoding_format"),
        (RESPONSES, {"input": [{"content": "x"}]}, "missing_required_parameter", "input[0].role"),
        (RESPONSES, {"input": [{"role": "user"}]}, "missing_required_parameter", "input[0].content"),
        (
            RESPONSES,
            {"input": [{"type": "function_call_output", "call_id": "c"}]},
            "missing_required_parameter",
            "input[0].output",
        ),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "x"}]}]}, "invalid_value", "input[0].content[0].type"),
        (RESPONSES, {"max_output_tokens": 0}, "invalid_value", "max_output_tokens"),
        (RESPONSES, {"tools": [{"type": "function"}]}, "missing_required_parameter", "tools[0].name"),
        (RESPONSES, {"text": {"format": {"type": "json_schema"}}}, "missing_required_parameter", "text.format.name"),
        (RESPONSES, {"truncation": "some"}, "invalid_value", "truncation"),
        (RESPONSES, {"stream_options": {}}, "invalid_value", "stream_options"),
        (RERANK, {"documents": []}, "invalid_value", "documents"),
        (RERANK, {"documents": ["a", {}]}, "missing_required_parameter", "documents[1].text"),
        (RERANK, {"top_n": 0}, "invalid_value", "top_n"),
        (TOKENIZE, {"content": None}, "missing_required_parameter", "content"),
        (TOKENIZE, {"prompt": "x"}, "invalid_value", "prompt"),
        (DETOKENIZE, {"tokens": [1, "x"]}, "invalid_type", "tokens[1]"),
        (DETOKENIZE, {"tokens": [1, -1]}, "invalid_value", "tokens[1]"),
    ],
)
def test_a_bad_field_is_named_by_its_path(endpoint: Endpoint, more: Any, code: str, param: str) -> None:
    for strict in (False, True):
        error = refusal(endpoint, {**LEAST[endpoint], **more}, strict=strict)
        assert (error.code, error.param) == (code, param)
        assert f"'{param}'" in error.message


@pytest.mark.parametrize(
    ("endpoint", "more", "message"),
    [
        (CHAT, {"temperature": 3}, "Invalid value for 'temperature': expected number <= 2, got 3."),
        (CHAT, {"stop": list("abcde")}, "Invalid value for 'stop': expected array of length <= 4, got 5."),
        (CHAT, {"messages": [{"role": 7}]}, "Invalid type for 'messages[0].role': expected 'string', got 'integer'."),
        (
            CHAT,
            {"messages": [{"role": "boss"}]},
            "'messages[0].role': expected one of assistant, developer, function, system, tool, user, got 'boss'.",
        ),
        (CHAT, {"tool_choice": "x" * 99, "tools": [TOOL]}, "expected one of auto, none, required, got '" + "x" * 36 + "...."),
        (CHAT, {"logit_bias": {"a": 200}}, "Invalid value for 'logit_bias.a': expected number <= 100, got 200."),
    ],
)
def test_the_message_says_what_was_expected_and_what_was_found(endpoint: Endpoint, more: Any, message: str) -> None:
    assert message in refusal(endpoint, {**LEAST[endpoint], **more}).told


@pytest.mark.parametrize("endpoint", ENDPOINTS.values(), ids=ENDPOINTS)
def test_unknown_fields_pass_or_are_refused_as_the_operator_wants(endpoint: Endpoint) -> None:
    body = {**LEAST[endpoint], "top_k": 5, "grammar": {"root": []}}
    endpoint.schema.read(json.dumps(body).encode())
    error = refusal(endpoint, body, strict=True)
    assert (error.code, error.param) == ("unknown_parameter", "top_k")


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood"),
        (part(type="image_url", image_url={"url": "x", "size": 3}), "messages[0].content[1].image_url.size"),
        ({"tools": [{"type": "function", "function": {"name": "f", "speed": 1}}]}, "tools[0].function.speed"),
        ({"stream": True, "stream_options": {"chunks": 5}}, "stream_options.chunks"),
    ],
)
def test_strictness_reaches_all_the_way_down(more: Any, param: str) -> None:
    CHAT.schema.read(json.dumps({**LEAST[CHAT], **more}).encode())
    error = refusal(CHAT, {**LEAST[CHAT], **more}, strict=True)
    assert (error.code, error.param) == ("unknown_parameter", param)


@pytest.mark.parametrize("endpoint", ENDPOINTS.values(), ids=ENDPOINTS)
@pytest.mark.parametrize("last", ["1", '"x"', "null", "[]", "{}", "[[]]", '[{"a": 1}]'])
def test_of_a_field_that_stands_twice_either_may_be_complained_of(endpoint: Endpoint, last: str) -> None:
    """The decoder complains of the first, and what is found again at its place is the last."""
    for name in endpoint.schema.type.__struct_fields__:
        for first in ("1", '"x"', "[]", "{}", "-5", "1e400", '["", 2]', '[{"role": 3}]'):
            least = json.dumps(LEAST[endpoint])[:-1]
            body = f'{least}, "{name}": {first}, "{name}": {last}}}'.encode()
            for schema in (endpoint.schema, endpoint.schema.strict):
                with suppress(GatewayError):
                    schema.read(body)


@pytest.mark.parametrize("endpoint", ENDPOINTS.values(), ids=ENDPOINTS)
def test_null_is_as_good_as_absent(endpoint: Endpoint) -> None:
    given = LEAST[endpoint]
    nulls = dict.fromkeys(name for name in endpoint.schema.type.__struct_fields__ if name not in given)
    for schema in (endpoint.schema, endpoint.schema.strict):
        asked = schema.read(json.dumps({**given, **nulls}).encode())
        plain = schema.read(json.dumps(given).encode())
        assert (asked.prompt_text(), asked.most_tokens) == (plain.prompt_text(), plain.most_tokens)
        assert not asked.stream


def test_a_whole_conversation_with_tools_is_read_strictly() -> None:
    body = {
        "model": "m",
        "messages": [
            {"role": "system", "content": "be brief", "name": "boss"},
            {"role": "developer", "content": [{"type": "text", "text": "x"}]},
            {"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}, {"type": "text", "text": "look"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "5", "tool_call_id": "c1"},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}], "refusal": "no"},
            {"role": "function", "name": "f", "content": None},
        ],
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "strict": True}},
        "logprobs": True,
        "top_logprobs": 5,
        "logit_bias": {"50256": -100},
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 5,
        "max_completion_tokens": 7,
        "user": "u",
        "prompt_cache_key": "k",
        "stop": "END",
    }
    asked = CHAT.schema.strict.read(json.dumps(body).encode())
    assert (asked.most_tokens, asked.include_usage, asked.session) == (7, True, "k")
    text = asked.prompt_text()
    assert [word in text for word in ("f", "be brief", "look", "{}", "5")] == [True] * 5
    longer = {**body, "messages": [*body["messages"], {"role": "user", "content": "more"}]}  # type: ignore[misc]
    assert CHAT.schema.read(json.dumps(longer).encode()).prompt_text().startswith(text)


def test_no_bound_in_words_of_llama_cpp_is_no_bound() -> None:
    assert CHAT.schema.read(json.dumps({**LEAST[CHAT], "max_tokens": -1}).encode()).most_tokens is None


def test_the_key_at_fault_is_not_looked_for_in_a_body_that_is_too_large() -> None:
    body = {**LEAST[CHAT], "logit_bias": {"a": 200}, "x": "y" * MAX_WALK}
    error = refusal(CHAT, body)
    assert (error.code, error.param) == ("invalid_value", "logit_bias")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
)


@settings(deadline=None)  # the first body that is refused describes the types
@given(st.sampled_from(list(ENDPOINTS.values())), st.data())
def test_any_value_of_any_field_is_read_or_refused_and_nothing_else(endpoint: Endpoint, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(endpoint.schema.type.__struct_fields__))
    body = json.dumps({**LEAST[endpoint], name: data.draw(JSON)}).encode()
    for schema in (endpoint.schema, endpoint.schema.strict):
        try:
            schema.read(body)
        except GatewayError as error:
            assert error.status == 400
