"""Which backend a request gets, and how many requests each one holds."""

from __future__ import annotations

from .backend import Backend


class Lease:
    """A backend for the length of a block; it is given back however the block ends."""

    def __init__(self, backend: Backend, inflight: dict[str, int]) -> None:
        self._backend = backend
        self._inflight = inflight

    def __enter__(self) -> Backend:
        self._inflight[self._backend.name] += 1
        return self._backend

    def __exit__(self, *_: object) -> None:
        self._inflight[self._backend.name] -= 1


class Dispatcher:
    """Leases backends. With one backend there is nothing to choose, and everything to count."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.inflight = {backend.name: 0}

    def lease(self) -> Lease:
        """A backend."""
        return Lease(self._backend, self.inflight)
