"""A request of Anthropic's Messages API, written as a chat completion.

What has no counterpart is left out where an answer can do without it (cache_control, is_error, thinking budgets), and
refused by its path where the model would miss it (PDF files, tools that Anthropic runs). docs/anthropic.md has the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from .errors import GatewayError
from .messages import (
    AnyTool,
    AssistantTurn,
    Auto,
    Base64,
    Blocks,
    DocumentBlock,
    ImageBlock,
    MessagesRequest,
    NoTool,
    OneTool,
    Plain,
    Prompt,
    Text,
    Thinking,
    Tool,
    ToolResult,
    ToolUse,
    Url,
    UserTurn,
)

_Fields = dict[str, Any]
_CHOICES: Final = {Auto: "auto", AnyTool: "required", NoTool: "none"}
_THINKS: Final = {"enabled": True, "disabled": False}
_SAME: Final = ("max_tokens", "temperature", "top_p", "top_k")
"""Fields that a chat completion has too, ``top_k`` as an extra of the engines."""


def chat_body(request: Prompt) -> bytes:
    """The body of the chat completion. Raises `GatewayError` with the path of what cannot be said in one."""
    body: _Fields = {"model": request.model, "messages": _messages(request)}
    if request.tools:
        body["tools"] = [_tool(tool, f"tools[{place}]") for place, tool in enumerate(request.tools)]
        _choose_tool(request, body)
    if request.output_config is not None and request.output_config.format is not None:
        schema = {"name": "answer", "schema": request.output_config.format.schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if request.thinking is not None and request.thinking.type in _THINKS:
        body["chat_template_kwargs"] = {"enable_thinking": _THINKS[request.thinking.type]}
    if isinstance(request, MessagesRequest):
        _add_options(request, body)
    return msgspec.json.encode(body)


def _add_options(request: MessagesRequest, body: _Fields) -> None:
    for name in _SAME:
        value = getattr(request, name)
        if value is not None:
            body[name] = value
    if request.stop_sequences:
        body["stop"] = request.stop_sequences
    if request.stream:
        body["stream"] = True
    if request.metadata is not None and request.metadata.user_id is not None:
        body["user"] = request.metadata.user_id


# --- tools ------------------------------------------------------------------------------------


def _tool(tool: Tool, path: str) -> _Fields:
    if tool.type not in (None, "custom"):
        message = f"'{path}.type' is '{tool.type[:100] if tool.type else ''}': only the client's own tools can be used here."
        raise GatewayError("invalid_value", message, param=f"{path}.type")
    if tool.input_schema is None:
        path += ".input_schema"
        raise GatewayError("missing_required_parameter", f"Missing required parameter: '{path}'.", param=path)
    function: _Fields = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": function}


def _choose_tool(request: Prompt, body: _Fields) -> None:
    choice = request.tool_choice
    if choice is None:
        return
    if isinstance(choice, OneTool):
        body["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    else:
        body["tool_choice"] = _CHOICES[type(choice)]
    if choice.disable_parallel_tool_use:
        body["parallel_tool_calls"] = False


# --- messages ---------------------------------------------------------------------------------


def _messages(request: Prompt) -> list[_Fields]:
    found: list[_Fields] = []
    if request.system:
        found.append({"role": "system", "content": _joined(request.system)})
    for place, message in enumerate(request.messages):
        path = f"messages[{place}].content"
        found += _of_assistant(message) if isinstance(message, AssistantTurn) else _of_user(message, path)
    return found


def _joined(texts: str | Sequence[Text]) -> str:
    return texts if isinstance(texts, str) else "\n".join(text.text for text in texts)


def _of_assistant(message: AssistantTurn) -> Iterator[_Fields]:
    content = message.content
    if isinstance(content, str):
        yield {"role": "assistant", "content": content}
        return
    texts = [block for block in content if isinstance(block, Text)]
    thoughts = [block.thinking for block in content if isinstance(block, Thinking)]
    calls = [_call(block) for block in content if isinstance(block, ToolUse)]
    said: _Fields = {"role": "assistant", "content": _joined(texts) if texts else None if calls else ""}
    if thoughts:
        said["reasoning_content"] = "\n".join(thoughts)
    if calls:
        said["tool_calls"] = calls
    yield said


def _call(block: ToolUse) -> _Fields:
    arguments = msgspec.json.encode(block.input).decode("utf-8")
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def _of_user(message: UserTurn, path: str) -> Iterator[_Fields]:
    """Tools' answers are messages of their own and stand first, as they do in Anthropic's content."""
    content = message.content
    if isinstance(content, str):
        yield {"role": "user", "content": content}
        return
    said = []
    for place, block in enumerate(content):
        if isinstance(block, ToolResult):
            answer = _parts(block.content or "", f"{path}[{place}].content")
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": answer}
        else:
            said.append((f"{path}[{place}]", block))
    if said or not content:
        yield {"role": "user", "content": _merged([part for where, block in said for part in _of_block(block, where)])}


def _parts(content: str | Sequence[Text | ImageBlock | DocumentBlock], path: str) -> str | list[_Fields]:
    if isinstance(content, str):
        return content
    return _merged([part for place, block in enumerate(content) for part in _of_block(block, f"{path}[{place}]")])


def _merged(parts: list[_Fields]) -> str | list[_Fields]:
    """Text alone is one string: every engine's template knows what to do with that."""
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


def _of_block(block: Text | ImageBlock | DocumentBlock, path: str) -> Iterator[_Fields]:
    if isinstance(block, Text):
        yield {"type": "text", "text": block.text}
    elif isinstance(block, ImageBlock):
        yield {"type": "image_url", "image_url": {"url": _url(block.source)}}
    else:
        yield from _of_document(block, path)


def _url(source: Base64 | Url) -> str:
    return source.url if isinstance(source, Url) else f"data:{source.media_type};base64,{source.data}"


def _of_document(document: DocumentBlock, path: str) -> Iterator[_Fields]:
    source = document.source
    if document.title:
        yield {"type": "text", "text": document.title}
    if isinstance(source, Plain):
        yield {"type": "text", "text": source.data}
    elif isinstance(source, Blocks):
        blocks = [Text(source.content)] if isinstance(source.content, str) else source.content
        for block in blocks:
            yield from _of_block(block, path)
    else:
        path += ".source.type"
        kind = "url" if isinstance(source, Url) else "base64"
        message = f"'{path}' is '{kind}': of documents only text and content can be read here."
        raise GatewayError("invalid_value", message, param=path)
