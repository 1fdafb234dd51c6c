"""``inference-gateway top``: what the dashboard shows, in a terminal."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from .core.view import BackendView, RequestView, View, shown
from .remote import NotTold, ask

INTERVAL: Final = 1.0
REQUESTS: Final = 8
NARROWEST: Final = 40

_CLEAR: Final = "\x1b[H\x1b[J"
_BEGIN: Final = "\x1b[?1049h\x1b[?25l\x1b[?7l"
"""Another screen, no cursor, and lines that end at the edge: some characters are two columns wide."""

_AS_BEFORE: Final = "\x1b[?7h\x1b[?25h\x1b[?1049l"
_BOLD, _RED, _YELLOW, _GREEN, _FAINT = "1", "31", "33", "32", "2"
_COLOURS: Final = {"healthy": _GREEN, "busy": _GREEN, "draining": _FAINT, "unhealthy": _RED, "config_error": _RED}
_STEPS: Final = "▁▂▃▄▅▆▇█"


def fetch(url: str, key: str) -> View:
    """The picture of the gateway at this base URL. Raises `NotTold`."""
    seen: View = ask(url, "/dashboard/state", key, View)
    return seen


def run(url: str, key: str, *, once: bool) -> None:
    """Show the picture each second until Ctrl-C; just once if told so, or if nobody watches. Raises `NotTold`."""
    if once or not sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        sys.stdout.write("\n".join(screen(fetch(url, key), width, colours=False)) + "\n")
        return
    seen, problem = fetch(url, key), ""
    sys.stdout.write(_BEGIN)
    try:
        while True:
            _draw(seen, problem)
            time.sleep(INTERVAL)
            try:
                seen, problem = fetch(url, key), ""
            except NotTold as error:
                problem = str(error)
    except KeyboardInterrupt:
        pass
    finally:
        sys.stdout.write(_AS_BEFORE)
        sys.stdout.flush()


def _draw(seen: View, problem: str) -> None:
    width, height = shutil.get_terminal_size()
    lines = screen(seen, width, colours=True)
    if problem:
        lines.insert(0, _coloured(_cut(f"no longer connected: {problem}", width), _RED))
    sys.stdout.write(_CLEAR + "\n".join(lines[: height - 1]))
    sys.stdout.flush()


# --- what it looks like


def screen(seen: View, width: int, *, colours: bool) -> list[str]:
    """Lines of at most so many columns, but for colours. What has a name that cannot be printed shows replacements."""
    width = max(width, NARROWEST)
    found = [(_cut(line, width), colour) for line, colour in _lines(seen, width)]
    return [_coloured(line, colour) if colours and colour else line for line, colour in found]


def _coloured(line: str, colour: str) -> str:
    return f"\x1b[{colour}m{line}\x1b[0m"


def _cut(line: str, width: int) -> str:
    line = shown(line, 10_000)
    return line if len(line) <= width else f"{line[: width - 1]}\u2026"


def _lines(seen: View, width: int) -> Iterator[tuple[str, str]]:
    """Each line, and its colour."""
    now, counts = seen.now, seen.counts
    state = "shutting down" if seen.draining else f"up {_span(seen.uptime)}"
    yield f"inference-gateway {seen.version}  {state}  policy {seen.policy}  {seen.connections} connections", _BOLD
    yield f"in flight {seen.inflight}  waiting {seen.queued}  requests {now.requests:g}/s  retries {seen.retries}", ""
    yield f"tokens {now.completion:.0f}/s out, {now.prompt:.0f}/s in  cached {_part(counts.cached, counts.prompt_tokens)}", ""
    yield f"TTFT p50 {_seconds(now.ttft_p50)}  p95 {_seconds(now.ttft_p95)}  {sparkline(seen.series.ttft_p95, width - 36)}", ""
    yield "", ""
    yield from _backends(seen.backends, width)
    yield "", ""
    yield "queue  " + "  ".join(f"{name} {number}" for name, number in seen.priorities.items()), ""
    if seen.tenants:
        rows = "  ".join(f"{one.name or '(everybody)'} {one.waiting}/{one.requests}" for one in seen.tenants)
        yield f"tenants (waiting/requests)  {rows}", ""
    if seen.errors:
        yield "errors  " + "  ".join(f"{one.fault}:{one.code} {one.count}" for one in seen.errors), _YELLOW
    yield "", ""
    yield from _requests(seen.latest[:REQUESTS], width)


class _Column(NamedTuple):
    """Right of its neighbours where there is room for it; ``width`` less than nothing: to the left within it."""

    head: str
    width: int
    cell: Callable[[Any], object]


def _row(columns: Sequence[_Column], cells: Sequence[object], width: int) -> str:
    """As many whole columns as fit; the last one of all takes what room there is."""
    line = ""
    for column, cell in zip(columns, cells, strict=True):
        room = abs(column.width) or max(width - len(line), 0)
        if len(line) + room > width or not room:
            break
        text = _cut(str(cell), room)
        line += f"{text:>{room}}  " if column.width > 0 else f"{text:<{room}}  "
    return line.rstrip()


_BACKEND: Final = (
    _Column("BACKEND", -16, lambda one: one.name),
    _Column("STATE", -12, lambda one: one.state),
    _Column("SLOTS", 7, lambda one: f"{one.held}/{one.slots}" if one.slots else one.held),
    _Column("TTFT P50/P95", 17, lambda one: f"{_seconds(one.now.ttft_p50)} / {_seconds(one.now.ttft_p95)}"),
    _Column("REQ/S", 6, lambda one: f"{one.now.requests:g}"),
    _Column("ERRORS", 6, lambda one: one.window.errors),
    _Column("TOK/S", 6, lambda one: f"{one.now.completion:.0f}"),
    _Column("CACHED", 6, lambda one: _part(one.window.cached, one.window.prompt_tokens)),
    _Column("QUEUE", 6, lambda one: "-" if one.waiting is None else one.waiting),
    _Column("BREAKER", -9, lambda one: one.breaker),
)

_REQUEST: Final = (
    _Column("STATUS", -6, lambda one: one.status),
    _Column("TOTAL", 8, lambda one: _seconds(one.total)),
    _Column("TTFT", 8, lambda one: _seconds(one.first_token)),
    _Column("BACKEND", -16, lambda one: one.backend or "-"),
    _Column("WHY", -20, lambda one: one.code or one.decision),
    _Column("TENANT", -14, lambda one: one.tenant or "-"),
    _Column("MODEL", 0, lambda one: one.model),
)


def _backends(backends: Sequence[BackendView], width: int) -> Iterator[tuple[str, str]]:
    yield _row(_BACKEND, [column.head for column in _BACKEND], width), _BOLD
    for one in backends:
        yield _row(_BACKEND, [column.cell(one) for column in _BACKEND], width), _COLOURS.get(one.state, _YELLOW)
        if one.reason:
            yield f"  {one.reason}", _FAINT


def _requests(requests: Sequence[RequestView], width: int) -> Iterator[tuple[str, str]]:
    if not requests:
        yield "no requests yet", _FAINT
        return
    yield _row(_REQUEST, [column.head for column in _REQUEST], width), _BOLD
    for one in requests:
        colour = _RED if one.fault in ("backend", "gateway") else _YELLOW if one.code else ""
        yield _row(_REQUEST, [column.cell(one) for column in _REQUEST], width), colour


def sparkline(numbers: Sequence[float | None], width: int) -> str:
    """The last of the numbers, as many as there is room for, as bars; a space where there is none."""
    numbers = numbers[-max(width, 1) :]
    top = max((number for number in numbers if number is not None), default=0.0) or 1.0
    last = len(_STEPS) - 1
    return "".join(" " if number is None else _STEPS[min(int(number / top * last + 0.5), last)] for number in numbers)


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.0f} ms" if seconds < 1.0 else f"{seconds:.1f} s"


def _span(seconds: float) -> str:
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min {int(seconds % 60)} s"


def _part(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"
