"""What a request asks, as a backend is to see it and as the scheduler is told of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import msgspec
from msgspec import structs
from twisted.web.server import Request

from .backend import Answer
from .core import asking, messages, ranges, wire
from .core.endpoints import CHAT, endpoint_of
from .core.errors import BackendFailed, GatewayError
from .core.message_answers import Translation
from .core.message_chat import chat_body
from .core.model_settings import NO_MODELS, Models, ModelSettings
from .core.prefix import NO_BLOCKS, blocks_of
from .core.record import Record
from .core.scheduler import Scheduler
from .core.tickets import PRIORITIES, Ticket
from .core.usage import CHARACTERS
from .net.headers import last_of, pairs_of
from .net.request import body_of

MAX_DEADLINE: Final = 86400.0


class Calls:
    """Reads requests. Its methods raise `GatewayError` for what cannot be, or may not be asked.

    ``forward_authorization`` lets the caller's own credentials through to the backend; ``queue_timeout`` is how long a
    request may wait for a backend; ``strict`` refuses fields that OpenAI's API does not have; ``models`` is what the
    settings say of models.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        forward_authorization: bool = False,
        queue_timeout: float = 30.0,
        strict: bool = False,
        models: Models = NO_MODELS,
    ) -> None:
        self._scheduler = scheduler
        self._forward_authorization = forward_authorization
        self.queue_timeout = queue_timeout
        self.strict = strict
        self._models = models

    def read(self, request: Request, record: Record) -> wire.Call:
        """What the record's route is for."""
        body = _body(request, record)
        endpoint = endpoint_of(record.route)
        asked = (endpoint.schema.strict if self.strict else endpoint.schema).read(body)
        _note(record, asked.model or "", asked)
        if record.principal.models is not None:
            _check_spelling(body)
        return wire.Call(endpoint, body, asked, record.request_id, self.forwardable(request))

    def read_message(self, request: Request, record: Record) -> wire.Call:
        """A message of Anthropic's API, as a chat completion."""
        body = _body(request, record)
        asked = messages.parse(body)
        call = self._translated(request, record, asked, asked.stop_sequences or ())
        call.native = body
        return call

    def read_prompt(self, request: Request, record: Record) -> wire.Call:
        """Such a message, of which only the tokens are to be counted."""
        body = _body(request, record)
        call = self._translated(request, record, messages.parse_prompt(body), ())
        call.body, call.generates = body, False
        return call

    def _translated(self, request: Request, record: Record, asked: messages.Prompt, stops: Sequence[str]) -> wire.Call:
        body = chat_body(asked)
        chat = CHAT.schema.read(body)
        _note(record, asked.model, chat)
        translation = Translation(record.request_id, asked.model, tuple(stops))
        headers = [pair for pair in self.forwardable(request) if pair[0] != b"x-api-key"]  # Anthropic's, not a chat backend's
        return wire.Call(CHAT, body, chat, record.request_id, headers, translation)

    def ticket(self, request: Request, call: wire.Call, record: Record) -> Ticket:
        """What the scheduler is told of a request."""
        asked, model, now, principal = call.asked, call.asked.model or "", record.started, record.principal
        hashes = call.generates and self._scheduler.hashes
        header = last_of(request.requestHeaders).get
        patience = header(b"x-stainless-read-timeout")
        return Ticket(
            model,
            now,
            tenant=principal.tenant,
            weight=principal.weight,
            priority=max(_PRIORITIES.get(header(b"x-gateway-priority", b""), 1), principal.priority),
            deadline=math.inf if patience is None else now + _seconds(patience),
            expires=now + self.queue_timeout,
            size=len(call.body),
            prompt_tokens=0 if hashes or not call.generates else len(call.body) // CHARACTERS + 1,
            max_tokens=asked.most_tokens if call.generates else 0,
            prompt=blocks_of(model, asked.prompt_text()) if hashes else NO_BLOCKS,
            session=_session(header(b"x-session-id"), asked),
            streams=bool(asked.stream),
        )

    def forwardable(self, request: Request) -> list[tuple[bytes, bytes]]:
        """The headers of the client that go on to the backend."""
        return wire.forwardable(pairs_of(request.requestHeaders), authorization=self._forward_authorization)

    # --- models that have settings

    def settings_of(self, model: str) -> ModelSettings | None:
        """What the settings say of a model."""
        return self._models.get(model) if self._models else None

    @staticmethod
    def of_model(asked: wire.Call, settings: ModelSettings, record: Record) -> wire.Call:
        """The request as it is sent to the backends of this model."""
        body = settings.applied(asked.body, defaults=isinstance(asked.asked, asking.Generates) and asked.generates)
        if body is asked.body:
            call = asked
        else:
            read = (
                asked.endpoint.schema.read(body)
                if asked.generates
                else structs.replace(asked.asked, model=settings.backend_model)
            )
            native = asked.native and settings.applied(asked.native)
            call = structs.replace(asked, body=body, asked=read, native=native, original=asked)
        ranges.check(call.asked, settings.ranges)
        record.served_model = settings.backend_model
        return call


_PRIORITIES: Final = {name.encode("ascii"): place for place, name in enumerate(PRIORITIES)}


def _body(request: Request, record: Record) -> bytes:
    if request.getHeader(b"content-encoding") is not None:
        raise GatewayError("unsupported_media_type", "Send the body without Content-Encoding.")
    body = body_of(request)
    record.received_bytes = len(body)
    return body


def _check_spelling(body: bytes) -> None:
    """Raises `GatewayError` if a server that knows no case in names (Ollama) might read another model than the gateway has."""
    for name in msgspec.json.decode(body, type=dict[str, msgspec.Raw]):
        if name != "model" and name.lower() == "model":
            raise GatewayError("invalid_value", "A field is called 'model' but for its case: leave it out.", param=name)


def _note(record: Record, model: str, asked: asking.Request) -> None:
    """What was asked for, into the record. Raises `GatewayError` model_not_allowed."""
    record.model, record.stream = model, bool(asked.stream)
    if record.principal.models is not None and not record.principal.may_use(model):
        what = f"use the model '{model[:200]}'" if model else "leave the choice of a model to the gateway: name one"
        message = f"This key may not {what}. GET /v1/models lists what it may use."
        raise GatewayError("model_not_allowed", message, param="model")
    if record.trace is not None:
        record.trace.ask(asked.most_tokens, getattr(asked, "temperature", None), getattr(asked, "top_p", None))


def told(answer: Answer, call: wire.Call) -> Answer:
    """The answer in the words of its client. Raises `BackendFailed` if it is none."""
    translation = call.translation
    if translation is None or (answer.status < 400 and (answer.native or not call.generates)):
        return answer
    if answer.status >= 400:
        body = translation.refusal(answer.status, answer.body)
    else:
        try:
            body = translation.answer(answer.body, answer.usage)
        except ValueError as problem:
            message = "The backend's answer is not a chat completion."
            raise BackendFailed("backend_protocol_error", message, detail=str(problem)) from None
    kept = [pair for pair in answer.headers if pair[0].lower() != b"content-type"]
    return answer._replace(headers=[*kept, (b"content-type", b"application/json")], body=body)


def _session(header: bytes | None, asked: asking.Request) -> str | None:
    """Whose conversation it is: as the header says, else the body. Longer names are no names."""
    session = header.decode("latin-1") if header is not None else asked.session
    return session if session and len(session) <= 256 else None


def _seconds(header: bytes) -> float:
    """The client's own patience; infinity if that is no sensible number."""
    try:
        seconds = float(header)
    except ValueError:
        return math.inf
    return seconds if 0.0 < seconds < MAX_DEADLINE else math.inf
