"""Processes: where they run, what they have used, and that none is left behind."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
PORTS = itertools.cycle(range(18_100, 19_100))
"""Below the ports that the system gives to outgoing connections, of which there are thousands."""
PATIENCE = 10.0
"""Seconds that a process gets to end by itself."""


class BenchFailed(Exception):
    """Nothing can be measured; the message says why."""


@dataclass(frozen=True)
class Cores:
    """The proxy has the last core for itself; load and backend share the others."""

    proxy: set[int] = field(default_factory=set)
    others: set[int] = field(default_factory=set)

    @classmethod
    def of_this_machine(cls) -> Cores:
        """As far as this process may use it."""
        *others, last = sorted(os.sched_getaffinity(0))
        return cls({last}, set(others) or {last})


def free_port() -> int:
    """A port of the loopback on which nobody listens; another one each time."""
    for port in itertools.islice(PORTS, 1000):
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                one.bind(("127.0.0.1", port))
                return port
    raise BenchFailed("no free port")


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty if the process has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return []


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time of processes so far."""
    return sum(int(fields[11]) + int(fields[12]) for pid in pids if (fields := _stat(pid))) / TICK


def rss_kib(pids: Sequence[int]) -> float:
    """Resident memory of processes; pages that they share count for each."""
    return sum(int(fields[21]) for pid in pids if (fields := _stat(pid))) * PAGE / 1024


@contextmanager
def running(
    command: Sequence[str], cores: set[int], log: Path, directory: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process on these cores, for as long as the block lasts.

    The cores are ours for a moment, for the child to inherit: so they bind all its threads from the first on,
    and programs that start a thread for each core see how many they have.
    """
    before = os.sched_getaffinity(0)
    with log.open("wb") as output:
        os.sched_setaffinity(0, cores)
        try:
            process = subprocess.Popen(
                command,
                cwd=directory,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us; we end the others
            )
        except OSError as problem:
            raise BenchFailed(f"{command[0]}: {problem}") from None
        finally:
            os.sched_setaffinity(0, before)
    try:
        yield process
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process; if it does not go, its whole family."""
    members = family(process.pid)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE)
        return
    for pid in members:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def wait_until_ready(
    name: str, process: subprocess.Popen[bytes], port: int, request: bytes, logs: Path, seconds: float
) -> None:
    """Until a process answers a request with 200; BenchFailed, with the end of its logs, if it does not."""
    end = time.monotonic() + seconds
    said = "nothing"
    while time.monotonic() < end:
        if process.poll() is not None:
            raise BenchFailed(f"{name} ended with status {process.returncode}:\n{_end_of(logs)}")
        try:
            with socket.create_connection(("127.0.0.1", port), 5) as one:
                one.sendall(request)
                said = one.recv(65_536).split(b"\r\n", 1)[0].decode("latin-1")
        except OSError as problem:
            said = str(problem)
        if " 200 " in said:
            return
        time.sleep(0.1)
    raise BenchFailed(f"{name} is not ready after {seconds:.0f} s; it said: {said}\n{_end_of(logs)}")


def _end_of(logs: Path) -> str:
    lines = [line for log in sorted(logs.glob("*.log")) for line in log.read_text("utf-8", "replace").splitlines()]
    return "\n".join(lines[-10:])
