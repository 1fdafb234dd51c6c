"""docs/deployment.md names files and settings that there are."""

from __future__ import annotations

import re

from .variables import DEPLOY, ROOT, unknown

TEXT = (ROOT / "docs" / "deployment.md").read_text("utf-8")


def test_the_files_are_there() -> None:
    named = set(re.findall(r"\bdeploy/[\w./-]+\w", TEXT))
    assert len(named) > 8
    assert [name for name in named if not (ROOT / name).exists()] == []
    parts = re.findall(r"(?m)^\| `([\w/]+)` \|", TEXT)
    assert [part for part in parts if (DEPLOY / "kubernetes" / part).is_dir()] == [
        "base",
        "monitoring",
        "models",
        "overlays/example",
    ]
    assert [name for name in re.findall(r"\]\((\w+\.md)\)", TEXT) if not (ROOT / "docs" / name).is_file()] == []


def test_the_settings_are_there() -> None:
    assert not unknown(re.findall(r"\bGATEWAY_[A-Z_]+", TEXT))
