from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core import messages
from gateway.core.endpoints import CHAT
from gateway.core.errors import GatewayError
from gateway.core.message_chat import chat_body

USER = {"role": "user", "content": "hello"}
MINIMAL = {"model": "m", "max_tokens": 5, "messages": [USER]}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}


def chat(**changes: Any) -> dict[str, Any]:
    """The chat completion that a request becomes."""
    body: dict[str, Any] = json.loads(chat_body(messages.parse(json.dumps({**MINIMAL, **changes}).encode())))
    return body


def said(*contents: Any) -> list[dict[str, Any]]:
    """The messages that these of a user become."""
    found: list[dict[str, Any]] = chat(messages=[{"role": "user", "content": content} for content in contents])["messages"]
    return found


def problem(body: Any) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        chat_body(messages.parse(body if isinstance(body, bytes) else json.dumps(body).encode()))
    assert caught.value.status == 400
    return caught.value


def test_the_least_request() -> None:
    assert chat() == {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}


def test_options_that_both_have() -> None:
    more = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "stream": True,
        "stop_sequences": ["END"],
        "metadata": {"user_id": "u"},
    }
    same = {"temperature": 0.5, "top_p": 0.25, "top_k": 7, "stream": True, "stop": ["END"], "user": "u"}
    assert chat(**more) == {**chat(), **same}


@pytest.mark.parametrize("system", ["be\nbrief", [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]])
def test_the_system_prompt_is_the_first_message(system: Any) -> None:
    assert chat(system=system)["messages"][0] == {"role": "system", "content": "be\nbrief"}


def test_text_alone_becomes_one_string_and_with_an_image_parts() -> None:
    text = {"type": "text", "text": "what", "cache_control": {"type": "ephemeral"}}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    assert said([text, text]) == [{"role": "user", "content": "what\nwhat"}]
    assert said([text, IMAGE]) == [{"role": "user", "content": [{"type": "text", "text": "what"}, image]}]
    by_url = {"type": "image", "source": {"type": "url", "url": "https://images.example/1.png"}}
    assert said([by_url])[0]["content"][0]["image_url"] == {"url": "https://images.example/1.png"}


def test_documents_that_are_text_are_text() -> None:
    plain = {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "words"}}
    blocks = {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "more"}]}}
    assert said([plain, blocks]) == [{"role": "user", "content": "T\nwords\nmore"}]


def test_a_turn_with_tools_goes_there_and_back() -> None:
    call = {"type": "tool_use", "id": "a", "name": "weather", "input": {"city": "Bonn", "days": [1, 2]}}
    other = {"type": "tool_use", "id": "b", "name": "time", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "rain"}], "is_error": False}
    nothing = {"type": "tool_result", "tool_use_id": "b"}
    turns = [
        USER,
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "s"}, call, other]},
        {"role": "user", "content": [result, nothing, {"type": "text", "text": "and now?"}]},
    ]
    calls = [
        {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Bonn","days":[1, 2]}'}},
        {"id": "b", "type": "function", "function": {"name": "time", "arguments": "{}"}},
    ]
    assert chat(messages=turns)["messages"] == [
        USER,
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "a", "content": "rain"},
        {"role": "tool", "tool_call_id": "b", "content": ""},
        {"role": "user", "content": "and now?"},
    ]


def test_an_image_that_a_tool_gives_stays_with_its_answer() -> None:
    [answer] = said([{"type": "tool_result", "tool_use_id": "a", "content": [IMAGE]}])
    assert (answer["role"], answer["content"][0]["type"]) == ("tool", "image_url")


def test_what_another_provider_thought_in_secret_is_left_out() -> None:
    blocks = [{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "yes"}]
    assert chat(messages=[USER, {"role": "assistant", "content": blocks}])["messages"][1:] == [
        {"role": "assistant", "content": "yes"}
    ]


TOOL = {"name": "f", "description": "does f", "input_schema": {"type": "object"}}


def test_tools() -> None:
    function = {"name": "f", "description": "does f", "parameters": {"type": "object"}}
    assert chat(tools=[TOOL])["tools"] == [{"type": "function", "function": function}]
    assert "tool_choice" not in chat(tools=[TOOL])


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "any"}, "required"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "f"}, {"type": "function", "function": {"name": "f"}}),
    ],
)
def test_the_choice_of_a_tool(choice: Any, expected: Any) -> None:
    assert chat(tools=[TOOL], tool_choice=choice)["tool_choice"] == expected
    one = chat(tools=[TOOL], tool_choice={**choice, "disable_parallel_tool_use": True})
    assert one["parallel_tool_calls"] is False


@pytest.mark.parametrize(("kind", "thinks"), [("enabled", True), ("disabled", False)])
def test_thinking_is_a_switch_of_the_template(kind: str, thinks: bool) -> None:
    thinking = {"type": kind, "budget_tokens": 1024}
    assert chat(thinking=thinking)["chat_template_kwargs"] == {"enable_thinking": thinks}
    assert "chat_template_kwargs" not in chat(thinking={"type": "adaptive"})


def test_a_schema_for_the_answer() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    found = chat(output_config={"format": {"type": "json_schema", "schema": schema}})["response_format"]
    assert (found["type"], found["json_schema"]["schema"]) == ("json_schema", schema)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": []}, "messages"),
        ({"model": None}, "model"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"top_p": -1}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"stream": "yes"}, "stream"),
        ({"stop_sequences": "END"}, "stop_sequences"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        ({"messages": [USER, {"content": "x"}]}, "messages[1].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "assistant", "content": [IMAGE]}]}, "messages[0].content[0].type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "base64", "data": "A"}}]}]},
            "messages[0].content[0].source.media_type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "url", "url": "u"}}]}]},
            "messages[0].content[0].source.type",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": "x"}]}]},
            "messages[0].content[0].input",
        ),
        ({"tools": [TOOL, {"type": "web_search_20250305", "name": "web_search"}]}, "tools[1].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"metadata": {"user_id": 7}}, "metadata.user_id"),
    ],
)
def test_a_mistake_is_named_by_its_path(changes: dict[str, Any], param: str) -> None:
    error = problem({**MINIMAL, **changes})
    assert error.param == param
    assert param in error.message


@pytest.mark.parametrize("field", MINIMAL)
def test_what_is_required(field: str) -> None:
    error = problem({name: value for name, value in MINIMAL.items() if name != field})
    assert (error.code, error.param) == ("missing_required_parameter", field)


def test_a_prompt_to_be_counted_needs_no_bound() -> None:
    body = json.dumps({"model": "m", "messages": [USER], "system": "x"}).encode()
    assert json.loads(chat_body(messages.parse_prompt(body)))["messages"][0]["content"] == "x"


@settings(deadline=None)
@given(
    st.binary(max_size=200)
    | st.builds(
        lambda one: json.dumps({**MINIMAL, "messages": [one]}).encode(),
        st.dictionaries(st.sampled_from(["role", "content"]), st.text() | st.lists(st.text())),
    )
)
def test_any_body_is_read_or_refused(body: bytes) -> None:
    try:
        made = chat_body(messages.parse(body))
    except GatewayError as error:
        assert error.status == 400
    else:
        assert CHAT.schema.read(made).model is not None
