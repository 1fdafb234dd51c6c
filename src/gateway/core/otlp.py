"""OTLP as protobuf: spans and histograms into the bytes of an export request.

Source: https://github.com/open-telemetry/opentelemetry-proto (v1), trace.proto, metrics.proto, common.proto, resource.proto.
Each function's numbers are field numbers there. What many spans have in common is encoded once and copied: a span costs
microseconds, where building the generated messages costs a hundred times that.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Final

SERVER: Final = 2
CLIENT: Final = 3
"""Kinds of span."""

ERROR: Final = b"\x7a\x02\x18\x02"  # status = 15 {code = 3: 2}
"""The field of a span that failed."""

_CUMULATIVE: Final = 2
_LOCAL: Final = 0x100
_REMOTE: Final = 0x300
"""Span flags: it is known whether the parent is remote; it is."""

_times: Final = struct.Struct("<BQBQ").pack
_SHORT: Final = 126
"""Up to here the length of a text, and of the message around it, is one byte."""

_fixed64: Final = struct.Struct("<BQ").pack
_fixed32: Final = struct.Struct("<HI").pack
_double: Final = struct.Struct("<Bd").pack

Value = str | bool | int | float | tuple[str, ...]


def varint(number: int) -> bytes:
    """A non-negative number in base 128, the least first."""
    if number < 0x80:
        return bytes((number,))
    found = bytearray()
    while number >= 0x80:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


def field(number: int, content: bytes) -> bytes:
    """A field of bytes, text or another message."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def _any_value(value: Value) -> bytes:
    if isinstance(value, str):
        return field(1, value.encode("utf-8", "replace"))
    if isinstance(value, bool):
        return b"\x10\x01" if value else b"\x10\x00"
    if isinstance(value, int):
        return b"\x18" + varint(value & (2**64 - 1))
    if isinstance(value, float):
        return _double(0x21, value)
    return field(5, b"".join([field(1, _any_value(one)) for one in value]))


def key_value(key: str, value: Value) -> bytes:
    """The KeyValue of one attribute."""
    return field(1, key.encode("ascii")) + field(2, _any_value(value))


def attributes(number: int, values: Mapping[str, Value | None]) -> bytes:
    """Attributes as repeated fields of this number; those that are None are left out."""
    return b"".join([field(number, key_value(key, value)) for key, value in values.items() if value is not None])


def span_attributes(values: Mapping[str, Value | None]) -> bytes:
    """Attributes of a span."""
    return attributes(9, values)


def texts(key: str) -> Callable[[str], bytes]:
    """Encodes one attribute of spans, whose values differ each time: quickest for short ASCII texts."""
    name = field(1, key.encode("ascii"))
    lengths = [b"\x4a" + varint(len(name) + 4 + n) + name + bytes((0x12, n + 2, 0x0A, n)) for n in range(_SHORT)]

    def encode(value: str) -> bytes:
        if len(value) < _SHORT and value.isascii():
            return lengths[len(value)] + value.encode("ascii")
        return span_attributes({key: value})

    return encode


def event(name: str, nanoseconds: int, values: Mapping[str, Value]) -> bytes:
    """An event of a span, at a time since 1970."""
    return field(11, _fixed64(0x09, nanoseconds) + field(2, name.encode("ascii")) + attributes(3, values))


def span(
    ids: tuple[bytes, bytes, bytes],
    kind: int,
    times: tuple[int, int],
    *rest: bytes,
    state: str = "",
    remote: bool = False,
) -> bytes:
    """A span as an element of `traces`. ``ids``: trace, span, parent (or empty); ``times``: start and end in nanoseconds
    since 1970; ``rest``: its other fields, encoded: `span_name`, `span_attributes`, `event`, `ERROR`."""
    trace_id, span_id, parent_id = ids
    content = b"".join(
        (
            b"\x0a\x10",
            trace_id,
            b"\x12\x08",
            span_id,
            field(3, state.encode("ascii")) if state else b"",
            b"\x22\x08" + parent_id if parent_id else b"",
            b"\x30",
            bytes((kind,)),
            _times(0x39, times[0], 0x41, times[1]),
            *rest,
            _fixed32(0x0185, _REMOTE if remote else _LOCAL),  # flags = 16, fixed32: the tag is the bytes 85 01
        )
    )
    return b"\x12" + varint(len(content)) + content  # spans = 2 of a ScopeSpans


def span_name(name: str) -> bytes:
    """The field of a span's name."""
    return field(5, name.encode("utf-8", "replace"))


def resource(values: Mapping[str, Value]) -> bytes:
    """Who sends, as the first field of a ResourceSpans or ResourceMetrics."""
    return field(1, attributes(1, values))


def scope(name: str, version: str) -> bytes:
    """What made it, as the first field of a ScopeSpans or ScopeMetrics."""
    return field(1, field(1, name.encode("ascii")) + field(2, version.encode("ascii")))


def request(resource: bytes, scope: bytes, elements: Sequence[bytes]) -> bytes:
    """An ExportTraceServiceRequest of `span` elements, or an ExportMetricsServiceRequest of `histogram` elements."""
    return field(1, resource + field(2, scope + b"".join(elements)))


def point(
    started: int, now: int, counts: Sequence[int], total: float, bounds: Sequence[float], values: Mapping[str, Value | None]
) -> bytes:
    """One series of a `histogram`: what was counted from ``started`` to ``now`` (nanoseconds since 1970)."""
    return field(
        1,
        b"".join(
            (
                _times(0x11, started, 0x19, now),
                _fixed64(0x21, sum(counts)),
                _double(0x29, total),
                field(6, struct.pack(f"<{len(counts)}Q", *counts)),
                field(7, struct.pack(f"<{len(bounds)}d", *bounds)),
                attributes(9, values),
            )
        ),
    )


def histogram(name: str, description: str, unit: str, points: Sequence[bytes]) -> bytes:
    """A cumulative histogram as an element of a metrics request."""
    texts = field(1, name.encode("ascii")) + field(2, description.encode("ascii")) + field(3, unit.encode("ascii"))
    return field(2, texts + field(9, b"".join(points) + b"\x10" + varint(_CUMULATIVE)))


def rejected(response: bytes) -> int:
    """How many elements the receiver did not take, by its Export...ServiceResponse; 0 if that cannot be read."""
    try:
        return _varint_in(_bytes_in(response, 1), 1)
    except (IndexError, ValueError):
        return 0


def _bytes_in(message: bytes, wanted: int) -> bytes:
    """A field that is a message; empty if there is none. Raises IndexError or ValueError if there is no sense in it."""
    for number, value in _fields(message):
        if number == wanted and isinstance(value, bytes):
            return value
    return b""


def _varint_in(message: bytes, wanted: int) -> int:
    for number, value in _fields(message):
        if number == wanted and isinstance(value, int):
            return value
    return 0


def _fields(message: bytes) -> list[tuple[int, int | bytes]]:
    """(number, value) of the fields of a message that has only numbers, texts and messages."""
    found: list[tuple[int, int | bytes]] = []
    at = 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        value, at = _read_varint(message, at)
        if tag & 7 == 2:
            found.append((tag >> 3, message[at : at + value]))
            at += value
        elif tag & 7 == 0:
            found.append((tag >> 3, value))
        else:
            raise ValueError(tag)
    return found


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = message[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number, at
        if shift > 63:
            raise ValueError("too long")
