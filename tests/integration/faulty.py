"""A backend that fails as the model that is asked for is named: ``FAULTS`` has what each name does, byte for byte."""

from __future__ import annotations

import gzip
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice, repeat

from .asking import DONE, Request
from .backends import Connection, completion, event

Fault = Callable[[Connection, bool], None]
"""Answers on the connection; True: a stream is asked for."""

PLAIN = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
BODY = completion("ab")
BEGUN = event("a") + event("b")
STOP = event("", "stop")
GARBAGE = b"\x16\x03\x01\x02\x00\x01 this is no HTTP \x00\xff\r\n\r\n" + b"\xff" * 4096
BOMB = gzip.compress(bytes(8 << 20))
MEGABYTE = b"x" * (1 << 20)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def sized(body: bytes, stream: bool, length: int | None = None) -> bytes:
    """A response with a Content-Length."""
    return (EVENTS if stream else PLAIN) + b"Content-Length: %d\r\n\r\n" % (len(body) if length is None else length) + body


def parts(stream: bool) -> dict[str, bytes]:
    """A good response, up to each phase."""
    head = EVENTS + CHUNKED if stream else sized(BODY, False)[: -len(BODY)]
    begun = chunk(BEGUN) + b"40\r\ndata: {" if stream else BODY[: len(BODY) // 2]
    ended = chunk(BEGUN) + chunk(STOP + DONE) if stream else BODY[:-1]
    return {
        "before the headers": b"",
        "in the headers": head[: len(head) // 2],
        "before the body": head,
        "in the body": head + begun,
        "at the end": head + ended,
    }


def whole(stream: bool) -> bytes:
    return EVENTS + CHUNKED + chunk(BEGUN) + chunk(STOP + DONE) + chunk(b"") if stream else sized(BODY, False)


def _stalls(connection: Connection) -> None:
    """The next request, or the end of the connection, is waited for anyway."""


def _garbles(connection: Connection) -> None:
    connection.send(GARBAGE)


ENDS: dict[str, Callable[[Connection], None]] = {
    "silence": _stalls,
    "FIN": Connection.close,
    "RST": Connection.reset,
    "garbage": _garbles,
}
"""What can happen at each phase."""


def _at(phase: str, end: Callable[[Connection], None]) -> Fault:
    def fault(connection: Connection, stream: bool) -> None:
        connection.send(parts(stream)[phase])
        end(connection)

    return fault


def _says(make: Callable[[bool], bytes], end: Callable[[Connection], None] = _stalls) -> Fault:
    """Sends what ``make`` makes of whether a stream is asked for."""

    def fault(connection: Connection, stream: bool) -> None:
        connection.send(make(stream))
        end(connection)

    return fault


def _head(line: bytes, body: Callable[[bool], bytes] = whole) -> Fault:
    """A good response with one more header line."""
    return _says(lambda stream: body(stream).replace(b"\r\n", b"\r\n" + line + b"\r\n", 1))


def _status(line: bytes) -> Fault:
    return _says(lambda stream: line + whole(stream).removeprefix(b"HTTP/1.1 200 OK"))


def _endless(begin: Callable[[bool], bytes], piece: bytes = MEGABYTE, times: int = 100) -> Fault:
    """Goes on until the gateway has had enough; at most 100 MB."""

    def fault(connection: Connection, stream: bool) -> None:
        connection.send(begin(stream), *repeat(piece, times))

    return fault


def _trickles(connection: Connection, stream: bool) -> None:
    answer = whole(stream)
    for at in range(len(answer)):
        connection.send(answer[at : at + 1])


def _events(*after: bytes) -> Fault:
    """A stream of a, b and then these, well framed."""

    def fault(connection: Connection, _: bool) -> None:
        connection.send(EVENTS + CHUNKED + chunk(BEGUN), *map(chunk, after), chunk(b""))

    return fault


def _split_lines(connection: Connection, _: bool) -> None:
    connection.start_stream()
    lines = (BEGUN + STOP + DONE).replace(b"\n", b"\r\n")
    for at in range(len(lines)):
        connection.chunk(lines[at : at + 1])
    connection.chunk(b"")


def _pings_for_ever(connection: Connection, _: bool) -> None:
    connection.send(EVENTS + CHUNKED + chunk(BEGUN + STOP + DONE))
    connection.sock.settimeout(0.1)
    for _ping in range(200):
        connection.chunk(b": ping\n\n")
        with suppress(TimeoutError):
            if not connection.sock.recv(65536):
                return
    raise AssertionError("nobody stops a backend that has nothing more to say")


def _unframed(connection: Connection, stream: bool) -> None:
    connection.send((EVENTS + b"\r\n" + BEGUN + STOP + DONE) if stream else PLAIN + b"\r\n" + BODY)
    connection.close()


def _is_sent_slowly(connection: Connection, stream: bool) -> None:
    connection.send(*([b"HTTP/1.1 102 Processing\r\n\r\n"] * 3))
    time.sleep(0.2)
    connection.send(whole(stream))


def _zipped(stream: bool) -> bytes:
    return sized(BOMB, stream).replace(b"\r\n", b"\r\nContent-Encoding: gzip\r\n", 1)


def _tiny_chunks(stream: bool) -> bytes:
    body = BEGUN + STOP + DONE if stream else BODY
    return (EVENTS if stream else PLAIN) + CHUNKED + b"".join(chunk(bytes([byte])) for byte in body) + chunk(b"")


def _unended_chunked(stream: bool) -> bytes:
    return EVENTS + CHUNKED + chunk(BEGUN) if stream else PLAIN + CHUNKED + chunk(BODY)


FAULTS: dict[str, Fault] = {
    **{f"{what} {phase}": _at(phase, end) for what, end in ENDS.items() for phase in parts(False)},
    "HTTP/0.9": _says(lambda stream: BEGUN if stream else BODY, Connection.close),
    "10,000 x 100": _says(lambda stream: b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000 + whole(stream)),
    "10,000 x 103": _says(lambda stream: b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 10_000 + whole(stream)),
    "three 102, then slowly": _is_sent_slowly,
    "an endless status line": _endless(lambda _: b"HTTP/1.1 200 "),
    "an endless header": _endless(lambda _: PLAIN + b"X: "),
    "endless headers": _endless(lambda _: PLAIN, b"X: y\r\n" * 10_000),
    "5,000 headers": _head(b"\r\n".join(islice(repeat(b"X: y"), 5_000))),
    "two lengths": _head(b"Content-Length: 1\r\nContent-Length: 2"),
    "a length and chunks": _says(
        lambda stream: (EVENTS if stream else PLAIN) + b"Content-Length: 5\r\n" + CHUNKED + chunk(BODY)
    ),
    "a length that is no number": _says(lambda _: PLAIN + b"Content-Length: many\r\n\r\n" + BODY),
    "a negative length": _says(lambda _: PLAIN + b"Content-Length: -1\r\n\r\n" + BODY),
    "status 99999": _status(b"HTTP/1.1 99999 Oops"),
    "status 999": _status(b"HTTP/1.1 999 Oops"),
    "status 000": _status(b"HTTP/1.1 000 Oops"),
    "status 101": _status(b"HTTP/1.1 101 Switching Protocols"),
    "status 302": _status(b"HTTP/1.1 302 Found"),
    "status 204 with a body": _status(b"HTTP/1.1 204 No Content"),
    "status 500": _status(b"HTTP/1.1 500 Oops"),
    "a byte at a time": _trickles,
    "chunks of a byte": _says(_tiny_chunks),
    "a length too short": _says(
        lambda stream: sized(BEGUN + STOP + DONE if stream else BODY, stream, len(BEGUN) + 9 if stream else 99)
    ),
    "a length too long": _says(lambda stream: sized(BEGUN if stream else BODY, stream, 9999), Connection.close),
    "a length too long, then silence": _says(lambda stream: sized(BEGUN if stream else BODY, stream, 9999)),
    "no length": _unframed,
    "a gzip bomb": _says(_zipped),
    "gzip that it does not speak of": _says(lambda stream: sized(gzip.compress(BODY), stream), Connection.close),
    "a chunk size that is no number": _says(lambda stream: _unended_chunked(stream) + b"xyz\r\nabc\r\n"),
    "a negative chunk size": _says(lambda stream: _unended_chunked(stream) + b"-1\r\n"),
    "a chunk size of 20 digits": _says(lambda stream: _unended_chunked(stream) + b"f" * 20 + b"\r\n"),
    "a chunk longer than its size": _says(lambda stream: _unended_chunked(stream) + b"1\r\nabc\r\n0\r\n\r\n"),
    "an endless chunk size": _endless(_unended_chunked, b"0" * (1 << 20)),
    "an endless trailer": _endless(lambda stream: _unended_chunked(stream) + b"0\r\nX: "),
    "an answer over the limit": _endless(lambda _: PLAIN + b"Content-Length: %d\r\n\r\n" % (100 << 20)),
    "an error event": _events(b'data: {"error":{"message":"boom","type":"server_error","code":"boom"}}\n\n'),
    "invalid UTF-8": _events(b'data: {"choices":[{"delta":{"content":"\xff\xfe"}}]}\n\n', STOP + DONE),
    "an event that is no JSON": _events(b"data: {oops\n\n", STOP + DONE),
    "an endless event": _endless(lambda _: EVENTS + CHUNKED + chunk(BEGUN) + chunk(b"data: "), chunk(MEGABYTE)),
    "an endless first event": _endless(lambda _: EVENTS + CHUNKED + chunk(b"data: "), chunk(MEGABYTE)),
    "half an event": _events(event("c")[:-9]),
    "half a first event": _says(lambda _: EVENTS + CHUNKED + chunk(b"data: {") + chunk(b""), _stalls),
    "nothing but its end": _says(lambda _: EVENTS + CHUNKED + chunk(b""), _stalls),
    "no end": _events(),
    "no [DONE]": _events(STOP),
    "[DONE] alone": _events(DONE),
    "events after [DONE]": _events(STOP + DONE + event("c"), event("d")),
    "pings for ever after [DONE]": _pings_for_ever,
    "CRLF, a byte at a time": _split_lines,
}


def fails_as_named(connection: Connection, request: Request) -> None:
    """The script of a `ScriptedBackend`."""
    asked = json.loads(request[2])
    FAULTS[asked["model"]](connection, bool(asked.get("stream")))


def answers_well(connection: Connection, request: Request) -> None:
    """The script of a backend that has no fault."""
    connection.send(whole(bool(json.loads(request[2]).get("stream"))))


@contextmanager
def deaf(*, accepts: bool) -> Iterator[str]:
    """The URL of a server of which the kernel takes connections that nobody reads from; or none, since its queue is full."""
    fillers = []
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64 if accepts else 0)
        if not accepts:
            for _ in range(4):  # the kernel drops what comes after
                filler = socket.socket()
                filler.setblocking(False)
                filler.connect_ex(listener.getsockname())
                fillers.append(filler)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            for filler in fillers:
                filler.close()
