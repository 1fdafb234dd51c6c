"""The file of API keys: read, changed by one process at a time, and watched for what others change."""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from twisted.internet.interfaces import IReactorTime

from .core.api_keys import ApiKey, parse_keys
from .core.readers import SettingsError
from .watched import InThread, Watched

MAX_FILE: Final = 16 * 1024 * 1024
NEW_MODE: Final = 0o600


def read_text(path: Path) -> str:
    """The file's text; empty if there is none yet. Raises `SettingsError`."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE + 1)
        if len(raw) > MAX_FILE:
            raise SettingsError(f"{path}: is larger than {MAX_FILE} bytes")
        return raw.decode("utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as problem:
        raise SettingsError(f"{path}: cannot be read: {_why(problem)}") from None


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys of a file that must be there. Raises `SettingsError`."""
    if not path.exists():
        raise SettingsError(f"{path}: there is no such file; `inference-gateway keys add` makes one")
    return parse_keys(str(path), read_text(path))


class Change:
    """A change of the file under way: ``text`` as it stands, `write` what is to stand there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.text = read_text(path)
        self.keys = parse_keys(str(path), self.text)

    def write(self, text: str) -> tuple[ApiKey, ...]:
        """Put the text in the file's place in one step, if its keys can be read; they are returned."""
        keys = parse_keys(str(self._path), text)
        try:
            _replace(self._path, text.encode("utf-8"))
        except OSError as problem:
            raise SettingsError(f"{self._path}: cannot be written: {_why(problem)}") from None
        return keys


@contextmanager
def changing(path: Path) -> Iterator[Change]:
    """A `Change` that no other process makes one beside. Raises `SettingsError`.

    The lock is on a file of its own, since each change puts another file in the place of the one with the keys.
    """
    path = path.resolve()  # of a link, the file that it means
    try:
        lock = os.open(path.with_name(f".{path.name}.lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, NEW_MODE)
    except OSError as problem:
        raise SettingsError(f"{path}: cannot be locked: {_why(problem)}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Change(path)
    finally:
        os.close(lock)


def _replace(path: Path, content: bytes) -> None:
    """A reader sees the old file or the new one, also after a crash. Mode and owner stay; a new file is its owner's alone."""
    before = path.stat() if path.exists() else None
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            if before is not None:
                with suppress(PermissionError):  # who is not root writes files of its own
                    os.fchown(descriptor, before.st_uid, before.st_gid)
            os.fchmod(descriptor, stat.S_IMODE(before.st_mode) if before is not None else NEW_MODE)
            file.flush()
            os.fsync(descriptor)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _why(problem: Exception) -> str:
    return problem.strerror or str(problem) if isinstance(problem, OSError) else str(problem)


class KeysFile(Watched[Sequence[ApiKey]]):
    """Reads the keys again whenever the file has changed, and tells ``use`` of them: all, or none if one is wrong. A file of
    thousands of keys takes a while to parse. Raises `SettingsError`."""

    def __init__(self, path: Path, clock: IReactorTime, use: Callable[[Sequence[ApiKey]], object], in_thread: InThread) -> None:
        path = path.absolute()  # a daemon changes its directory
        super().__init__(
            [path], clock, lambda: read_keys(path), use, in_thread, told=lambda keys: f"keys: {len(keys)}", what="keys"
        )
