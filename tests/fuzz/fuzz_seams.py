"""Fuzzes one of the seams of ``seams.py``: ``python -m tests.fuzz.fuzz_seams NAME``, or ``make fuzz`` for all.

Without a name it says which there are. What follows the name goes to libFuzzer; a file of bytes is tried alone.
"""

from __future__ import annotations

import sys

import atheris

from .harness import run
from .seams import ODD, all_seams

with atheris.instrument_imports(include=["gateway"]):
    SEAMS = all_seams()

SHORT = 1000
"""Bytes of an odd value to begin with; what is nested more deeply takes long to be refused."""


def main() -> None:
    if len(sys.argv) == 1:
        print("\n".join(SEAMS))
        return
    name = sys.argv.pop(1)
    if name not in SEAMS:
        sys.exit(f"no seam is called {name}; there are {', '.join(SEAMS)}")
    run(SEAMS[name].one, [*SEAMS[name].seeds, *(odd for odd in ODD if len(odd) <= SHORT)])


if __name__ == "__main__":
    main()
