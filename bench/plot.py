"""Pictures of the results, for the documentation. Needs matplotlib."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure import Result
from bench.processes import BenchFailed

COLOURS = {
    "gateway": "#0072B2",
    "gateway+json": "#56B4E9",
    "nginx": "#999999",
    "haproxy": "#555555",
    "sglang-router": "#E69F00",
    "vllm-router": "#009E73",
}
"""Okabe and Ito's, which colour-blind readers can tell apart; greys for what is not made for models."""
OTHERS = ("#CC79A7", "#D55E00", "#F0E442", "#000000")
GROUP = 0.84
"""How much of its room a group of bars takes."""


@dataclass(frozen=True)
class Panel:
    """A part of a picture with an axis of its own."""

    title: str
    groups: Sequence[str]
    bars: dict[str, list[float]]
    """Of each proxy, a figure for each group; nan where there is none."""


def draw(results: Sequence[Result], directory: Path) -> list[Path]:
    """Write performance-requests and performance-streams, each as PNG and SVG."""
    library = pyplot()
    written = []
    for name, label, panels in (
        ("requests", "CPU per request, us", _requests(results)),
        ("streams", "CPU per event, us", _streams(results)),
    ):
        if panels:
            figure = _figure(library, label, panels)
            for ending in ("png", "svg"):
                path = directory / f"performance-{name}.{ending}"
                # No date in the file: the same results make the same picture.
                figure.savefig(path, dpi=150, metadata={"Date": None} if ending == "svg" else None)
                written.append(path)
            library.close(figure)
    return written


def pyplot() -> Any:
    """The library; BenchFailed without it."""
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError:
        raise BenchFailed("plots need matplotlib: pip install --group bench") from None
    matplotlib.use("agg")
    matplotlib.rcParams.update({"svg.hashsalt": "bench", "svg.fonttype": "none", "font.size": 9})
    return importlib.import_module("matplotlib.pyplot")


def _requests(results: Sequence[Result]) -> list[Panel]:
    """A panel for each size of prompt, a group for each number of connections."""
    rows = [result for result in results if result.scenario == "requests" and result.numbers]
    panels = []
    for kib in sorted({int(row.numbers["prompt_kib"]) for row in rows}):
        title = f"prompt of {kib} KiB" if kib < 1024 else f"prompt of {kib // 1024} MiB"
        panels.append(_panel(title, [row for row in rows if row.numbers["prompt_kib"] == kib], "connections"))
    return panels


def _streams(results: Sequence[Result]) -> list[Panel]:
    rows = [result for result in results if result.scenario == "streams" and result.numbers]
    return [_panel("", rows, "streams")] if rows else []


def _panel(title: str, rows: Sequence[Result], number: str) -> Panel:
    values = sorted({int(row.numbers[number]) for row in rows})
    one = {1: number.removesuffix("s")}
    bars: dict[str, list[float]] = {row.proxy: [float("nan")] * len(values) for row in rows}
    for row in rows:
        bars[row.proxy][values.index(int(row.numbers[number]))] = row.figures.get("cpu_us", float("nan"))
    return Panel(title, [f"{value:,} {one.get(value, number)}" for value in values], bars)


def _figure(library: Any, label: str, panels: Sequence[Panel]) -> Any:
    """Panels below each other: a page is not wide, and each has a scale of its own."""
    size = (7.5, 1.0 + 2.1 * len(panels))
    figure, axes = library.subplots(len(panels), 1, figsize=size, squeeze=False, layout="constrained")
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        _draw_panel(axis, panel)
    figure.supylabel(label, fontsize=9)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside upper center", ncols=len(names), frameon=False, columnspacing=1.2, handlelength=1.2
    )
    return figure


def _draw_panel(axis: Any, panel: Panel) -> None:
    others = iter(OTHERS * len(panel.bars))
    width = GROUP / len(panel.bars)
    for number, (name, heights) in enumerate(panel.bars.items()):
        offset = (number - (len(panel.bars) - 1) / 2) * width
        places = [group + offset for group in range(len(heights))]
        colour = COLOURS.get(name) or next(others)
        bars = axis.bar(places, heights, width * 0.92, label=name, color=colour)
        labels = ["" if height != height else _short(height) for height in heights]  # noqa: PLR0124 - nan is not itself
        axis.bar_label(bars, labels=labels, fontsize=6.5, padding=1.5, color="#333333")
    axis.set_xticks(range(len(panel.groups)), panel.groups)
    axis.set_title(panel.title, fontsize=9, loc="left")
    axis.tick_params(length=0)
    axis.margins(y=0.1)
    axis.yaxis.grid(visible=True, color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"
