"""The way of the ledger's rows from memory over the journal to the database, on two threads.

One thread appends to the journal, which is when a row counts as written: whatever happens to the process or the database
after that, it is delivered. The other delivers: rows go to the database, and stay where they are until it has them.
Rows are known by their request, so that twice is as good as once. When the journal cannot be written, rows stay in memory,
and go to the database from there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import chain
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread
from typing import Final

from .core.ledger import is_whole
from .database import Database, DatabaseAway, UnreadableLines
from .journal import Journal

PATIENCE: Final = (0.25, 30.0)
"""Seconds until a database that is away is tried again: at first, and at most."""

OFTEN: Final = 60.0
"""Seconds between two looks for rows that are too old."""

FEW: Final = 1000
"""Rows that are deleted at a time: others may use the database in between."""

DAY: Final = 86400.0


class Delivery:
    """``keep`` is how many seconds rows are kept, 0 for ever; ``unix`` gives Unix seconds; ``tell`` is told, on some thread,
    what the log should say.

    ``settled`` counts the rows that no longer depend on this process' memory, ``journaled`` and ``written`` those on the
    disk and in the database, ``lost`` those of which nothing could be made.
    """

    def __init__(
        self, database: Database, journal: Journal, keep: float, unix: Callable[[], float], tell: Callable[[str], object]
    ) -> None:
        self.settled = self.journaled = self.written = self.lost = 0
        self.away = ""
        self._database = database
        self._journal = journal
        self._keep = keep
        self._unix = unix
        self._tell = tell
        self._lock = Lock()
        self._pending: list[bytes] = []
        self._unwritable = ""
        self._marks: deque[tuple[int, float]] = deque()  # which batch, and when its first row ended
        self._given = self._appended = 0
        self._forget_at = 0.0
        self._batches: SimpleQueue[list[bytes] | None] = SimpleQueue()
        self._news = Event()
        self._stopping = Event()
        self._met = False
        self._ended: Callable[[], object] = bool

    # --- what the reactor's thread calls

    def start(self) -> None:
        """Begin, with what an earlier process has left in the journal."""
        self._news.set()
        for name, work in (("journal", self._append_forever), ("database", self._deliver_forever)):
            Thread(target=work, name=f"ledger-{name}", daemon=True).start()  # a database that hangs does not keep us here

    def give(self, lines: list[bytes], first: float) -> None:
        """A batch of rows; the first of these requests ended then."""
        self._given += 1
        if len(self._marks) < FEW:  # while the database is away, the oldest one is what counts
            self._marks.append((self._given, first))
        self._batches.put(lines)

    def stop(self, ended: Callable[[], object]) -> None:
        """Append and deliver what there is, and end; then ``ended`` is called, on another thread."""
        self._ended = ended
        self._batches.put(None)

    def oldest(self) -> float | None:
        """When the oldest row ended that the database does not have."""
        try:
            return self._marks[0][1]
        except IndexError:
            return None

    @property
    def waiting(self) -> int:
        """Bytes of rows in the journal."""
        return self._journal.waiting

    # --- the journal's thread

    def _append_forever(self) -> None:
        going = True
        while going:
            batches, going = self._next_batches()
            if batches:
                self.append(batches)
        self._stopping.set()
        self._news.set()

    def _next_batches(self) -> tuple[list[list[bytes]], bool]:
        """All that there are: they are synced together."""
        batches = []
        batch = self._batches.get()
        while batch is not None:
            batches.append(batch)
            try:
                batch = self._batches.get_nowait()
            except Empty:
                return batches, True
        return batches, False

    def append(self, batches: list[list[bytes]]) -> None:
        """Into the journal, with what did not fit before; if that cannot be, they wait in memory."""
        with self._lock:
            self._pending += chain.from_iterable(batches)
            try:
                self._journal.append(self._pending)
            except OSError as problem:
                self._say_unwritable(problem.strerror or str(problem))
            else:
                self._say_unwritable("")
                self.journaled += len(self._pending)
                self.settled += len(self._pending)
                self._pending = []
            self._appended += len(batches)
        self._news.set()

    def _say_unwritable(self, why: str) -> None:
        if why and not self._unwritable:
            self._tell(f"the usage ledger's journal cannot be written: {why}; rows are kept in memory")
        self._unwritable = why

    # --- the database's thread

    def _deliver_forever(self) -> None:
        patience, last = PATIENCE[0], False
        while not last:
            last = self._stopping.is_set()
            self._news.clear()
            try:
                self.deliver()
            except DatabaseAway:
                self._stopping.wait(0.0 if last else patience)
                patience = min(2 * patience, PATIENCE[1])
            else:
                patience = PATIENCE[0]
                self._news.wait(0.0 if last else OFTEN)
        self._journal.close()
        self._database.close()
        self._ended()

    def deliver(self) -> None:
        """All that is there, to the database; then delete what is too old. Raises `DatabaseAway`."""
        try:
            with self._lock:
                appended = self._appended
            if self.away or not self._met:
                self._database.insert([])  # so that it shows whether it is there
                self._met = True
            while lines := self._journal.chunk():
                self._insert(lines)
                self._journal.delivered()
            self._deliver_pending()
            while self._marks and self._marks[0][0] <= appended:
                self._marks.popleft()
            self._say_away("")
            self._forget()
        except (DatabaseAway, OSError) as problem:  # the other: the journal cannot be read
            self._say_away(str(problem) or "no reason given")
            raise DatabaseAway from None

    def _deliver_pending(self) -> None:
        with self._lock:
            lines = self._pending[:]
        if lines:
            self._insert(lines)
        with self._lock:
            if self._pending[: len(lines)] == lines:  # else the journal has taken them, and they come again
                del self._pending[: len(lines)]
                self.settled += len(lines)

    def _insert(self, lines: list[bytes]) -> None:
        try:
            self._database.insert(lines)
        except UnreadableLines:
            whole = [line for line in lines if is_whole(line)]
            if len(whole) == len(lines):
                raise DatabaseAway("the database does not understand the rows") from None
            if whole:
                self._database.insert(whole)
            self.lost += len(lines) - len(whole)
            self._tell(f"the usage ledger's journal had {len(lines) - len(whole)} lines that are no rows")
            lines = whole
        self.written += len(lines)

    def _say_away(self, why: str) -> None:
        if why and not self.away:
            self._tell(f"the usage ledger's database is away: {why}; rows wait in the journal")
        elif self.away and not why:
            self._tell("the usage ledger's database is back, and has all rows")
        self.away = why

    def _forget(self) -> None:
        """A few at a time, and no more while there are new rows to deliver."""
        now = self._unix()
        if not self._keep or now < self._forget_at:
            return
        while self._database.delete(now - self._keep, FEW) == FEW:
            if self._news.is_set():
                return
        self._forget_at = now + OFTEN
