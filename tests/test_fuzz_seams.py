"""Each seam at which others' bytes come in, tried with odd values in every place, and with bytes that a machine makes up.

``make fuzz`` tries the same for longer; what it has found stands here, with the exact bytes.
"""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from .fuzz import words
from .fuzz.seams import ODD, Seam, all_seams, odd_bodies

SEAMS: Final = all_seams()
FEW: Final = settings(max_examples=300, phases=set(Phase) - {Phase.explain}, database=None)
OF_JSON: Final = sorted(name for name, seam in SEAMS.items() if any(seed.startswith(b"{") for seed in seam.seeds))


_COUNTS: Final = b":1700000000\r\n:1\r\n:2\r\n:1\r\n:3\r\n:1700000000\r\n"
_KEY: Final = b'[[keys]]\nid = "a"\ntenant = "t"\nhash = "' + b"0" * 64 + b'"\n'

FOUND: Final = [
    ("assembler", b'{"choices":[{"index":0,"delta":{"tool_calls":[{"index":-5}]}}]}'),
    ("assembler", b'{"choices":[{"index":0,"message":"a"}]}\n{"choices":[{"index":0,"delta":{"content":"b"}}]}'),
    ("text-assembler", b'{"choices":[{"index":0,"delta":{"content":"a"}}]}'),
    ("response-assembler", b'{"type":"error","message":1e999}'),
    ("response-assembler", b'{"type":"error","message":"\xff"}'),
    ("meters", b'{"type":[],"response":{"status":"completed"}}'),
    ("reports", b'{"total_slots":' + b"1" * 400 + b"}"),
    ("reports", b'{"loads":[{"num_running_reqs":1,"token_usage":' + b"1" * 400 + b"}]}"),
    ("reports", b"tgi_batch_current_size 1e308\ntgi_batch_current_size 1e308\n"),
    ("reports", b"tgi_batch_current_size -5\n"),
    ("reports", b'{"total_slots":1000000000000,"default_generation_settings":{"n_ctx":1000000000000}}'),
    ("entries", b'{"id":"m","max_model_len":' + b"1" * 400 + b"}"),
    ("body/v1/chat/completions", b'{"messages":[{"role":"user","content":"a","cont\\nt":1}]}'),
    ("body/v1/chat/completions", b'{"messages":[{"role":"user","content":"a"}],"logit_bias":{"a\\nb":"c"}}'),
    ("body/v1/rerank", b'{ "documents": [], "documents": 1}'),
    ("body/tokenize", b'{"prompt":[],"prompt":null}'),
    ("redis", b"*0\r\n"),
    ("redis", b":1\r\n"),
    ("redis", b"*7\r\n:1\r\n" + _COUNTS.replace(b":2\r\n", b"+two\r\n")),
    ("redis", b"*7\r\n:0\r\n" + _COUNTS),
    ("redis", b"\x002\r\n00\r\n:\0/\0\r\n$\0:1:1\r\n-nJo\r\n:1:O\0$20\r"),
    ("toml", b"port = 0x" + b"f" * 5000),
    ("toml", b"port = " + b"1" * 5000),
    ("toml", b"port = " + b"[" * 5000 + b"]" * 5000),
    ("toml", b"[models.m.defaults." + b"a." * 5000 + b"a]\nb = 1\n"),
    ("source", b"dns+http://modpam80/v1/v1"),
    ("keys", b"keys = " + b"[" * 5000 + b"]" * 5000),
    ("keys", _KEY + b"expires = 0001-01-01T00:00:00+23:59\n"),
    ("keys", _KEY + b"rpm = 0x" + b"f" * 5000 + b"\n"),
]
"""Where something did not hold, and for which bytes."""


@pytest.mark.parametrize(("name", "data"), FOUND, ids=[f"{name}-{at}" for at, (name, _) in enumerate(FOUND)])
def test_what_was_found_once_is_not_found_again(name: str, data: bytes) -> None:
    SEAMS[name].one(data)


@pytest.mark.parametrize("name", OF_JSON)
def test_no_odd_value_in_any_place_of_a_body_breaks_what_holds(name: str) -> None:
    for seed in SEAMS[name].seeds:
        for body in odd_bodies(seed) if seed.startswith((b"{", b"[{")) else ODD:
            SEAMS[name].one(body)


def test_no_odd_value_of_any_setting_breaks_what_holds() -> None:
    for file in words.odd_files():
        words.toml(file)


def test_no_odd_value_of_any_field_of_a_key_breaks_what_holds() -> None:
    for file in words.odd_keys():
        words.keys(file)


@pytest.mark.parametrize("name", SEAMS)
def test_what_holds_at_a_seam_holds_for_all_that_it_begins_with(name: str) -> None:
    for seed in SEAMS[name].seeds:
        SEAMS[name].one(seed)


@FEW
@given(st.sampled_from(sorted(SEAMS)), st.data())
def test_what_holds_at_a_seam_holds_for_bytes_that_a_machine_makes_up(name: str, data: st.DataObject) -> None:
    SEAMS[name].one(data.draw(made_up(SEAMS[name])))


def made_up(seam: Seam) -> st.SearchStrategy[bytes]:
    """A seed with a part of it taken out, and something else in its place."""
    other = st.binary(max_size=24) | st.sampled_from([odd for odd in ODD if len(odd) < 1000]) | st.sampled_from(seam.seeds)

    @st.composite
    def cut(draw: st.DrawFn) -> bytes:
        seed = draw(st.sampled_from(seam.seeds))
        begin = draw(st.integers(0, len(seed)))
        end = draw(st.integers(begin, min(len(seed), begin + 40)))
        return seed[:begin] + draw(other) + seed[end:]

    return cut() | st.binary(max_size=100)
