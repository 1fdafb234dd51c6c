"""HTTP/1.1 on the wire, row by row: what is refused, what is handled, and that no two sides ever read the same bytes apart.

The rows of clients are in `tests/corpus.py`. Those of backends are here.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Final, NamedTuple

import pytest

from .. import wire
from ..corpus import HANDLED, MAX_BODY, OPEN, PATH, REFUSED, SMUGGLED_POST, Handled, asking, chunks, get, post
from ..wire import Message
from .backends import Connection, ScriptedBackend, backend, completion, event
from .processes import Running, wait_for

SETTINGS: Final = {"GATEWAY_BACKEND_KIND": "openai", "GATEWAY_PROBE_INTERVAL": "1h"}
"""A backend that gets each body byte for byte, and nothing that no test asked for."""

OPTIONS: Final = ("--client-timeout", "5s", "--max-body", str(MAX_BODY))

REFUSALS: Final = {name: row for rows in REFUSED.values() for name, row in rows.items()}
OWN: Final = {b"host", b"content-length", b"content-type", b"accept-encoding", b"x-request-id"}
"""What the gateway itself says to a backend."""

LAST: Final = asking(b"the next request")
METRICS: Final = get(b"Accept: text/plain", b"Connection: close", target=b"/metrics")
ERROR: Final = {"message", "type", "param", "code"}


class Setup(NamedTuple):
    gateway: Running
    server: ScriptedBackend

    def forget(self) -> None:
        """What the backend got so far is of no interest any more."""
        for connection in self.server.connections:
            connection.received.clear()

    def got(self) -> list[Message]:
        """The requests that the backend got since then."""
        return [one for connection in self.server.connections for one in wire.requests(bytes(connection.received))]

    def bodies(self) -> list[bytes]:
        """The bodies that the backend got since then, in their order."""
        got = self.got()
        assert all(one.line == b"POST %b HTTP/1.1" % PATH for one in got), got
        return [one.body for one in got]


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    with backend(echo) as server, started(tmp_path_factory, server) as gateway:
        wait_for(lambda: gateway.get("/readyz")[0] == 200)
        yield Setup(gateway, server)


def started(directories: pytest.TempPathFactory, server: ScriptedBackend) -> Running:
    return Running(directories.mktemp("conformance"), *OPTIONS, BACKEND_URL=server.url, **SETTINGS)


def echo(connection: Connection, request: tuple[bytes, dict[bytes, bytes], bytes]) -> None:
    connection.answer(completion(said(request[2])))


def said(body: bytes) -> str:
    """What a request asks."""
    found: str = json.loads(body)["messages"][0]["content"]
    return found


def told(answer: Message) -> str | None:
    """What the backend answered, if it was the backend."""
    choices = json.loads(answer.body or b"{}").get("choices")
    return choices[0]["message"]["content"] if choices else None


def talk(gateway: Running, data: bytes) -> bytes:
    """Send it all, and read until the gateway closes the connection."""
    received = b""
    with gateway.connect() as sock:
        try:
            sock.sendall(data)
            while more := sock.recv(65536):
                received += more
        except (BrokenPipeError, ConnectionResetError):
            pass
    return received


def assert_refused(answer: Message) -> None:
    """A 4xx in OpenAI's form, with a request id."""
    assert 400 <= answer.status < 500
    assert answer.status != 408, "it was waited for more"
    assert json.loads(answer.body)["error"].keys() == ERROR
    assert len(answer.all(b"x-request-id")) == 1
    assert answer.all(b"connection") == [b"close"]


def assert_clean(got: list[Message], passed: tuple[tuple[bytes, bytes], ...] = ()) -> None:
    """Whole requests of the gateway's own making, with what it passes on and nothing else."""
    for request in got:
        assert len(request.all(b"host")) == len(request.all(b"content-length")) == 1
        assert len({name for name, _ in request.headers}) == len(request.headers) or passed
        assert {header for header in request.headers if header[0] not in OWN} <= set(passed)
    if passed:
        assert [header for header in got[0].headers if header[0] not in OWN] == list(passed)


def assert_next_is_right(setup: Setup) -> None:
    """A request on a connection of its own gets its own answer."""
    answer = ask(setup, LAST)
    assert (answer.status, told(answer)) == (200, said(LAST))


def ask(setup: Setup, body: bytes) -> Message:
    """The one answer to a request on a connection of its own."""
    (answer,) = wire.answers(talk(setup.gateway, post(b"Connection: close", body=body)))
    return answer


@pytest.mark.parametrize("name", REFUSALS)
def test_a_request_that_is_not_clear_is_refused_with_all_that_follows_it(setup: Setup, name: str) -> None:
    setup.forget()
    answers = wire.answers(talk(setup.gateway, REFUSALS[name] + SMUGGLED_POST))
    assert len(answers) == 1
    assert_refused(answers[0])
    assert_next_is_right(setup)
    assert setup.bodies() == [LAST]


@pytest.mark.parametrize("name", HANDLED)
def test_a_request_that_is_clear_is_answered_and_so_is_the_next(setup: Setup, name: str) -> None:
    row = HANDLED[name]
    setup.forget()
    received = talk(setup.gateway, row.data + (SMUGGLED_POST if row.closes else post(b"Connection: close", body=LAST)))
    assert_handled(setup, row, wire.answers(received, row.methods))


def assert_handled(setup: Setup, row: Handled, answers: list[Message]) -> None:
    """Each request has its answer, in order, the follow-up too; the backend got these and no others."""
    bodies = [*row.bodies, *([] if row.closes else [LAST])]
    assert [one.status for one in answers] == [*row.answers, *([] if row.closes else [200])]
    assert [text for one in answers if (text := told(one)) is not None] == [said(body) for body in bodies]
    assert answers[-1].all(b"connection") == [b"close"]
    assert all(len(one.all(b"x-request-id")) == 1 for one in answers)
    assert_clean(setup.got(), row.passed)
    assert_next_is_right(setup)
    assert setup.bodies() == [*bodies, LAST]


@pytest.mark.parametrize("name", OPEN)
def test_what_may_be_refused_or_handled_is_one_of_the_two(setup: Setup, name: str) -> None:
    row = OPEN[name]
    setup.forget()
    answers = wire.answers(talk(setup.gateway, row.data + post(b"Connection: close", body=LAST)))
    if len(answers) == 1:
        assert_refused(answers[0])
        assert_next_is_right(setup)
        assert setup.bodies() == [LAST]
    else:
        assert_handled(setup, row, answers)


def test_no_connection_is_left(setup: Setup) -> None:
    assert wait_for(lambda: b"\ngateway_connections 1.0\n" in talk(setup.gateway, METRICS))


# --- what a backend may say -----------------------------------------------------------------------

GOOD, BAD, EITHER = {200}, {502}, {200, 502}
OK: Final = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
ANSWER: Final = completion("the answer")
POISON: Final = completion("poison")
LENGTH: Final = b"Content-Length: %d\r\n" % len(ANSWER)
CHUNKED: Final = b"Transfer-Encoding: chunked\r\n"
SPLIT: Final = b"%bContent-Length: %d\r\n\r\n" % (OK, len(POISON)) + POISON
"""A whole answer that nobody asked for."""


class Said(NamedTuple):
    """What a backend says, and closes the connection or not; the statuses that a client may get for it."""

    data: bytes
    statuses: set[int]
    closes: bool = True


def lines(*more: bytes, status: bytes = b"HTTP/1.1 200 OK", body: bytes = LENGTH + b"\r\n" + ANSWER) -> bytes:
    """An answer with these header lines; ``body``: its framing, and itself."""
    return b"\r\n".join([status, b"Content-Type: application/json", *more, body])


def framed(*framing: bytes) -> bytes:
    """A plain body under this framing."""
    return OK + b"".join(line + b"\r\n" for line in framing) + b"\r\n" + ANSWER


def sent_chunked(body: bytes, *framing: bytes) -> bytes:
    return OK + CHUNKED + b"".join(line + b"\r\n" for line in framing) + b"\r\n" + body


def chunk(size: bytes, end: bytes = b"\r\n") -> bytes:
    return sent_chunked(size + end + ANSWER + b"\r\n0\r\n\r\n")


HEX: Final = b"%x" % len(ANSWER)
COUNT: Final = b"%d" % len(ANSWER)

SAYS: Final = {
    "an answer": Said(lines(), GOOD, closes=False),
    "an answer, and the connection closes": Said(lines(), GOOD),
    "Connection: close": Said(lines(b"Connection: close"), GOOD, closes=False),
    "chunked": Said(sent_chunked(chunks(ANSWER)), GOOD, closes=False),
    "chunked in capitals": Said(OK + b"Transfer-Encoding: Chunked\r\n\r\n" + chunks(ANSWER), GOOD, closes=False),
    "a chunk extension": Said(chunk(HEX + b";x=y"), GOOD, closes=False),
    "a trailer": Said(sent_chunked(chunks(ANSWER, b"X-T: y\r\n")), GOOD, closes=False),
    "trailers of the framing": Said(sent_chunked(chunks(ANSWER, b"Content-Length: 3\r\nConnection: close\r\n")), EITHER),
    "no length, until the end": Said(framed(), GOOD),
    "HTTP/1.0 without a length": Said(framed().replace(b"HTTP/1.1", b"HTTP/1.0"), GOOD),
    "HTTP/1.0 with a length": Said(lines(status=b"HTTP/1.0 200 OK"), GOOD, closes=False),
    "HTTP/1.0 that is chunked": Said(sent_chunked(chunks(ANSWER)).replace(b"HTTP/1.1", b"HTTP/1.0"), EITHER),
    "100 before the answer": Said(b"HTTP/1.1 100 Continue\r\n\r\n" + lines(), GOOD, closes=False),
    "103 before the answer": Said(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + lines(), GOOD, closes=False),
    "several 1xx before the answer": Said(b"HTTP/1.1 102 Processing\r\n\r\n" * 5 + lines(), GOOD, closes=False),
    "endless 1xx": Said(b"HTTP/1.1 102 Processing\r\n\r\n" * 10_000 + lines(), EITHER),
    "100 and nothing more": Said(b"HTTP/1.1 100 Continue\r\n\r\n", BAD),
    "101": Said(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n" + SPLIT, BAD),
    "Upgrade beside an answer": Said(lines(b"Connection: upgrade", b"Upgrade: h2c"), GOOD, closes=False),
    "204 with a body": Said(lines(status=b"HTTP/1.1 204 No Content"), {204, 502}, closes=False),
    "205 with a body": Said(lines(status=b"HTTP/1.1 205 Reset Content"), {205, 502}, closes=False),
    "304 with a body": Said(lines(status=b"HTTP/1.1 304 Not Modified"), BAD, closes=False),
    "a redirect": Said(lines(b"Location: http://127.0.0.1:1/", status=b"HTTP/1.1 302 Found"), BAD, closes=False),
    "a length and chunked": Said(OK + LENGTH + CHUNKED + b"\r\n" + chunks(ANSWER), EITHER, closes=False),
    "a length to the middle, and chunked": Said(OK + b"Content-Length: 5\r\n" + CHUNKED + b"\r\n" + chunks(ANSWER), EITHER),
    "chunked, and a length of an answer": Said(
        OK + CHUNKED + b"Content-Length: 5\r\n\r\n" + chunks(ANSWER) + SPLIT, EITHER, closes=False
    ),
    "two lengths that are equal": Said(framed(b"Content-Length: " + COUNT, b"Content-Length: " + COUNT), EITHER, closes=False),
    "two lengths that differ": Said(framed(b"Content-Length: " + COUNT, b"Content-Length: 5"), BAD, closes=False),
    "two lengths that differ, the smaller first": Said(framed(b"Content-Length: 5", b"Content-Length: " + COUNT), BAD),
    "a list of lengths": Said(framed(b"Content-Length: %b, 5" % COUNT), BAD),
    "a negative length": Said(framed(b"Content-Length: -5"), BAD),
    "a length with a plus": Said(framed(b"Content-Length: +" + COUNT), BAD),
    "an empty length": Said(framed(b"Content-Length:"), BAD),
    "a length of 2^64 and more": Said(framed(b"Content-Length: %d" % (2**64 + len(ANSWER))), BAD),
    "a length without end": Said(framed(b"Content-Length: " + b"9" * 5000), BAD),
    "a length that is too long": Said(framed(b"Content-Length: %d" % (len(ANSWER) + 1)), BAD),
    "a length that is too short": Said(framed(b"Content-Length: %d" % (len(ANSWER) - 1)), BAD, closes=False),
    "a space before a length's colon": Said(framed(b"Content-Length : " + COUNT), EITHER),
    "a coding that nobody knows": Said(framed(b"Transfer-Encoding: gzip"), BAD),
    "gzip, chunked": Said(OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + chunks(ANSWER), BAD),
    "chunked twice": Said(sent_chunked(chunks(ANSWER), b"Transfer-Encoding: chunked"), EITHER),
    "identity": Said(framed(b"Transfer-Encoding: identity", b"Content-Length: " + COUNT), EITHER),
    "a content coding": Said(lines(b"Content-Encoding: gzip"), BAD, closes=False),
    "a chunk size that is no number": Said(chunk(b"zz"), BAD),
    "a negative chunk size": Said(chunk(b"-" + HEX), BAD),
    "a chunk size with 0x": Said(chunk(b"0x" + HEX), BAD),
    "a chunk size with a space": Said(chunk(HEX + b" "), EITHER),
    "a chunk size of 17 digits": Said(chunk(b"1" + HEX.rjust(16, b"0")), BAD),
    "a chunk size line without end": Said(sent_chunked(b"0" * 200_000), BAD),
    "a bare LF after a chunk size": Said(chunk(HEX, b"\n"), EITHER),
    "chunk data without a line end": Said(sent_chunked(HEX + b"\r\n" + ANSWER + b"0\r\n\r\n"), BAD),
    "chunks without the last": Said(sent_chunked(HEX + b"\r\n" + ANSWER + b"\r\n"), BAD),
    "chunks without the end of the last": Said(sent_chunked(HEX + b"\r\n" + ANSWER + b"\r\n0\r\n"), BAD),
    "half a chunk": Said(sent_chunked(HEX + b"\r\n" + ANSWER[:9]), BAD),
    "trailers that are too long": Said(sent_chunked(chunks(ANSWER, b"X: " + b"y" * 200_000 + b"\r\n")), EITHER),
    "a header that is too long": Said(lines(b"X: " + b"y" * 200_000), BAD),
    "a header without end": Said(OK + b"X: " + b"y" * 200_000, BAD),
    "too many headers": Said(lines(*[b"X: y"] * 30_000), BAD),
    "a NUL in a header": Said(lines(b"Retry-After: 1\x00Evil: y"), EITHER),
    "a bare CR in a header": Said(lines(b"Retry-After: 1\rEvil: y"), EITHER),
    "a bare LF in a header": Said(lines(b"Retry-After: 1\nEvil: y"), EITHER),
    "a folded header": Said(lines(b"Retry-After: 1", b" Evil: y"), EITHER),
    "a header without a colon": Said(lines(b"oops"), EITHER),
    "a header without a name": Said(lines(b": y"), EITHER),
    "a space before a colon": Said(lines(b"Retry-After : 1"), EITHER),
    "bytes over 0x7f in a header": Said(lines(b"Retry-After: \x80\xff"), GOOD, closes=False),
    "nothing": Said(b"", BAD),
    "an empty line": Said(b"\r\n", BAD),
    "HTTP/0.9": Said(ANSWER, BAD),
    "half a status line": Said(b"HTTP/1.1 20", BAD),
    "half of the headers": Said(OK, BAD),
    "half of the body": Said(lines()[:-9], BAD),
    "headers alone, as for HEAD": Said(OK + LENGTH + b"\r\n", BAD),
    "SSH": Said(b"SSH-2.0-OpenSSH_9\r\n\r\n", BAD),
    "TLS": Said(b"\x15\x03\x01\x00\x02\x02\x46", BAD),
    "HTTP/2": Said(b"\x00\x00\x12\x04\x00\x00\x00\x00\x00" + bytes(18), BAD),
    "a request": Said(post(), BAD),
    "a status line without a reason": Said(lines(status=b"HTTP/1.1 200"), EITHER, closes=False),
    **{
        f"the status line {status.decode()}": Said(lines(status=status), BAD)
        for status in (
            *(b"HTTP/1.1 20 OK", b"HTTP/1.1 2000 OK", b"HTTP/1.1 abc OK", b"HTTP/1.1 -20 OK", b"HTTP/1.1 099 OK"),
            *(b"HTTP/1.1 600 OK", b"HTTP/2 200 OK", b"HTTP/3.0 200 OK", b"HTTP/1.x 200 OK", b"ICY 200 OK", b"http/1.1 200 OK"),
            *(b" HTTP/1.1 200 OK", b"HTTP/1.1\t200 OK", b"HTTP/1.1200 OK"),
        )
    },
    "an answer behind the answer": Said(lines() + SPLIT, EITHER, closes=False),
    "an answer behind a chunked one": Said(sent_chunked(chunks(ANSWER)) + SPLIT, EITHER, closes=False),
    "an answer behind 304": Said(b"HTTP/1.1 304 Not Modified\r\n\r\n" + SPLIT, BAD, closes=False),
    "an answer behind 204": Said(b"HTTP/1.1 204 No Content\r\n\r\n" + SPLIT, {204, 502}, closes=False),
    "one byte behind the answer": Said(lines() + b"x", EITHER, closes=False),
    "an empty line behind the answer": Said(lines() + b"\r\n", EITHER, closes=False),
    "100 behind the answer": Said(lines() + b"HTTP/1.1 100 Continue\r\n\r\n", EITHER, closes=False),
    "a refusal behind the answer": Said(lines() + b"HTTP/1.1 408 Timeout\r\nContent-Length: 0\r\n\r\n", EITHER, closes=False),
}

ASKED: Final = asking(b"anything")


class Liar:
    """Answers what the test wants; every other request is answered well."""

    says: Said

    def __call__(self, connection: Connection, request: tuple[bytes, dict[bytes, bytes], bytes]) -> None:
        if said(request[2]) != said(ASKED):
            echo(connection, request)
            return
        connection.send(self.says.data)
        if self.says.closes:
            connection.sock.shutdown(socket.SHUT_WR)


LIAR: Final = Liar()


@pytest.fixture(scope="module")
def liar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    with backend(LIAR) as server, started(tmp_path_factory, server) as gateway:
        wait_for(lambda: gateway.get("/readyz")[0] == 200)
        yield Setup(gateway, server)


@pytest.mark.parametrize("name", SAYS)
def test_what_a_backend_says_is_an_answer_or_a_502_and_never_the_next_ones_answer(liar: Setup, name: str) -> None:
    LIAR.says = SAYS[name]
    liar.forget()
    answer = ask(liar, ASKED)
    assert answer.status in LIAR.says.statuses
    if answer.status == 200:
        assert answer.body == ANSWER
    elif answer.status == 502:
        error = json.loads(answer.body)["error"]
        assert error.keys() == ERROR
        assert error["code"] in ("backend_protocol_error", "backend_unreachable")
    assert not answer.all(b"evil")
    for _ in range(3):
        assert_next_is_right(liar)
    assert_clean(liar.got())
    assert set(liar.bodies()) == {ASKED, LAST}


def test_bytes_that_come_after_the_answer_are_not_the_next_ones(liar: Setup) -> None:
    """They come while the connection is idle, before the next request."""
    LIAR.says = Said(lines(), GOOD, closes=False)
    for _ in range(5):
        assert ask(liar, ASKED).body == ANSWER
        number = liar.server.posts[-1][0]
        liar.server.connections[number].send(SPLIT)
        assert_next_is_right(liar)
        assert liar.server.posts[-1][0] != number


@pytest.mark.parametrize("name", ["Connection: close", "HTTP/1.0 with a length"])
def test_a_connection_that_the_backend_will_close_is_not_used_again(liar: Setup, name: str) -> None:
    LIAR.says = SAYS[name]
    assert ask(liar, ASKED).status == 200
    number = liar.server.posts[-1][0]
    assert_next_is_right(liar)
    assert liar.server.posts[-1][0] != number


@pytest.mark.parametrize("end", [b"0\r\n\r\n" + SPLIT, b"zz\r\n", b"-1\r\n", b""])
def test_a_stream_that_ends_oddly_does_not_reach_into_the_next_answer(liar: Setup, end: bytes) -> None:
    told = event("one") + event("two", "stop") + b"data: [DONE]\n\n"
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n" + CHUNKED + b"\r\n"
    LIAR.says = Said(head + b"%x\r\n%b\r\n" % (len(told), told) + end, GOOD, closes=not end.startswith(b"0"))
    streaming = ASKED[:-1] + b',"stream":true}'
    answer = ask(liar, streaming)
    assert answer.body == told
    for _ in range(3):
        assert_next_is_right(liar)
