"""Results as JSON, and as markdown tables that are made from it."""

from __future__ import annotations

import json
import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.measure import Result
from bench.proxies import GATEWAY


@dataclass(frozen=True)
class Column:
    """A figure, and how it is shown."""

    title: str
    figure: str
    form: str = ".1f"


@dataclass(frozen=True)
class Table:
    """How a scenario is shown."""

    scenario: str
    title: str
    columns: Sequence[Column]
    ratio: str = ""
    """The figure that is compared with the gateway's."""


RSS = Column("RSS MiB", "rss_mib", ".0f")
TIMES = (Column("p50 ms", "p50_ms", ".2f"), Column("p99 ms", "p99_ms", ".2f"))
REQUEST = Column("us CPU / request", "cpu_us")

TABLES = (
    Table("requests", "Requests: connections x prompt", (REQUEST, Column("requests/s", "rate", ".0f"), *TIMES, RSS), "cpu_us"),
    Table(
        "streams",
        "Streams: streams x events a second of each",
        (Column("us CPU / event", "cpu_us", ".2f"), Column("events/s", "rate", ".0f"), *TIMES, RSS),
        "cpu_us",
    ),
    Table(
        "latency",
        "Latency at a fixed rate",
        (
            *TIMES,
            Column("added p50 ms", "added_p50_ms", ".2f"),
            Column("added p99 ms", "added_p99_ms", ".2f"),
            Column("answered/s", "rate", ".0f"),
            REQUEST,
        ),
    ),
    Table(
        "workers",
        "Workers",
        (REQUEST, Column("of it the busiest worker's", "busiest", ".0%"), Column("requests/s", "rate", ".0f"), *TIMES, RSS),
    ),
    Table(
        "held streams",
        "Memory of streams that are held",
        (
            Column("held", "streams", ".0f"),
            Column("KiB / stream", "kib_per_stream"),
            Column("MiB before", "before_mib"),
            Column("MiB holding", "rss_mib"),
            Column("MiB after", "after_mib"),
            Column("MiB holding again", "again_mib"),
            Column("s to open", "seconds"),
        ),
    ),
    Table(
        "many requests",
        "Memory over many requests",
        (
            Column("requests", "requests", ".0f"),
            *(Column(f"MiB at {part} %", f"rss_{part}_mib") for part in (0, 25, 50, 75, 100)),
            REQUEST,
        ),
    ),
)


def markdown(results: Sequence[Result]) -> Iterator[str]:
    """The lines of all tables that have rows."""
    for table in TABLES:
        rows = [result for result in results if result.scenario == table.scenario]
        if rows:
            yield from ["", f"### {table.title}", "", *_lines(table, rows)]


def _lines(table: Table, rows: Sequence[Result]) -> Iterator[str]:
    titles = ["case", "proxy", *(column.title for column in table.columns), "errors"]
    if table.ratio:
        titles.insert(3, "to the gateway's")
    yield f"| {' | '.join(titles)} |"
    yield f"|---|---|{'--:|' * (len(titles) - 3)}---|"
    for case in dict.fromkeys(row.case for row in rows):
        for row in rows:
            if row.case == case:
                yield f"| {' | '.join(_cells(table, row, rows))} |"


def _cells(table: Table, row: Result, rows: Sequence[Result]) -> Iterator[str]:
    yield row.case
    yield row.proxy
    for number, column in enumerate(table.columns):
        value = row.figures.get(column.figure)
        yield "" if value is None else format(value, column.form)
        if table.ratio and number == 0:
            yield _ratio(table, row, rows)
    yield ", ".join(f"{count} {name}" for name, count in row.errors.items() if count) or "0"


def _ratio(table: Table, row: Result, rows: Sequence[Result]) -> str:
    mine = [one.figures.get(table.ratio) for one in rows if one.proxy == GATEWAY and one.case == row.case]
    value = row.figures.get(table.ratio)
    return f"{value / mine[0]:.2f}" if value is not None and mine and mine[0] else ""


def machine() -> dict[str, str]:
    """What the figures hold for."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        if line.startswith("model name")
    ]
    optimized = "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or "")
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "kernel": platform.release(),
        "python": platform.python_version() + ("" if optimized else ", not optimized (PGO)"),
        "when": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def save(path: Path, about: dict[str, str], results: Sequence[Result]) -> None:
    """Write everything, windows included."""
    content = {"machine": about, "results": [vars(result) for result in results]}
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def restore(path: Path) -> tuple[dict[str, str], list[Result]]:
    """What `save` wrote."""
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return content["machine"], [Result(**result) for result in content["results"]]
