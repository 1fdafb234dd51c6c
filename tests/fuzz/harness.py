"""What the fuzzers share: seeds from the corpus, and a run that is bounded by time.

They stand apart from the tests: atheris instruments what it imports, and runs until it is stopped.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import atheris

SECONDS: Final = 60
MAX_BYTES: Final = 8192


def run(target: Callable[[bytes], None], seeds: Iterable[bytes]) -> None:
    """Fuzz for a while; further arguments are libFuzzer's own. An exception ends the run, and writes the bytes to a file; files
    that are named are tried, and nothing else."""
    logging.disable()
    with tempfile.TemporaryDirectory() as directory:
        for number, seed in enumerate(seeds):
            Path(directory, f"{number:04}").write_bytes(seed[:MAX_BYTES])
        limits = [f"-max_total_time={SECONDS}", f"-max_len={MAX_BYTES}", "-timeout=10", "-print_final_stats=1"]
        # libFuzzer takes files to try, or directories to fuzz with, and not both.
        corpus = [] if any(Path(given).is_file() for given in sys.argv[1:]) else [directory]
        atheris.Setup([sys.argv[0], *limits, *sys.argv[1:], *corpus], target)
        atheris.Fuzz()


def pieces(data: bytes) -> list[bytes]:
    """The bytes but the first, cut in pieces as long as the first says."""
    step = max(1, data[0]) if data else 1
    rest = data[1:]
    return [rest[at : at + step] for at in range(0, len(rest), step)]
