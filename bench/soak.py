"""A long run against servers that fail: `python -m bench.soak`. What should stay as it is, is looked at all the time.

    python -m bench.soak                  a million requests, about a quarter of an hour
    python -m bench.soak --total 20000    a short one

A gateway with all that is on by default, and keys, tokens, limits and the ledger; four servers of which three fail now and
then, each in a way that real ones do; clients that leave, read slowly, and send what is no request. It ends with status 1 if
something grows that should not, hangs, or is missing in the ledger.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from statistics import linear_regression
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from bench import crowd, faulty
from bench.processes import BenchFailed, family, free_port, rss_kib, running, wait_until_ready
from bench.wire import KEY, chat_request

KEYS = 2000
SECRET = "soak-" * 8
SHARES = (0.0, 0.01, 0.03, 0.08)
"""Of the requests to each server that fail."""
SAMPLE_SECONDS = 5.0
SETTLE_SECONDS = 8.0
"""After the last request: longer than any timeout of the gateway's, so that all has ended that will."""
MOST_KIB = 2048.0
"""By which memory may grow in 100,000 requests of the second half: tables still fill, and what they leave is in pieces."""
SETTINGS = """
port = {port}
keys = "keys.toml"
ledger = "usage.sqlite"
jwt_key = "{secret}"
connect_timeout = "1s"
first_byte_timeout = "2s"
idle_timeout = "2s"
client_timeout = "3s"
queue_timeout = "5s"
breaker_open = "1s"
log_file_size = "16MiB"
log_files = 2
"""
BACKEND = '[[backends]]\nname = "b{number}"\nurl = "http://127.0.0.1:{port}"\nkind = "openai"\nslots = 64\n'
WATCHED = (
    "gateway_queue_depth",
    "gateway_inflight",
    "gateway_prefix_index_tokens",
    "gateway_limits_keys",
    "gateway_connections",
)
"""Metrics whose sum is shown."""


class Sample(NamedTuple):
    """How things were when so many requests had been sent."""

    sent: int
    mib: float
    files: int
    threads: int
    series: int
    watched: dict[str, float]


class Gateway:
    """What is looked at."""

    def __init__(self, pid: int, port: int, key: str) -> None:
        self.pid = pid
        self._url = f"http://127.0.0.1:{port}/metrics"
        self._key = key
        self.samples: list[Sample] = []

    def look(self, sent: int) -> Sample:
        """One sample more."""
        lines = [line for line in self._metrics().splitlines() if line and line[0] != "#"]
        watched: Counter[str] = Counter()
        for line in lines:
            name = re.split(r"[{ ]", line, maxsplit=1)[0]
            if name in WATCHED:
                watched[name] += float(line.rsplit(" ", 1)[1])  # type: ignore[assignment]
        place = Path(f"/proc/{self.pid}")
        files, threads = len(list((place / "fd").iterdir())), len(list((place / "task").iterdir()))
        found = Sample(sent, rss_kib([self.pid]) / 1024, files, threads, len(lines), dict(watched))
        self.samples.append(found)
        return found

    def _metrics(self) -> str:
        headers = {"Accept": "text/plain", "Authorization": f"Bearer {self._key}"}
        with urllib.request.urlopen(urllib.request.Request(self._url, headers=headers), timeout=30) as response:
            return str(response.read().decode())


def _write_files(run: Path, port: int, ports: list[int]) -> None:
    def key(number: int, name: str, more: str = "") -> str:
        limits = "rpm = 60\n" if number % 100 == 99 else "rpm = 1000000\ntpm = 100000000\nconcurrency = 1000\n"
        hashed = sha256(name.encode()).hexdigest()
        return f'[[keys]]\nid = "k{number}"\ntenant = "t{number % 500}"\nhash = "{hashed}"\n{limits}{more}\n'

    admin = key(KEYS, KEY, "admin = true\n")
    (run / "keys.toml").write_text("".join(key(number, crowd.key_of(number)) for number in range(KEYS)) + admin)
    backends = "".join(BACKEND.format(number=number, port=one) for number, one in enumerate(ports))
    (run / "gateway.toml").write_text(SETTINGS.format(port=port, secret=SECRET) + backends)


def _told(process: Any, ended: threading.Event, seen: dict[str, Any]) -> None:
    for line in process.stdout:
        seen.update(json.loads(line))
    ended.set()


def soak(total: int, clients: int, seconds: float, run: Path) -> tuple[list[Sample], dict[str, int], list[str]]:
    """(samples, answers by kind, what was wrong)."""
    port, ports = free_port(), [free_port() for _ in SHARES]
    _write_files(run, port, ports)
    servers = [sys.executable, "-m", "bench.faulty", json.dumps(asdict(faulty.Spec(ports, SHARES)))]
    program = [sys.executable, str(Path(sys.executable).with_name("twistd")), "-n", "--pidfile=", "--logfile=gateway.log"]
    spec = crowd.Spec(port, clients, total, seconds, KEYS, SECRET, str(run / "answered"))
    here, cores = Path(__file__).parents[1], os.sched_getaffinity(0)
    with (
        running(servers, cores, run / "servers.log", here),
        running([*program, "inference-gateway", "--config", "gateway.toml"], cores, run / "output.log", run) as process,
    ):
        wait_until_ready("gateway", process, port, chat_request(64, False), run, 60.0)
        gateway = Gateway(process.pid, port, KEY)
        before = gateway.look(0)
        with subprocess.Popen(crowd.command(spec), cwd=here, stdout=subprocess.PIPE) as asking:
            ended, seen = threading.Event(), dict[str, Any]()
            threading.Thread(target=_told, args=[asking, ended, seen], daemon=True).start()
            while not ended.wait(SAMPLE_SECONDS):
                print(_line(gateway.look(seen.get("sent", 0))), flush=True)
        time.sleep(SETTLE_SECONDS)
        after = gateway.look(seen.get("sent", 0))
        left = family(process.pid)
    wrong = [*_not_as_before(before, after), *_grown(gateway.samples)]
    if process.returncode != 0 or len(left) > 1:
        wrong.append(f"the gateway ended with status {process.returncode}, and {len(left) - 1} processes beside it")
    wrong += _missing(run, run / "answered")
    log = "".join(one.read_text("utf-8", "replace") for one in run.glob("gateway.log*"))
    wrong += [f"the log has {log.count('Traceback')} tracebacks"] if "Traceback" in log else []
    wrong += [f"{count} x {what}" for what, count in seen["seen"].items() if what.isupper()]
    return gateway.samples, seen["seen"], wrong


def _not_as_before(before: Sample, after: Sample) -> Iterator[str]:
    """Nobody asks any more: nothing waits, runs or is open."""
    for name in ("gateway_queue_depth", "gateway_inflight"):
        if after.watched.get(name, 0):
            yield f"{name} is {after.watched[name]:g} at the end"
    if after.files > before.files + 300:  # connections to backends are kept for a while
        yield f"{after.files} files are open at the end, {before.files} at the start"


def slope(samples: list[Sample]) -> float:
    """KiB by which memory grows in 100,000 requests, over the second half of the run (least squares)."""
    half = [one for one in samples if one.sent > samples[-1].sent / 2]
    if len(half) < 3:
        return 0.0
    found = linear_regression([one.sent / 100_000 for one in half], [one.mib * 1024 for one in half])
    return found.slope


def _grown(samples: list[Sample]) -> Iterator[str]:
    if samples[-1].sent >= 200_000 and slope(samples) > MOST_KIB:
        yield f"memory grows by {slope(samples):.0f} KiB in 100,000 requests"


def _missing(run: Path, answered: Path) -> Iterator[str]:
    """Each request that was answered, but with 401, is in the ledger, once."""
    marks = answered.read_bytes()
    with closing(sqlite3.connect(run / "usage.sqlite")) as ledger:
        rows = Counter(row[0] for row in ledger.execute("select request_id from usage"))
    wanted = {str(number) for number, mark in enumerate(marks) if mark == crowd.ADMITTED}
    if lost := wanted - rows.keys():
        yield f"{len(lost)} of {len(wanted)} answered requests are not in the ledger, such as {sorted(lost)[:3]}"
    if twice := [name for name, count in rows.items() if count > 1]:
        yield f"{len(twice)} requests are in the ledger twice"


def _line(one: Sample) -> str:
    watched = " ".join(f"{name.removeprefix('gateway_')}={value:g}" for name, value in one.watched.items())
    return (
        f"{one.sent:>8} sent  {one.mib:6.1f} MiB  {one.files:>5} files  {one.threads} threads  {one.series} series  {watched}"
    )


def table(samples: list[Sample]) -> str:
    """At eight moments of the run."""
    names = sorted({name for one in samples for name in one.watched})
    rows = [
        "| requests | MiB | files | threads | series | " + " | ".join(name.removeprefix("gateway_") for name in names) + " |"
    ]
    rows.append("|--:" * (5 + len(names)) + "|")
    step = max((len(samples) - 1) // 8, 1)
    for one in [*samples[:-1:step], samples[-1]]:
        cells = [f"{one.sent}", f"{one.mib:.1f}", one.files, one.threads, one.series]
        rows.append("| " + " | ".join(map(str, [*cells, *(f"{one.watched.get(name, 0):g}" for name in names)])) + " |")
    return "\n".join(rows)


def main() -> None:
    """Run it, and say what came of it."""
    parser = argparse.ArgumentParser(
        prog="bench.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--total", type=int, default=1_000_000, help="requests")
    parser.add_argument("--clients", type=int, default=64, help="at a time")
    parser.add_argument("--seconds", type=float, default=3600.0, help="at most")
    options = parser.parse_args()
    with TemporaryDirectory(prefix="soak-") as name:
        try:
            samples, seen, wrong = soak(options.total, options.clients, options.seconds, Path(name))
        except BenchFailed as problem:
            sys.exit(f"soak: {problem}")
    print(table(samples), f"\nmemory: {slope(samples):+.0f} KiB in 100,000 requests, over the second half")
    print("answers: " + ", ".join(f"{what} {count}" for what, count in sorted(seen.items())))
    if wrong:
        sys.exit("\n".join(f"WRONG: {one}" for one in wrong))


if __name__ == "__main__":
    main()
