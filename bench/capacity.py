"""How many processes so many streams take: arithmetic with what was measured. `INPUTS` is the one place to change.

python -m bench.capacity                    the tables
python -m bench.capacity docs/scaling.md    write them there, between the lines that are marked for them
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import Final, NamedTuple

BEGIN: Final = "<!-- made by python -m bench.capacity -->"
END: Final = "<!-- end -->"


class Inputs(NamedTuple):
    """What the arithmetic stands on. us are microseconds of one core."""

    request_us: float = 95.0
    """A request of 1 KiB, with what is on by default (docs/performance.md)."""
    extras_us: float = 250.0
    """Keys, limits by Redis, ledger and sampled spans on top of it."""
    event_us: float = 20.0
    """An event of a stream, of which each brings one token."""
    stream_kib: float = 15.8
    process_mib: float = 62.0
    redis_us: float = 165.0
    """Of Redis' one core for a request: a script that reserves, another that settles (Redis 6.2, one connection)."""
    row_us: float = 105.0
    """Of PostgreSQL's cores for a row of the ledger (PostgreSQL 18, 20 rows a statement)."""
    answer_tokens: float = 500.0
    load: float = 0.6
    """Share of its core that a process is planned for: the rest is for bursts."""
    server_streams: int = 64
    """Streams that a model server has slots for."""
    connections: int = 16384
    """GATEWAY_MAX_CONNECTIONS."""
    backends: int = 256
    """MAX_BACKENDS of core/backend_settings.py: a group of gateways can know no more."""


INPUTS: Final = Inputs()
CASES: Final = [(streams, rate) for streams in (1_000, 100_000, 1_000_000) for rate in (20, 50)]


class Need(NamedTuple):
    """What ``streams`` at ``rate`` tokens a second each take."""

    streams: int
    rate: int
    events: float
    """A second."""
    requests: float
    """A second, new streams in the place of those that end."""
    cores: float
    by_cpu: int
    by_connections: int
    groups: int
    servers: int
    mib: float
    """Of one process."""
    files: int
    """Open in one process: a connection to the client and one to a backend."""
    redis_cores: float
    row_cores: float

    @property
    def processes(self) -> int:
        """As many as what is scarcest wants; a group has one at the least."""
        return max(self.by_cpu, self.by_connections, self.groups)


def need(streams: int, rate: int, given: Inputs = INPUTS) -> Need:
    """The formulas of docs/scaling.md."""
    events = streams * rate
    requests = events / given.answer_tokens
    cores = (events * given.event_us + requests * (given.request_us + given.extras_us)) / 1e6
    by_cpu, by_connections = ceil(cores / given.load), ceil(streams / given.connections)
    servers = ceil(streams / given.server_streams)
    groups = ceil(servers / given.backends)
    each = streams / max(by_cpu, by_connections, groups)
    return Need(
        streams,
        rate,
        events,
        requests,
        cores,
        by_cpu,
        by_connections,
        groups,
        servers,
        given.process_mib + each * given.stream_kib / 1024,
        2 * ceil(each),
        requests * given.redis_us / 1e6,
        requests * given.row_us / 1e6,
    )


def tables(given: Inputs = INPUTS) -> Iterator[str]:
    """Lines of Markdown: what goes in, what one of each thing takes, and what many streams take."""
    yield "| input | |\n|---|--:|\n"
    yield f"| a request, us of one core | {given.request_us:g} |\n"
    yield f"| keys, limits by Redis, ledger, spans: more of it | {given.extras_us:g} |\n"
    yield f"| an event (one token) of a stream, us | {given.event_us:g} |\n"
    yield f"| a stream that is open, KiB | {given.stream_kib:g} |\n"
    yield f"| a process without streams, MiB | {given.process_mib:g} |\n"
    yield f"| a request, us of Redis' core | {given.redis_us:g} |\n"
    yield f"| a row, us of PostgreSQL | {given.row_us:g} |\n"
    yield f"| tokens of an answer | {given.answer_tokens:g} |\n"
    yield f"| share of its core that a process is planned for | {given.load:g} |\n"
    yield f"| slots of a model server | {given.server_streams} |\n\n"
    yield from _one(given)
    yield (
        "| streams | tokens/s each | events/s | requests/s | cores | processes | of that by connections | groups"
        " | model servers | MiB a process | files a process | Redis' cores | PostgreSQL's cores |\n"
    )
    yield "|--:" * 13 + "|\n"
    for streams, rate in CASES:
        found = need(streams, rate, given)
        yield (
            f"| {found.streams:,} | {found.rate} | {found.events:,.0f} | {found.requests:,.0f} | {found.cores:,.1f} |"
            f" {found.processes:,} | {found.by_connections:,} | {found.groups:,} | {found.servers:,} | {found.mib:,.0f} |"
            f" {found.files:,} | {found.redis_cores:.2f} | {found.row_cores:.2f} |\n"
        )


def _one(given: Inputs) -> Iterator[str]:
    """What one process, one model server, one group and one Redis come to."""
    tokens, requests = 1e6 / given.event_us, 1e6 / given.request_us
    planned, idle = tokens * given.load, given.process_mib + 10_000 * given.stream_kib / 1024
    group = given.backends * given.server_streams
    sizes = " and ".join(f"{need(group, rate, given).processes} at {rate}" for rate in (20, 50))
    yield "| one | |\n|---|---|\n"
    yield f"| process, full | {tokens:,.0f} tokens a second, or {requests:,.0f} requests without an answer to speak of |\n"
    yield (
        f"| process, as planned | {planned:,.0f} tokens a second: {planned / 20:,.0f} streams of 20 tokens a second,"
        f" or {planned / 50:,.0f} of 50 |\n"
    )
    yield f"| process with 10,000 streams that wait for their first token | {idle:,.0f} MiB, and no work |\n"
    yield (
        f"| answer of {given.answer_tokens:g} tokens | {given.answer_tokens * given.event_us / 1e3:.1f} ms of a core, and"
        f" {given.request_us / 1e3:.2f} ms for its request |\n"
    )
    yield (
        f"| model server of {given.server_streams} streams at 50 tokens a second |"
        f" {need(given.server_streams, 50, given).cores:.2f} of a core of gateway |\n"
    )
    yield f"| group of {given.backends} such servers | {group:,} streams, which take {sizes} tokens a second |\n"
    yield f"| Redis | {1e6 / given.redis_us:,.0f} requests a second that have limits |\n\n"


def written(text: str) -> str:
    """The document with the tables of today in it."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{''.join(tables())}{END}{after}"


def main() -> None:
    """Print, or write into the document that is named."""
    if len(sys.argv) > 1:
        path = Path(sys.argv[1])
        path.write_text(written(path.read_text("utf-8")), "utf-8")
    else:
        sys.stdout.writelines(tables())


if __name__ == "__main__":
    main()
