"""Log lines, for people or as JSON: one for each request, and what else there is to say.

A line never holds a prompt, an answer or a key: the record it is made of has none.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
from twisted.logger import ILogObserver, LogEvent, Logger, LogLevel, formatEvent
from twisted.python.logfile import LogFile
from zope.interface import implementer

from .core.record import Record

MAX_TEXT: Final = 8 * 1024
"""Characters of a message or a traceback that a line keeps."""

Format = Literal["text", "json"]
_log: Final = Logger("gateway.access")
_file_log: Final = Logger("gateway.logs")


class Fields(dict[str, Any]):
    """What one request's line says; as text, ``key=value`` pairs."""

    def __str__(self) -> str:
        return " ".join(f"{name}={_plain(value)}" for name, value in self.items())


def _plain(value: object) -> str:
    """A value that cannot be mistaken for two, nor break the line."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if text and text.isascii() and text.isprintable() and not any(mark in text for mark in ' "=\\'):
        return text
    return msgspec.json.encode(text).decode("utf-8") if text.isprintable() else ascii(text)


def access_fields(record: Record) -> Fields:
    """A record's line. Durations are milliseconds; what does not apply is left out."""
    used = record.usage
    fields = Fields(
        request_id=record.request_id,
        method=record.method,
        route=record.route,
        status=record.status,
        code=record.code,
        fault=record.fault or "",
        model=record.model[:128],
        backend=record.backend,
        attempts=record.attempts,
        stream=record.stream,
        duration_ms=_ms(record.duration),
        first_token_ms=_ms(record.first_token - record.started) if record.first_token is not None else "",
        prompt_tokens=used.prompt_tokens,
        completion_tokens=used.completion_tokens,
        cached_tokens=used.cached_tokens,
        estimated=used.estimated and used.completion_tokens > 0,
        finish_reason=record.finish_reason or "",
        client=record.client,
        error=record.message[:500],
        detail=record.detail,
    )
    always = ("request_id", "method", "route", "status", "duration_ms")
    return Fields({name: value for name, value in fields.items() if value or name in always})


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 2)


def access_log(record: Record) -> None:
    """An observer of records: writes the line, as a warning if the fault is not the caller's."""
    level = LogLevel.warn if record.fault in ("backend", "gateway") else LogLevel.info
    _log.emit(level, "{access}", access=access_fields(record))


class StandardOutput:
    """The process's own; twistd soon puts a file that logs in its place."""

    def __init__(self) -> None:
        self._file = sys.stdout

    def __call__(self, line: str) -> None:
        self._file.write(line)
        self._file.flush()


class RotatedFile:
    """A log file that begins anew at ``size`` bytes, and when told to; ``count`` old ones are kept.

    Each has the mode that the umask at the start gives it: a daemon's own is 077. Raises OSError.
    """

    def __init__(self, path: Path, size: int, count: int) -> None:
        umask = os.umask(0)
        os.umask(umask)
        place = path.absolute()
        self._file = LogFile(
            place.name, str(place.parent), defaultMode=0o666 & ~umask, rotateLength=size, maxRotatedFiles=count
        )

    def __call__(self, line: str) -> None:
        self._file.write(line)

    def rotate(self) -> None:
        """Begin a new file; the one before keeps its lines under another name, given by us or by logrotate."""
        if not Path(self._file.path).exists():
            self._file.reopen()
        elif os.access(self._file.directory, os.W_OK):
            self._file.rotate()
        else:
            _file_log.warn("the log's directory {directory} cannot be written to", directory=self._file.directory)


@implementer(ILogObserver)
class LineObserver:
    """Writes each event as one line. ``write`` takes a line with its newline."""

    def __init__(self, write: Callable[[str], object], style: Format) -> None:
        self.write = write
        self._line = _json_line if style == "json" else _text_line

    def __call__(self, event: LogEvent) -> None:
        time = datetime.fromtimestamp(event.get("log_time", 0.0), UTC).isoformat("T", "milliseconds")
        level: Any = event.get("log_level") or LogLevel.info
        namespace = event.get("log_namespace") or "-"
        self.write(self._line(time.replace("+00:00", "Z"), level.name, str(namespace), event))


def _json_line(time: str, level: str, namespace: str, event: LogEvent) -> str:
    line: dict[str, Any] = {"time": time, "level": level, "logger": namespace}
    access = event.get("access")
    if isinstance(access, Fields):
        line.update(access)
    else:
        line["message"] = _message(event)
        if "log_failure" in event:
            line["traceback"] = event["log_failure"].getTraceback()[-MAX_TEXT:]
    return msgspec.json.encode(line).decode("utf-8") + "\n"


def _text_line(time: str, level: str, namespace: str, event: LogEvent) -> str:
    message = _message(event).replace("\r", "\\r").replace("\n", "\\n")
    line = f"{time} {level:<5} {namespace} {message}\n"
    if "log_failure" in event:
        line += event["log_failure"].getTraceback()[-MAX_TEXT:]
    return line


def _message(event: LogEvent) -> str:
    return formatEvent(event)[:MAX_TEXT]
