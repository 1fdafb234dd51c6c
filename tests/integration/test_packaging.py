"""What is installed, from a wheel or editable, is a program that twistd knows."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from .processes import clean_environment

ROOT = Path(__file__).parents[2]
INSTALL_SECONDS = 300


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean_environment(PIP_DISABLE_PIP_VERSION_CHECK="1"),
        capture_output=True,
        text=True,
        timeout=INSTALL_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def new_environment(directory: Path) -> Path:
    """The python of a new, empty virtual environment, which has pip, whatever made our own."""
    run(sys.executable, "-m", "venv", "venv", cwd=directory)
    return directory / "venv/bin/python"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    run(new_environment(directory), "-m", "pip", "wheel", "-q", "--no-deps", "-w", directory, ROOT, cwd=directory)
    (built,) = directory.glob("inference_gateway-*.whl")
    return built


@pytest.mark.timeout(INSTALL_SECONDS)
@pytest.mark.parametrize("how", ["wheel", "editable"])
def test_a_new_environment_has_the_plugin(tmp_path: Path, wheel: Path, how: str) -> None:
    what: list[str | Path] = [wheel] if how == "wheel" else ["--editable", ROOT]
    python = new_environment(tmp_path)
    run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", *what, cwd=tmp_path)
    assert "inference-gateway" in run(tmp_path / "venv/bin/twistd", "--help", cwd=tmp_path)
    assert "keys" in run(tmp_path / "venv/bin/inference-gateway", "--help", cwd=tmp_path)
    assert "--by" in run(tmp_path / "venv/bin/inference-gateway", "usage", "--help", cwd=tmp_path)
    assert "--backend-url=" in run(tmp_path / "venv/bin/twistd", "inference-gateway", "--help", cwd=tmp_path)


def test_the_wheel_holds_the_package_and_the_plugin_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert "twisted/plugins/inference_gateway.py" in names
    assert "gateway/py.typed" in names
    assert {"gateway/sql/sqlite-1.sql", "gateway/sql/postgresql-1.sql"} <= set(names)
    assert "gateway/dashboard.html" in names
    assert {name.split("/")[0] for name in names} == {"gateway", "twisted"}
    assert [name for name in names if name.startswith("twisted/")] == ["twisted/plugins/inference_gateway.py"]
    assert not [name for name in names if "dropin.cache" in name or "__pycache__" in name]
