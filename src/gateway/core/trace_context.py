"""W3C Trace Context: where a request stands in somebody's trace, whether its spans are recorded, and what a backend is told.

Source: https://www.w3.org/TR/trace-context-2/. A header that breaks its rules counts as none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from .errors import UNDECODABLE

MAX_STATE: Final = 512
"""Characters of a tracestate that goes on; a longer one is dropped, as is one that is malformed."""

MAX_MEMBERS: Final = 32

MAX_TEXT: Final = 128
"""Characters that are kept of what others may invent."""

_PARENT: Final = re.compile(rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_MEMBER: Final = re.compile(r"([a-z0-9][a-z0-9_*/@-]{0,255})=[ -+\--<>-~]{0,255}[!-+\--<>-~]")
_OURS: Final = frozenset([b"traceparent", b"tracestate"])


class Parent(NamedTuple):
    """What a caller's headers say: hexadecimal ids, and its own decision."""

    trace_id: str
    span_id: str
    sampled: bool
    state: str


class Trace(msgspec.Struct):
    """One request's part of a trace.

    ``parent_id`` is empty at a trace's root. The ids of the request's own spans count up from ``first``. What is not
    ``sampled`` has no spans here; its ids are the caller's, for the log. ``path``, ``asked`` (max_tokens, temperature, top_p)
    and what the answer calls itself are for the spans alone.
    """

    trace_id: str
    parent_id: str
    sampled: bool
    first: int = 0
    state: str = ""
    path: str = ""
    asked: tuple[int | None, float | None, float | None] = (None, None, None)
    answer_id: str = ""
    answer_model: str = ""

    @property
    def span_id(self) -> str:
        """Of the span that the request's log line belongs to."""
        return f"{self.first:016x}" if self.sampled else self.parent_id

    def ask(self, max_tokens: int | None, temperature: object, top_p: object) -> None:
        """What is asked of the model; what is no number that a backend could mean is left out."""
        fits = max_tokens is not None and 0 <= max_tokens < 2**63
        self.asked = (max_tokens if fits else None, _float(temperature), _float(top_p))

    def answered(self, data: bytes) -> None:
        """What an answer, or a stream's first event, says it is."""
        try:
            found = _decode(data)
        except UNDECODABLE:
            return
        found = found.response or found
        self.answer_id, self.answer_model = _text(found.id), _text(found.model)

    def onward(self, headers: Sequence[tuple[bytes, bytes]], attempt: int) -> list[tuple[bytes, bytes]]:
        """The headers of an attempt, counted from 0, of a request that came with these: its span is the backend's parent."""
        kept = [pair for pair in headers if pair[0] not in _OURS]
        kept.append((b"traceparent", f"00-{self.trace_id}-{attempt_id(self.first, attempt):016x}-01".encode("ascii")))
        if self.state:
            kept.append((b"tracestate", self.state.encode("ascii")))
        return kept


class _Identity(msgspec.Struct):
    """Of an answer; an event of a response's stream has it inside."""

    id: object = None
    model: object = None
    response: _Identity | None = None


_decode: Final = msgspec.json.Decoder(_Identity).decode


def _text(value: object) -> str:
    return value[:MAX_TEXT] if isinstance(value, str) else ""


def _float(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63 else None


def attempt_id(first: int, attempt: int) -> int:
    """The id of an attempt's span: after the request's own and the operation's."""
    return first + 2 + attempt


class Tracing:
    """Begins a request's part of a trace.

    ``ratio`` of the traces that begin here are recorded, and of those that come from elsewhere what their callers decided,
    if ``by_parent``. ``bits`` gives so many random bits.
    """

    def __init__(self, ratio: float, bits: Callable[[int], int], *, by_parent: bool = True) -> None:
        self.ratio = ratio
        self._bound = round(ratio * 2**64)
        self._bits = bits
        self._by_parent = by_parent

    def begin(self, headers: Sequence[tuple[bytes, bytes]]) -> Trace | None:
        """The trace of a request with these (lower-case name, value) headers; None if it has none that anybody records."""
        parent = read(headers) if headers else None
        if parent is None:
            id = self._bits(128) or 1
            return Trace(f"{id:032x}", "", True, self._first()) if id & (2**64 - 1) < self._bound else None
        sampled = parent.sampled if self._by_parent else int(parent.trace_id[16:], 16) < self._bound
        if not sampled:
            return Trace(parent.trace_id, parent.span_id, False)
        return Trace(parent.trace_id, parent.span_id, True, self._first(), parent.state)

    def _first(self) -> int:
        """Odd and short of 64 bits: it is never 0, and counting up from it does not overflow."""
        return self._bits(63) | 1


class Following(Tracing):
    """Records nothing, but knows the traces of others."""

    def __init__(self) -> None:
        super().__init__(0.0, lambda _: 1)

    def begin(self, headers: Sequence[tuple[bytes, bytes]]) -> Trace | None:
        parent = read(headers) if headers else None
        return Trace(parent.trace_id, parent.span_id, False) if parent is not None else None


def read(headers: Sequence[tuple[bytes, bytes]]) -> Parent | None:
    """The caller's trace, if these (lower-case name, value) headers name one by the rules."""
    given = [value for name, value in headers if name == b"traceparent"]
    found = _PARENT.fullmatch(given[0].strip(b" \t")) if len(given) == 1 and len(given[0]) <= MAX_STATE else None
    if found is None or (found[1] == b"00" and found[5] is not None):
        return None
    state = _state([value for name, value in headers if name == b"tracestate"])
    return Parent(found[2].decode("ascii"), found[3].decode("ascii"), bool(int(found[4], 16) & 1), state)


def _state(values: Sequence[bytes]) -> str:
    """All of a request's tracestate as one; empty if any of it is malformed."""
    members = [member.strip(" \t") for member in b",".join(values).decode("latin-1").split(",")]
    members = [member for member in members if member]
    found = [_MEMBER.fullmatch(member) for member in members]
    names = {one[1] for one in found if one is not None}
    state = ",".join(members)
    return state if len(names) == len(members) <= MAX_MEMBERS and len(state) <= MAX_STATE else ""


SAMPLERS: Final[Mapping[str, tuple[float | None, bool]]] = {
    "always_on": (1.0, False),
    "always_off": (0.0, False),
    "traceidratio": (None, False),
    "parentbased_always_on": (1.0, True),
    "parentbased_always_off": (0.0, True),
    "parentbased_traceidratio": (None, True),
}
"""OTEL_TRACES_SAMPLER: the ratio (None: OTEL_TRACES_SAMPLER_ARG has it), and whether a caller's decision counts."""
