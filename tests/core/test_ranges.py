from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.endpoints import CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, Endpoint
from gateway.core.errors import GatewayError
from gateway.core.ranges import Ranges, Window, check, check_window

HELLO = {"messages": [{"role": "user", "content": "x"}]}
TOOL = {"type": "function", "function": {"name": "f"}}


def asked(endpoint: Endpoint, **body: Any) -> Any:
    return endpoint.schema.read(json.dumps(body).encode())


@pytest.mark.parametrize(
    ("endpoint", "body", "ranges", "code", "param"),
    [
        (CHAT, {**HELLO, "max_tokens": 11}, Ranges(max_tokens=10), "invalid_value", "max_tokens"),
        (CHAT, {**HELLO, "max_completion_tokens": 11}, Ranges(max_tokens=10), "invalid_value", "max_completion_tokens"),
        (RESPONSES, {"input": "x", "max_output_tokens": 11}, Ranges(max_tokens=10), "invalid_value", "max_output_tokens"),
        (CHAT, {**HELLO, "n": 3}, Ranges(max_n=2), "invalid_value", "n"),
        (COMPLETIONS, {"prompt": "x", "best_of": 3}, Ranges(max_n=2), "invalid_value", "best_of"),
        (CHAT, {**HELLO, "logprobs": True}, Ranges(allow_logprobs=False), "invalid_value", "logprobs"),
        (COMPLETIONS, {"prompt": "x", "logprobs": 0}, Ranges(allow_logprobs=False), "invalid_value", "logprobs"),
        (RESPONSES, {"input": "x", "top_logprobs": 2}, Ranges(allow_logprobs=False), "invalid_value", "top_logprobs"),
        (CHAT, {**HELLO, "tools": [TOOL]}, Ranges(allow_tools=False), "invalid_value", "tools"),
        (CHAT, {**HELLO, "max_tokens": 10}, Ranges(context_length=10), "context_length_exceeded", "max_tokens"),
    ],
)
def test_what_a_model_may_not_be_asked_is_refused_by_its_path(
    endpoint: Endpoint, body: Any, ranges: Ranges, code: str, param: str
) -> None:
    with pytest.raises(GatewayError) as caught:
        check(asked(endpoint, **body), ranges)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, param)


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES])
def test_what_is_not_asked_for_is_not_bounded(endpoint: Endpoint) -> None:
    body = {**HELLO, "prompt": "x", "input": "x"}
    check(asked(endpoint, **body), Ranges(5, 6, 1, allow_logprobs=False, allow_tools=False))
    check(asked(endpoint, **body, max_tokens=5), Ranges(5, 6))


@given(st.integers(1, 50), st.integers(0, 50), st.integers(1, 60), st.booleans())
def test_a_window_refuses_exactly_what_has_no_room(prompt: int, most: int, tokens: int, whole: bool) -> None:
    request = asked(CHAT, **HELLO, max_tokens=most)
    fits = prompt + (most if whole else 0) <= tokens
    try:
        check_window(request, Window(tokens, whole), prompt)
        refused = False
    except GatewayError as error:
        assert error.param == ("max_tokens" if prompt <= tokens else None)
        refused = True
    assert refused != fits
