"""Variables of the environment that a manifest sets for the gateway: each must be one that the gateway knows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from gateway.core.settings import TABLE, Settings, Source, resolve

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
AFTER_GRACE = 2 + 2 + 2 + 10
"""Seconds that a stop may take beyond the grace: answers, spans and settled limits that leave, and the ledger's database."""

_NAMES = {row.env for row in TABLE}
_OBSERVABILITY = (ROOT / "docs" / "observability.md").read_text("utf-8")


def unknown(names: Iterable[str]) -> set[str]:
    """Those that are neither in the table of settings nor, if they are OpenTelemetry's, in docs/observability.md."""
    return {name for name in names if name not in _NAMES and not (name.startswith("OTEL_") and f"`{name}`" in _OBSERVABILITY)}


def settings(variables: dict[str, str], file: dict[str, object] | None = None) -> Settings:
    """What the gateway makes of them, and of a TOML file under them; raises `SettingsError` as its start would."""
    return resolve([Source("file", "file", file or {}), Source("environment", "env", variables)])
