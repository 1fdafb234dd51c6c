"""One measurement: a load on a proxy, and what the proxy used meanwhile."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.load import Spec
from bench.processes import BenchFailed, Cores, cpu_seconds, free_port, rss_kib, running, wait_until_ready
from bench.proxies import Proxy, Running, started
from bench.wire import chat_request

ROOT = Path(__file__).parents[1]
DEADLINE = 180.0
"""Seconds over its own time after which a load is taken for stuck."""
STREAM_INTERVAL = 0.02
MOST_EVENTS = 20_000
"""A second, over all streams. With more, load and backend would be what is measured: they share a core or a few."""


@dataclass
class Result:
    """A row of a table. Figures are medians of the windows, errors their sum."""

    scenario: str
    case: str
    proxy: str
    figures: Mapping[str, float]
    errors: Mapping[str, int] = field(default_factory=dict)
    windows: list[dict[str, float]] = field(default_factory=list)
    numbers: Mapping[str, float] = field(default_factory=dict)
    """What the case is, for a plot."""


@contextmanager
def backend(kind: str, cores: Cores, interval: float = STREAM_INTERVAL) -> Iterator[int]:
    """The port of a model server of this kind, for as long as the block lasts."""
    port = free_port()
    with TemporaryDirectory(prefix="bench-") as name:
        command = [sys.executable, "-m", "bench.backend", str(port), kind, str(interval)]
        logs = Path(name)
        with running(command, cores.others, logs / "output.log", ROOT) as process:
            wait_until_ready("the backend", process, port, chat_request(64, kind != "fixed"), logs, 20)
            yield port


@contextmanager
def proxy_before(proxy: Proxy, kind: str, cores: Cores, files: int, interval: float = STREAM_INTERVAL) -> Iterator[Running]:
    """A proxy and a backend of its own."""
    with backend(kind, cores, interval) as port, started(proxy, port, kind != "fixed", cores, files) as running_proxy:
        yield running_proxy


class LoadProcess:
    """A load that runs, and the lines it writes."""

    def __init__(self, spec: Spec) -> None:
        command = [sys.executable, "-m", "bench.load", json.dumps(asdict(spec))]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self._timer = threading.Timer(spec.warm_up + spec.seconds * spec.windows + DEADLINE, self._process.kill)
        self._timer.daemon = True
        self._timer.start()

    def line(self) -> dict[str, Any]:
        """The next line; BenchFailed if the load has ended instead."""
        assert self._process.stdout is not None
        text = self._process.stdout.readline()
        if not text:
            raise BenchFailed(f"the load ended with status {self._process.wait()}, or was stuck")
        found: dict[str, Any] = json.loads(text)
        return found

    def finish(self) -> None:
        """Tell a load that holds streams that it is enough."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def __enter__(self) -> LoadProcess:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        self._timer.cancel()
        try:
            self._process.wait(0 if failed else 15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()


def load(spec: Spec, pids: list[int]) -> tuple[list[dict[str, float]], Counter[str]]:
    """(windows, errors): what a load saw, and what these processes used for it."""
    windows: list[dict[str, float]] = []
    with LoadProcess(spec) as process:
        errors = Counter(process.line()["errors"])  # those of the warm-up count too
        used = cpu_seconds(pids)
        for _ in range(spec.windows):
            line = process.line()
            before, used = used, cpu_seconds(pids)
            errors.update(line["errors"])
            units, seconds = line["units"], line["seconds"]
            windows.append({"units": units, "rate": units / seconds, "cpu": used - before, "rss_mib": rss_kib(pids) / 1024})
            if units:
                windows[-1]["cpu_us"] = 1e6 * (used - before) / units
        for window, latencies in zip(windows, process.line()["latencies"], strict=True):
            window.update({f"{name}_ms": value for name, value in latencies.items()})
    return windows, errors


def median(windows: list[dict[str, float]]) -> dict[str, float]:
    """The median of each figure, over the windows that have it."""
    names = dict.fromkeys(name for window in windows for name in window)
    return {name: statistics.median(window[name] for window in windows if name in window) for name in names}
