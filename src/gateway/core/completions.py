"""What a plain completion may ask (OpenAI API reference, "Create completion")."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from .asking import Completes, Text, TopLogprobs, check_one_kind, text_of, texts_of
from .schema import wrong


class CompletionRequest(Completes, kw_only=True):
    """A completion of one prompt, or of several: texts, or tokens."""

    prompt: Text
    suffix: str | None = None
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None
    logprobs: TopLogprobs | None = None

    @property
    def choices(self) -> int:  # type: ignore[override]
        return max(self.n or 1, self.best_of or 1) * len(texts_of(self.prompt))

    def prompt_text(self) -> str:
        return text_of(self.prompt)

    def check(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise wrong("stream_options", "it needs 'stream' to be true")
        if type(self.prompt) is list:
            check_one_kind("prompt", self.prompt)
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise wrong("best_of", f"it is less than 'n', which is {self.n}")
        if self.stream and self.best_of is not None and self.best_of > (self.n or 1):
            raise wrong("best_of", "in a stream it cannot be more than 'n'")
