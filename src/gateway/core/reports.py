"""What a look at a backend found, and how each kind of model server tells it.

Every parser takes a body and gives `Facts`; a body of another form gives none. Sources: llama.cpp
tools/server/README.md; vLLM docs/usage/metrics.md; SGLang docs/references/production_metrics.md and its
http_server.py; text-generation-inference docs/source/reference/metrics.md and its OpenAPI document.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple

import msgspec

from .backend_settings import Kind
from .errors import UNDECODABLE
from .load import Load

MAX_MODELS: Final = 1000
"""Models of one backend that are known by name."""

_MOST: Final = 2**50
"""No number of tokens or requests is as large as this."""


class Report(NamedTuple):
    """A look at a backend that answered. ``models``: the entries of its list, None if it does not tell; ``slots``,
    ``kv_tokens``, ``load``: None if it does not tell; ``started``: when its process began, in Unix seconds;
    ``retry_after``: seconds, with ``rate_limited``; ``key_refused``: it wants another API key; ``context``: tokens of one
    slot's window, where the entries of its models do not tell."""

    kind: Kind
    state: Literal["healthy", "warming", "config_error", "rate_limited"] = "healthy"
    reason: str = ""
    models: tuple[dict[str, Any], ...] | None = None
    slots: int | None = None
    kv_tokens: int | None = None
    load: Load | None = None
    started: float | None = None
    retry_after: float = 0.0
    key_refused: bool = False
    context: int | None = None


class Facts(NamedTuple):
    """What one body told; None is silence. ``running`` and ``waiting`` are requests, ``kv_usage`` is 0 to 1."""

    slots: int | None = None
    kv_tokens: int | None = None
    running: int | None = None
    waiting: int = 0
    kv_usage: float | None = None
    started: float | None = None
    model: str | None = None
    context: int | None = None


Parse = Callable[[bytes], Facts | None]


class Look(NamedTuple):
    """How a kind of server is looked at: the path whose status is its health (None: the list of models has to do), what
    is asked once after it started, and its load; both where they may stand, best first."""

    health: str | None = None
    facts: tuple[tuple[str, Parse], ...] = ()
    loads: tuple[tuple[str, Parse], ...] = ()


# --- JSON


def _decoded(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except UNDECODABLE:
        return None


def _object(body: bytes) -> dict[str, Any]:
    found = _decoded(body)
    return found if isinstance(found, dict) else {}


def _objects(found: Any) -> list[dict[str, Any]]:
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _count(value: Any) -> int | None:
    """A plausible whole number, else None."""
    return int(value) if _plausible(value) and value >= 0 else None


def _plausible(value: Any) -> bool:
    """A number with which one can count: neither infinite nor beyond what a float tells apart."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -_MOST < value < _MOST


def _positive(value: Any) -> int | None:
    return _count(value) or None


def _sum(found: list[dict[str, Any]], name: str) -> int:
    return min(sum(_count(one.get(name)) or 0 for one in found), _MOST)


def llamacpp_props(body: bytes) -> Facts | None:
    """``/props``: the context of a slot stands among the default generation settings."""
    found = _object(body)
    slots = _positive(found.get("total_slots"))
    if slots is None:
        return None
    settings = found.get("default_generation_settings")
    context = _positive(settings.get("n_ctx")) if isinstance(settings, dict) else None
    return Facts(slots, _positive(slots * context) if context else None, context=context)


def llamacpp_slots(body: bytes) -> Facts | None:
    """``/slots``: what waits for a slot does not show."""
    found = _objects(_decoded(body))
    if not found:
        return None
    return Facts(len(found), running=sum(one.get("is_processing") is True for one in found))


def sglang_info(body: bytes) -> Facts | None:
    """``/get_server_info``, lately ``/server_info``: the tokens of its KV cache, of all its data-parallel ranks together."""
    found = _object(body)
    tokens = _positive(found.get("max_total_num_tokens"))
    if tokens is None:
        return None
    ranks = _positive(found.get("dp_size")) or 1
    states = _objects(found.get("internal_states"))
    slots = [_positive(state.get("effective_max_running_requests_per_dp")) for state in states]
    return Facts(_positive(ranks * slots[0]) if slots and slots[0] else None, _positive(ranks * tokens))


def sglang_load(body: bytes) -> Facts | None:
    """``/get_load``: one entry for each data-parallel rank; its ``num_reqs`` counts those that wait too."""
    found = [one for one in _objects(_decoded(body)) if _count(one.get("num_reqs")) is not None]
    if not found:
        return None
    waiting = _sum(found, "num_waiting_reqs")
    return Facts(running=max(_sum(found, "num_reqs") - waiting, 0), waiting=waiting)


def sglang_loads(body: bytes) -> Facts | None:
    """``/v1/loads``, which takes the place of ``/get_load``: running and waiting apart."""
    found = [one for one in _objects(_object(body).get("loads")) if _count(one.get("num_running_reqs")) is not None]
    if not found:
        return None
    used = [one["token_usage"] for one in found if _plausible(one.get("token_usage"))]
    kv_usage = _share(sum(used) / len(used)) if used else None
    return Facts(running=_sum(found, "num_running_reqs"), waiting=_sum(found, "num_waiting_reqs"), kv_usage=kv_usage)


def tgi_info(body: bytes) -> Facts | None:
    """``/info``: its batch holds so many tokens; how many requests that is depends on them."""
    found = _object(body)
    if "max_concurrent_requests" not in found:
        return None
    model = found.get("model_id")
    return Facts(kv_tokens=_positive(found.get("max_batch_total_tokens")), model=model if isinstance(model, str) else None)


# --- Prometheus text


_SAMPLE: Final = r"^(%s)(\{.*\})?[ \t]+(\S+)"


def samples(body: bytes, names: str) -> list[tuple[str, str, float]]:
    """(name, labels, value) of the samples whose name the pattern ``names`` matches."""
    found = []
    for name, labels, value in re.findall(_SAMPLE % names, body.decode("utf-8", "replace"), re.MULTILINE):
        try:
            found.append((name, labels, float(value)))
        except ValueError:
            continue
    return found


def _of_metrics(body: bytes, running: str, waiting: str, kv_usage: str = "-") -> Facts | None:
    """Sums over all series, as a server with several engines has one for each; the KV cache's use is their mean."""
    found = samples(body, f"{running}|{waiting}|{kv_usage}|process_start_time_seconds")

    def values(pattern: str) -> list[float]:
        return [value for name, _, value in found if re.fullmatch(pattern, name) and _plausible(value)]

    if not values(running):
        return None
    used, started = values(kv_usage), values("process_start_time_seconds")
    return Facts(
        running=_total(values(running)),
        waiting=_total(values(waiting)),
        kv_usage=_share(sum(used) / len(used)) if used else None,
        started=started[0] if started else None,
    )


def _total(found: list[float]) -> int:
    return int(min(max(sum(found), 0), _MOST))


def _share(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def llamacpp_metrics(body: bytes) -> Facts | None:
    """``/metrics``, with ``--metrics``; the KV cache's use only in versions before June 2025."""
    return _of_metrics(body, "llamacpp:requests_processing", "llamacpp:requests_deferred", "llamacpp:kv_cache_usage_ratio")


def vllm_metrics(body: bytes) -> Facts | None:
    """``/metrics``; the name of the KV cache's use changed in version 0.10, its size stands in labels."""
    found = _of_metrics(body, "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:(?:gpu|kv)_cache_usage_perc")
    return found and found._replace(kv_tokens=_positive(sum(_cache_tokens(body))))


def _cache_tokens(body: bytes) -> list[int]:
    configs = [labels for _, labels, _ in samples(body, "vllm:cache_config_info")]
    found = [(re.search(r'block_size="(\d{1,9})"', one), re.search(r'num_gpu_blocks="(\d{1,12})"', one)) for one in configs]
    return [int(block[1]) * int(blocks[1]) for block, blocks in found if block and blocks]


def sglang_metrics(body: bytes) -> Facts | None:
    """``/metrics``, with ``--enable-metrics``."""
    return _of_metrics(body, "sglang:num_running_reqs", "sglang:num_queue_reqs", "sglang:token_usage")


def tgi_metrics(body: bytes) -> Facts | None:
    """``/metrics``."""
    return _of_metrics(body, "tgi_batch_current_size", "tgi_queue_size")


def ollama_version(body: bytes) -> Facts | None:
    """``/api/version``: that it answers is all there is to it."""
    return Facts() if isinstance(_object(body).get("version"), str) else None


def window_of(entry: dict[str, Any]) -> int | None:
    """The tokens of a model's window, as its entry in vLLM's and SGLang's list has them."""
    return _positive(entry.get("max_model_len"))


# --- kinds


LOOKS: Final[dict[Kind, Look]] = {
    "llamacpp": Look("/health", (("/props", llamacpp_props),), (("/metrics", llamacpp_metrics), ("/slots", llamacpp_slots))),
    "vllm": Look("/health", loads=(("/metrics", vllm_metrics),)),
    # its /health generates a token, unless an environment variable of its own forbids it
    "sglang": Look(
        facts=(("/get_server_info", sglang_info), ("/server_info", sglang_info)),
        loads=(("/v1/loads", sglang_loads), ("/get_load", sglang_load), ("/metrics", sglang_metrics)),
    ),
    "ollama": Look("/api/version"),
    "tgi": Look("/health", (("/info", tgi_info),), (("/metrics", tgi_metrics),)),
    "openai": Look(),
}

SIGNS: Final[tuple[tuple[str, Parse, Kind], ...]] = (
    ("/props", llamacpp_props, "llamacpp"),
    ("/api/version", ollama_version, "ollama"),
    ("/info", tgi_info, "tgi"),
    ("/get_server_info", sglang_info, "sglang"),
)
"""Where a kind shows that its list of models does not tell."""

_OWNERS: Final[dict[str, Kind]] = {"llamacpp": "llamacpp", "vllm": "vllm", "sglang": "sglang"}


def kind_of(server: bytes, entries: list[dict[str, Any]]) -> Kind | None:
    """What the Server header and the owners of the models say that it is."""
    if server.lower().startswith(b"llama.cpp"):
        return "llamacpp"
    owners = [str(one.get("owned_by")) for one in entries]
    return next((_OWNERS[owner] for owner in owners if owner in _OWNERS), None)
