"""Log lines, for people or as JSON: one for each request, and what else there is to say.

A line never holds a prompt, an answer or a key: the record it is made of has none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from datetime import UTC, datetime
from time import time
from typing import Any, Final, Literal

import msgspec
from twisted.internet.interfaces import IReactorTime
from twisted.logger import ILogObserver, LogEvent, Logger, LogLevel, formatEvent
from zope.interface import implementer

from .core.record import Record
from .core.repeats import Repeats

MAX_TEXT: Final = 8 * 1024
"""Characters of a message or a traceback that a line keeps."""

SHOWN: Final = 0.0005
"""Seconds in the queue that a line tells of."""

GATHER_SECONDS: Final = 0.05
GATHERED: Final = 1000
"""Lines of requests are written at the latest after this time, and when there are this many."""

Format = Literal["text", "json"]
_log: Final = Logger("gateway.access")


class Fields(dict[str, Any]):
    """What one request's line says; as text, ``key=value`` pairs."""

    def __str__(self) -> str:
        return " ".join([f"{name}={_text(value)}" for name, value in self.items()])


_PLAIN: Final = re.compile(r"[!#-<>-\[\]-~]+")  # printable ASCII without space, quotes, = and backslash


def _text(value: object) -> str:
    """A value that cannot be mistaken for two, nor break the line."""
    text = "true" if value is True else str(value)
    if _PLAIN.fullmatch(text):
        return text
    return msgspec.json.encode(text).decode("utf-8") if text.isprintable() else ascii(text)


class AccessText:
    """The same as ``str(access_fields(record))`` in a fifth of the time: there is one for every request.

    What many records have in common stands in a table of at most ``most`` texts.
    """

    def __init__(self, most: int = 4096) -> None:
        self._most = most
        self._texts: dict[tuple[object, ...], tuple[str, str]] = {}

    def __call__(self, record: Record) -> str:
        if record.code or record.retries or record.served_model or record.first_token is not None:
            return str(access_fields(record))
        same = (
            record.route,
            record.status,
            record.model,
            record.backend,
            record.attempts,
            record.stream,
            record.client,
            record.finish_reason,
            record.method,
            record.decision,
            record.principal.id,
            record.principal.tenant,
        )
        before, after = self._texts.get(same) or self._make(same, record)
        used = record.usage
        prompt = f" prompt_tokens={used.prompt_tokens}" if used.prompt_tokens else ""
        completion = f" completion_tokens={used.completion_tokens}" if used.completion_tokens else ""
        cached = f" cached_tokens={used.cached_tokens}" if used.cached_tokens else ""
        if used.estimated and completion:
            completion += " estimated=true"
        queued = f" queue_ms={_ms(record.queued)}" if record.queued >= SHOWN else ""
        trace = record.trace
        if trace is not None:
            after += f" trace_id={trace.trace_id} span_id={trace.span_id}"
        milliseconds = round((record.ended - record.started) * 1000, 2)
        return f"request_id={_text(record.request_id)}{before}{milliseconds}{queued}{prompt}{completion}{cached}{after}"

    def _make(self, same: tuple[object, ...], record: Record) -> tuple[str, str]:
        model = f" model={_text(record.model[:128])}" if record.model else ""
        backend = f" backend={record.backend} attempts={record.attempts}" if record.backend else ""
        decision = f" decision={_text(record.decision)}" if record.decision else ""
        stream = " stream=true" if record.stream else ""
        finish = f" finish_reason={_text(record.finish_reason)}" if record.finish_reason else ""
        client = f" client={record.client}" if record.client else ""
        caller = f" tenant={_text(record.tenant)} key={_text(record.key)}" if record.key else ""
        before = f" method={record.method} route={record.route} status={record.status}{model}{backend}"
        before += f"{decision}{stream} duration_ms="
        if len(self._texts) >= self._most:
            self._texts.clear()
        self._texts[same] = made = (before, f"{finish}{caller}{client}")
        return made


def access_fields(record: Record) -> Fields:
    """A record's line. Durations are milliseconds; what does not apply is left out."""
    fields = Fields(request_id=record.request_id, method=record.method, route=record.route, status=record.status)
    if record.code:
        fields["code"] = record.code
        fields["fault"] = record.fault
    if record.model:
        fields["model"] = record.model[:128]
    if record.served_model:
        fields["served_model"] = record.served_model
    if record.backend:
        fields["backend"] = record.backend
        fields["attempts"] = record.attempts
    if record.retries:
        fields["retried"] = ",".join(record.retries)
    if record.decision:
        fields["decision"] = record.decision
    if record.stream:
        fields["stream"] = True
    fields["duration_ms"] = _ms(record.ended - record.started)
    if record.queued >= SHOWN:
        fields["queue_ms"] = _ms(record.queued)
    if record.first_token is not None:
        fields["first_token_ms"] = _ms(record.first_token - record.started)
    _add_usage(fields, record)
    _add_caller(fields, record)
    if record.trace is not None:
        fields["trace_id"] = record.trace.trace_id
        fields["span_id"] = record.trace.span_id
    if record.message:
        fields["error"] = record.message[:500]
    if record.detail:
        fields["detail"] = record.detail
    return fields


def _add_usage(fields: Fields, record: Record) -> None:
    used = record.usage
    if used.prompt_tokens:
        fields["prompt_tokens"] = used.prompt_tokens
    if used.completion_tokens:
        fields["completion_tokens"] = used.completion_tokens
        if used.estimated:
            fields["estimated"] = True
    if used.cached_tokens:
        fields["cached_tokens"] = used.cached_tokens
    if record.finish_reason:
        fields["finish_reason"] = record.finish_reason


def _add_caller(fields: Fields, record: Record) -> None:
    if record.key:
        fields["tenant"] = record.tenant
        fields["key"] = record.key
    if record.client:
        fields["client"] = record.client


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 2)


QUIET: Final = frozenset(["/dashboard/state", "/dashboard/events"])
"""Routes that a page or `inference-gateway top` asks for all the time: they have a line only if they are refused or fail."""

_OURS: Final = frozenset(["backend", "gateway"])
"""Faults that are worth a warning."""


def access_log(record: Record) -> None:
    """An observer of records, for a log that is not ours: one event a request."""
    if record.route in QUIET and record.status < 400:
        return
    level: Any = LogLevel.warn if record.fault in _OURS else LogLevel.info
    _log.emit(level, "{access}", access=access_fields(record))


_OF_DNS_PORTS: Final = re.compile(
    r"DNSDatagramProtocol starting on \d+|\(UDP Port \d+ Closed\)|(Starting|Stopping) protocol <twisted\.names\.dns\.[^>]*>"
)
"""What twisted says of each question to a name server, and cannot be told not to."""


@implementer(ILogObserver)
class LineObserver:
    """Writes each event as one line, but for warnings that repeat themselves; ``write`` takes lines with their newlines.

    The lines of requests (see `access`) are gathered for a moment and written together: under load
    a write for each would cost more than the line.
    """

    def __init__(self, write: Callable[[str], object], style: Format) -> None:
        self.write = write
        self._json = style == "json"
        self._gathered: list[str] = []
        self._second = (0, "")
        self._repeats = Repeats()

    def __call__(self, event: LogEvent) -> None:
        access = event.get("access")
        level: Any = event.get("log_level") or LogLevel.info
        namespace = str(event.get("log_namespace") or "-")
        fields = access if isinstance(access, Fields) else Fields(message=_message(event))
        if access is None and _OF_DNS_PORTS.fullmatch(fields["message"]):
            return
        if "log_failure" in event:
            fields["traceback"] = event["log_failure"].getTraceback()[-MAX_TEXT:]
        self.flush()
        if access is None and level >= LogLevel.warn:
            # What a bug's line begins with is another request's id each time.
            said = str(event.get("log_format")) if "log_failure" in event else fields["message"]
            if not self._repeats.may_say(namespace, said, time()):
                return
        self.write(self._line(event.get("log_time", 0.0), level.name, namespace, fields))

    def access(self, clock: IReactorTime) -> Callable[[Record], None]:
        """An observer of records, whose lines are written within `GATHER_SECONDS`."""
        name = str(_log.namespace)
        access_text = AccessText()

        def observe(record: Record) -> None:
            if record.route in QUIET and record.status < 400:
                return
            gathered = self._gathered
            if not gathered:
                clock.callLater(GATHER_SECONDS, self.flush)
            level = "warn" if record.fault in _OURS else "info"
            if self._json:
                gathered.append(self._line(time(), level, name, access_fields(record)))
            else:
                gathered.append(f"{self._time(time())} {level}  {name} {access_text(record)}\n")
            if len(gathered) >= GATHERED:
                self.flush()

        return observe

    def flush(self) -> None:
        """Write what was gathered."""
        if self._gathered:
            lines, self._gathered = self._gathered, []
            self.write("".join(lines))
        self._tell_repeats(time())

    def close(self) -> None:
        """There will be no more: say what was kept back."""
        self.flush()
        self._tell_repeats(math.inf)

    def _tell_repeats(self, now: float) -> None:
        for namespace, text in self._repeats.over(now):
            self.write(self._line(time(), "warn", namespace, Fields(message=text)))

    def _line(self, seconds: float, level: str, namespace: str, fields: Fields) -> str:
        when = self._time(seconds)
        if self._json:
            return msgspec.json.encode({"time": when, "level": level, "logger": namespace, **fields}).decode("utf-8") + "\n"
        traceback = fields.pop("traceback", "")
        message = fields.get("message")
        text = str(fields) if message is None else message.replace("\r", "\\r").replace("\n", "\\n")
        return f"{when} {level:<5} {namespace} {text}\n{traceback}"

    def _time(self, seconds: float) -> str:
        """RFC 3339, in milliseconds; most of it is made once a second."""
        whole = int(seconds)
        if whole != self._second[0]:
            self._second = (whole, datetime.fromtimestamp(whole, UTC).strftime("%Y-%m-%dT%H:%M:%S"))
        return f"{self._second[1]}.{int((seconds - whole) * 1000):03d}Z"


def _message(event: LogEvent) -> str:
    return formatEvent(event)[:MAX_TEXT]
