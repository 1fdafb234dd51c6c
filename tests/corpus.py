"""What clients may put on the wire: requests that are refused, requests that are not, and what holds for each.

The names are those of RFC 9112 (HTTP/1.1) and RFC 9110 (HTTP) where these have one.
"""

from __future__ import annotations

from typing import Final, NamedTuple

PATH: Final = b"/v1/chat/completions"


def asking(content: bytes) -> bytes:
    """The body of a chat completion request."""
    return b'{"messages":[{"role":"user","content":"%b"}]}' % content


BODY: Final = asking(b"hello")
SMUGGLED: Final = asking(b"smuggled")


def head(*lines: bytes, first: bytes = b"POST %b HTTP/1.1" % PATH, host: bytes = b"Host: g") -> bytes:
    """A request line and headers."""
    return b"\r\n".join([first, *([host] if host else []), *lines, b"", b""])


def get(*lines: bytes, target: bytes = b"/healthz", host: bytes = b"Host: g") -> bytes:
    return head(*lines, first=b"GET %b HTTP/1.1" % target, host=host)


def post(*lines: bytes, body: bytes = BODY) -> bytes:
    return head(b"Content-Length: %d" % len(body), *lines) + body


def sized(length: bytes, body: bytes = BODY) -> bytes:
    """A request whose Content-Length is as given, after the colon."""
    return head(b"Content-Length:" + length) + body


def encoded(*codings: bytes, lines: tuple[bytes, ...] = ()) -> bytes:
    """A request with these Transfer-Encoding lines, as given after the colon, and a chunked body."""
    return head(*lines, *(b"Transfer-Encoding:" + coding for coding in codings)) + chunks(BODY)


def chunks(body: bytes, trailer: bytes = b"") -> bytes:
    """The body as one chunk and the last."""
    return b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(body), body, trailer)


def chunked(body: bytes, *lines: bytes) -> bytes:
    """A chunked request with a body as given, chunk sizes and all."""
    return head(b"Transfer-Encoding: chunked", *lines) + body


def chunk_of(size: bytes, end: bytes = b"\r\n") -> bytes:
    """A request whose chunk-size line is as given, without its line end."""
    return chunked(size + end + BODY + b"\r\n0\r\n\r\n")


def trailed(*lines: bytes) -> bytes:
    """A chunked request with trailers."""
    return chunked(chunks(BODY, b"".join(line + b"\r\n" for line in lines)))


SMUGGLED_POST: Final = post(b"Connection: close", body=SMUGGLED)
SIZE: Final = b"%x" % len(BODY)
LENGTH: Final = b"%d" % len(BODY)

MAX_BODY: Final = 64 * 1024
"""The limit that the rows assume."""

OVER: Final = b" " * (MAX_BODY + 1)

# --- refused: one 4xx, the connection closed, nothing behind it taken for a request ---------------

LENGTHS: Final = {
    "two lengths that differ": head(b"Content-Length: " + LENGTH, b"Content-Length: 3") + BODY,
    "two lengths that differ, the smaller first": head(b"Content-Length: 3", b"Content-Length: " + LENGTH) + BODY,
    "two lengths that are equal": head(b"Content-Length: " + LENGTH, b"Content-Length: " + LENGTH) + BODY,
    "a list of equal lengths": sized(b" %b, %b" % (LENGTH, LENGTH)),
    "a list of lengths that differ": sized(b" %b, 3" % LENGTH),
    "a list with a comma too many": sized(b" %b," % LENGTH),
    "a length with a plus": sized(b" +" + LENGTH),
    "a negative length": sized(b" -" + LENGTH),
    "a negative zero": sized(b" -0"),
    "a hexadecimal length": sized(b" 0x2d"),
    "a length with hexadecimal digits": sized(b" 2d"),
    "a length with a space in it": sized(b" 4 5"),
    "a length with a parameter": sized(b" %b;x=1" % LENGTH),
    "a length in quotes": sized(b' "%b"' % LENGTH),
    "a length with an exponent": sized(b" 1e1"),
    "a length with a fraction": sized(b" 45.0"),
    "a length with an underscore": sized(b" 4_5"),
    "an empty length": sized(b""),
    "a blank length": sized(b" \t "),
    "a length behind a vertical tab": sized(b" \x0b" + LENGTH),
    "a length before a form feed": sized(b" %b\x0c" % LENGTH),
    "a length before a NUL": sized(b" %b\x00" % LENGTH),
    "a length in other digits": sized(" \u0664\u0665".encode()),
    "a length in superscript": sized(b" \xb2\xb3"),
    "a length of 2^64": sized(b" 18446744073709551616"),
    "a length of 2^64 and the body's": sized(b" 18446744073709551661"),
    "a length of 2^63": sized(b" 9223372036854775808"),
    "a length without end": sized(b" " + b"9" * 5000),
    "a length of many zeros": sized(b" " + b"0" * 5000 + LENGTH),
    "a space before the colon of a length": head(b"Content-Length : " + LENGTH) + BODY,
    "a tab before the colon of a length": head(b"Content-Length\t: " + LENGTH) + BODY,
    "a folded length": head(b"Content-Length:\r\n " + LENGTH) + BODY,
    "a length that goes on in the next line": head(b"Content-Length: 4\r\n 5") + BODY,
    "a length that is not a number in HTTP/1.0": head(b"Content-Length: x", first=b"POST %b HTTP/1.0" % PATH) + BODY,
}

_BOTH: Final = (b"Content-Length: " + LENGTH,)

CODINGS: Final = {
    "a length and chunked": encoded(b" chunked", lines=_BOTH),
    "a length of zero and chunked": encoded(b" chunked", lines=(b"Content-Length: 0",)),
    "a length to the next request and chunked": encoded(b" chunked", lines=(b"Content-Length: 4",)),
    "chunked and a length": head(b"Transfer-Encoding: chunked", *_BOTH) + chunks(BODY),
    "a length and a coding that nobody knows": encoded(b" xchunked", lines=_BOTH),
    "a length and identity": encoded(b" identity", lines=_BOTH),
    "a length and an empty coding": encoded(b"", lines=_BOTH),
    "a length, and a coding behind a space": head(*_BOTH, b"Transfer-Encoding : chunked") + chunks(BODY),
    "a length, and a coding after a bare CR": head(*_BOTH, b"X: y\rTransfer-Encoding: chunked") + chunks(BODY),
    "a length, and a coding after a bare LF": head(*_BOTH, b"X: y\nTransfer-Encoding: chunked") + chunks(BODY),
    "a length, and a coding after a folded line": head(*_BOTH, b"X:\r\n Transfer-Encoding: chunked") + chunks(BODY),
    "a length, and a coding with a NUL in its name": head(*_BOTH, b"Transfer-Encoding\x00: chunked") + chunks(BODY),
    "a length, and a coding with a byte before its name": head(*_BOTH, b"\xffTransfer-Encoding: chunked") + chunks(BODY),
    "gzip, chunked": encoded(b" gzip, chunked"),
    "gzip": encoded(b" gzip"),
    "identity": encoded(b" identity"),
    "identity, chunked": encoded(b" identity, chunked"),
    "chunked, identity": encoded(b" chunked, identity"),
    "chunked, chunked": encoded(b" chunked, chunked"),
    "chunked, gzip": encoded(b" chunked, gzip"),
    "xchunked": encoded(b" xchunked"),
    "chunkedx": encoded(b" chunkedx"),
    "chunke": encoded(b" chunke"),
    "chunked in quotes": encoded(b' "chunked"'),
    "chunked in other quotes": encoded(b" 'chunked'"),
    "chunked with a parameter": encoded(b" chunked;q=1"),
    "chunked before a comma": encoded(b" chunked,"),
    "chunked behind a comma": encoded(b" ,chunked"),
    "chunked in two words": encoded(b" chun ked"),
    "chunked behind a vertical tab": encoded(b"\x0bchunked"),
    "chunked behind a form feed": encoded(b"\x0cchunked"),
    "chunked before a vertical tab": encoded(b" chunked\x0b"),
    "chunked before a NUL": encoded(b" chunked\x00"),
    "chunked behind a byte of Latin-1": encoded(b"\xa0chunked"),
    "chunked before a byte of Latin-1": encoded(b" chunked\x85"),
    "chunked with a long s": encoded(" c\u017funked".encode()),
    "an empty coding": encoded(b""),
    "a coding of one comma": encoded(b" ,"),
    "chunked twice": encoded(b" chunked", b" chunked"),
    "identity in one line and chunked in the next": encoded(b" identity", b" chunked"),
    "chunked in one line and identity in the next": encoded(b" chunked", b" identity"),
    "gzip in one line and chunked in the next": encoded(b" gzip", b" chunked"),
    "chunked in one line and an empty one in the next": encoded(b" chunked", b""),
    "a folded coding": encoded(b"\r\n chunked"),
    "a coding that goes on in the next line": encoded(b" chunked\r\n , identity"),
    "a coding with a space before the colon": head(b"Transfer-Encoding : chunked") + chunks(BODY),
    "chunked in HTTP/1.0": head(b"Transfer-Encoding: chunked", first=b"POST %b HTTP/1.0" % PATH) + chunks(BODY),
    "chunked and a length in HTTP/1.0": head(*_BOTH, b"Transfer-Encoding: chunked", first=b"POST %b HTTP/1.0" % PATH)
    + chunks(BODY),
}

CHUNKS: Final = {
    "a chunk size that is no number": chunk_of(b"zz"),
    "an empty chunk size": chunk_of(b""),
    "a negative chunk size": chunk_of(b"-" + SIZE),
    "a negative last chunk": chunked(b"-0\r\n\r\n"),
    "a chunk size with a plus": chunk_of(b"+" + SIZE),
    "a chunk size with 0x": chunk_of(b"0x" + SIZE),
    "a chunk size with an underscore": chunk_of(b"2_d"),
    "a chunk size with a space before it": chunk_of(b" " + SIZE),
    "a chunk size with a tab before it": chunk_of(b"\t" + SIZE),
    "a chunk size with a space in it": chunk_of(b"2 d"),
    "a chunk size with a space behind it": chunk_of(SIZE + b" "),
    "a chunk size with a tab behind it": chunk_of(SIZE + b"\t"),
    "a chunk size with a NUL behind it": chunk_of(SIZE + b"\x00"),
    "a chunk size with a vertical tab behind it": chunk_of(SIZE + b"\x0b"),
    "a chunk size with a CR behind it": chunk_of(SIZE + b"\r"),
    "a chunk size in other digits": chunk_of("\u0664\u0665".encode()),
    "a chunk size with a comma": chunk_of(SIZE + b",2d"),
    "a chunk extension without a size": chunk_of(b";x=y"),
    "a chunk size of 17 digits": chunk_of(b"10000000000000000"),
    "a chunk size of 17 digits that wraps": chunk_of(b"1" + SIZE.rjust(16, b"0")),
    "a chunk size of 16 digits": chunk_of(b"f" * 16) + OVER,
    "a chunk size of 2^63": chunk_of(b"8" + b"0" * 15) + OVER,
    "a chunk size of 8 digits": chunk_of(b"f" * 8) + OVER,
    "a chunk size line that is too long": chunk_of(b"0" * 100_000),
    "a chunk size line without end": chunked(b"0" * 100_000),
    "a chunk extension that is too long": chunk_of(SIZE + b";x=" + b"y" * 100_000),
    "chunk extensions that are too long together": chunked(b"".join(b"1;%b\r\n \r\n" % (b"x" * 1000) for _ in range(200))),
    "a bare LF after a chunk size": chunk_of(SIZE, b"\n"),
    "a bare LF in a chunk extension": chunk_of(SIZE + b";x\n"),
    "a bare LF in a chunk extension, and a request behind it": chunked(b"2;\nxx\r\n4c\r\n0\r\n\r\n"),
    "a bare CR in a chunk extension": chunk_of(SIZE + b";x\ry"),
    "a NUL in a chunk extension": chunk_of(SIZE + b";x=\x00"),
    "chunk data that is longer than its size": chunked(b"3\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk data without a line end": chunked(SIZE + b"\r\n" + BODY + b"0\r\n\r\n"),
    "chunk data that ends with a bare LF": chunked(SIZE + b"\r\n" + BODY + b"\n0\r\n\r\n"),
    "chunk data that ends with a bare CR": chunked(SIZE + b"\r\n" + BODY + b"\r0\r\n\r\n"),
    "chunk data that ends with two bytes that are no line end": chunked(SIZE + b"\r\n" + BODY + b"XX0\r\n\r\n"),
    "a last chunk with a bare LF": chunked(SIZE + b"\r\n" + BODY + b"\r\n0\n\n"),
    "a last chunk with 0x": chunked(SIZE + b"\r\n" + BODY + b"\r\n0x0\r\n\r\n"),
    "a trailer without a colon": trailed(b"oops"),
    "a trailer with a space before its colon": trailed(b"X : y"),
    "a trailer with a NUL": trailed(b"X: a\x00b"),
    "a trailer with a bare CR": trailed(b"X: a\rb"),
    "a trailer with a bare LF": trailed(b"X: a\nY: b"),
    "a trailer that is folded": trailed(b"X: a", b" b"),
    "a trailer without a name": trailed(b": y"),
    "a trailer section that begins with a space": trailed(b" X: y"),
    "trailers that are too long": trailed(b"X: " + b"y" * 100_000),
    "trailers that are too many": trailed(*(b"X-%d: y" % number for number in range(150))),
    "trailers that are too long together": trailed(*(b"X-%d: %b" % (number, b"y" * 4000) for number in range(20))),
}

REQUEST_LINES: Final = {
    "a request line without a version": b"GET /healthz\r\n\r\n",
    "HTTP/0.9": b"GET /healthz\r\nHost: g\r\n\r\n",
    "a request line of one word": b"GET\r\nHost: g\r\n\r\n",
    "a request line without a method": b"/healthz HTTP/1.1\r\nHost: g\r\n\r\n",
    "a request line without a target": b"GET HTTP/1.1\r\nHost: g\r\n\r\n",
    "an empty target": b"GET  HTTP/1.1\r\nHost: g\r\n\r\n",
    "a tab before the target": b"GET\t/healthz HTTP/1.1\r\nHost: g\r\n\r\n",
    "a tab behind the target": b"GET /healthz\tHTTP/1.1\r\nHost: g\r\n\r\n",
    "a space before the method": b" GET /healthz HTTP/1.1\r\nHost: g\r\n\r\n",
    "a space behind the version": b"GET /healthz HTTP/1.1 \r\nHost: g\r\n\r\n",
    "a word behind the version": b"GET /healthz HTTP/1.1 x\r\nHost: g\r\n\r\n",
    "a space in the target": b"GET /health z HTTP/1.1\r\nHost: g\r\n\r\n",
    "a method in lower case": b"get /healthz HTTP/1.1\r\nHost: g\r\n\r\n",
    "a method in mixed case": b"Get /healthz HTTP/1.1\r\nHost: g\r\n\r\n",
    "a method that is too long": b"A" * 100_000 + b" /healthz HTTP/1.1\r\nHost: g\r\n\r\n",
    "a method without end": b"A" * 100_000,
    "a method with a NUL": b"GE\x00T /healthz HTTP/1.1\r\nHost: g\r\n\r\n",
    "a method that is no token": b"GE(T /healthz HTTP/1.1\r\nHost: g\r\n\r\n",
    "a NUL before the method": b"\x00GET /healthz HTTP/1.1\r\nHost: g\r\n\r\n",
    "a byte order mark": b"\xef\xbb\xbfGET /healthz HTTP/1.1\r\nHost: g\r\n\r\n",
    "a bare LF after the request line": b"GET /healthz HTTP/1.1\nHost: g\r\n\r\n",
    "a bare LF after every line": b"GET /healthz HTTP/1.1\nHost: g\n\n",
    "a bare CR after the request line": b"GET /healthz HTTP/1.1\rHost: g\r\n\r\n",
    "a bare CR after every line": b"GET /healthz HTTP/1.1\rHost: g\r\r",
    "two CR after the request line": b"GET /healthz HTTP/1.1\r\r\nHost: g\r\n\r\n",
    **{
        "the version " + version.decode(): b"GET /healthz %b\r\nHost: g\r\n\r\n" % version
        for version in (
            *b"HTTP/1.2 HTTP/2.0 HTTP/2 HTTP/3.0 HTTP/0.9 HTTP/0.0 HTTP/1 HTTP/1. HTTP/.1 HTTP/11 HTTP/1.10".split(),
            *b"HTTP/01.1 HTTP/1.01 HTTP/1.1x HTTP/1,1 HTTP/1.1.1 HTTP/-1.1 HTTP/+1.1 HTTP/a.b HTTP/9.9".split(),
            *b"http/1.1 Http/1.1 HTTPS/1.1 HTTP1.1 HTTP\\1.1 XTTP/1.1 HTTP/ ICY/1.1".split(),
        )
    },
    "a version in two words": b"GET /healthz HTTP /1.1\r\nHost: g\r\n\r\n",
    "RTSP": b"DESCRIBE /healthz RTSP/1.0\r\nHost: g\r\n\r\n",
    "Icecast": b"SOURCE /healthz ICE/1.0\r\nHost: g\r\n\r\n",
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "the preface of HTTP/2 with a host": b"PRI * HTTP/1.1\r\nHost: g\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(32)),
    "TLS with a line end": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\r\n\r\n",
    "SSH": b"SSH-2.0-OpenSSH_9.6\r\n",
    "the PROXY protocol": b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n" + get(),
    "the PROXY protocol, version 2": b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\xc0\x00\x02\x01\xc0\x00\x02\x02\x00\x01\x00\x02",
    "an answer": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "CONNECT": b"CONNECT g:443 HTTP/1.1\r\nHost: g:443\r\n\r\n",
    "CONNECT with a body": b"CONNECT g:443 HTTP/1.1\r\nHost: g:443\r\nContent-Length: %b\r\n\r\n" % LENGTH + BODY,
    "CONNECT to a route": b"CONNECT %b HTTP/1.1\r\nHost: g\r\n\r\n" % PATH,
}

TARGETS: Final = {
    "the target " + target.decode("latin-1").encode("unicode_escape").decode()[:40]: get(target=target)
    for target in (
        b"g:80",  # authority-form
        b"healthz",
        b"*",  # asterisk-form is for OPTIONS
        b"?x",
        b"/healthz#x",
        b"/healthz\x00",
        b"/healthz\x01",
        b"/healthz\x0b",
        b"/healthz\x1f",
        b"/healthz\x7f",
        b"/healthz\x80",
        b"/healthz\r",
        b"/healthz\n",
        b"/healthz\xff",
        b"/caf\xc3\xa9",
        b"/%ff%fe",
        b"/" + b"x" * 100_000,
        b"/?" + b"x" * 100_000,
    )
} | {"a target without end": b"GET /" + b"x" * 100_000}

HOSTS: Final = {
    "no host": get(host=b""),
    "two hosts": get(b"Host: h"),
    "two equal hosts": get(b"Host: g"),
    "two hosts in HTTP/1.0": b"GET /healthz HTTP/1.0\r\nHost: g\r\nHost: h\r\n\r\n",
    "an absolute target and no host": get(target=b"http://g/healthz", host=b""),
    "an absolute target and two hosts": get(b"Host: g", target=b"http://g/healthz"),
    **{
        "the host " + host.decode("latin-1").encode("unicode_escape").decode(): get(host=b"Host: " + host)
        for host in (b"a b", b"a/b", b"a?b", b"a#b", b"a@b", b"a\\b", b"a\tb", b"a\x00b", b"a\x7fb", b"\xff", b"http://g")
    },
    "a host with a port that is no number": get(host=b"Host: g:x"),
    "a host with two ports": get(host=b"Host: g:80:80"),
    "a host with half a bracket": get(host=b"Host: [::1"),
    "a host with a space before its colon": get(host=b"Host : g"),
    "a folded host": get(host=b"Host:\r\n g"),
    "a host behind a space": get(host=b" Host: g"),
    "a host in a folded line": get(b" Host: h", host=b"Host: g"),
}

_NOT_A_NAME: Final = b'"(),/;<=>?@[\\]{} \t\x00\x01\x08\x0b\x1f\x7f\x80\xff'
_NOT_A_VALUE: Final = bytes([*range(9), *range(0x0B, 0x0D), *range(0x0E, 0x20), 0x7F])

HEADERS: Final = {
    "a line without a colon": get(b"oops"),
    "a line without a colon, the last": get(b"X: y", b"oops"),
    "a header without a name": get(b": y"),
    "a header of one colon": get(b":"),
    "a space before the colon": get(b"X : y"),
    "a tab before the colon": get(b"X\t: y"),
    "a space before the first header": get(host=b" X: y\r\nHost: g"),
    "a tab before the first header": get(host=b"\tX: y\r\nHost: g"),
    "a blank line that is not empty": get(b" ", b"X: y"),
    "obs-fold": get(b"X: a", b" b"),
    "obs-fold with a tab": get(b"X: a", b"\tb"),
    "obs-fold of an empty line": get(b"X: a", b" "),
    "a bare CR in a value": get(b"X: a\rb"),
    "a bare CR at the end of a value": get(b"X: a\r"),
    "a bare CR in a name": get(b"X\rY: a"),
    "a bare CR before a name": get(b"\rX: a"),
    "a bare LF in a value": get(b"X: a\nY: b"),
    "a bare LF after a line": get(b"X: a\nY: b", b"Z: c"),
    "a bare LF before the end of the headers": b"GET /healthz HTTP/1.1\r\nHost: g\r\n\n",
    "a bare LF at the end of the headers": b"GET /healthz HTTP/1.1\r\nHost: g\n\r\n",
    "a bare CR at the end of the headers": b"GET /healthz HTTP/1.1\r\nHost: g\r\n\rX",
    **{f"byte 0x{byte:02x} in a name": get(b"X%cY: z" % byte) for byte in _NOT_A_NAME},
    **{f"byte 0x{byte:02x} in a value": get(b"X: a%cb" % byte) for byte in _NOT_A_VALUE},
    "a name that is too long": get(b"X" * 100_000 + b": y"),
    "a name without end": b"GET /healthz HTTP/1.1\r\nHost: g\r\n" + b"X" * 100_000,
    "a value that is too long": get(b"X: " + b"y" * 100_000),
    "a value without end": b"GET /healthz HTTP/1.1\r\nHost: g\r\nX: " + b"y" * 100_000,
    "a value of endless spaces": b"GET /healthz HTTP/1.1\r\nHost: g\r\nX: " + b" " * 100_000,
    "too many headers": get(*(b"X-%d: y" % number for number in range(150))),
    "headers that are too long together": get(*(b"X-%d: %b" % (number, b"y" * 4000) for number in range(20))),
}

REFUSED: Final = {
    "lengths": LENGTHS,
    "codings": CODINGS,
    "chunks": CHUNKS,
    "request lines": REQUEST_LINES,
    "targets": TARGETS,
    "hosts": HOSTS,
    "headers": HEADERS,
}

# --- handled: an answer for each request, and the next request on the connection gets its own -----


class Handled(NamedTuple):
    """``answers``: statuses; ``bodies``: what a backend gets; ``closes``: nothing behind these bytes is taken for a request.

    ``passed``: headers that go on to a backend; every other one stays. ``methods``: of the requests, where one is HEAD.
    """

    data: bytes
    answers: tuple[int, ...] = (200,)
    bodies: tuple[bytes, ...] = (BODY,)
    closes: bool = False
    passed: tuple[tuple[bytes, bytes], ...] = ()
    methods: tuple[bytes, ...] = ()


def _old(*lines: bytes) -> bytes:
    return head(b"Content-Length: " + LENGTH, *lines, first=b"POST %b HTTP/1.0" % PATH) + BODY


ONE, TWO, THREE = asking(b"one"), asking(b"two"), asking(b"three")
_UPGRADE = (b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13", b"Sec-WebSocket-Key: AA==")
_WEBSOCKET = ((b"sec-websocket-version", b"13"), (b"sec-websocket-key", b"AA=="))
_H2C = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA")

HANDLED: Final = {
    "a length": Handled(post()),
    "a length with zeros before it": Handled(sized(b" 00" + LENGTH)),
    "a length without a space": Handled(sized(LENGTH)),
    "a length between blanks": Handled(sized(b" \t %b \t " % LENGTH)),
    "a length in HTTP/1.0": Handled(_old(), closes=True),
    "a length that hides a request": Handled(post(body=SMUGGLED_POST), answers=(400,), bodies=()),
    "chunked": Handled(chunked(chunks(BODY))),
    "chunked in capitals": Handled(encoded(b" CHUNKED")),
    "chunked without a space": Handled(encoded(b"chunked")),
    "a chunk a byte": Handled(chunked(b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n")),
    "a chunk size in capitals": Handled(chunk_of(SIZE.upper())),
    "a chunk size with zeros before it": Handled(chunk_of(b"000" + SIZE)),
    "a last chunk of many zeros": Handled(chunked(SIZE + b"\r\n" + BODY + b"\r\n000\r\n\r\n")),
    "a chunk extension": Handled(chunk_of(SIZE + b";x=y")),
    "a chunk extension in quotes": Handled(chunk_of(SIZE + b';x="y z"')),
    "a chunk extension without a value": Handled(chunk_of(SIZE + b";x")),
    "a chunk extension at the last chunk": Handled(chunked(SIZE + b"\r\n" + BODY + b"\r\n0;x=y\r\n\r\n")),
    "chunks that hide a request": Handled(chunked(chunks(SMUGGLED_POST)), answers=(400,), bodies=()),
    "a trailer": Handled(trailed(b"X-Trailer: y")),
    "trailers": Handled(trailed(b"X-Trailer: y", b"X-Request-ID: from-a-trailer", b"Digest: z")),
    "a trailer that was announced": Handled(chunked(chunks(BODY, b"X-Trailer: y\r\n"), b"Trailer: X-Trailer")),
    "a trailer that hides a credential": Handled(trailed(b"X-Forwarded-For: 192.0.2.1", b"Authorization: Bearer x")),
    "an empty line before the request": Handled(b"\r\n" + post()),
    "an empty line between requests": Handled(post(body=ONE) + b"\r\n" + post(body=TWO), (200, 200), (ONE, TWO)),
    "an empty line between chunked requests": Handled(
        chunked(chunks(ONE)) + b"\r\n" + chunked(chunks(TWO)), (200, 200), (ONE, TWO)
    ),
    "requests in one piece": Handled(post(body=ONE) + post(body=TWO) + post(body=THREE), (200,) * 3, (ONE, TWO, THREE)),
    "chunked requests in one piece": Handled(
        chunked(chunks(ONE)) + post(body=TWO) + chunked(chunks(THREE)), (200,) * 3, (ONE, TWO, THREE)
    ),
    "trailers between requests": Handled(trailed(b"X-Trailer: y") + post(body=TWO), (200, 200), (BODY, TWO)),
    "requests for other things in between": Handled(
        post(body=ONE) + get() + get(target=b"/nope") + post(body=TWO) + get(), (200, 200, 404, 200, 200), (ONE, TWO)
    ),
    "a refusal behind requests": Handled(
        post(body=ONE) + post(body=TWO) + sized(b" x") + post(body=THREE), (200, 200, 400), (ONE, TWO), closes=True
    ),
    "a refused chunk behind a request": Handled(post(body=ONE) + chunk_of(b"zz"), (200, 400), (ONE,), closes=True),
    "a refused method behind a request": Handled(post(body=ONE) + b"\x00\x00\x00\r\n\r\n", (200, 400), (ONE,), closes=True),
    "close": Handled(post(b"Connection: close"), closes=True),
    "close in capitals": Handled(post(b"Connection: CLOSE"), closes=True),
    "close in a list": Handled(post(b"Connection: x, close"), closes=True),
    "close in a second line": Handled(post(b"Connection: keep-alive", b"Connection: close"), closes=True),
    "close between requests": Handled(post(b"Connection: close", body=ONE) + post(body=TWO), (200,), (ONE,), closes=True),
    "close in a chunked request": Handled(chunked(chunks(BODY), b"Connection: close"), closes=True),
    "close in a trailer": Handled(trailed(b"Connection: close"), closes=True),
    "an upgrade in a trailer": Handled(trailed(b"Connection: upgrade", b"Upgrade: websocket"), closes=True),
    "closed": Handled(post(b"Connection: closed")),
    "keep-alive": Handled(post(b"Connection: keep-alive", b"Keep-Alive: timeout=5")),
    "keep-alive in HTTP/1.0": Handled(_old(b"Connection: keep-alive") + SMUGGLED_POST, closes=True),
    "HTTP/1.0 without a host": Handled(b"GET /healthz HTTP/1.0\r\n\r\n", bodies=(), closes=True),
    "HTTP/1.0 with a host": Handled(b"GET /healthz HTTP/1.0\r\nHost: g\r\n\r\n", bodies=(), closes=True),
    "Connection names a header": Handled(post(b"Connection: X-One", b"X-One: 1", b"X-Two: 2"), passed=((b"x-two", b"2"),)),
    "Connection names headers of the message": Handled(post(b"Connection: Content-Length, Host, Content-Type")),
    "headers that concern one connection": Handled(
        post(b"TE: trailers", b"Connection: TE", b"Proxy-Authorization: x", b"Proxy-Connection: y", b"Trailer: X-T")
    ),
    "Upgrade to WebSocket": Handled(post(*_UPGRADE), passed=_WEBSOCKET),
    "Upgrade to WebSocket of a GET": Handled(get(*_UPGRADE), bodies=()),
    "Upgrade to WebSocket, and requests behind it": Handled(
        post(*_UPGRADE, body=ONE) + post(body=TWO), (200, 200), (ONE, TWO), passed=_WEBSOCKET
    ),
    "Upgrade of a GET, and requests behind it": Handled(get(*_UPGRADE) + post(), (200, 200)),
    "Upgrade of a chunked request": Handled(
        chunked(chunks(BODY), *_UPGRADE) + post(body=TWO), (200, 200), (BODY, TWO), passed=_WEBSOCKET
    ),
    "Upgrade to HTTP/2": Handled(post(*_H2C)),
    "Upgrade of a GET to HTTP/2, and requests behind it": Handled(get(*_H2C) + post(), (200, 200)),
    "Upgrade without Connection": Handled(post(b"Upgrade: websocket") + post(body=TWO), (200, 200), (BODY, TWO)),
    "Connection: upgrade without Upgrade": Handled(post(b"Connection: upgrade") + post(body=TWO), (200, 200), (BODY, TWO)),
    "Expect": Handled(post(b"Expect: 100-continue")),
    "Expect in capitals": Handled(post(b"Expect: 100-CONTINUE")),
    "Expect with a chunked body": Handled(chunked(chunks(BODY), b"Expect: 100-continue")),
    "Expect without a body": Handled(get(b"Expect: 100-continue"), bodies=()),
    "Expect in HTTP/1.0": Handled(_old(b"Expect: 100-continue"), closes=True),
    "Expect between requests": Handled(
        post(body=ONE) + post(b"Expect: 100-continue", body=TWO) + post(body=THREE), (200,) * 3, (ONE, TWO, THREE)
    ),
    "an absolute target": Handled(get(target=b"http://g/healthz"), bodies=()),
    "an absolute target and another host": Handled(get(target=b"http://other/healthz"), bodies=()),
    "an absolute target in capitals": Handled(get(target=b"HTTP://G/healthz"), bodies=()),
    "an absolute target with a query": Handled(get(target=b"http://g:80/healthz?x=http://h/nope"), bodies=()),
    "an absolute target without a path": Handled(get(target=b"http://g"), answers=(404,), bodies=()),
    "an absolute target of a POST": Handled(
        head(b"Content-Length: " + LENGTH, first=b"POST http://other%b HTTP/1.1" % PATH) + BODY
    ),
    "OPTIONS *": Handled(head(first=b"OPTIONS * HTTP/1.1"), answers=(404,), bodies=()),
    "a query": Handled(get(target=b"/healthz?a=b&c"), bodies=()),
    "a NUL in percent encoding": Handled(get(target=b"/%00"), answers=(404,), bodies=()),
    "a line end in percent encoding": Handled(get(target=b"/%0d%0aX:%20y"), answers=(404,), bodies=()),
    "an unknown route": Handled(get(target=b"/smuggled"), answers=(404,), bodies=()),
    "a host with a port": Handled(get(host=b"Host: g:8080"), bodies=()),
    "a host that is an IPv6 address": Handled(get(host=b"Host: [::1]:8080"), bodies=()),
    "a host in capitals, without a space": Handled(get(host=b"HOST:g"), bodies=()),
    "HEAD": Handled(head(first=b"HEAD /healthz HTTP/1.1"), bodies=(), methods=(b"HEAD",)),
    "HEAD between requests": Handled(
        post(body=ONE) + head(first=b"HEAD /healthz HTTP/1.1") + post(body=TWO),
        answers=(200,) * 3,
        bodies=(ONE, TWO),
        methods=(b"POST", b"HEAD", b"POST"),
    ),
    "TRACE": Handled(head(b"X-Secret: x", first=b"TRACE /healthz HTTP/1.1"), answers=(405,), bodies=()),
    "a GET with a length": Handled(get(b"Content-Length: %d" % len(SMUGGLED_POST)) + SMUGGLED_POST, bodies=()),
    "a GET that is chunked": Handled(get(b"Transfer-Encoding: chunked") + chunks(SMUGGLED_POST), bodies=()),
    "a HEAD with a length": Handled(
        head(b"Content-Length: %d" % len(SMUGGLED_POST), first=b"HEAD /healthz HTTP/1.1") + SMUGGLED_POST,
        bodies=(),
        methods=(b"HEAD",),
    ),
    "a DELETE with a length": Handled(
        head(b"Content-Length: %d" % len(SMUGGLED_POST), first=b"DELETE /healthz HTTP/1.1") + SMUGGLED_POST, (405,), ()
    ),
    "a POST to an unknown route": Handled(head(b"Content-Length: " + LENGTH, first=b"POST /nope HTTP/1.1") + BODY, (404,), ()),
    "a GET without a length, and bytes behind it": Handled(get() + b"xyz\r\n\r\n", (200, 400), (), closes=True),
    "a GET without a length, and a request behind it": Handled(get() + post(), (200, 200)),
    "a POST without a length, and a request behind it": Handled(head() + post(body=TWO), (400, 200), (TWO,)),
    "a length of zero": Handled(head(b"Content-Length: 0") + post(body=TWO), (400, 200), (TWO,)),
    "an empty chunked body": Handled(chunked(b"0\r\n\r\n") + post(body=TWO), (400, 200), (TWO,)),
    "an empty value": Handled(post(b"X-Empty:"), passed=((b"x-empty", b""),)),
    "a value between blanks": Handled(post(b"X-Blank: \t y z \t "), passed=((b"x-blank", b"y z"),)),
    "a tab in a value": Handled(post(b"X-Tab: a\tb"), passed=((b"x-tab", b"a\tb"),)),
    "bytes over 0x7f in a value": Handled(post(b"X-Bytes: \x80\xa0\xff"), passed=((b"x-bytes", b"\x80\xa0\xff"),)),
    "every byte of a name": Handled(post(b"!#$%&'*+-.^`|~09AZaz: y"), passed=((b"!#$%&'*+-.^`|~09azaz", b"y"),)),
    "every byte of a value": Handled(post(b"X: " + bytes(range(33, 127))), passed=((b"x", bytes(range(33, 127))),)),
    "a header twice": Handled(post(b"X-Twice: a", b"X-Twice: b"), passed=((b"x-twice", b"a"), (b"x-twice", b"b"))),
    "as many headers as may be": Handled(get(*(b"X-%d: y" % number for number in range(99))), bodies=()),
    "a long value": Handled(post(b"X-Long: " + b"y" * 30_000), passed=((b"x-long", b"y" * 30_000),)),
    "a long target": Handled(get(target=b"/healthz?" + b"x" * 30_000), bodies=()),
}

# --- open: the standard lets a server do either; nothing behind these bytes is ever mistaken -------

OPEN: Final = {
    "two empty lines before the request": Handled(b"\r\n\r\n" + post()),
    "many empty lines before the request": Handled(b"\r\n" * 50 + post()),
    "a bare LF before the request": Handled(b"\n" + post()),
    "a blank before a chunk extension": Handled(chunk_of(SIZE + b" ;x=y")),
    "a blank in a chunk extension": Handled(chunk_of(SIZE + b"; x = y")),
    "a chunk extension of odd bytes": Handled(chunk_of(SIZE + b";\x80\x01=")),
    "an open quote in a chunk extension": Handled(chunk_of(SIZE + b';x="y')),
    "a chunk size of 17 digits, most of them zeros": Handled(chunk_of(SIZE.rjust(17, b"0"))),
    "a length of 20 digits, most of them zeros": Handled(sized(b" " + LENGTH.rjust(19, b"0"))),
    "chunked between blanks": Handled(encoded(b" \t chunked \t ")),
    "a length in a trailer": Handled(trailed(b"Content-Length: 3")),
    "a coding in a trailer": Handled(trailed(b"Transfer-Encoding: chunked")),
    "a host in a trailer": Handled(trailed(b"Host: other")),
    "an odd byte in a trailer": Handled(trailed(b"X: a\x01b")),
    "an unknown method": Handled(head(first=b"BREW /healthz HTTP/1.1"), answers=(405,), bodies=()),
    "an unknown expectation": Handled(post(b"Expect: 200-ok")),
    "two expectations": Handled(post(b"Expect: 100-continue, 200-ok")),
    "an empty expectation": Handled(post(b"Expect:")),
    "an empty host": Handled(get(host=b"Host:"), bodies=()),
    "a target of another scheme": Handled(get(target=b"ftp://g/healthz"), answers=(404,), bodies=()),
    "an absolute target with a user": Handled(get(target=b"http://user@g/healthz"), bodies=()),
    "a percent sign alone": Handled(get(target=b"/%zz"), answers=(404,), bodies=()),
    "bytes in a target that a URI has not": Handled(get(target=b'/"<>\\^`{|}'), answers=(404,), bodies=()),
    "names with an underscore": Handled(
        post(b"Transfer_Encoding: chunked", b"Content_Length: 3"),
        passed=((b"transfer_encoding", b"chunked"), (b"content_length", b"3")),
    ),
}
