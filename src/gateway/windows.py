"""Refuses, before it waits for a backend, a request that certainly has no room in its model's window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec
from twisted.logger import Logger

from .backend import Backend, HTTPBackend
from .core.asking import Request
from .core.chat import ChatRequest
from .core.completions import CompletionRequest
from .core.errors import UNDECODABLE, BackendFailed
from .core.ranges import Window, check_window
from .core.wire import Call
from .pool import Pool

TEMPLATE: Final = 64
"""Tokens that a chat template may add to each message, to be safe."""

_log: Final = Logger("gateway.windows")


class Windows:
    """``pool`` knows the windows. A prompt whose bytes alone might not fit is counted by a backend's own tokenizer."""

    def __init__(self, pool: Pool, backends: Mapping[str, Backend]) -> None:
        self._pool = pool
        self._backends = backends

    async def check(self, call: Call) -> None:
        """Raises `GatewayError` ``context_length_exceeded``. What cannot be found out is let through."""
        asked = call.asked
        window = self._pool.windows.get(asked.model or "")
        if window is None:
            return
        check_window(asked, window)
        if _surely_fits(asked, window, len(call.body)):
            return
        count = await self._count(call)
        if count is not None:
            check_window(asked, window, count)

    async def _count(self, call: Call) -> int | None:
        """Its prompt's tokens, as a backend that has its model counts them."""
        name = self._pool.one_with(call.asked.model or "")
        backend = None if name is None else self._backends[name]
        if not isinstance(backend, HTTPBackend):
            return None
        try:
            return await _counted(backend, call)
        except (BackendFailed, *UNDECODABLE) as problem:
            _log.debug("no count of tokens by {name}: {problem}", name=name, problem=problem)
            return None


def _surely_fits(asked: Request, window: Window, size: int) -> bool:
    """No tokenizer makes more tokens of a text than it has bytes."""
    messages = len(asked.messages) if isinstance(asked, ChatRequest) else 1
    return size + TEMPLATE * messages + ((asked.most_tokens or 0) if window.whole else 0) <= window.tokens


async def _counted(backend: HTTPBackend, call: Call) -> int | None:
    asked = call.asked
    if backend.kind == "vllm":
        if isinstance(asked, ChatRequest):
            return _length(await backend.ask("/tokenize", call.body))
        if isinstance(asked, CompletionRequest) and isinstance(asked.prompt, str):
            return _length(await backend.ask("/tokenize", msgspec.json.encode({"model": asked.model, "prompt": asked.prompt})))
    if backend.kind == "llamacpp":
        text: Any = None
        if isinstance(asked, ChatRequest):
            text = (await backend.ask("/apply-template", call.body)).get("prompt")
        elif isinstance(asked, CompletionRequest):
            text = asked.prompt
        if isinstance(text, str):
            body = {"content": text, "add_special": True, "parse_special": True}
            return _length(await backend.ask("/tokenize", msgspec.json.encode(body)))
    return None


def _length(answer: dict[str, Any]) -> int | None:
    tokens = answer.get("tokens")
    return len(tokens) if isinstance(tokens, list) else None
