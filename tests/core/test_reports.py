"""Bodies as the servers write them, and bodies that are anything at all."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core import reports
from gateway.core.reports import LOOKS, SIGNS, Facts, kind_of

VLLM = b"""\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a {b}"} 3.0
vllm:num_requests_running{engine="1",model_name="a {b}"} 2.0
vllm:num_requests_waiting{engine="0",model_name="m"} 7.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 99.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.25
vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="0",num_gpu_blocks="1000"} 1.0
process_start_time_seconds 1.75e+09
"""
LLAMA = b"llamacpp:requests_processing 2\nllamacpp:requests_deferred 5\n"
SGLANG = (
    b'sglang:num_running_reqs{model_name="m"} 4.0\nsglang:num_queue_reqs{model_name="m"} 1.0\nsglang:token_usage{a="b"} 0.1\n'
)
TGI = b"tgi_batch_current_size 8\ntgi_queue_size 3\n"


def packed(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest.mark.parametrize(
    ("parse", "body", "facts"),
    [
        (reports.vllm_metrics, VLLM, Facts(None, 16000, 5, 7, 0.375, 1.75e9)),
        (reports.vllm_metrics, VLLM.replace(b"kv_cache", b"gpu_cache"), Facts(None, 16000, 5, 7, 0.375, 1.75e9)),
        (reports.llamacpp_metrics, LLAMA, Facts(running=2, waiting=5)),
        (reports.llamacpp_slots, packed([{"is_processing": True}, {"is_processing": False}]), Facts(2, running=1)),
        (
            reports.llamacpp_props,
            packed({"total_slots": 4, "default_generation_settings": {"n_ctx": 4096}}),
            Facts(4, 16384, context=4096),
        ),
        (reports.sglang_metrics, SGLANG, Facts(running=4, waiting=1, kv_usage=0.1)),
        (
            reports.sglang_load,
            packed([{"dp_rank": rank, "num_reqs": 5, "num_waiting_reqs": 2, "num_tokens": 9} for rank in (0, 1)]),
            Facts(running=6, waiting=4),
        ),
        (
            reports.sglang_loads,
            packed({"loads": [{"num_running_reqs": 3, "num_waiting_reqs": 1, "token_usage": 0.2}]}),
            Facts(running=3, waiting=1, kv_usage=0.2),
        ),
        (
            reports.sglang_info,
            packed(
                {"max_total_num_tokens": 1000, "dp_size": 2, "internal_states": [{"effective_max_running_requests_per_dp": 8}]}
            ),
            Facts(16, 2000),
        ),
        (reports.tgi_metrics, TGI, Facts(running=8, waiting=3)),
        (
            reports.tgi_info,
            packed({"model_id": "m", "max_concurrent_requests": 128, "max_batch_total_tokens": 32768}),
            Facts(kv_tokens=32768, model="m"),
        ),
    ],
)
def test_what_a_server_tells_is_understood(parse: reports.Parse, body: bytes, facts: Facts) -> None:
    assert parse(body) == facts


PARSERS = {parse for look in LOOKS.values() for _, parse in (*look.facts, *look.loads)} | {parse for _, parse, _ in SIGNS}
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from(["loads", "total_slots", "dp_size", "num_reqs", "n"]), inner)
    ),
)


@given(st.binary() | JSON.map(packed) | st.text().map(lambda text: f"tgi_queue_size {text}".encode()))
def test_a_body_of_any_form_gives_facts_or_none(body: bytes) -> None:
    for parse in PARSERS:
        parse(body)


def test_a_list_of_models_is_no_sign_of_any_kind() -> None:
    listing = packed({"object": "list", "data": [{"id": "m"}]})
    assert [parse(listing) for _, parse, _ in SIGNS] == [None] * len(SIGNS)


@pytest.mark.parametrize(
    ("server", "owner", "kind"),
    [
        (b"llama.cpp", "x", "llamacpp"),
        (b"", "llamacpp", "llamacpp"),
        (b"uvicorn", "vllm", "vllm"),
        (b"uvicorn", "sglang", "sglang"),
        (b"uvicorn", "openai", None),
        (b"", ["unhashable"], None),
    ],
)
def test_the_kind_shows_in_the_server_header_or_in_who_owns_the_models(server: bytes, owner: Any, kind: str | None) -> None:
    assert kind_of(server, [{"id": "m", "owned_by": owner}]) == kind
