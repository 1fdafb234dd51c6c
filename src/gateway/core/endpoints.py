"""The endpoints that go to a backend: what each may ask, and how its streams are read and put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from .assembly import Assembler, ResponseAssembler
from .chat import ChatRequest
from .completions import CompletionRequest
from .embeddings import EmbeddingRequest, RerankRequest
from .responses import ResponsesRequest
from .schema import Schema
from .tokens import DetokenizeRequest, TokenizeRequest
from .usage import ResponsesMeter, UsageMeter


def _text_completion(limit: int) -> Assembler:
    return Assembler(limit, "text_completion")


class Endpoint(NamedTuple):
    """One row. ``path`` is where clients and backends have it, and its label in metrics and log. ``usage_option``: its streams
    tell the usage if ``stream_options.include_usage`` asks for it. ``assembler``: what makes a whole answer of a stream, with
    the most bytes it may take in; None: it has no streams."""

    path: str
    schema: Schema[Any]
    usage_option: bool = False
    assembler: Callable[[int], Assembler | ResponseAssembler] | None = None
    meter: type[UsageMeter] = UsageMeter


CHAT: Final = Endpoint("/v1/chat/completions", Schema(ChatRequest), usage_option=True, assembler=Assembler)
COMPLETIONS: Final = Endpoint("/v1/completions", Schema(CompletionRequest), usage_option=True, assembler=_text_completion)
EMBEDDINGS: Final = Endpoint("/v1/embeddings", Schema(EmbeddingRequest))
RESPONSES: Final = Endpoint(
    "/v1/responses",
    Schema(ResponsesRequest),
    assembler=ResponseAssembler,
    meter=ResponsesMeter,
)
RERANK: Final = Endpoint("/v1/rerank", Schema(RerankRequest))
RERANK_OF_OLD: Final = Endpoint("/rerank", RERANK.schema)
TOKENIZE: Final = Endpoint("/tokenize", Schema(TokenizeRequest))
DETOKENIZE: Final = Endpoint("/detokenize", Schema(DetokenizeRequest))

ENDPOINTS: Final = {
    row.path: row for row in (CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, RERANK, RERANK_OF_OLD, TOKENIZE, DETOKENIZE)
}


def endpoint_of(route: str) -> Endpoint:
    """The endpoint of a route; of one that is about another, as /admin/explain is, chat completions."""
    return ENDPOINTS.get(route, CHAT)
