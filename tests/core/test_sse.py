from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core import sse

LINE_ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])
TEXT = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=12).map(str.encode)


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[bytes | None]]:
    """A stream of whole events with one kind of line end each, and the data that each event carries."""
    raw = draw(st.sampled_from([b"", b"\xef\xbb\xbf"]))
    expected: list[bytes | None] = []
    for _ in range(draw(st.integers(0, 5))):
        end = draw(LINE_ENDS)
        values = []
        for kind in draw(st.lists(st.sampled_from(["data", "data-tight", "comment", "event", "bare"]), min_size=1, max_size=4)):
            value = draw(TEXT)
            if kind == "data":
                raw += b"data: " + value + end
                values.append(value)
            elif kind == "data-tight":
                raw += b"data:" + value + end
                values.append(value.removeprefix(b" "))
            elif kind == "comment":
                raw += b":" + value + end
            elif kind == "event":
                raw += b"event: " + value + end
            else:
                raw += b"data" + end
                values.append(b"")
        raw += end
        expected.append(b"\n".join(values) if values else None)
    return raw, expected


def fed(chunks: list[bytes]) -> tuple[list[sse.Event], bytes]:
    decoder = sse.Decoder()
    events = [event for chunk in chunks for event in decoder.feed(chunk)]
    return events, decoder.pending


@given(streams(), st.data())
def test_events_do_not_depend_on_how_the_bytes_are_split(stream: tuple[bytes, list[bytes | None]], data: st.DataObject) -> None:
    raw, expected = stream
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=6)))
    chunks = [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    events, pending = fed(chunks)
    assert [event.data for event in events] == expected
    assert b"".join(event.raw for event in events) + pending == raw


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_every_single_split_of_a_stream_gives_the_same_events(end: bytes) -> None:
    raw = end.join([b": hi", b"", b'data: {"a": 1}', b"", b"data: x", b"data: y", b"", b"data: [DONE]", b"", b""])
    for cut in range(len(raw) + 1):
        events, _ = fed([raw[:cut], raw[cut:]])
        assert [event.data for event in events] == [None, b'{"a": 1}', b"x\ny", b"[DONE]"], cut
    events, _ = fed([raw[at : at + 1] for at in range(len(raw))])
    assert [event.data for event in events] == [None, b'{"a": 1}', b"x\ny", b"[DONE]"]


def test_done_counts_only_as_the_whole_data_of_an_event() -> None:
    events, _ = fed([b'data: {"content": "data: [DONE]"}\n\n'])
    assert events[0].data != sse.DONE


def test_an_event_cut_short_stays_pending() -> None:
    events, pending = fed([b"data: a\n\ndata: b\n"])
    assert [event.data for event in events] == [b"a"]
    assert pending == b"data: b\n"


def test_an_event_that_never_ends_is_refused_at_the_limit() -> None:
    decoder = sse.Decoder(limit=100)
    decoder.feed(b"data: " + b"x" * 94)
    with pytest.raises(sse.TooLong):
        decoder.feed(b"x")


@given(st.binary(max_size=200), st.data())
def test_no_input_makes_it_lose_a_byte(raw: bytes, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(raw)))
    events, pending = fed([raw[:cut], raw[cut:]])
    assert b"".join(event.raw for event in events) + pending == raw


@given(st.lists(TEXT, min_size=1, max_size=4))
def test_what_encode_makes_the_decoder_reads(lines: list[bytes]) -> None:
    events, pending = fed([sse.encode(b"\n".join(lines))])
    assert [event.data for event in events] == [b"\n".join(lines)]
    assert pending == b""
