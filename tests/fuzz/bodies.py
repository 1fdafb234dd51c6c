"""Seams of requests' bodies: one for each endpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from gateway.core import message_chat, messages, wire
from gateway.core.endpoints import ENDPOINTS
from gateway.core.errors import CODES, UNDECODABLE, GatewayError
from gateway.core.model_settings import ModelSettings
from gateway.core.schema import Schema

from .seams import Seam, packed

SHOWN: Final = 2048
"""An error is never longer than this: a body cannot be made to fill a log."""


def _told(error: GatewayError) -> None:
    assert error.code in CODES
    assert error.status == 400
    assert "\n" not in error.message
    assert len(error.body()) <= 8 * SHOWN
    assert len(error.message) <= SHOWN


def _reads(schema: Schema[Any]) -> Callable[[bytes], None]:
    model = ModelSettings("m", "other", {"seed": msgspec.Raw(b"7")})

    def one(data: bytes) -> None:
        """It is read, or refused in words; what goes on to a backend is JSON."""
        for form in (schema, schema.strict):
            try:
                asked = form.read(data)
            except GatewayError as error:
                _told(error)
                continue
            assert isinstance(asked.prompt_text(), str)
            assert asked.choices >= 1
            assert asked.most_tokens is None or asked.most_tokens >= 0
            for rewrite in (wire.as_stream, wire.with_usage, model.applied):
                try:
                    made = rewrite(data)
                except GatewayError as error:
                    _told(error)
                    continue
                msgspec.json.decode(made, type=dict[str, msgspec.Raw])
                assert len(made) <= 2 * len(data) + 200

    return one


def message(data: bytes) -> None:
    """A message is read and becomes a chat completion, or is refused in words."""
    for parse in (messages.parse, messages.parse_prompt):
        try:
            made = message_chat.chat_body(parse(data))
            ENDPOINTS["/v1/chat/completions"].schema.read(made)
        except GatewayError as error:
            _told(error)
            continue
        assert len(made) <= 16 * len(data) + 1024


def change(data: bytes) -> None:
    """What an operator asks for is read, or refused in words."""
    try:
        wire.CHANGE.read(data)
    except GatewayError as error:
        _told(error)


def listing(data: bytes) -> None:
    """A backend's list of models is one, or is told not to be."""
    try:
        entries = wire.models(data)
    except UNDECODABLE:
        return
    for entry in entries:
        assert all(isinstance(name, str) for name in wire.names_of(entry))
    try:
        wire.find_model(data, "m")
    except GatewayError as error:
        assert error.code == "model_not_found"


_TOOL: Final = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}
_CALL: Final = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
_PARTS: Final = [{"type": "text", "text": "t"}, {"type": "image_url", "image_url": {"url": "data:x", "detail": "low"}}]
_OPTIONS: Final = {
    "model": "m",
    "stream": True,
    "temperature": 1,
    "max_tokens": 5,
    "stop": ["a"],
    "n": 1,
    "logit_bias": {"1": 2},
}
_CHAT: Final = {
    **_OPTIONS,
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": _PARTS, "name": "n"},
        {"role": "assistant", "tool_calls": [_CALL]},
        {"role": "tool", "content": "r", "tool_call_id": "c1"},
    ],
    "tools": [_TOOL],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "stream_options": {"include_usage": True},
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
    "logprobs": True,
    "top_logprobs": 2,
    "metadata": {"a": "b"},
}
_INPUT: Final = [
    {"role": "user", "content": [{"type": "input_text", "text": "t"}]},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": "o"},
]
_BODIES: Final[dict[str, list[Any]]] = {
    "/v1/chat/completions": [_CHAT],
    "/v1/completions": [{**_OPTIONS, "prompt": ["a", "b"], "logprobs": 1, "echo": True}, {"prompt": [[1, 2], [3]]}],
    "/v1/embeddings": [{"input": ["a"], "model": "m", "dimensions": 8, "encoding_format": "base64"}],
    "/v1/responses": [{"input": _INPUT, "model": "m", "instructions": "i", "max_output_tokens": 20, "tools": [{"type": "x"}]}],
    "/v1/rerank": [{"query": "q", "documents": ["d", {"text": "e"}], "top_n": 1}],
    "/tokenize": [{"content": "c", "add_special": True}, {"prompt": "p", "model": "m"}],
    "/detokenize": [{"tokens": [1, 2]}],
}
_MESSAGE: Final = {
    "model": "m",
    "max_tokens": 5,
    "system": [{"type": "text", "text": "s"}],
    "messages": [
        {"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "u"}}, {"type": "text", "text": "t"}]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "i", "name": "f", "input": {"a": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "i", "content": [{"type": "text", "text": "x"}]}]},
    ],
    "tools": [{"name": "f", "input_schema": {"type": "object"}}],
    "tool_choice": {"type": "tool", "name": "f"},
    "metadata": {"user_id": "u"},
    "stop_sequences": ["a"],
    "temperature": 0.5,
}
_LIST: Final = {"object": "list", "data": [{"id": "m", "aliases": ["n"], "owned_by": "vllm", "max_model_len": 4096}]}

SEAMS: Final = {
    **{f"body{path}": Seam(_reads(ENDPOINTS[path].schema), packed(*made)) for path, made in _BODIES.items()},
    "body/v1/messages": Seam(message, packed(_MESSAGE)),
    "body/admin/backends": Seam(change, packed({"draining": True})),
    "models": Seam(listing, packed(_LIST)),
}
