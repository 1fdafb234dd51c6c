"""Answers that the gateway itself makes, in OpenAI's forms, for the echo."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from . import sse
from .usage import Usage


def usage_object(usage: Usage) -> dict[str, int]:
    """OpenAI's ``usage`` object."""
    prompt, completion = usage.prompt_tokens, usage.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def chat_completion(id: str, created: int, model: str, content: str, usage: Usage) -> bytes:
    """A whole ``chat.completion``; ``created`` in Unix seconds."""
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    answer = {"id": id, "object": "chat.completion", "created": created, "model": model}
    return msgspec.json.encode({**answer, "choices": [choice], "usage": usage_object(usage)})


def chat_stream(
    id: str, created: int, model: str, pieces: Iterable[str], usage: Usage, *, include_usage: bool
) -> Iterator[bytes]:
    """The same as SSE events: the role, one chunk a piece, the finish reason, usage, ``[DONE]``.

    As in OpenAI's streams, the chunks before the last have a ``usage`` of null if the client asked for usage.
    """
    head = {"id": id, "object": "chat.completion.chunk", "created": created, "model": model}
    if include_usage:
        head["usage"] = None

    def chunk(delta: Mapping[str, str], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return sse.encode(msgspec.json.encode({**head, "choices": [choice]}))

    yield chunk({"role": "assistant", "content": ""})
    for piece in pieces:
        yield chunk({"content": piece})
    yield chunk({}, "stop")
    yield sse.encode(msgspec.json.encode({**head, "choices": [], "usage": usage_object(usage)}))
    yield sse.encode(sse.DONE)


def text_completion(id: str, created: int, model: str, texts: Sequence[str], usage: Usage) -> bytes:
    """A whole ``text_completion``, with a choice for each text."""
    choices = [{"index": at, "text": text, "logprobs": None, "finish_reason": "stop"} for at, text in enumerate(texts)]
    answer = {"id": id, "object": "text_completion", "created": created, "model": model}
    return msgspec.json.encode({**answer, "choices": choices, "usage": usage_object(usage)})


def text_stream(
    id: str, created: int, model: str, texts: Sequence[Iterable[str]], usage: Usage, *, include_usage: bool
) -> Iterator[bytes]:
    """The same as SSE events, the pieces of one text after those of another."""
    head = {"id": id, "object": "text_completion", "created": created, "model": model}
    if include_usage:
        head["usage"] = None

    def chunk(at: int, text: str, finish_reason: str | None = None) -> bytes:
        choice = {"index": at, "text": text, "logprobs": None, "finish_reason": finish_reason}
        return sse.encode(msgspec.json.encode({**head, "choices": [choice]}))

    for at, pieces in enumerate(texts):
        for piece in pieces:
            yield chunk(at, piece)
        yield chunk(at, "", "stop")
    yield sse.encode(msgspec.json.encode({**head, "choices": [], "usage": usage_object(usage)}))
    yield sse.encode(sse.DONE)


def embeddings(model: str, vectors: Iterable[Sequence[float]], usage: Usage, *, as_base64: bool) -> bytes:
    """A ``list`` of embeddings; in base64 they are little-endian 32-bit floats."""
    made = [{"object": "embedding", "index": at, "embedding": _vector(one, as_base64)} for at, one in enumerate(vectors)]
    counts = {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens}
    return msgspec.json.encode({"object": "list", "model": model, "data": made, "usage": counts})


def _vector(vector: Sequence[float], as_base64: bool) -> object:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii") if as_base64 else vector


def reranking(id: str, model: str, ranked: Iterable[tuple[int, float]], texts: Sequence[str] | None, usage: Usage) -> bytes:
    """Reranked documents as (index, score), best first; ``texts`` if the documents themselves come back."""
    results: list[dict[str, Any]] = [{"index": at, "relevance_score": score} for at, score in ranked]
    for one in results if texts is not None else ():
        one["document"] = {"text": texts[one["index"]]}  # type: ignore[index]
    counts = {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens}
    return msgspec.json.encode({"id": id, "object": "list", "model": model, "results": results, "usage": counts})


def response_object(id: str, created: int, model: str, text: str | None, usage: Usage) -> dict[str, Any]:
    """A ``response``, completed; without a text it is only in progress."""
    answer: dict[str, Any] = {"id": f"resp_{id}", "object": "response", "created_at": created, "model": model}
    answer |= {"error": None, "incomplete_details": None, "instructions": None, "metadata": {}, "parallel_tool_calls": True}
    answer |= {"temperature": None, "tool_choice": "auto", "tools": [], "top_p": None}
    if text is None:
        return {**answer, "status": "in_progress", "output": [], "usage": None}
    prompt, completion = usage.prompt_tokens, usage.completion_tokens
    counts = {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + completion,
    }
    return {**answer, "status": "completed", "output": [_output(id, [_part(text)])], "usage": counts}


def _output(id: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    status = "completed" if content else "in_progress"
    return {"type": "message", "id": f"msg_{id}", "status": status, "role": "assistant", "content": content}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def response_stream(id: str, created: int, model: str, pieces: Iterable[str], text: str, usage: Usage) -> Iterator[bytes]:
    """The same as typed SSE events (OpenAI API reference, "Streaming events")."""
    sequence = -1

    def event(type: str, **fields: object) -> bytes:
        nonlocal sequence
        sequence += 1
        data = {"type": type, "sequence_number": sequence, **fields}
        return b"event: %b\n" % type.encode("ascii") + sse.encode(msgspec.json.encode(data))

    begun = response_object(id, created, model, None, usage)
    place: Mapping[str, Any] = {"item_id": f"msg_{id}", "output_index": 0, "content_index": 0}
    yield event("response.created", response=begun)
    yield event("response.in_progress", response=begun)
    yield event("response.output_item.added", output_index=0, item=_output(id, []))
    yield event("response.content_part.added", **place, part=_part(""))
    for piece in pieces:
        yield event("response.output_text.delta", **place, delta=piece, logprobs=[])
    yield event("response.output_text.done", **place, text=text, logprobs=[])
    yield event("response.content_part.done", **place, part=_part(text))
    yield event("response.output_item.done", output_index=0, item=_output(id, [_part(text)]))
    yield event("response.completed", response=response_object(id, created, model, text, usage))
