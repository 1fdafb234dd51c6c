"""No model at all: the last user message comes back. What answers when no backend is configured."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Final

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPushProducer, IReactorTime
from twisted.internet.task import CooperativeTask, Cooperator, TaskStopped
from zope.interface import implementer

from .backend import Answer, Stream
from .core import wire
from .core.reports import Report
from .core.usage import Usage
from .exchange import Receive

MODEL: Final = "echo"
_PIECE: Final = re.compile(r"\s*\S+|\s+$")


class EchoBackend:
    """Answers ``Echo: `` and the last user message; whitespace-separated words count as tokens.

    ``time`` gives Unix seconds, for ``created``.
    """

    name = MODEL

    def __init__(self, clock: IReactorTime, time: Callable[[], float]) -> None:
        self._time = time
        self._cooperator = Cooperator(scheduler=lambda step: clock.callLater(0.0, step))
        self._listing = wire.model_list([MODEL], int(time()))

    async def send(self, call: wire.Call) -> Answer | Stream:
        messages = call.chat.messages
        said = next((message.text() for message in reversed(messages) if message.role == "user"), "")
        content = f"Echo: {said}"
        usage = Usage(sum(len(message.text().split()) for message in messages), len(content.split()))
        created = int(self._time())
        if not call.stream:
            body = wire.chat_completion(call.request_id, created, MODEL, content, usage)
            return Answer(200, [(b"Content-Type", b"application/json")], body, usage, "stop")
        pieces = (piece[0] for piece in _PIECE.finditer(content))
        events = wire.chat_stream(call.request_id, created, MODEL, pieces, usage, include_usage=call.include_usage)
        return EchoStream(events, self._cooperator, usage_added=not call.include_usage)

    async def models(self, headers: list[tuple[bytes, bytes]]) -> Answer:
        return Answer(200, [(b"Content-Type", b"application/json")], self._listing)

    async def probe(self) -> Report:
        return Report("echo", models=tuple(wire.models(self._listing)))


@implementer(IPushProducer)
class EchoStream:
    """Events made as fast as they are taken, in turns, so that a long echo does not hold up the reactor."""

    status = 200
    framed = True

    def __init__(self, events: Iterator[bytes], cooperator: Cooperator, *, usage_added: bool) -> None:
        self.usage_added = usage_added
        self.headers = [(b"Content-Type", b"text/event-stream")]
        self._events = events
        self._cooperator = cooperator
        self._task: CooperativeTask[Iterator[object]] | None = None
        self._ended: Deferred[None] = Deferred(lambda _: self.stopProducing())
        self._paused = False

    def deliver(self, receive: Receive) -> Deferred[None]:
        steps: Iterator[object] = map(receive, self._events)
        self._task = task = self._cooperator.cooperate(steps)
        task.whenDone().addCallbacks(lambda _: self._end(), lambda stopped: stopped.trap(TaskStopped))
        if self._paused:
            task.pause()
        return self._ended

    def _end(self) -> None:
        self._task = None
        self._ended.callback(None)

    def expect_end(self) -> None:
        """It comes by itself."""

    def pauseProducing(self) -> None:
        if self._task is not None and not self._paused:
            self._task.pause()
        self._paused = True

    def resumeProducing(self) -> None:
        if self._task is not None and self._paused:
            self._task.resume()
        self._paused = False

    def stopProducing(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.stop()
