from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.task import Clock

from gateway.core.api_keys import ApiKey, with_field, with_key
from gateway.core.readers import SettingsError
from gateway.keys_file import KeysFile, changing, read_keys
from gateway.watched import POLL_SECONDS

from .conftest import Said


def table(id: str) -> dict[str, str]:
    return {"id": id, "tenant": "t", "hash": hashlib.sha256(id.encode()).hexdigest()}


def written(path: Path, *ids: str) -> None:
    text = ""
    for id in ids:
        text = with_key(text, table(id))
    path.write_text(text)


class Watched:
    """A keys file on a stopped clock; `used` are the ids of each set of keys that there was."""

    def __init__(self, path: Path) -> None:
        self.clock = Clock()
        self.used: list[list[str]] = []
        self.threads = 0
        self.service = KeysFile(path, self.clock, self._use, self._in_thread)
        self.service.startService()

    def _use(self, keys: Sequence[ApiKey]) -> None:
        self.used.append([key.id for key in keys])

    def _in_thread(self, call: Callable[[], Any]) -> Deferred[Any]:
        self.threads += 1
        return maybeDeferred(call)

    def wait(self) -> None:
        self.clock.pump([POLL_SECONDS] * 2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "keys.toml"
    written(found, "a")
    return found


@pytest.fixture
def said() -> Iterator[list[str]]:
    with Said("gateway.files") as lines:
        yield lines


def test_a_changed_file_is_read_again(path: Path) -> None:
    watched = Watched(path)
    watched.wait()
    assert (watched.used, watched.threads) == ([["a"]], 0)
    written(path, "a", "b")
    watched.wait()
    assert watched.used == [["a"], ["a", "b"]]
    watched.wait()
    assert watched.threads == 1
    watched.service.stopService()
    assert not watched.clock.getDelayedCalls()


def test_a_file_in_the_place_of_another_is_seen_even_if_it_looks_the_same(path: Path) -> None:
    watched = Watched(path)
    before = path.stat()
    other = path.with_name("other")
    written(other, "b")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)
    assert path.stat().st_size == before.st_size
    watched.wait()
    assert watched.used[-1] == ["b"]


def test_a_broken_file_keeps_the_old_keys_and_is_told_of_once(path: Path, said: list[str]) -> None:
    watched = Watched(path)
    path.write_text(path.read_text() + "[[keys]]\nid = 5\n")
    for _ in range(5):
        watched.wait()
    assert watched.used == [["a"]]
    assert len(said) == 1
    assert "key 5.tenant: missing" in said[0]
    assert "the keys of before stay" in said[0]
    written(path, "a", "c")
    watched.wait()
    assert watched.used[-1] == ["a", "c"]


def test_a_file_that_vanishes_keeps_the_keys_until_it_is_there_again(path: Path, said: list[str]) -> None:
    watched = Watched(path)
    path.unlink()
    watched.wait()
    watched.wait()
    assert watched.used == [["a"]]
    assert len(said) == 1
    written(path, "b")
    watched.wait()
    assert watched.used[-1] == ["b"]


def test_what_is_read_when_the_gateway_stops_is_not_used(path: Path) -> None:
    clock, used, waiting = Clock(), list[Sequence[ApiKey]](), [Deferred[Any]()]
    service = KeysFile(path, clock, used.append, lambda call: waiting[0])
    service.startService()
    written(path, "b")
    clock.pump([POLL_SECONDS] * 2)
    service.stopService()
    assert len(used) == 1
    assert not clock.getDelayedCalls()


@pytest.mark.parametrize("content", [None, "[[keys]\n", "\0", "x" * 100])
def test_a_start_without_a_good_file_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "keys.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SettingsError, match=r"keys\.toml"):
        Watched(path)


def test_a_new_file_is_its_owners_alone_and_an_old_one_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    with changing(path) as change:
        change.write(with_key(change.text, table("a")))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    link = tmp_path / "link.toml"
    link.symlink_to(path)
    with changing(link) as change:
        change.write(with_key(change.text, table("b")))
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [key.id for key in read_keys(path)] == ["a", "b"]
    assert sorted(found.name for found in tmp_path.iterdir()) == [".keys.toml.lock", "keys.toml", "link.toml"]


def test_a_change_that_could_not_be_read_is_not_written(path: Path) -> None:
    before = path.read_text()
    with changing(path) as change, pytest.raises(SettingsError):
        change.write(with_field(change.text, 0, "rpm", "many"))
    assert path.read_text() == before
    assert sorted(found.name for found in path.parent.iterdir()) == [".keys.toml.lock", "keys.toml"]


ADD = """
import sys
from pathlib import Path
from gateway.core.api_keys import with_key
from gateway.keys_file import changing
for number in range(10):
    with changing(Path(sys.argv[1])) as change:
        id = f"{sys.argv[2]}.{number}"
        change.write(with_key(change.text, {"id": id, "tenant": "t", "hash": id.encode().hex().rjust(64, "0")}))
"""


def test_of_changes_by_several_processes_none_is_lost(path: Path) -> None:
    running = [subprocess.Popen([sys.executable, "-c", ADD, str(path), name]) for name in "xyz"]
    assert [one.wait(60) for one in running] == [0, 0, 0]
    assert len(read_keys(path)) == 31
