"""The parts that a message's content may have (OpenAI API reference, "Create chat completion"), and those that vLLM adds."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta, Struct


class Part(Struct, tag_field="type", gc=False):
    """One part of a message's content."""

    type: ClassVar[str]
    text: ClassVar[str | None] = None


class TextPart(Part, tag="text"):
    """Text."""

    type: ClassVar[str] = "text"
    text: str  # type: ignore[misc]  # the one part that has it


class Image(Struct, gc=False):
    """Where an image is: a URL, or the image itself as a ``data:`` URL."""

    url: Annotated[str, Meta(min_length=1)]
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(Part, tag="image_url"):
    """An image."""

    type: ClassVar[str] = "image_url"
    image_url: Image


class Audio(Struct, gc=False):
    """Sound, as base64."""

    data: str
    format: str


class AudioPart(Part, tag="input_audio"):
    """Sound."""

    type: ClassVar[str] = "input_audio"
    input_audio: Audio


class File(Struct, gc=False):
    """A file: its id, or its content as base64."""

    file_id: str | None = None
    file_data: str | None = None
    filename: str | None = None


class FilePart(Part, tag="file"):
    """A file."""

    type: ClassVar[str] = "file"
    file: File


class RefusalPart(Part, tag="refusal"):
    """What the model would not do."""

    type: ClassVar[str] = "refusal"
    refusal: str


class Link(Struct, gc=False):
    """Where a film or a sound is."""

    url: Annotated[str, Meta(min_length=1)]


class VideoPart(Part, tag="video_url"):
    """A film (vLLM)."""

    type: ClassVar[str] = "video_url"
    video_url: Link


class AudioLinkPart(Part, tag="audio_url"):
    """Sound by its address (vLLM)."""

    type: ClassVar[str] = "audio_url"
    audio_url: Link


Content = str | list[TextPart | ImagePart | AudioPart | FilePart | RefusalPart | VideoPart | AudioLinkPart]
