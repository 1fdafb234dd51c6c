"""The units are units, for systemd's own tools, and keep the gateway in its box."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.process import is_loopback

from ..conftest import cannot_run
from .variables import AFTER_GRACE, DEPLOY, settings, unknown

UNITS = DEPLOY / "systemd"
INSTALLED = "/opt/inference-gateway/bin"
EXPOSURE = 15
"""What `systemd-analyze security` finds left to reach, at most: tenths, of 0 to 100. A service without a box has 96."""

Unit = dict[str, list[str]]
"""All values of each key."""


def analyze(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("systemd-analyze")
    if program is None:
        cannot_run("no systemd-analyze", "apt-get install systemd")
    return subprocess.run([program, *arguments], cwd=cwd, capture_output=True, text=True, timeout=30, check=False)


def read(name: str) -> Unit:
    found: Unit = {}
    for line in (UNITS / name).read_text().splitlines():
        if line and not line.startswith(("#", "[")):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def environment(unit: Unit) -> dict[str, str]:
    words = [word.partition("=") for line in unit["Environment"] for word in line.split()]
    return {name: value for name, _, value in words}


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units, as if this environment were the installed one."""
    for unit in ("inference-gateway.service", "inference-gateway.socket"):
        text = (UNITS / unit).read_text()
        (tmp_path / unit).write_text(text.replace(INSTALLED, str(Path(sys.executable).parent)))
    return tmp_path


def test_systemd_has_nothing_to_say(installed: Path) -> None:
    said = analyze("verify", "--man=no", "./inference-gateway.service", "./inference-gateway.socket", cwd=installed)
    assert (said.returncode, said.stdout, said.stderr) == (0, "", "")


def test_systemd_finds_little_that_it_could_still_reach(installed: Path) -> None:
    said = analyze("security", "--offline=true", f"--threshold={EXPOSURE}", "./inference-gateway.service", cwd=installed)
    assert said.returncode == 0, said.stdout + said.stderr


def test_a_socket_that_everybody_reaches_is_one_of_a_gateway_that_asks_for_keys() -> None:
    """The gateway refuses to be open to all by the host it is told; a socket that it is handed must be of that host."""
    (place,) = read("inference-gateway.socket")["ListenStream"]
    given = settings(environment(read("inference-gateway.service")))
    assert place == str(given.port)
    assert not is_loopback(given.host)
    assert given.keys
    assert not given.insecure_open


def test_it_sets_what_there_is() -> None:
    assert not unknown(environment(read("inference-gateway.service")))


def test_systemd_waits_longer_for_the_end_than_the_gateway_takes() -> None:
    (patience,) = read("inference-gateway.service")["TimeoutStopSec"]
    assert float(patience) > settings({}).grace + AFTER_GRACE


def test_it_may_open_all_the_files_that_it_wants() -> None:
    (files,) = read("inference-gateway.service")["LimitNOFILE"]
    assert int(files) > 2 * settings({}).max_connections + 100


def test_the_service_runs_as_the_user_that_is_made_for_it() -> None:
    (user,) = read("inference-gateway.service")["User"]
    lines = (UNITS / "inference-gateway.sysusers").read_text().splitlines()
    assert [line.split()[1] for line in lines if not line.startswith("#")] == [user]
