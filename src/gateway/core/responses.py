"""What a response may ask (OpenAI API reference, "Create a model response"). Items and tools of kinds that are not listed
here pass: there are many, and an engine knows its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Final, Literal

from msgspec import Meta, Struct

from .asking import Generates, Object, TopLogprobs
from .schema import missing, wrong


class InputPart(Struct, tag_field="type", gc=False):
    """One part of an item's content."""

    text: ClassVar[str | None] = None


class InputText(InputPart, tag="input_text"):
    """What the user says."""

    text: str  # type: ignore[misc]


class OutputText(InputPart, tag="output_text"):
    """What the model has said."""

    text: str  # type: ignore[misc]


class PlainText(InputPart, tag="text"):
    """Text of either."""

    text: str  # type: ignore[misc]


class InputImage(InputPart, tag="input_image"):
    """An image: by URL, or by the id of a file."""

    image_url: str | None = None
    file_id: str | None = None
    detail: Literal["auto", "low", "high", "original"] | None = None


class InputFile(InputPart, tag="input_file"):
    """A file: by id, by URL, or its content as base64."""

    file_id: str | None = None
    file_url: str | None = None
    file_data: str | None = None
    filename: str | None = None


class InputAudio(InputPart, tag="input_audio"):
    """Sound."""

    input_audio: Object


class RefusedPart(InputPart, tag="refusal"):
    """What the model would not do."""

    refusal: str


ItemContent = str | list[InputText | OutputText | PlainText | InputImage | InputFile | InputAudio | RefusedPart]


class Item(Struct, gc=False):
    """One item of the conversation: a message (``type`` may be absent), a call, what came of it, or something else."""

    type: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: ItemContent | None = None
    id: str | None = None
    status: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Any = None
    summary: Any = None

    def text(self) -> str:
        """The text of its content, or of its call."""
        content = self.content
        if isinstance(content, list):
            return "\n".join(part.text for part in content if part.text is not None)
        return content or f"{self.name or ''}{self.arguments or ''}{self.output or ''}"


_NEEDED: Final = {
    None: ("role", "content"),
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
}


class ResponseTool(Struct, gc=False):
    """A tool; of a function its name and parameters."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: Object | None = None
    strict: bool | None = None


class AnyText(Struct, tag_field="type", tag="text", gc=False):
    """Any text."""


class AnyJson(Struct, tag_field="type", tag="json_object", gc=False):
    """A JSON object."""


class JsonOf(Struct, tag_field="type", tag="json_schema", gc=False):
    """JSON of this schema."""

    name: str
    schema: Object
    description: str | None = None
    strict: bool | None = None


class TextOptions(Struct, gc=False):
    """What the text is to be like."""

    format: AnyText | AnyJson | JsonOf | None = None
    verbosity: str | None = None


class ResponseStreamOptions(Struct, gc=False):
    """How a stream is to be sent."""

    include_obfuscation: bool | None = None


class ResponsesRequest(Generates, kw_only=True):
    """A response."""

    input: str | list[Item]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    stream_options: ResponseStreamOptions | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | Object | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Annotated[int, Meta(ge=1)] | None = None
    text: TextOptions | None = None
    reasoning: Object | None = None
    top_logprobs: TopLogprobs | None = None
    truncation: Literal["auto", "disabled"] | None = None
    include: list[str] | None = None
    previous_response_id: str | None = None
    conversation: str | Object | None = None
    background: bool | None = None

    @property
    def most_tokens(self) -> int | None:  # type: ignore[override]
        return self.max_output_tokens

    def prompt_text(self) -> str:
        return "\x1f".join(self._pieces())

    def _pieces(self) -> Iterator[str]:
        for tool in self.tools or ():
            yield f"{tool.type}{tool.name or ''}{tool.description or ''}"
        yield self.instructions or ""
        if isinstance(self.input, str):
            yield self.input
            return
        for item in self.input:
            yield item.role or item.type or ""
            yield item.text()

    def check(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise wrong("stream_options", "it needs 'stream' to be true")
        for at, item in enumerate(self.input if isinstance(self.input, list) else ()):
            for name in _NEEDED.get(item.type, ()):
                if getattr(item, name) is None:
                    raise missing(f"input[{at}].{name}")
        for at, tool in enumerate(self.tools or ()):
            if tool.type == "function" and not tool.name:
                raise missing(f"tools[{at}].name")
