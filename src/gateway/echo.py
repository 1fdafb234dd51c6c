"""No model at all: what was said last comes back. What answers when no backend is configured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPushProducer, IReactorTime
from twisted.internet.task import CooperativeTask, Cooperator, TaskStopped
from zope.interface import implementer

from .backend import Answer, Stream
from .core import answers, echoes, endpoints, messages, wire
from .core.asking import texts_of
from .core.chat import ChatRequest
from .core.completions import CompletionRequest
from .core.embeddings import EmbeddingRequest, RerankRequest
from .core.reports import Report
from .core.responses import ResponsesRequest
from .core.schema import wrong
from .core.tokens import DetokenizeRequest, TokenizeRequest
from .core.usage import Usage
from .exchange import Receive

MODEL: Final = "echo"

MAX_NUMBERS: Final = 2**20
"""Numbers in the vectors of one answer."""

_JSON: Final = [(b"Content-Type", b"application/json")]


class EchoBackend:
    """Answers ``Echo: `` and what was said last; whitespace-separated words count as tokens.

    Embeddings are hashed words, reranking goes by shared words, and tokens are the bytes of UTF-8.
    ``time`` gives Unix seconds, for ``created``.
    """

    name = MODEL

    def __init__(self, clock: IReactorTime, time: Callable[[], float]) -> None:
        self._time = time
        self._cooperator = Cooperator(scheduler=lambda step: clock.callLater(0.0, step))
        self._listing = wire.model_list([MODEL], int(time()))
        self._ways: dict[endpoints.Endpoint, Callable[[wire.Call, Any], Answer | Stream]] = {
            endpoints.CHAT: self._chat,
            endpoints.COMPLETIONS: self._completion,
            endpoints.RESPONSES: self._response,
            endpoints.EMBEDDINGS: self._embeddings,
            endpoints.RERANK: self._rerank,
            endpoints.RERANK_OF_OLD: self._rerank,
            endpoints.TOKENIZE: self._tokenize,
            endpoints.DETOKENIZE: self._detokenize,
        }

    async def send(self, call: wire.Call) -> Answer | Stream:
        return self._ways[call.endpoint](call, call.asked)

    def _chat(self, call: wire.Call, asked: ChatRequest) -> Answer | Stream:
        turns = asked.messages
        read = sum(echoes.count(turn.text()) for turn in turns)
        if not call.generates:
            return Answer(200, _JSON, messages.token_count(read))
        said = next((turn.text() for turn in reversed(turns) if turn.role == "user"), "")
        content = f"Echo: {said}"
        usage = Usage(read, echoes.count(content))
        created = int(self._time())
        if not asked.stream:
            body = answers.chat_completion(call.request_id, created, MODEL, content, usage)
            return Answer(200, _JSON, body, usage, "stop")
        events = answers.chat_stream(
            call.request_id, created, MODEL, echoes.pieces(content), usage, include_usage=asked.include_usage
        )
        return EchoStream(events, self._cooperator, usage_added=not asked.include_usage)

    def _completion(self, call: wire.Call, asked: CompletionRequest) -> Answer | Stream:
        prompts = texts_of(asked.prompt)
        texts = [f"{prompt if asked.echo else ''}Echo: {prompt}" for prompt in prompts]
        usage = Usage(sum(map(echoes.count, prompts)), sum(1 + echoes.count(prompt) for prompt in prompts))
        created = int(self._time())
        if not asked.stream:
            body = answers.text_completion(call.request_id, created, MODEL, texts, usage)
            return Answer(200, _JSON, body, usage, "stop")
        cut = [echoes.pieces(text) for text in texts]
        events = answers.text_stream(call.request_id, created, MODEL, cut, usage, include_usage=asked.include_usage)
        return EchoStream(events, self._cooperator, usage_added=not asked.include_usage)

    def _response(self, call: wire.Call, asked: ResponsesRequest) -> Answer | Stream:
        found = asked.input
        said = found if isinstance(found, str) else next((item.text() for item in reversed(found) if item.role == "user"), "")
        text = f"Echo: {said}"
        usage = Usage(echoes.count(asked.prompt_text()), echoes.count(text))
        created = int(self._time())
        if not asked.stream:
            body = msgspec.json.encode(answers.response_object(call.request_id, created, MODEL, text, usage))
            return Answer(200, _JSON, body, usage, "completed")
        events = answers.response_stream(call.request_id, created, MODEL, echoes.pieces(text), text, usage)
        return EchoStream(events, self._cooperator, usage_added=False)

    @staticmethod
    def _embeddings(call: wire.Call, asked: EmbeddingRequest) -> Answer:
        texts, dimensions = texts_of(asked.input), asked.dimensions or echoes.DIMENSIONS
        if len(texts) * dimensions > MAX_NUMBERS:
            raise wrong("dimensions", f"the echo makes at most {MAX_NUMBERS} numbers for one answer")
        usage = Usage(sum(map(echoes.count, texts)))
        vectors = [echoes.vector(text, dimensions) for text in texts]
        body = answers.embeddings(MODEL, vectors, usage, as_base64=asked.encoding_format == "base64")
        return Answer(200, _JSON, body, usage)

    @staticmethod
    def _rerank(call: wire.Call, asked: RerankRequest) -> Answer:
        texts = asked.texts()
        usage = Usage(echoes.count(asked.query) + sum(map(echoes.count, texts)))
        ranked = echoes.ranked(asked.query, texts)[: asked.top_n]
        body = answers.reranking(call.request_id, MODEL, ranked, texts if asked.return_documents else None, usage)
        return Answer(200, _JSON, body, usage)

    @staticmethod
    def _tokenize(call: wire.Call, asked: TokenizeRequest) -> Answer:
        tokens = list(asked.text().encode("utf-8", "replace"))
        if asked.content is None:
            answer: dict[str, object] = {"count": len(tokens), "max_model_len": 0, "tokens": tokens}
        elif asked.with_pieces:
            answer = {"tokens": [{"id": one, "piece": chr(one) if one < 128 else [one]} for one in tokens]}
        else:
            answer = {"tokens": tokens}
        return Answer(200, _JSON, msgspec.json.encode(answer))

    @staticmethod
    def _detokenize(call: wire.Call, asked: DetokenizeRequest) -> Answer:
        try:
            text = bytes(asked.tokens).decode("utf-8", "replace")
        except ValueError:
            at = next(at for at, token in enumerate(asked.tokens) if token > 255)
            raise wrong(f"tokens[{at}]", "a token of the echo is a byte, 0 to 255") from None
        return Answer(200, _JSON, msgspec.json.encode({"content": text, "prompt": text}))

    async def models(self, headers: list[tuple[bytes, bytes]]) -> Answer:
        return Answer(200, _JSON, self._listing)

    async def probe(self) -> Report:
        return Report("echo", models=tuple(wire.models(self._listing)))


@implementer(IPushProducer)
class EchoStream:
    """Events made as fast as they are taken, in turns, so that a long echo does not hold up the reactor."""

    status = 200
    framed = True
    native = False

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
