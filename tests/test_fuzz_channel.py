"""The server's channel against requests that a machine makes up: valid ones, broken ones, and a second parser's opinion."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import h11
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from . import corpus, wire
from .dialogs import Dialog, Seen, cut, sorted_headers

SLOWLY: Final = settings(deadline=None, max_examples=150, phases=set(Phase) - {Phase.explain})
REFUSALS: Final = {name: row for rows in corpus.REFUSED.values() for name, row in rows.items()}

SHORT: Final = sorted(name for name, row in REFUSALS.items() if len(row) < 2000)
"""Those that may wait behind a request that is being answered."""

# --- the corpus -----------------------------------------------------------------------------------


def in_pieces(data: bytes) -> list[list[bytes]]:
    """Whole; byte by byte, or nearly so if it is long; in two halves."""
    step = max(1, len(data) // 2000)
    return [[data], [data[at : at + step] for at in range(0, len(data), step)], cut(data, [len(data) // 2])]


@pytest.mark.parametrize("group", corpus.REFUSED)
def test_what_is_not_clear_is_refused_at_once_however_it_comes(group: str) -> None:
    wrong = {name for name, row in corpus.REFUSED[group].items() for pieces in in_pieces(row) if not refused(pieces)}
    assert not wrong


def refused(pieces: list[bytes]) -> bool:
    with Dialog() as dialog:
        dialog.send(*pieces)
    return len(dialog.refusals) == 1 and not dialog.seen and len(wire.answers(dialog.wire.value())) == 1


def test_what_is_clear_is_handled_however_it_comes() -> None:
    for name, row in corpus.HANDLED.items():
        data = row.data + (corpus.SMUGGLED_POST if row.closes else b"")
        whole, *others = [seen(pieces, later=later) for pieces in in_pieces(data) for later in (False, True)]
        refusals = row.answers.count(400) if row.closes else 0
        assert len(whole) == len(row.answers) - refusals, name
        assert all(other == whole for other in others), name


def seen(pieces: list[bytes], *, later: bool) -> list[Seen]:
    with Dialog(later=later) as dialog:
        dialog.send(*pieces)
    return dialog.seen


# --- requests that a machine makes up -------------------------------------------------------------

TOKEN: Final = "!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
VISIBLE: Final = bytes([*range(0x21, 0x7F), *range(0x80, 0x100)])


def strings(alphabet: bytes | str, least: int, most: int) -> st.SearchStrategy[bytes]:
    letters = list(alphabet.encode("ascii") if isinstance(alphabet, str) else alphabet)
    return st.lists(st.sampled_from(letters), min_size=least, max_size=most).map(bytes)


methods = st.sampled_from([b"GET", b"POST", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"HEAD"])
targets = strings("abcABC019-._~!$&'()*+,;=:@/?", 0, 12).map(lambda rest: b"/" + rest)
names = strings(TOKEN, 1, 8).map(lambda name: b"x-" + name.lower())
values = st.lists(strings(VISIBLE, 1, 6), max_size=3).map(b" ".join)
extras = st.lists(st.tuples(names, values), max_size=3)
extensions = st.sampled_from([b"", b";x", b";x=y", b";x=y;z", b';x="y z"'])
blanks = st.sampled_from([b"", b" ", b"\t", b"  "])


@st.composite
def chunked_bodies(draw: st.DrawFn, body: bytes) -> bytes:
    pieces = cut(body, draw(st.lists(st.integers(0, 200), max_size=4))) if body else []
    sizes = st.sampled_from([b"%x", b"%X", b"0%x"])
    data = b"".join(b"%b%b\r\n%b\r\n" % (draw(sizes) % len(piece), draw(extensions), piece) for piece in pieces)
    trailers = draw(st.lists(st.tuples(names, values), max_size=2))
    return data + b"0%b\r\n" % draw(extensions) + b"".join(b"%b: %b\r\n" % trailer for trailer in trailers) + b"\r\n"


@st.composite
def requests(draw: st.DrawFn) -> tuple[Seen, bytes]:
    """A request as its resource is to see it, and its bytes."""
    method, target, headers = draw(methods), draw(targets), [(b"host", b"g"), *draw(extras)]
    framing = draw(st.sampled_from(["none", "length", "chunked"]))
    body = b"" if framing == "none" else draw(st.binary(max_size=60))
    tail = body
    if framing == "length":
        headers.append((b"content-length", b"%d" % len(body)))
    if framing == "chunked":
        headers.append((b"transfer-encoding", b"chunked"))
        tail = draw(chunked_bodies(body))
    # llhttp refuses a blank behind the coding, which nobody sends: see "chunked between blanks" in the corpus.
    last = {b"transfer-encoding": st.just(b"")}
    lines = (b"%b:%b%b%b\r\n" % (name, draw(blanks), value, draw(last.get(name, blanks))) for name, value in headers)
    data = b"%b %b HTTP/1.1\r\n%b\r\n%b" % (method, target, b"".join(lines), tail)
    return Seen(method, target, sorted_headers(headers), body), data


def outcome(pieces: list[bytes], *, later: bool) -> tuple[list[Seen], bytes]:
    """What the resource saw, and what the client got but for the date."""
    with Dialog(later=later) as dialog:
        dialog.send(*pieces)
    assert not dialog.refusals
    return dialog.seen, re.sub(rb"(?i)\r\ndate: [^\r]*", b"", dialog.wire.value())


@given(st.lists(requests(), min_size=1, max_size=4), st.lists(st.integers(0, 5000), max_size=12), st.booleans())
@SLOWLY
def test_valid_requests_are_the_same_requests_however_they_are_cut(
    made: list[tuple[Seen, bytes]], places: list[int], later: bool
) -> None:
    data = b"".join(data for _, data in made)
    whole = outcome([data], later=False)
    assert whole[0] == [request for request, _ in made]
    assert outcome(cut(data, places), later=later) == whole
    assert outcome([data], later=True) == whole
    answers = wire.answers(whole[1], (request.method for request, _ in made))
    told = [b"%d %b %d" % (count, one.method, len(one.body)) for count, (one, _) in enumerate(made, 1)]
    assert [one.body for one in answers] == [b"" if b" HEAD " in one else one for one in told]


@given(st.lists(requests(), min_size=1, max_size=3), st.sampled_from(SHORT), st.booleans())
@SLOWLY
def test_a_refusal_comes_after_the_answers_to_the_requests_before_it(
    made: list[tuple[Seen, bytes]], name: str, later: bool
) -> None:
    data = b"".join(data for _, data in made)
    with Dialog(later=later) as dialog:
        dialog.send(data + REFUSALS[name] + corpus.SMUGGLED_POST)
    assert dialog.seen == [request for request, _ in made]
    answers = wire.answers(dialog.wire.value(), (request.method for request, _ in made))
    assert [one.status for one in answers[:-1]] == [200] * len(made)
    assert 400 <= answers[-1].status < 500


# --- what is broken on purpose --------------------------------------------------------------------

NASTY: Final = [
    *(b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\n\n", b"\x00", b" ", b"\t", b":", b";", b",", b"\x0b", b"\x7f", b"\x80", b"\xff"),
    *(b"0\r\n\r\n", b"0", b"-1", b"+1", b"0x1", b"f" * 16, b"1" + b"0" * 16, b"\r\n ", b" :"),
    *(b"HTTP/1.1", b"HTTP/1.0", b"HTTP/0.9", b"GET /x HTTP/1.1\r\n", b"http://g/", b"*", b"#", b"%00", b'"'),
    *(b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"Content-Length:", b"Transfer-Encoding: chunked\r\n", b"chunked"),
    *(b"Transfer-Encoding: identity\r\n", b"Transfer-Encoding : chunked\r\n", b"gzip, ", b"Host: h\r\n", b"Host:", b"X: y\r\n"),
    *(b"Connection: close\r\n", b"Connection: upgrade\r\nUpgrade: h2c\r\n", b"Expect: 100-continue\r\n", b"Trailer: X\r\n"),
    *(b"CONNECT ", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01"),
]

tokens = st.one_of(st.sampled_from(NASTY), st.binary(min_size=1, max_size=3))
kinds = st.sampled_from(["insert", "delete", "replace", "repeat"])
changes = st.tuples(kinds, st.integers(0, 2000), st.integers(1, 30), tokens)
Changes = list[tuple[str, int, int, bytes]]


def changed(data: bytes, made: Changes) -> bytes:
    for what, place, length, token in made:
        at = place % (len(data) + 1)
        end = at + (length if what != "insert" else 0)
        middle = {"insert": token, "delete": b"", "replace": token, "repeat": data[at:end] * 2}[what]
        data = data[:at] + middle + data[end:]
    return data


pieces_of_corpus = st.sampled_from([*(REFUSALS[name] for name in SHORT), *(row.data for row in corpus.HANDLED.values())])
originals = st.lists(st.one_of(requests().map(lambda made: made[1]), pieces_of_corpus), min_size=1, max_size=3).map(b"".join)


@given(originals, st.lists(changes, max_size=4), st.lists(st.integers(0, 5000), max_size=6), st.booleans())
@settings(SLOWLY, max_examples=400)
@example(b"", [], [], True)
def test_broken_requests_break_nothing(data: bytes, made: Changes, places: list[int], later: bool) -> None:
    data = changed(data, made)
    with Dialog(later=later) as dialog:
        dialog.send(*cut(data, places), corpus.SMUGGLED_POST)
    assert_consistent(dialog)


def assert_consistent(dialog: Dialog) -> None:
    """At most one refusal, the last of all; and every request was as long as it said."""
    assert len(dialog.refusals) <= 1
    if dialog.refusals:
        assert len(dialog.seen) == dialog.seen_when_refused
    answers = wire.answers(dialog.wire.value(), answered_methods(dialog))
    assert len(answers) == len(dialog.seen) + len(dialog.refusals)
    for request in dialog.seen:
        assert_whole(request)


def answered_methods(dialog: Dialog) -> list[bytes]:
    return [request.method for request in dialog.seen] + [refusal.method.encode() for refusal in dialog.refusals]


def assert_whole(request: Seen) -> None:
    lengths, codings = request.all(b"content-length"), request.all(b"transfer-encoding")
    assert len(lengths) + len(codings) <= 1
    assert len(request.all(b"host")) <= 1
    assert re.fullmatch(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+", request.method)
    assert re.fullmatch(rb"[!-~]+", request.target)
    for name, value in request.headers:
        assert re.fullmatch(rb"[!#$%&'*+\-.^_`|~0-9a-z]+", name)
        assert not re.search(rb"[\x00\r\n]", value)
    if not codings:
        assert len(request.body) == int(lengths[0] if lengths else b"0")
    else:
        assert codings[0].lower() == b"chunked"


# --- a second opinion -----------------------------------------------------------------------------


def opinion(data: bytes) -> tuple[list[Seen], str]:
    """What h11 makes of the bytes, and how it ends: ``refused``, ``incomplete``, or ``closed`` after the last request."""
    found: list[Seen] = []
    while data := after_empty_line(data):
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=2**20)
        connection.receive_data(data)
        try:
            request = one_request(connection)
        except h11.RemoteProtocolError:
            return found, "refused"
        if request is None:
            return found, "incomplete"
        found.append(request)
        if connection.their_state is h11.MUST_CLOSE:
            return found, "closed"
        data = bytes(connection.trailing_data[0])
    return found, "incomplete"


def after_empty_line(data: bytes) -> bytes:
    """h11 refuses an empty line before a request; RFC 9112 section 2.2 wants it ignored."""
    return data.removeprefix(b"\r\n")


def one_request(connection: h11.Connection) -> Seen | None:
    """The first request, or None if it is not all there."""
    head: Any = connection.next_event()
    if head is h11.NEED_DATA:
        return None
    body = b""
    while True:
        event: Any = connection.next_event()
        if event is h11.NEED_DATA:
            return None
        if isinstance(event, h11.EndOfMessage):
            return Seen(head.method, head.target, sorted_headers(head.headers), body)
        body += event.data


Difference = Callable[[bytes], object]
DIFFERENCES: Final[dict[str, Difference]] = {
    "llhttp takes several spaces around a target, as RFC 9112 section 3 allows": re.compile(
        rb"[A-Z]  +[!-~]|[!-~]  +HTTP/"
    ).search,
    "llhttp skips empty lines before a request, as RFC 9112 section 2.2 wants": re.compile(rb"\A[\r\n]|\n\r?\n\r?\n").search,
    "llhttp takes the protocol names RTSP and ICE": re.compile(rb" (?:RTSP|ICE)/").search,
    "h11 refuses a chunk size of more than 20 digits": re.compile(rb"(?i)\r\n0[0-9a-f]{20}").search,
    "h11 refuses a length of more than 20 digits": re.compile(rb"(?i)content-length:\s*0[0-9]{20}").search,
}
"""What h11 refuses and we take: nothing but these."""


def normal(request: Seen) -> Seen:
    """As h11 gives it: methods as they are, the coding in lower case."""
    lower = ((name, value.lower() if name == b"transfer-encoding" else value) for name, value in request.headers)
    return request._replace(headers=tuple(lower))


@given(st.lists(requests(), min_size=1, max_size=3))
@SLOWLY
def test_valid_requests_are_to_h11_what_they_are_to_us(made: list[tuple[Seen, bytes]]) -> None:
    data = b"".join(data for _, data in made)
    assert opinion(data) == (seen([data], later=False), "incomplete")


@given(originals, st.lists(changes, max_size=3))
@settings(SLOWLY, max_examples=400)
def test_what_h11_refuses_we_refuse(data: bytes, made: Changes) -> None:
    assert_agreed(changed(data, made))


def test_h11_has_no_other_opinion_of_the_corpus() -> None:
    for row in (*REFUSALS.values(), *(one.data for one in (*corpus.HANDLED.values(), *corpus.OPEN.values()))):
        assert_agreed(row)


def assert_agreed(data: bytes) -> None:
    """Where both take a request, it is the same one; we take none that h11 does not."""
    ours, (theirs, _) = seen([data], later=False), opinion(data)
    if any(applies(data) for applies in DIFFERENCES.values()):
        return
    assert [normal(one) for one in ours] == [normal(one) for one in theirs[: len(ours)]]
