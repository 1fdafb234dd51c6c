"""Text to tokens and back, as llama.cpp (tools/server/README.md) and vLLM (``/tokenize``, ``/detokenize``) take it."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from .asking import Object, Request, Token
from .schema import missing, wrong


class TokenizeRequest(Request, kw_only=True):
    """Text as llama.cpp takes it (``content``), as vLLM takes it (``prompt``), or a conversation (vLLM)."""

    content: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Object], Meta(min_length=1)] | None = None
    add_special: bool | None = None
    parse_special: bool | None = None
    with_pieces: bool | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    def text(self) -> str:
        """What is to be cut into tokens; of a conversation the contents that are text."""
        if self.messages is None:
            return self.content or self.prompt or ""
        contents = [msgspec.json.decode(one.get("content", b"null")) for one in self.messages]
        return "\n".join(one for one in contents if isinstance(one, str))

    def prompt_text(self) -> str:
        return self.content or self.prompt or ""

    def check(self) -> None:
        given = [name for name in ("content", "prompt", "messages") if getattr(self, name) is not None]
        if not given:
            raise missing("content")
        if len(given) > 1:
            raise wrong(given[1], f"'{given[0]}' is there too")


class DetokenizeRequest(Request, kw_only=True):
    """Tokens."""

    tokens: list[Token]

    def prompt_text(self) -> str:
        return ""
