"""Requests of Anthropic's Messages API, read strictly.

Field names and shapes are those of Anthropic's API reference ("Create a Message"). `message_chat` writes them as chat
completions.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from .schema import Asked, Schema, wrong
from .usage import CHARACTERS

MESSAGES: Final = "/v1/messages"
COUNT_TOKENS: Final = "/v1/messages/count_tokens"

MAX_STOPS: Final = 4
"""As many as a chat completion takes."""


_Object = dict[str, msgspec.Raw]
_Positive = Annotated[int, msgspec.Meta(ge=1)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


# --- blocks -----------------------------------------------------------------------------------


class Text(msgspec.Struct, tag="text"):
    """Text, of either side."""

    text: str


class Base64(msgspec.Struct, tag="base64"):
    """Bytes of a file, within the request."""

    media_type: str
    data: str


class Url(msgspec.Struct, tag="url"):
    """Where the file is."""

    url: str


class Plain(msgspec.Struct, tag="text"):
    """A document that is text."""

    data: str


class ImageBlock(msgspec.Struct, tag="image"):
    """A picture."""

    source: Base64 | Url


class Blocks(msgspec.Struct, tag="content"):
    """A document that is made of blocks."""

    content: str | list[Text | ImageBlock]


class DocumentBlock(msgspec.Struct, tag="document"):
    """A document: text, or blocks. Files such as PDF are refused."""

    source: Plain | Blocks | Base64 | Url
    title: str | None = None


class ToolResult(msgspec.Struct, tag="tool_result"):
    """What a tool has answered."""

    tool_use_id: str
    content: str | list[Text | ImageBlock | DocumentBlock] | None = None


class ToolUse(msgspec.Struct, tag="tool_use"):
    """The model wants a tool to be called."""

    id: str
    name: str
    input: _Object


class Thinking(msgspec.Struct, tag="thinking"):
    """What the model thought."""

    thinking: str


class Redacted(msgspec.Struct, tag="redacted_thinking"):
    """What the model thought, for another provider's eyes only."""


class UserTurn(msgspec.Struct, tag_field="role", tag="user"):
    """A turn of the user, tools' answers included."""

    content: str | list[Text | ImageBlock | DocumentBlock | ToolResult]


class AssistantTurn(msgspec.Struct, tag_field="role", tag="assistant"):
    """A turn of the model."""

    content: str | list[Text | ToolUse | Thinking | Redacted]


# --- the request ------------------------------------------------------------------------------


class Tool(msgspec.Struct):
    """A tool of the client's. Tools that Anthropic runs have another ``type``, and are refused."""

    name: str
    type: str | None = None
    description: str | None = None
    input_schema: _Object | None = None


class Auto(msgspec.Struct, tag="auto"):
    """Tools as the model likes."""

    disable_parallel_tool_use: bool = False


class AnyTool(msgspec.Struct, tag="any"):
    """Some tool."""

    disable_parallel_tool_use: bool = False


class OneTool(msgspec.Struct, tag="tool"):
    """This tool."""

    name: str
    disable_parallel_tool_use: bool = False


class NoTool(msgspec.Struct, tag="none"):
    """No tool."""

    disable_parallel_tool_use: bool = False


class Metadata(msgspec.Struct):
    """Who the request is for."""

    user_id: str | None = None


class ThinkingMode(msgspec.Struct):
    """Whether the model is to think; how long is its engine's affair."""

    type: str


class AnswerSchema(msgspec.Struct, tag="json_schema"):
    """The answer is JSON of this schema."""

    schema: _Object


class OutputConfig(msgspec.Struct):
    """The form of the answer."""

    format: AnswerSchema | None = None


class Prompt(Asked, kw_only=True):
    """What is counted: all that the model reads. Fields that are not named here are accepted and ignored."""

    model: str
    messages: list[UserTurn | AssistantTurn]
    system: str | list[Text] | None = None
    tools: list[Tool] | None = None
    tool_choice: Auto | AnyTool | OneTool | NoTool | None = None
    thinking: ThinkingMode | None = None
    output_config: OutputConfig | None = None

    def check(self) -> None:
        if not self.messages:
            raise wrong("messages", "it is empty; send at least one message")


class MessagesRequest(Prompt, kw_only=True):
    """A request for an answer."""

    max_tokens: _Positive
    stop_sequences: list[str] | None = None
    temperature: _Share | None = None
    top_p: _Share | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0)] | None = None
    stream: bool = False
    metadata: Metadata | None = None

    def check(self) -> None:
        super().check()
        if self.stop_sequences is not None and len(self.stop_sequences) > MAX_STOPS:
            raise wrong("stop_sequences", f"at most {MAX_STOPS} may be given, got {len(self.stop_sequences)}")


REQUEST: Final = Schema(MessagesRequest)
PROMPT: Final = Schema(Prompt)


def parse(body: bytes) -> MessagesRequest:
    """Read a request for an answer. Raises `GatewayError`, whose ``param`` is the path of the field."""
    return REQUEST.read(body)


def parse_prompt(body: bytes) -> Prompt:
    """Read a request to count tokens. Raises as `parse` does."""
    return PROMPT.read(body)


# --- counts -----------------------------------------------------------------------------------


def estimate(body: bytes) -> int:
    """Tokens of a prompt that is so many bytes long as JSON, frame and all."""
    return len(body) // CHARACTERS + 1


def token_count(tokens: int) -> bytes:
    """The answer to a request to count."""
    return msgspec.json.encode({"input_tokens": tokens})
