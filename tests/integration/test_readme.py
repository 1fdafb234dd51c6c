"""The README's examples, run exactly as they are printed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..conftest import cannot_run
from .processes import PATIENCE, Running, clean_environment, wait_for

README = (Path(__file__).parents[2] / "README.md").read_text()
CREATED = re.compile(r'"created":\d+')


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment in which curl finds localhost:8080 at a gateway on a free port."""
    if shutil.which("curl") is None:
        cannot_run("no curl", "apt-get install curl")
    with Running(tmp_path) as gateway:
        (tmp_path / ".curlrc").write_text(f'connect-to = "localhost:8080:127.0.0.1:{gateway.port}"\n')
        wait_for(lambda: gateway.get("/readyz")[0] == 200)
        yield clean_environment(CURL_HOME=str(tmp_path), NO_PROXY="*", GATEWAY_PORT_OF_TEST=str(gateway.port))


def examples() -> list[tuple[str, str]]:
    """(command, output) of each example in the README's console blocks."""
    found = []
    for block in re.findall(r"^```console\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        for example in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = example.partition("\n")
            found.append((command, output))
    return found


def test_every_curl_example_prints_what_the_readme_says(shell: dict[str, str]) -> None:
    commands = examples()
    assert len(commands) >= 9
    for command, output in commands:
        done = subprocess.run(["bash", "-c", command], env=shell, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 0, (command, done.stderr)
        said = CREATED.sub('"created":1700000000', done.stdout)
        assert said.rstrip("\n") == output.rstrip("\n"), command


def test_the_python_example_works(shell: dict[str, str]) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    there = code.replace("localhost:8080", f"127.0.0.1:{shell['GATEWAY_PORT_OF_TEST']}")
    done = subprocess.run(
        [sys.executable, "-c", there], env=shell, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (done.stdout, done.stderr) == ("Echo: hello\n", "")


def test_the_two_commands_are_the_makefiles() -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    for target in ("run", "test", "check", "bench"):
        assert re.search(rf"^{target}: ", makefile, re.MULTILINE)
        assert f"make {target}" in README


def test_every_code_is_in_the_documentation() -> None:
    from gateway.core.errors import CODES

    rows = re.findall(
        r"^\| (\d+) \| (\w+) \| (\w+) \| (\w+) \|", (Path(__file__).parents[2] / "docs/errors.md").read_text(), re.M
    )
    assert rows == [(str(code.status), code.type, name, code.fault) for name, code in CODES.items()]
