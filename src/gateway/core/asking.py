"""What requests of several endpoints have in common."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta, Raw, Struct

from .schema import Asked, wrong

Object = dict[str, Raw]
"""An object that is passed on as it is."""

Token = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Text = str | Annotated[list[str | Token | Annotated[list[Token], Meta(min_length=1)]], Meta(min_length=1)]
"""One text or several; the tokens of one or of several."""

Stop = str | Annotated[list[str], Meta(max_length=4)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
TopLogprobs = Annotated[int, Meta(ge=0, le=20)]


class StreamOptions(Struct, gc=False):
    """How a stream is to be sent."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Request(Asked, kw_only=True):
    """What any request may have. ``model`` absent: the only one, or any."""

    stream: ClassVar[bool | None] = False
    include_usage: ClassVar[bool] = False
    most_tokens: ClassVar[int | None] = 0
    """The longest answer that is asked for, in tokens; None: no bound."""

    choices: ClassVar[int] = 1
    """Answers that it makes a backend generate."""

    model: str | None = None
    user: str | None = None

    @property
    def session(self) -> str | None:
        """Whose conversation it is."""
        return self.user

    def prompt_text(self) -> str:
        """The text that a prompt cache goes by: that of a request which continues another begins with the other's."""
        raise NotImplementedError


class Generates(Request, kw_only=True):
    """What a request may have that makes a model generate text."""

    stream: bool | None = None  # type: ignore[misc]
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None

    @property
    def session(self) -> str | None:
        return self.prompt_cache_key or self.user


class Completes(Generates, kw_only=True):
    """What chat and plain completions have in common. ``max_tokens`` of -1 is no bound (llama.cpp)."""

    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    stop: Stop | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | None = None

    @property
    def include_usage(self) -> bool:  # type: ignore[override]
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def choices(self) -> int:  # type: ignore[override]
        return self.n or 1

    @property
    def most_tokens(self) -> int | None:  # type: ignore[override]
        most = self.max_tokens
        return None if most is None or most < 0 else most

    def check(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise wrong("stream_options", "it needs 'stream' to be true")


def check_one_kind(name: str, found: list[str | int | list[int]]) -> None:
    """Raises `GatewayError` if the list has texts and tokens side by side."""
    kind = type(found[0])
    if any(type(one) is not kind for one in found):
        at = next(at for at, one in enumerate(found) if type(one) is not kind)
        raise wrong(f"{name}[{at}]", "texts, tokens and lists of tokens cannot be mixed")


def texts_of(found: str | list[str | int | list[int]]) -> list[str]:
    """Each text; of tokens their numbers, with spaces between."""
    if isinstance(found, str):
        return [found]
    if isinstance(found[0], int):
        return [" ".join(map(str, found))]
    return [one if isinstance(one, str) else " ".join(map(str, one)) for one in found]  # type: ignore[arg-type]


def text_of(found: str | list[str | int | list[int]]) -> str:
    """All of it as one text."""
    return found if isinstance(found, str) else "\x1f".join(texts_of(found))
