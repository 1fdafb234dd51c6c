"""Which backend a request gets, and how many requests each one holds."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from .backend import Backend


class Dispatcher:
    """Leases backends. With one backend there is nothing to choose, and everything to count."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.inflight = {backend.name: 0}

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[Backend]:
        """A backend; it is given back however the block ends."""
        backend = self._backend
        self.inflight[backend.name] += 1
        try:
            yield backend
        finally:
            self.inflight[backend.name] -= 1
