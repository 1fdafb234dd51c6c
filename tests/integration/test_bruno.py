"""The Bruno collection in tests/bruno, run by its own command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..conftest import cannot_run
from .processes import Running, clean_environment, wait_for

ROOT = Path(__file__).parents[2]
COLLECTION = ROOT / "tests" / "bruno"
BRUNO = "@usebruno/cli@4.1.0"
HOME = ROOT / "build" / "bruno"
INSTALL_SECONDS = 400


def node_environment() -> dict[str, str]:
    """Our own Node first: the one that pip installed beside this Python."""
    return clean_environment(PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


def bru() -> str:
    """Bruno's command, installed with npm at the first call."""
    command = HOME / "node_modules/.bin/bru"
    if not command.exists():
        HOME.mkdir(parents=True, exist_ok=True)
        npm = [
            "npm",
            "install",
            "--prefix",
            str(HOME),
            "--no-audit",
            "--no-fund",
            "--no-package-lock",
            "--ignore-scripts",
            BRUNO,
        ]
        try:
            subprocess.run(npm, env=node_environment(), check=True, capture_output=True, timeout=INSTALL_SECONDS)
        except (OSError, subprocess.SubprocessError) as problem:
            said = getattr(problem, "stderr", b"") or b""
            cannot_run(f"no Bruno ({problem} {said.decode()[-500:]})", f"npm install --prefix build/bruno {BRUNO}")
    return str(command)


@pytest.mark.timeout(INSTALL_SECONDS + 100)
def test_the_collection_passes(tmp_path: Path) -> None:
    command = bru()
    report = tmp_path / "report.json"
    with Running(tmp_path) as gateway:
        wait_for(lambda: gateway.get("/readyz")[0] == 200)
        options = ["--env", "local", "--env-var", f"base_url={gateway.url}", "--reporter-json", str(report), "-r"]
        done = subprocess.run(
            [command, "run", *options],
            cwd=COLLECTION,
            env=node_environment(),
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = json.loads(report.read_text())
    requests = len(list(COLLECTION.glob("* endpoints/*.bru")))
    assert requests >= 16
    assert run["summary"]["totalRequests"] == run["summary"]["passedRequests"] == requests
    assert run["summary"]["totalAssertions"] == run["summary"]["passedAssertions"] > 3 * requests / 2
