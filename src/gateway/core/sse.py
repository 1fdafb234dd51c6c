"""Server-sent events, incrementally (WHATWG HTML, section 9.2 "Server-sent events").

`Decoder` cuts a byte stream into whole events and keeps each one's own bytes, so that a relay
can pass on exactly what came. Lines end with LF, CRLF or CR; an event ends with a blank line.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

_END: Final = re.compile(rb"\n\n|\r\r|\n\r\n?|\r\n\r\n?|\r\n\n")
_LINE: Final = re.compile(rb"\r\n|\n|\r")
_BOM: Final = b"\xef\xbb\xbf"

DONE: Final = b"[DONE]"
"""The data of the event that closes an OpenAI stream."""


class TooLong(ValueError):
    """An event grew past the decoder's limit without ending."""


class Event(msgspec.Struct, frozen=True, gc=False):
    """One event: ``data`` as the specification joins it (None if it had none: a comment, say),
    and ``raw``, the bytes it came as, its blank line included."""

    data: bytes | None
    raw: bytes


class Decoder:
    """Bytes in, whole events out; however the bytes are split, the events are the same.

    ``limit`` bounds the bytes held for an event that has not ended. ``pending`` is what came
    of it so far; at the end of a stream it is an event cut short (the specification discards it).
    """

    def __init__(self, limit: int = 8 * 1024 * 1024) -> None:
        self._limit = limit
        self._held = bytearray()  # of an event that has not ended; it may trickle in byte by byte
        self._after_cr = False  # the last event ended with CR: a LF that follows belongs to it
        self._first = True

    @property
    def pending(self) -> bytes:
        return bytes(self._held)

    def feed(self, data: bytes) -> list[Event]:
        """The events that ``data`` completes, in order. Raises `TooLong`."""
        if not self._held and _is_one_plain_event(data):
            self._first = self._after_cr = False
            return [Event(data[6:-2], data)]
        # An end is at most four bytes long: of what is held, only the last three can be part of one.
        held = self._held
        if _END.search(held[-3:] + data) is None:
            self._hold(data)
            return []
        buffer = b"".join((held, data))
        events: list[Event] = []
        begin, search = 0, max(len(held) - 3, 0)
        while (found := _END.search(buffer, self._skip(buffer, begin, search))) is not None:
            end = found.end()
            events.append(self._event(buffer[begin:end]))
            self._after_cr = buffer[end - 1] == 0x0D
            begin = search = end
        self._held = bytearray()
        self._hold(buffer[begin:])
        return events

    def _hold(self, data: bytes) -> None:
        self._held += data
        if len(self._held) > self._limit:
            raise TooLong(f"an event of more than {self._limit} bytes")

    def _skip(self, buffer: bytes, begin: int, search: int) -> int:
        """Where to look for the next end: past a LF that only completes the CRLF before it."""
        if self._after_cr and buffer[begin : begin + 1] == b"\n":
            return max(search, begin + 1)
        return search

    def _event(self, raw: bytes) -> Event:
        text = raw
        if self._first:
            self._first = False
            text = text.removeprefix(_BOM)
        return Event(text[6:-2] if _is_one_plain_event(text) else _data(text), raw)


def _is_one_plain_event(data: bytes) -> bool:
    """What backends send nearly always: one data line that ends with LF, and the blank line."""
    return data.startswith(b"data: ") and data.endswith(b"\n\n") and data.find(b"\n") == len(data) - 2 and b"\r" not in data


def _data(text: bytes) -> bytes | None:
    values = []
    for line in _LINE.split(text):
        name, _, value = line.partition(b":")
        if name == b"data":
            values.append(value.removeprefix(b" "))
    return b"\n".join(values) if values else None


def encode(data: bytes) -> bytes:
    """One event with this data. Data of several lines gets a ``data:`` line for each."""
    return b"".join(b"data: " + line + b"\n" for line in _LINE.split(data)) + b"\n"
