"""The import rules of docs/architecture.md."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "gateway"
MODULES = sorted(SOURCE.rglob("*.py"))
IMPURE = {
    "time",
    "socket",
    "asyncio",
    "threading",
    "os",
    "pathlib",
    "random",
    "uuid",
    "sqlite3",
    "psycopg",
    "twisted",
    "treq",
    "klein",
    "dotenv",
    "kubernetes",
}
LOW_TO_HIGH = [
    "net",
    "exchange",
    "watched",
    "keys_file",
    "jwks",
    "probe",
    "backend",
    "echo",
    "looks",
    "pool",
    "discovery",
    "dns_source",
    "kubernetes_source",
    "members",
    "windows",
    "dispatch",
    "hedge",
    "relay",
    "limiter",
    "redis_link",
    "redis_limiter",
    "calls",
    "inference",
    "metrics",
    "guard",
    "loop_delay",
    "edge",
    "otel_export",
    "telemetry",
    "log_file",
    "logs",
    "dashboard",
    "answering",
    "app",
    "journal",
    "database",
    "sqlite",
    "postgresql",
    "ledger_place",
    "delivery",
    "ledger",
    "inherited",
    "notify",
    "offspring",
    "lifecycle",
    "process",
    "parts",
    "reload",
    "workers",
    "service",
    "command",
    "remote",
    "check_command",
    "usage_command",
    "top",
    "cli",
]


def imports(path: Path) -> set[str]:
    """Absolute names of what a module imports; ours as ``gateway.room``. Imports for type checking alone do not count."""
    package = ["gateway", *path.relative_to(SOURCE).parent.parts]
    found = set()
    tree = ast.parse(path.read_text())
    skipped = {
        id(x)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for x in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} if node.module else {f"{module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent.name == "core"], ids=lambda path: path.name)
def test_core_is_pure(path: Path) -> None:
    for name in imports(path):
        assert name.split(".")[0] not in IMPURE, f"{path.name} imports {name}"
        assert not name.startswith("gateway") or name.startswith("gateway.core"), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent.name != "core"], ids=lambda path: path.name)
def test_imports_run_downwards(path: Path) -> None:
    room = "net" if path.parent.name == "net" else path.stem
    if room == "__init__":
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "gateway" and len(parts) > 1 and parts[1] not in ("core", "__version__", room):
            assert LOW_TO_HIGH.index(parts[1]) < LOW_TO_HIGH.index(room), f"{room} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_only_the_composition_root_knows_the_reactor(path: Path) -> None:
    assert path.stem == "service" or "import reactor" not in path.read_text()
