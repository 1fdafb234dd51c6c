"""Strict readers of what the gateway writes: requests to a backend, answers to a client. Not a byte may be left over."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

_FIELD: Final = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+): ([\t\x20-\x7e\x80-\xff]*)")
_STATUS: Final = re.compile(rb"HTTP/1\.[01] (\d{3}) [\t\x20-\x7e]+")
_REQUEST: Final = re.compile(rb"([A-Z]+) ([!-~]+) HTTP/1\.1")
_NO_CONTENT: Final = (204, 304)


class Message(NamedTuple):
    """A request or an answer: its line, its headers with lower-case names, its body."""

    line: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes

    def all(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key == name]

    @property
    def status(self) -> int:
        return int(self.line.split()[1])


def requests(data: bytes) -> list[Message]:
    """The requests in what a backend received, each with one length at most and no other framing."""
    found = []
    while data:
        line, headers, data = _head(data)
        assert _REQUEST.fullmatch(line), line
        lengths = [value for name, value in headers if name == b"content-length"]
        assert len(lengths) <= 1
        assert all(name != b"transfer-encoding" for name, _ in headers)
        body, data = _take(data, int(lengths[0]) if lengths else 0)
        found.append(Message(line, headers, body))
    return found


def answers(data: bytes, methods: Iterable[bytes] = ()) -> list[Message]:
    """The final answers in what a client received; ``methods`` are those of its requests, for HEAD."""
    asked = list(methods)
    found: list[Message] = []
    while data:
        line, headers, data = _head(data)
        assert _STATUS.fullmatch(line), line
        answer = Message(line, headers, b"")
        if answer.status == 100:
            assert not headers
            continue
        head = len(found) < len(asked) and asked[len(found)] == b"HEAD"
        body, data = _content(answer, data, empty=head or answer.status in _NO_CONTENT)
        found.append(answer._replace(body=body))
    return found


def _head(data: bytes) -> tuple[bytes, list[tuple[bytes, bytes]], bytes]:
    text, end, rest = data.partition(b"\r\n\r\n")
    assert end, text[:200]
    line, *lines = text.split(b"\r\n")
    fields = [_FIELD.fullmatch(field) for field in lines]
    assert all(fields), lines
    return line, [(field[1].lower(), field[2]) for field in fields if field], rest


def _content(answer: Message, data: bytes, *, empty: bool) -> tuple[bytes, bytes]:
    if empty:
        return b"", data
    if answer.all(b"transfer-encoding") == [b"chunked"]:
        assert not answer.all(b"content-length")
        return _unchunked(data)
    lengths = answer.all(b"content-length")
    if not lengths:  # until the connection closes
        assert answer.all(b"connection") == [b"close"]
        return data, b""
    assert len(lengths) == 1
    return _take(data, int(lengths[0]))


def _unchunked(data: bytes) -> tuple[bytes, bytes]:
    body = b""
    while True:
        size, _, data = data.partition(b"\r\n")
        assert re.fullmatch(rb"[0-9a-f]+", size, re.IGNORECASE), size
        part, data = _take(data, int(size, 16))
        body += part
        assert data[:2] == b"\r\n"
        data = data[2:]
        if not part:
            return body, data


def _take(data: bytes, length: int) -> tuple[bytes, bytes]:
    assert len(data) >= length, data[:200]
    return data[:length], data[length:]
