"""Fuzzes the server's channel: ``python -m tests.fuzz.fuzz_server``, or ``make fuzz``."""

from __future__ import annotations

import atheris

with atheris.instrument_imports(include=["gateway"]):
    import gateway.net.channel
    import gateway.net.server  # noqa: F401  # instrumented here, used by Dialog

from .. import corpus
from ..dialogs import Dialog
from ..test_fuzz_channel import assert_consistent, opinion
from .harness import pieces, run


def one(data: bytes) -> None:
    """Whatever comes, the channel is consistent with itself, however it is cut, and takes nothing that h11 takes otherwise."""
    cut = pieces(data)
    with Dialog(later=bool(data and data[0] & 1)) as dialog:
        dialog.send(*cut)
    assert_consistent(dialog)
    with Dialog() as whole:
        whole.send(b"".join(cut))
    assert whole.seen == dialog.seen
    theirs = opinion(b"".join(cut))[0]
    for ours, other in zip(dialog.seen, theirs, strict=False):
        assert (ours.method, ours.target, ours.body) == (other.method, other.target, other.body)


def seeds() -> list[bytes]:
    """Each row of the corpus, once whole and once in small pieces."""
    rows = [row for rows in corpus.REFUSED.values() for row in rows.values()]
    rows += [row.data for row in (*corpus.HANDLED.values(), *corpus.OPEN.values())]
    return [first + row for row in rows if len(row) < 4096 for first in (b"\xff", b"\x05")]


if __name__ == "__main__":
    run(one, seeds())
