"""What a gateway holds: counted after faults and attacks. And what docs/faults.md says of them."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from .asking import metric
from .processes import Running, wait_for

FAULTS_MD = Path(__file__).parents[2] / "docs" / "faults.md"


def everything_is_given_back(gateway: Running, descriptors: int) -> None:
    """Nothing in flight, nobody waiting, no connection but the one that asks, no descriptor more than there were."""
    wait_for(lambda: metric(gateway, r"gateway_inflight\{") == 0)
    assert metric(gateway, r"gateway_queue_depth") == metric(gateway, r"gateway_queue_bytes") == 0
    wait_for(lambda: metric(gateway, "gateway_connections ") == 1)
    wait_for(lambda: open_descriptors(gateway) <= descriptors)
    assert "Traceback" not in gateway.lines()


def open_descriptors(gateway: Running) -> int:
    return sum(1 for _ in Path(f"/proc/{gateway.process.pid}/fd").iterdir())


def resident(gateway: Running) -> int:
    """Bytes of memory."""
    pages = Path(f"/proc/{gateway.process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def grown(samples: Sequence[int]) -> float:
    """By how much the second half of the samples is more than the first, by their medians."""
    half = len(samples) // 2
    return statistics.median(samples[half:]) - statistics.median(samples[:half])


def rows_of(heading: str) -> list[tuple[str, ...]]:
    """The cells of the table in the chapter with this heading, its own head included."""
    chapter = FAULTS_MD.read_text().split(f"{heading}\n")[1].split("\n## ")[0]
    lines = [line for line in chapter.splitlines() if line.startswith("|") and not line.startswith("|-")]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]
