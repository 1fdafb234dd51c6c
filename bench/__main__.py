"""What the gateway costs, beside what other proxies cost on the same machine: CPU, added latency, memory.

  make bench                                  requests and streams, the quick way, in three minutes
  make bench ARGS="all --json results.json"   everything, in twenty
  make bench ARGS="streams --streams 2000 --proxies gateway,nginx"
  make bench ARGS="table --json results.json --plot docs"   from earlier results

Load, backend and proxy are processes of their own; the proxy has the last core for itself, the others share the
rest. CPU time (user and system, children included, from /proc) for each request or event is the figure to compare:
it holds on a busy machine far better than a rate. Each figure is the median of several windows of time after a
warm-up. Peers that the machine has are measured too; `pip install --group bench` gets two of them, and what plots
need. Linux only.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import plot, proxies, report, scenarios
from bench.measure import Result
from bench.processes import BenchFailed, Cores
from bench.wire import allow_files

SCENARIOS = {
    "requests": scenarios.requests,
    "streams": scenarios.streams,
    "latency": scenarios.latency,
    "workers": scenarios.workers,
    "memory": scenarios.memory,
}
QUICK = {
    "connections": [32],
    "prompts": [1],
    "streams": [100, 400],
    "seconds": 1.5,
    "held": 1000,
    "total": 50_000,
    "proxies": [proxies.GATEWAY, *proxies.PEERS],
}
FULL = {
    "connections": [1, 32, 256],
    "prompts": [1, 64, 1024],
    "streams": [100, 400, 2000],
    "seconds": 2.0,
    "held": 10_000,
    "total": 1_000_000,
    "proxies": [],
}
ALL = {"total": 200_000}
"""A million requests would take longer than all the rest."""


def numbers(text: str) -> list[int]:
    """As in 1,32,256."""
    return [int(one) for one in text.split(",")]


def scenario(text: str) -> str:
    """One that there is."""
    if text not in {*SCENARIOS, "all", "table"}:
        raise argparse.ArgumentTypeError(f"there is no {text!r}")
    return text


def parser() -> argparse.ArgumentParser:
    """The command line; what is not given comes from QUICK or FULL."""
    made = argparse.ArgumentParser(
        prog="bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    made.add_argument("what", nargs="*", default=[], type=scenario, metavar="SCENARIO")
    made.epilog = (
        f"SCENARIO: {', '.join(SCENARIOS)}, all, or table, which measures nothing; none: requests and streams, --quick"
    )
    made.add_argument("--quick", action="store_true", default=False, help="small sizes and short windows")
    made.add_argument("--proxies", type=lambda text: text.split(","), help="names, with commas; all that are found")
    made.add_argument("--peers-bin", default=os.environ.get("BENCH_PEERS_BIN"), help="a directory with peers' programs")
    made.add_argument("--connections", type=numbers, help="of requests: 1,32,256")
    made.add_argument("--prompts", type=numbers, help="of requests, in KiB: 1,64,1024")
    made.add_argument("--streams", type=numbers, help="100,400,2000")
    made.add_argument("--interval", type=float, default=0.0, help="seconds between events; 0.02, more for many streams")
    made.add_argument("--rate", type=numbers, default=[], dest="rates", help="of latency, requests/s: 500,3000")
    made.add_argument("--held", type=int, help="streams held for memory; 0: leave it out")
    made.add_argument("--total", type=int, help="requests for memory; 0: leave it out")
    made.add_argument("--seconds", type=float, help="of a window")
    made.add_argument("--repeat", type=int, default=3, help="windows")
    made.add_argument("--json", type=Path, default=None, help="write the results here; `table` reads them")
    made.add_argument("--plot", type=Path, default=None, metavar="DIRECTORY", help="write performance-*.png and .svg there")
    return made


def chosen(names: Sequence[str], directory: str | None) -> list[proxies.Proxy]:
    """The proxies of these names, or all; a line for each that is not there."""
    there, missing = proxies.found(directory)
    known = [proxy.name for proxy in there] + missing
    if unknown := set(names) - set(known):
        raise BenchFailed(f"no such proxy: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    for name in missing:
        if not names or name in names:
            scenarios.note(f"{name} is not on this machine: left out (--peers-bin says where to look)")
    return [proxy for proxy in there if not names or proxy.name in names]


def plan_of(options: argparse.Namespace) -> scenarios.Plan:
    """What to measure, and how much of it."""
    files = allow_files()
    usual = QUICK if options.quick else {**FULL, **(ALL if "all" in options.what else {})}
    values = {**usual, **vars(options)}
    cores = Cores.of_this_machine()
    if cores.proxy == cores.others:
        scenarios.note("one core alone: load, backend and proxy are in each other's way")
    else:
        os.sched_setaffinity(0, cores.others)
    names = ("connections", "prompts", "streams", "seconds", "repeat", "rates", "held", "total", "interval")
    return scenarios.Plan(
        proxies=chosen(values["proxies"], options.peers_bin),
        cores=cores,
        files=files,
        named="proxies" in options,
        **{name: values[name] for name in names},
    )


def measure(options: argparse.Namespace) -> tuple[dict[str, str], list[Result]]:
    """Measure, and keep what there is even if it is interrupted."""
    about = report.machine()
    results: list[Result] = []
    options.quick = options.quick or not options.what
    names = list(SCENARIOS) if "all" in options.what else options.what or ["requests", "streams"]
    plan = plan_of(options)
    try:
        for name in names:
            for result in SCENARIOS[name](plan):
                results.append(result)  # one by one: an interruption loses none
    finally:
        if options.json:
            report.save(options.json, about, results)
    return about, results


def main() -> None:
    """Measure or read, print tables, draw."""
    made = parser()
    options = made.parse_args()
    # An end from outside must not leave proxies behind: the exception unwinds through whatever is running.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, lambda *_: sys.exit(1))
    if "table" in options.what and not options.json:
        made.error("table needs --json, the file with the results")
    try:
        if options.plot:
            plot.pyplot()  # better now than after twenty minutes
        about, results = report.restore(options.json) if "table" in options.what else measure(options)
        print(", ".join(f"{name}: {value}" for name, value in about.items()))
        print("\n".join(report.markdown(results)))
        for path in plot.draw(results, options.plot) if options.plot else []:
            scenarios.note(f"wrote {path}")
        if any(result.case == scenarios.FAILED for result in results):
            sys.exit(1)
    except BenchFailed as problem:
        sys.exit(f"bench: {problem}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
