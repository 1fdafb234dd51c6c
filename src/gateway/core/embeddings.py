"""What may be asked of models that measure text: embeddings (OpenAI API reference) and reranking (Jina's, as llama.cpp
and vLLM have it)."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from .asking import Request, Text, check_one_kind, text_of
from .schema import wrong


class EmbeddingRequest(Request, kw_only=True):
    """Vectors of one input, or of several: texts, or tokens."""

    input: Text
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=65536)] | None = None

    def prompt_text(self) -> str:
        return text_of(self.input)

    def check(self) -> None:
        found = self.input
        if type(found) is list:
            check_one_kind("input", found)
            if "" in found:
                raise wrong(f"input[{found.index('')}]", "it is empty")
        elif not found:
            raise wrong("input", "it is empty")


class Document(Struct, gc=False):
    """A document as an object; what else it has is passed on."""

    text: str


class RerankRequest(Request, kw_only=True):
    """How well each document answers the query."""

    query: str
    documents: Annotated[list[str | Document], Meta(min_length=1)]
    top_n: Annotated[int, Meta(ge=1)] | None = None
    return_documents: bool | None = None
    max_tokens_per_doc: Annotated[int, Meta(ge=1)] | None = None

    def texts(self) -> list[str]:
        """The documents' texts."""
        return [one if isinstance(one, str) else one.text for one in self.documents]

    def prompt_text(self) -> str:
        return "\x1f".join([self.query, *self.texts()])
