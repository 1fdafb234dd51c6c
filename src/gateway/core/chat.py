"""What a chat completion may ask (OpenAI API reference, "Create chat completion"), and parts that engines add to it."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct

from .asking import Completes, Object, TopLogprobs
from .content import Content
from .schema import missing, wrong

# --- messages


class Function(Struct, gc=False):
    """A function that the model calls; its arguments are JSON in a string."""

    name: str
    arguments: str


class FunctionCall(Struct, tag_field="type", tag="function", gc=False):
    """A call of a function."""

    id: str
    function: Function

    def text(self) -> str:
        return self.function.name + self.function.arguments


class Custom(Struct, gc=False):
    """A custom tool that the model uses."""

    name: str
    input: str


class CustomCall(Struct, tag_field="type", tag="custom", gc=False):
    """A use of a custom tool."""

    id: str
    custom: Custom

    def text(self) -> str:
        return self.custom.name + self.custom.input


class Message(Struct, tag_field="role", gc=False):
    """One message of the conversation."""

    role: ClassVar[str]
    tool_calls: ClassVar[list[FunctionCall | CustomCall] | None] = None

    def text(self) -> str:
        """The text of the content; parts that are not text have none."""
        content: Content | None = self.content  # type: ignore[attr-defined]  # each kind has it
        if isinstance(content, list):
            return "\n".join(part.text for part in content if part.text is not None)
        return content or ""


class SystemMessage(Message, tag="system"):
    """What the model is told first."""

    role: ClassVar[str] = "system"
    content: Content
    name: str | None = None


class DeveloperMessage(Message, tag="developer"):
    """The same, by its new name."""

    role: ClassVar[str] = "developer"
    content: Content
    name: str | None = None


class UserMessage(Message, tag="user"):
    """What the user says."""

    role: ClassVar[str] = "user"
    content: Content
    name: str | None = None


class AssistantMessage(Message, tag="assistant"):
    """What the model has said or done."""

    role: ClassVar[str] = "assistant"
    content: Content | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[FunctionCall | CustomCall] | None = None  # type: ignore[misc]  # the one message that has them
    function_call: Function | None = None
    audio: Object | None = None


class ToolMessage(Message, tag="tool"):
    """What a tool gave."""

    role: ClassVar[str] = "tool"
    content: Content
    tool_call_id: str


class FunctionMessage(Message, tag="function"):
    """What a function gave, before there were tools."""

    role: ClassVar[str] = "function"
    name: str
    content: Content | None = None


# --- tools


class FunctionDefinition(Struct, gc=False):
    """A function that the model may call; its parameters are a JSON Schema."""

    name: Annotated[str, Meta(min_length=1)]
    description: str | None = None
    parameters: Object | None = None
    strict: bool | None = None


class FunctionTool(Struct, tag_field="type", tag="function", gc=False):
    """A function."""

    function: FunctionDefinition

    @property
    def name(self) -> str:
        return self.function.name

    def text(self) -> str:
        found = self.function
        properties = (found.parameters or {}).get("properties", b"")
        return f"{found.name}{found.description or ''}{str(properties, 'utf-8')}"


class CustomDefinition(Struct, gc=False):
    """A tool that takes free text, or a text of some format."""

    name: Annotated[str, Meta(min_length=1)]
    description: str | None = None
    format: Object | None = None


class CustomTool(Struct, tag_field="type", tag="custom", gc=False):
    """A custom tool."""

    custom: CustomDefinition

    @property
    def name(self) -> str:
        return self.custom.name

    def text(self) -> str:
        return f"{self.custom.name}{self.custom.description or ''}"


class Named(Struct, gc=False):
    """A tool by its name."""

    name: str


class FunctionChoice(Struct, tag_field="type", tag="function", gc=False):
    """This function is to be called."""

    function: Named


class CustomChoice(Struct, tag_field="type", tag="custom", gc=False):
    """This custom tool is to be used."""

    custom: Named


class AllowedTools(Struct, tag_field="type", tag="allowed_tools", gc=False):
    """Some of the tools are allowed."""

    allowed_tools: Object


# --- formats of answers


class TextFormat(Struct, tag_field="type", tag="text", gc=False):
    """Any text."""


class JsonObject(Struct, tag_field="type", tag="json_object", gc=False):
    """A JSON object; llama.cpp takes its schema too."""

    schema: Any = None


class JsonSchema(Struct, gc=False):
    """A JSON Schema, by its name."""

    name: str
    description: str | None = None
    schema: Object | None = None
    strict: bool | None = None


class JsonSchemaFormat(Struct, tag_field="type", tag="json_schema", gc=False):
    """JSON of this schema; llama.cpp takes the schema itself too."""

    json_schema: JsonSchema | None = None
    schema: Any = None


class StructuralTag(Struct, tag_field="type", tag="structural_tag", gc=False):
    """Text with structured parts (vLLM, SGLang)."""


# --- the request


class ChatRequest(Completes, kw_only=True):
    """A chat completion. What engines have beyond it passes through, unless strictness is on."""

    messages: Annotated[
        list[SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage | FunctionMessage],
        Meta(min_length=1),
    ]
    max_completion_tokens: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tools: list[FunctionTool | CustomTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | CustomChoice | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    response_format: TextFormat | JsonObject | JsonSchemaFormat | StructuralTag | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    modalities: list[str] | None = None
    audio: Object | None = None
    prediction: Object | None = None
    web_search_options: Object | None = None
    functions: list[FunctionDefinition] | None = None
    function_call: Any = None

    @property
    def most_tokens(self) -> int | None:  # type: ignore[override]
        most, other = self.max_completion_tokens, self.max_tokens
        if most is None or (other is not None and (other < 0 or other > most >= 0)):
            most = other  # engines differ in which of the two they go by
        return None if most is None or most < 0 else most

    def prompt_text(self) -> str:
        """Tools first, then the messages in order, each with its role; parts that are not text count by their type."""
        pieces = [tool.text() for tool in self.tools] if self.tools else [""]
        for message in self.messages:
            content = message.content
            pieces.append(message.role)
            if isinstance(content, str):
                pieces.append(content)
            elif content is not None:
                pieces += [part.text if part.text is not None else part.type for part in content]
            if message.tool_calls:
                pieces += [call.text() for call in message.tool_calls]
        return "\x1f".join(pieces)

    def check(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise wrong("stream_options", "it needs 'stream' to be true")
        if self.top_logprobs is not None and not self.logprobs:
            raise wrong("top_logprobs", "it needs 'logprobs' to be true")
        if self.tool_choice is not None:
            self._check_tool_choice()
        format = self.response_format
        if isinstance(format, JsonSchemaFormat) and format.json_schema is None and format.schema is None:
            raise missing("response_format.json_schema")

    def _check_tool_choice(self) -> None:
        choice = self.tool_choice
        if choice in ("none", "auto"):
            return
        if not self.tools:
            raise wrong("tool_choice", "it needs 'tools'")
        named = (
            choice.function
            if isinstance(choice, FunctionChoice)
            else choice.custom
            if isinstance(choice, CustomChoice)
            else None
        )
        if named is not None and named.name not in [tool.name for tool in self.tools]:
            path = "tool_choice.function.name" if isinstance(choice, FunctionChoice) else "tool_choice.custom.name"
            raise wrong(path, "none of 'tools' has this name")
