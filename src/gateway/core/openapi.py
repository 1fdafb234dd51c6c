"""The OpenAPI 3.1 document, made from the types that requests are read with, and the table of errors."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, Final, NamedTuple

import msgspec

from .endpoints import (
    CHAT,
    COMPLETIONS,
    DETOKENIZE,
    EMBEDDINGS,
    ENDPOINTS,
    RERANK,
    RERANK_OF_OLD,
    RESPONSES,
    TOKENIZE,
)
from .error_forms import ANTHROPIC_TYPES
from .errors import CODES
from .messages import COUNT_TOKENS, MESSAGES, PROMPT, REQUEST
from .schema import Schema
from .tickets import PRIORITIES
from .wire import CHANGE

JSON: Final = "application/json"
EVENTS: Final = "text/event-stream"
HTML: Final = "text/html"
UNSEEN: Final = frozenset(["client_cancelled", "rejected_by_backend"])
"""Codes of the log that no client reads."""
UNROUTED: Final = frozenset([408, 413, 431])
"""Statuses of what is refused before it has a route."""


class Operation(NamedTuple):
    """One row. ``parameter``: the one in its path; ``gives``: the media types of its answer; ``open``: it asks for no key.
    ``anthropic``: its errors have Anthropic's form."""

    method: str
    path: str
    summary: str
    schema: Schema[Any] | None = None
    parameter: str = ""
    gives: tuple[str, ...] = (JSON,)
    open: bool = False
    anthropic: bool = False


_STREAMED: Final = (JSON, EVENTS)
_METRICS: Final = (JSON, "text/plain", "application/openmetrics-text")

OPERATIONS: Final = (
    Operation("post", CHAT.path, "A chat completion, whole or streamed", CHAT.schema, gives=_STREAMED),
    Operation("post", COMPLETIONS.path, "A plain completion, whole or streamed", COMPLETIONS.schema, gives=_STREAMED),
    Operation("post", RESPONSES.path, "A response, whole or streamed", RESPONSES.schema, gives=_STREAMED),
    Operation("post", EMBEDDINGS.path, "Vectors of texts", EMBEDDINGS.schema),
    Operation("post", RERANK.path, "How well documents answer a query", RERANK.schema),
    Operation("post", RERANK_OF_OLD.path, "The same, by its other name", RERANK_OF_OLD.schema),
    Operation("post", TOKENIZE.path, "Text to tokens", TOKENIZE.schema),
    Operation("post", DETOKENIZE.path, "Tokens to text", DETOKENIZE.schema),
    Operation("post", MESSAGES, "A message of Anthropic's API, whole or streamed", REQUEST, gives=_STREAMED, anthropic=True),
    Operation("post", COUNT_TOKENS, "How many tokens such a message's prompt has", PROMPT, anthropic=True),
    Operation("get", "/v1/models", "The models of all backends"),
    Operation("get", "/v1/models/{id}", "One model", parameter="id"),
    Operation("get", "/healthz", "The process lives", open=True),
    Operation("get", "/readyz", "A backend is in order", open=True),
    Operation("get", "/metrics", "Totals as JSON, or Prometheus or OpenMetrics text", gives=_METRICS),
    Operation("get", "/openapi.json", "This document", open=True),
    Operation("get", "/dashboard", "A page that shows how things are", gives=(HTML,), open=True),
    Operation("get", "/dashboard/state", "What it shows, as JSON"),
    Operation("get", "/dashboard/events", "The same once a second, as a stream of events", gives=(EVENTS,)),
    Operation("get", "/admin/settings", "The settings that hold; secrets are fingerprints"),
    Operation("post", "/admin/explain", "Where a chat completion would go, and why", CHAT.schema),
    Operation("post", "/admin/backends/{name}", "Take a backend out of service, or back", CHANGE, parameter="name"),
)

_ERROR: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "the path of the field at fault"},
                "code": {"type": ["string", "null"], "enum": [*sorted(set(CODES) - UNSEEN), None]},
            },
        }
    },
}

_ANTHROPIC_ERROR: Final = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"enum": sorted(set(ANTHROPIC_TYPES.values()))}, "message": {"type": "string"}},
        },
        "request_id": {"type": "string"},
    },
}

_REQUEST_ID: Final = {
    "name": "x-request-id",
    "in": "header",
    "description": "Comes back, and goes to the backend; one that does not fit is replaced.",
    "schema": {"type": "string", "pattern": "^[!-~]{1,128}$"},
}
_OF_INFERENCE: Final = (
    {
        "name": "x-gateway-priority",
        "in": "header",
        "description": "How urgent it is.",
        "schema": {"type": "string", "enum": list(PRIORITIES)},
    },
    {
        "name": "x-session-id",
        "in": "header",
        "description": "Whose conversation it is: it stays where its cache is. Else the body's prompt_cache_key or user.",
        "schema": {"type": "string", "pattern": "^[!-~]{1,256}$"},
    },
)


@cache
def document(version: str, *, strict: bool) -> bytes:
    """The document as JSON. ``strict``: fields that a type does not have are refused."""
    types = list({_type_of(row.schema, row, strict=strict): None for row in OPERATIONS if row.schema is not None})
    references, schemas = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    of_type = dict(zip(types, references, strict=True))
    paths: dict[str, Any] = {}
    for row in OPERATIONS:
        body = None if row.schema is None else of_type[_type_of(row.schema, row, strict=strict)]
        paths.setdefault(row.path, {})[row.method] = _operation(row, body)
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "Inference Gateway", "version": version, "license": {"name": "MIT", "identifier": "MIT"}},
            "paths": paths,
            "components": {
                "schemas": {**schemas, "Error": _ERROR, "AnthropicError": _ANTHROPIC_ERROR},
                "responses": {**dict(_errors("E", "Error")), **dict(_errors("A", "AnthropicError"))},
                "securitySchemes": {
                    "bearer": {"type": "http", "scheme": "bearer"},
                    "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
                },
            },
        }
    )


def _type_of(schema: Schema[Any], row: Operation, *, strict: bool) -> type:
    """Of Anthropic's API only what its translation needs is known, so more is never refused."""
    return schema.strict.type if strict and not row.anthropic else schema.type


def _operation(row: Operation, body: Any) -> dict[str, Any]:
    parameters: list[Any] = [_REQUEST_ID, *(_OF_INFERENCE if _is_inference(row) else ())]
    if row.parameter:
        schema = {"type": "string", "minLength": 1}
        parameters.append({"name": row.parameter, "in": "path", "required": True, "schema": schema})
    made: dict[str, Any] = {
        "summary": row.summary,
        "operationId": f"{row.method}{row.path.translate(_PLAIN)}",
        "parameters": parameters,
        "security": [{}] if row.open else [{"bearer": []}, {"key": []}, {}],
        "responses": {"200": _answer(row.gives), **dict(_references(row))},
    }
    if body is not None:
        made["requestBody"] = {"required": True, "content": {JSON: {"schema": body}}}
    return made


_PLAIN: Final = str.maketrans({"/": "_", "{": None, "}": None, ".": "_"})


_SCHEMAS: Final[dict[str, Any]] = {
    JSON: {"schema": {"type": "object"}},
    HTML: {"schema": {"type": "string"}},
    EVENTS: {},  # what a schema would be of, OpenAPI 3.1 does not say: the stream, or each event
    "text/plain": {"schema": {"type": "string"}},
    "application/openmetrics-text": {"schema": {"type": "string"}},
}


def _answer(media_types: tuple[str, ...]) -> dict[str, Any]:
    content = {one: _SCHEMAS[one] for one in media_types}
    return {"description": "The answer", "headers": _ID_HEADER, "content": content}


_ID_HEADER: Final = {"x-request-id": {"description": "What the request goes by.", "schema": {"type": "string"}}}


def _references(row: Operation) -> Iterator[tuple[str, dict[str, str]]]:
    form = "A" if row.anthropic else "E"
    for status in _statuses():
        # What is refused before it has a route (a body too large, bad HTTP) is told in OpenAI's form whatever the path.
        yield str(status), {"$ref": f"#/components/responses/{'E' if status in UNROUTED else form}{status}"}
    if _is_inference(row) or row.path == "/v1/models":
        yield "4XX", {"$ref": f"#/components/responses/{form}4XX"}


def _is_inference(row: Operation) -> bool:
    return row.path in ENDPOINTS or row.anthropic


def _statuses() -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name, code in CODES.items():
        if name not in UNSEEN:
            found.setdefault(code.status, []).append(name)
    return dict(sorted(found.items()))


def _errors(form: str, schema: str) -> Iterator[tuple[str, dict[str, Any]]]:
    content = {JSON: {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    for status, names in _statuses().items():
        headers: dict[str, Any] = dict(_ID_HEADER)
        if status in (429, 503):
            wait = {"type": "integer", "minimum": 0, "maximum": 120}
            headers["retry-after"] = {"description": "Seconds after which a retry makes sense.", "schema": wait}
        yield f"{form}{status}", {"description": ", ".join(names), "headers": headers, "content": content}
    yield f"{form}4XX", {"description": "The backend's own refusal, as it said it", "content": {JSON: {"schema": {}}}}
