"""The command `inference-gateway keys`, and requests with what it makes."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

from .processes import PATIENCE, Running, clean_environment

HELLO = {"model": "echo", "messages": [{"role": "user", "content": "hello"}]}


def command(directory: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``inference-gateway`` with these arguments, as its console script does."""
    return subprocess.run(
        [sys.executable, "-m", "gateway.cli", *arguments],
        cwd=directory,
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def keys(path: Path, *arguments: str) -> str:
    """What ``inference-gateway keys`` prints."""
    done = command(path.parent, "keys", *arguments, "--keys", path.name)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def add(path: Path, tenant: str, *options: str) -> str:
    """A new key."""
    return keys(path, "add", "--tenant", tenant, *options)


def id_of(key: str) -> str:
    return key.split("-")[1]


def ask(
    gateway: Running, key: str | None = None, body: Any = HELLO, path: str = "/v1/chat/completions", **headers: str
) -> tuple[int, Any]:
    """Status and JSON of a POST, or of a GET without a body, with a key."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    named |= {} if key is None else {"Authorization": f"Bearer {key}"}
    raw = None if body is None else json.dumps(body).encode()
    return gateway._call(urllib.request.Request(gateway.url + path, raw, {"Content-Type": "application/json"} | named))


def status(gateway: Running, key: str | None = None) -> int:
    """Of a chat completion with this key."""
    return ask(gateway, key)[0]
