"""SECURITY.md names tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_each_test_that_shows_something_is_there() -> None:
    rows = [line for line in (ROOT / "SECURITY.md").read_text("utf-8").splitlines() if line.startswith("| ")]
    named = {name.strip() for row in rows for name in row.rstrip("| ").split("|")[-1].split(",") if "test_" in name}
    assert len(named) > 20
    missing = [name for name in named if not (ROOT / "tests" / f"{name}.py").is_file()]
    assert not missing


def test_each_setting_is_there() -> None:
    from gateway.core.settings import TABLE

    named = set(re.findall(r"`(GATEWAY_[A-Z_]+)", (ROOT / "SECURITY.md").read_text("utf-8")))
    assert named <= {row.env for row in TABLE}
