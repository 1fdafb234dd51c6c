"""Header fields as they came, which become twisted's mapping only if somebody asks for that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from twisted.web.http_headers import Headers

Pairs = list[tuple[bytes, bytes]]


class RawHeaders(Headers):
    """Twisted's Headers around (lower-case name, value) pairs in their order on the wire.

    ``pairs`` and ``last`` (each name with its last value) are for reading alone: what is changed through
    the methods of Headers is seen by those methods only.
    """

    __slots__ = ("_made", "last", "pairs")

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs
        self.last = dict(pairs)
        self._made: dict[bytes, list[bytes]] | None = None

    @property
    def _rawHeaders(self) -> dict[bytes, list[bytes]]:  # type: ignore[override]  # the one attribute that all of Headers stands on
        if self._made is None:
            made = Headers()
            for name, value in self.pairs:
                made.addRawHeader(name, value)
            self._made = made._rawHeaders
        return self._made

    def getAllRawHeaders(self) -> Iterator[tuple[bytes, Sequence[bytes]]]:
        """Field by field as they came; a name that came twice comes twice."""
        if self._made is None:
            return iter([(name, (value,)) for name, value in self.pairs])
        return super().getAllRawHeaders()


def pairs_of(headers: Headers) -> Pairs:
    """(lower-case name, value) of every field."""
    if isinstance(headers, RawHeaders):
        return headers.pairs
    return [(name.lower(), value) for name, values in headers.getAllRawHeaders() for value in values]


def last_of(headers: Headers) -> dict[bytes, bytes]:
    """Lower-case name to the last value of each field."""
    return headers.last if isinstance(headers, RawHeaders) else dict(pairs_of(headers))
