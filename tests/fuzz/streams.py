"""Seams of streams: events, what is put together from them, and what they are told as."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import msgspec

from gateway.core import sse
from gateway.core.assembly import Assembler, Broken, ResponseAssembler, StreamError
from gateway.core.errors import UNDECODABLE
from gateway.core.message_answers import Translation
from gateway.core.message_usage import MessageMeter, of_message
from gateway.core.usage import ResponsesMeter, Usage, UsageMeter, of_answer

from .seams import Seam, packed

LIMIT: Final = 4096
_MANY: Final = 2**42


def events(data: bytes) -> None:
    """However the bytes are cut, the events are the same, and what is held is bounded."""
    whole, step = data[1:], 1 + (data[0] if data else 0)
    pieces = [whole[at : at + step] for at in range(0, len(whole), step)]
    assert _events(pieces) == _events([whole]) == _events([whole[at : at + 1] for at in range(len(whole))])


def _events(pieces: list[bytes]) -> list[bytes | None]:
    """The data of each; an LF after the CR that has ended an event is of the raw bytes of either, as it came."""
    decoder, found = sse.Decoder(10 * LIMIT), []
    for piece in pieces:
        found += decoder.feed(piece)
    assert b"".join([*(event.raw for event in found), decoder.pending]) == b"".join(pieces)
    return [event.data for event in found]


def bounded(data: bytes) -> None:
    """An event that does not end is held as far as the limit reaches."""
    decoder = sse.Decoder(64)
    try:
        for at in range(0, len(data), 7):
            decoder.feed(data[at : at + 7])
            assert len(decoder.pending) <= 64
    except sse.TooLong:
        assert len(decoder.pending) <= 64 + 7


def _stream(data: bytes) -> bytes:
    """Events with a line of the data each."""
    return b"".join(b"data: " + line + b"\n\n" for line in data.split(b"\n")) + sse.encode(sse.DONE)


def _puts_together(make: Callable[[], Any]) -> Callable[[bytes], None]:
    def one(data: bytes) -> None:
        """It becomes an answer that is not much more than what came, or is refused."""
        sent = _stream(data)
        assembler = make()
        try:
            assembler.feed(sent)
            answer = assembler.answer()
        except (Broken, StreamError, sse.TooLong):
            return
        with suppress(*UNDECODABLE):  # it is then refused
            of_answer(answer)
        assert len(answer) <= 32 * len(sent) + 1024

    return one


def told_as_messages(data: bytes) -> None:
    """What the client sees are events of Anthropic's, which end; a block is closed before the next is opened."""
    stream = Translation("r", "m", ("stop",)).stream()
    said = b"".join(stream.see(event) for event in sse.Decoder(1 << 20).feed(_stream(data))) + stream.end(Usage())
    is_open = False
    for event in sse.Decoder(1 << 24).feed(said):
        told = msgspec.json.decode(event.data or b"{}", type=dict[str, Any])
        if told.get("type") in ("content_block_start", "content_block_stop"):
            assert is_open is (told["type"] == "content_block_stop")
            is_open = not is_open
    assert not is_open or b"event: error" in said
    assert stream.end(Usage()) == b""


def metered(data: bytes) -> None:
    """Every meter takes every event; its numbers stay numbers."""
    for meter in (UsageMeter(), ResponsesMeter(), MessageMeter()):
        for event in sse.Decoder(1 << 20).feed(_stream(data)):
            meter.see(event, 1.0)
        assert all(0 <= count <= _MANY for count in _counts(meter.usage))
        assert isinstance(meter.finish_reason, str | None)


def _counts(usage: Usage) -> tuple[int, ...]:
    return usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, usage.reasoning_tokens


def answers(data: bytes) -> None:
    """A whole answer is understood, or is told not to be."""
    for read in (of_answer, of_message):
        try:
            usage, finish = read(data)
        except UNDECODABLE:
            continue
        assert all(0 <= count <= _MANY for count in _counts(usage))
        assert isinstance(finish, str | None)
    with suppress(ValueError):
        msgspec.json.decode(Translation("r", "m", ()).answer(data, Usage()))
    msgspec.json.decode(Translation("r", "m", ()).refusal(400, data))


_CALL: Final = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{"}}
_DELTA: Final = {"role": "assistant", "content": "a", "reasoning_content": "b", "refusal": None, "tool_calls": [_CALL]}
_COUNTS: Final = {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}
_CHUNK: Final = {
    "id": "c1",
    "choices": [{"index": 0, "delta": _DELTA, "finish_reason": "stop", "logprobs": {"content": [{"token": "a"}]}}],
    "usage": _COUNTS,
    "timings": {"cache_n": 1, "prompt_n": 2, "predicted_n": 3},
}
_PLAIN: Final = {"choices": [{"index": 0, "text": "a", "finish_reason": "stop", "logprobs": {"tokens": ["a"]}}]}
_RESPONSE: Final = {
    "type": "response.completed",
    "response": {"id": "r", "status": "completed", "usage": {"input_tokens": 1, "output_tokens": 1}},
}
_ERROR: Final = {"error": {"code": 500, "message": "m"}}
_OF_MESSAGE: Final = (
    {"type": "message_start", "message": {"usage": {"input_tokens": 1, "cache_read_input_tokens": 1}, "stop_reason": "x"}},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 9}},
)
_WHOLE: Final = {"choices": [{"message": {**_DELTA, "role": "assistant"}, "finish_reason": "stop"}], "usage": _COUNTS}
_TYPED: Final = {"type": "error", "code": 500, "message": "m", "param": None}
SEAMS: Final = {
    "events": Seam(events, [b"\x02data: a\n\ndata: b\r\n\r\n: c\r\rid\n\n", b"\x00\xef\xbb\xbfdata: a\ndata: b\n\n\r\n"]),
    "bounded": Seam(bounded, [b"data: " + b"x" * 50 + b"\n\n"]),
    "assembler": Seam(_puts_together(lambda: Assembler(1 << 20)), packed(_CHUNK, _ERROR)),
    "text-assembler": Seam(_puts_together(lambda: Assembler(1 << 20, "text_completion")), packed(_PLAIN, _ERROR)),
    "response-assembler": Seam(_puts_together(lambda: ResponseAssembler(1 << 20)), packed(_RESPONSE, _ERROR, _TYPED)),
    "message-stream": Seam(told_as_messages, packed(_CHUNK, _ERROR)),
    "meters": Seam(metered, packed(_CHUNK, _RESPONSE, *_OF_MESSAGE)),
    "answers": Seam(answers, packed(_WHOLE)),
}
