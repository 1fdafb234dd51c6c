"""The seams at which others' bytes come in, by name: what must hold there whatever the bytes are, and bytes to begin with.

They know neither atheris nor hypothesis: tests/test_fuzz_seams.py tries them a little in each run of the tests, and
``fuzz_seams.py`` for as long as one likes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple


class Seam(NamedTuple):
    """``one`` raises if something does not hold for the bytes that it is given."""

    one: Callable[[bytes], None]
    seeds: Sequence[bytes]


DEEP: Final = 3000
ODD: Final = (
    b"null",
    b"true",
    b"-1",
    b"0",
    b"1.5",
    b"1e308",
    b"1e999",
    b"9223372036854775808",
    b"18446744073709551616",
    b"1" * 400,
    b"1" * 5000,
    b"NaN",
    b'""',
    b'"x"',
    b'"\\u0000"',
    b'"\\ud800"',
    b'"\xff"',
    b"[]",
    b"[[]]",
    b"[null]",
    b"{}",
    b'{"":1}',
    b'{"index":-5}',
    b'[{"index":-5}]',
    b'[{"index":1e400}]',
    b'{"a":1,"a":[]}',
    b"[" * 900 + b"]" * 900,
    b'{"a":' * 900 + b"1" + b"}" * 900,
    b"[" * DEEP + b"]" * DEEP,
    b'{"a":[' * DEEP + b"]}" * DEEP,
)
"""What a value of JSON may be that nobody thinks of."""

_HERE: Final = "\x7fhere"


def odd_bodies(seed: bytes) -> Iterator[bytes]:
    """The JSON object with each of its values, one at a time, replaced by each odd one; and with one key more."""
    whole = json.loads(seed)
    for holder, key in list(_places(whole)):
        kept = holder[key]
        holder[key] = _HERE
        yield from (json.dumps(whole).encode().replace(json.dumps(_HERE).encode(), odd) for odd in ODD)
        holder[key] = kept
    yield from (seed.rstrip()[:-1] + b',"unheard":' + odd + b"}" for odd in ODD)
    yield from ODD


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def packed(*bodies: Any) -> list[bytes]:
    """Each as JSON."""
    return [json.dumps(body).encode() for body in bodies]


def all_seams() -> dict[str, Seam]:
    """By name."""
    from . import bodies, peers, streams, words

    return {**streams.SEAMS, **bodies.SEAMS, **words.SEAMS, **peers.SEAMS}
