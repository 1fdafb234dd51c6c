"""What an operator lets requests for a model ask, and what a model's window has room for."""

from __future__ import annotations

from typing import NamedTuple

from .asking import Request
from .errors import GatewayError
from .schema import wrong

BOUNDS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
"""The fields that bound an answer, of which the first one given counts."""


class Ranges(NamedTuple):
    """Of one model. ``max_tokens``: the longest answer that may be asked for; ``context_length``: prompt and answer together;
    ``max_n``: answers to one request; None is no bound. What a request does not ask for is not bounded here."""

    max_tokens: int | None = None
    context_length: int | None = None
    max_n: int | None = None
    allow_logprobs: bool = True
    allow_tools: bool = True


class Window(NamedTuple):
    """What backends say of a model: the ``tokens`` of its window; ``whole``: they refuse a request whose prompt and longest
    answer do not fit together (vLLM, SGLang), where others (llama.cpp) end the answer where the window ends."""

    tokens: int
    whole: bool


def check(asked: Request, ranges: Ranges) -> None:
    """Raises `GatewayError` with the path of the field: ``invalid_value``, or ``context_length_exceeded``."""
    if ranges.max_tokens is not None:
        for name in BOUNDS:  # which of several an engine goes by differs; below 0 is no bound
            most = getattr(asked, name, None)
            if most is not None and not 0 <= most <= ranges.max_tokens:
                raise wrong(name, f"at most {ranges.max_tokens} may be asked of this model, got {most}")
    most = asked.most_tokens
    if most is not None and ranges.context_length is not None:
        check_window(asked, Window(ranges.context_length, whole=True))
    if ranges.max_n is not None:
        for name in ("n", "best_of"):
            found = getattr(asked, name, None)
            if found is not None and found > ranges.max_n:
                raise wrong(name, f"at most {ranges.max_n} may be asked of this model, got {found}")
    if not ranges.allow_logprobs:
        for name in ("logprobs", "top_logprobs"):
            found = getattr(asked, name, None)
            if found is not None and found is not False:  # 0 of a plain completion asks for that of the token itself
                raise wrong(name, "it is not allowed for this model")
    if not ranges.allow_tools and getattr(asked, "tools", None):
        raise wrong("tools", "they are not allowed for this model")


def check_window(asked: Request, window: Window, prompt_tokens: int = 1) -> None:
    """Raises `GatewayError` ``context_length_exceeded`` if a prompt of at least so many tokens certainly has no room."""
    most = (asked.most_tokens or 0) if window.whole else 0
    needed = prompt_tokens + most
    if needed <= window.tokens and prompt_tokens <= window.tokens:
        return
    what = f"{prompt_tokens} in the prompt" + (f", {most} in the answer" if most else "")
    message = f"This model's context length is {window.tokens} tokens, and {needed} were asked for ({what})."
    by_answer = prompt_tokens <= window.tokens and most
    raise GatewayError("context_length_exceeded", message, param=_bound(asked) if by_answer else None)


def _bound(asked: Request) -> str:
    return next((name for name in BOUNDS if getattr(asked, name, None) is not None), "max_tokens")
