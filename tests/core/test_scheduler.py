from __future__ import annotations

import heapq
import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.core.load import Load
from gateway.core.policy import POLICIES
from gateway.core.prefix import blocks_of
from gateway.core.scheduler import LONGEST, Scheduler
from gateway.core.tickets import Bounds, Hopeless, QueueFull, Ticket
from gateway.core.usage import Usage

TEXT = "".join(f"{i} bottles of beer, " for i in range(3000))


def scheduler_of(*names: str, policy: str = "expected-completion", requests: int = 1000, slots: int | None = None) -> Scheduler:
    scheduler = Scheduler(POLICIES[policy](), Bounds(requests=requests, bytes=1000))
    for name in names:
        scheduler.set_backend(name, 0.0, slots=slots)
    return scheduler


class Servers:
    """Backends that read prompts at ``speed`` tokens a second, one after another or side by side, and answer at once."""

    def __init__(self, scheduler: Scheduler, speed: float, *, serial: bool = True) -> None:
        self.scheduler = scheduler
        self.now = 0.0
        self.finished: list[tuple[float, Ticket]] = []
        self._speed = speed
        self._serial = serial
        self._free: dict[str | None, float] = {}
        self._running: list[tuple[float, int, Ticket]] = []

    def send(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            begin = max(self._free.get(ticket.backend, 0.0), self.now) if self._serial else self.now
            end = self._free[ticket.backend] = begin + ticket.prompt_tokens / self._speed
            heapq.heappush(self._running, (end, id(ticket), ticket))

    def submit(self, ticket: Ticket) -> None:
        self.send([ticket] if self.scheduler.submit(ticket, self.now) else self.scheduler.schedule(self.now))

    def run(self, until: float = math.inf) -> None:
        """Until then, or until nothing is left to happen."""
        while True:
            end = self._running[0][0] if self._running else math.inf
            when = min(end, self.scheduler.next_wake(self.now) or math.inf)
            if when > until or when == math.inf:
                break
            self.now = max(when, self.now)
            if end <= when:
                ticket = heapq.heappop(self._running)[2]
                self.finished.append((self.now, ticket))
                self.scheduler.first_token(ticket, self.now)
                self.scheduler.release(ticket, self.now, Usage(ticket.prompt_tokens, 1, 0))
            self.send(self.scheduler.schedule(self.now))
        self.now = max(self.now, until) if until < math.inf else self.now

    def warm_up(self, tokens: int = 1000, count: int = 60) -> None:
        """Let the scheduler see how they work: alone, and several at a time."""
        for number in range(count):
            self.submit(Ticket("m", self.now, prompt_tokens=tokens))
            if number % 4 == 0:
                self.run(self.now + 5 * tokens / self._speed)
        self.run()


def test_a_ticket_is_bound_at_once_if_a_backend_is_free() -> None:
    scheduler = scheduler_of("a")
    ticket = Ticket("m", 1.0, prompt_tokens=10)
    assert scheduler.submit(ticket, 1.0)
    assert (ticket.backend, ticket.granted_at, ticket.decision) == ("a", 1.0, "least-load")


def test_without_a_free_slot_a_ticket_waits_until_one_is() -> None:
    scheduler = scheduler_of("a", slots=1)
    first, second = Ticket("m", 0.0), Ticket("m", 0.0)
    assert scheduler.submit(first, 0.0)
    assert not scheduler.submit(second, 0.0)
    assert scheduler.schedule(1.0) == []
    scheduler.release(first, 2.0, None)
    assert scheduler.schedule(2.0) == [second]


def test_a_full_queue_refuses_with_the_time_that_it_takes_to_drain() -> None:
    scheduler = scheduler_of("a", slots=1, requests=20)
    running = Ticket("m", 0.0)
    assert scheduler.submit(running, 0.0)
    waiting = [Ticket("m", 0.0) for _ in range(20)]
    assert not any(scheduler.submit(ticket, 0.0) for ticket in waiting)
    now = 0.0
    for _ in range(10):
        now += 3.0
        scheduler.release(running, now, None)
        [running] = scheduler.schedule(now)
        assert not scheduler.submit(Ticket("m", now), now)
    with pytest.raises(QueueFull) as refused:
        scheduler.submit(Ticket("m", now), now)
    assert refused.value.retry_after == pytest.approx(60.0, rel=0.15)


def test_a_queue_full_of_bytes_refuses_and_retry_after_is_bounded() -> None:
    scheduler = scheduler_of("a", slots=0)
    assert not scheduler.submit(Ticket("m", 0.0, size=900), 0.0)
    with pytest.raises(QueueFull) as refused:
        scheduler.submit(Ticket("m", 0.0, size=101), 0.0)
    assert 1.0 <= refused.value.retry_after <= LONGEST


def test_a_ticket_that_cannot_make_its_deadline_is_refused_once_there_is_evidence() -> None:
    servers = Servers(scheduler_of("a"), speed=100.0)
    servers.submit(Ticket("m", 0.0, prompt_tokens=10_000, deadline=1.0))  # nobody knows yet that this takes 100 s
    servers.run()
    servers.warm_up(tokens=200)
    with pytest.raises(Hopeless):  # 100 s of work, though nobody is before it
        servers.scheduler.submit(Ticket("m", servers.now, prompt_tokens=10_000, deadline=servers.now + 20.0), servers.now)
    for _ in range(10):
        servers.submit(Ticket("m", servers.now, prompt_tokens=1000))
    with pytest.raises(Hopeless):
        servers.scheduler.submit(Ticket("m", servers.now, prompt_tokens=10, deadline=servers.now + 5.0), servers.now)
    assert not servers.scheduler.submit(Ticket("m", servers.now, prompt_tokens=10, deadline=servers.now + 200.0), servers.now)


def test_a_ticket_expires_where_it_waits() -> None:
    scheduler = scheduler_of("a", slots=0)
    ticket = Ticket("m", 0.0, deadline=5.0)
    assert not scheduler.submit(ticket, 0.0)
    assert scheduler.next_wake(0.0) == 5.0
    assert scheduler.expire(4.9) == []
    assert scheduler.expire(5.0) == [ticket]
    assert scheduler.next_wake(5.0) is None


def test_a_model_without_a_backend_does_not_hold_up_another() -> None:
    scheduler = scheduler_of("a", slots=1)
    scheduler.set_backend("a", 0.0, models=frozenset({"x"}), slots=1)
    scheduler.set_backend("b", 0.0, models=frozenset({"y"}), accepting=False)
    for _ in range(200):
        assert not scheduler.submit(Ticket("y", 0.0, priority=0), 0.0)
    ticket = Ticket("x", 1.0, priority=2)
    assert not scheduler.submit(ticket, 1.0)
    assert scheduler.schedule(1.0) == [ticket]
    assert scheduler.knows_model("y")
    assert not scheduler.has_backend(Ticket("y", 0.0))
    assert not scheduler.knows_model("z")


def test_a_retry_does_not_go_where_it_has_been() -> None:
    scheduler = scheduler_of("a", "b")
    ticket = Ticket("m", 0.0, tried=frozenset({"a"}))
    assert scheduler.submit(ticket, 0.0)
    assert ticket.backend == "b"
    assert not scheduler.has_backend(Ticket("m", 0.0, tried=frozenset({"a", "b"})))


def test_no_ticket_is_held_back_while_nothing_is_known() -> None:
    scheduler = scheduler_of("a")
    assert all(scheduler.submit(Ticket("m", 0.0, prompt_tokens=50_000), 0.0) for _ in range(200))


def test_tickets_are_held_back_once_a_backend_is_seen_to_read_one_prompt_after_another() -> None:
    servers = Servers(scheduler_of("a"), speed=1000.0)
    servers.warm_up()
    for _ in range(10):
        servers.submit(Ticket("m", servers.now, prompt_tokens=1000))
    assert len(servers.scheduler.queue) >= 8
    begun, before = servers.now, len(servers.finished)
    servers.run()
    assert len(servers.finished) == before + 10
    assert servers.now - begun == pytest.approx(10.0, rel=0.01)  # it was never idle


def test_a_backend_that_reads_prompts_side_by_side_is_given_all_of_them() -> None:
    servers = Servers(scheduler_of("a"), speed=1000.0, serial=False)
    servers.warm_up()
    for _ in range(100):
        servers.submit(Ticket("m", servers.now, prompt_tokens=1000))
    assert len(servers.scheduler.queue) == 0


def test_short_work_passes_long_work_by_a_bounded_time() -> None:
    servers = Servers(scheduler_of("a"), speed=1000.0)
    servers.warm_up()
    long = Ticket("m", servers.now, prompt_tokens=10_000)
    for ticket in [*(Ticket("m", servers.now, prompt_tokens=1000) for _ in range(5)), long]:
        servers.submit(ticket)
    for _ in range(2000):  # as much short work as the backend can do, without end
        servers.submit(Ticket("m", servers.now, prompt_tokens=100))
        servers.run(servers.now + 0.1)
        if not long.waiting:
            break
    assert 0.0 < long.granted_at - long.arrived < 120.0


def test_a_prompt_whose_answer_is_not_streamed_holds_others_back_no_longer_than_predicted() -> None:
    servers = Servers(scheduler_of("a"), speed=1000.0)
    servers.warm_up()
    scheduler, now = servers.scheduler, servers.now
    assert scheduler.submit(Ticket("m", now, prompt_tokens=1000, streams=False), now)
    assert not scheduler.submit(Ticket("m", now, prompt_tokens=1000), now)
    wake = scheduler.next_wake(now)
    assert wake is not None
    assert wake - now == pytest.approx(0.9, abs=0.3)
    assert len(scheduler.schedule(wake + 1e-6)) == 1


def test_a_full_cache_and_a_reported_full_memory_hold_tickets_back() -> None:
    scheduler = Scheduler(POLICIES["expected-completion"]())
    scheduler.set_backend("a", 0.0, kv_tokens=10_000)
    assert scheduler.submit(Ticket("m", 0.0, prompt_tokens=20_000), 0.0)  # it has nothing else to do
    assert not scheduler.submit(Ticket("m", 0.0, prompt_tokens=100), 0.0)
    other = Scheduler(POLICIES["expected-completion"]())
    other.set_backend("a", 0.0)
    assert other.submit(Ticket("m", 0.0), 0.0)
    other.set_backend("a", 0.0, load=Load(1, 0, 0.99, 0.0))
    assert not other.submit(Ticket("m", 1.0), 1.0)
    assert len(other.schedule(60.0)) == 1  # that was long ago


def test_a_failed_request_leaves_nothing_in_the_mirror_and_a_restart_empties_it() -> None:
    scheduler = scheduler_of("a", "b")
    prompt = blocks_of("m", TEXT)
    failed = Ticket("m", 0.0, prompt=prompt)
    assert scheduler.submit(failed, 0.0)
    scheduler.release(failed, 1.0, None)
    assert scheduler.snapshot().index_tokens == {"a": 0, "b": 0}
    served = Ticket("m", 2.0, prompt=prompt)
    assert scheduler.submit(served, 2.0)
    scheduler.first_token(served, 3.0)
    scheduler.release(served, 4.0, Usage(15_000, 5, 0))
    assert sum(scheduler.snapshot().index_tokens.values()) > 10_000
    assert served.backend
    scheduler.forget_cache(served.backend)
    assert scheduler.snapshot().index_tokens == {"a": 0, "b": 0}


def test_a_cache_of_unknown_size_is_learned_from_what_was_not_there() -> None:
    scheduler = scheduler_of("a", "b")
    for number in range(200):
        ticket = Ticket("m", float(number), prompt=blocks_of("m", f"{number % 40} {TEXT}"))
        assert scheduler.submit(ticket, float(number))
        scheduler.first_token(ticket, number + 0.1)
        scheduler.release(ticket, number + 0.2, Usage(15_000, 5, 4 if number else 0))  # it says that it had next to nothing
    assert max(scheduler.backends.index.capacity) < 1_500_000 * 4
    snapshot = scheduler.snapshot()
    assert snapshot.predicted_cached_tokens > snapshot.actual_cached_tokens


def test_a_waiting_ticket_knows_its_place_and_when_its_turn_is() -> None:
    scheduler = scheduler_of("a", slots=1)
    running = Ticket("m", 0.0)
    scheduler.submit(running, 0.0)
    waiting = [Ticket("m", 0.01 * i) for i in range(20)]
    for ticket in waiting:
        scheduler.submit(ticket, ticket.arrived)
    assert scheduler.position(waiting[4], 0.2) == (4, None)
    now = 0.2
    for _ in range(5):
        now += 2.0
        scheduler.release(running, now, None)
        [running] = scheduler.schedule(now)
    ahead, seconds = scheduler.position(waiting[9], now)
    assert ahead == 4
    assert seconds == pytest.approx(10.0, rel=0.25)


def test_explain_says_what_each_backend_would_cost_and_changes_nothing() -> None:
    scheduler = scheduler_of("a", "b", "c", slots=1)
    scheduler.set_backend("c", 0.0, accepting=False)
    busy = Ticket("m", 0.0, prompt_tokens=4000)
    assert scheduler.submit(busy, 0.0)
    before = scheduler.snapshot()
    ticket = Ticket("m", 0.0, prompt_tokens=1000)
    candidates = scheduler.explain(ticket, 0.0)
    assert scheduler.snapshot() == before
    why_not = {candidate.name: candidate.why_not for candidate in candidates}
    assert why_not == {candidates[0].name: "", busy.backend: "slots", "c": "not accepting"}
    assert scheduler.submit(ticket, 0.0)
    assert ticket.backend == candidates[0].name


def test_prompts_are_hashed_only_where_it_matters() -> None:
    assert not scheduler_of("a").hashes
    assert scheduler_of("a", "b").hashes
    assert not scheduler_of("a", "b", policy="round-robin").hashes


def test_a_heavy_tenant_and_nine_light_ones_get_equal_token_service() -> None:
    servers = Servers(scheduler_of("a", "b", requests=100_000), speed=2000.0)
    servers.warm_up()
    start = servers.now
    for number in range(900):  # the heavy tenant wants nine times as much, in larger pieces, and comes first
        servers.submit(Ticket("m", start, tenant="heavy", prompt_tokens=1500 if number % 3 else 300))
    for number in range(450):
        servers.submit(Ticket("m", start, tenant=f"light {number % 9}", prompt_tokens=400 + 100 * (number % 5)))
    servers.run(start + 60.0)
    served = [
        sum(ticket.prompt_tokens for at, ticket in servers.finished if ticket.tenant == tenant)
        for tenant in ["heavy", *(f"light {i}" for i in range(9))]
    ]
    assert min(served) > 0
    assert sum(served) ** 2 / (len(served) * sum(x * x for x in served)) >= 0.95


def test_an_account_is_settled_with_what_was_used() -> None:
    scheduler = scheduler_of("a")
    ticket = Ticket("m", 0.0, tenant="t", prompt_tokens=1000, max_tokens=100)
    scheduler.submit(ticket, 0.0)
    assert scheduler.snapshot().served == {"t": 1100.0}
    scheduler.first_token(ticket, 1.0)
    scheduler.release(ticket, 2.0, Usage(1200, 30, 1000))
    assert scheduler.snapshot().served == {"t": 230.0}
    failed = Ticket("m", 3.0, tenant="t", prompt_tokens=1000)
    scheduler.submit(failed, 3.0)
    scheduler.release(failed, 4.0, None)
    assert scheduler.snapshot().served == {"t": 230.0}


@pytest.mark.parametrize("streams", [True, False])
def test_a_removed_backend_may_still_give_back_what_it_has(streams: bool) -> None:
    scheduler = scheduler_of("a", "b")
    tickets = [Ticket("m", 0.0, prompt_tokens=100, streams=streams) for _ in range(10)]
    assert all(scheduler.submit(ticket, 0.0) for ticket in tickets)
    scheduler.remove_backend("a", 1.0)
    scheduler.set_backend("c", 1.0)
    scheduler.set_backend("a", 1.0)
    for ticket in tickets:
        scheduler.release(ticket, 2.0, Usage(100, 10, 0))
    assert scheduler.snapshot().inflight == {"b": 0, "c": 0, "a": 0}
    assert scheduler.submit(Ticket("m", 3.0), 3.0)


class Interleavings(RuleBasedStateMachine):
    """Whatever happens in whatever order: nothing is lost, given twice, or left behind."""

    @initialize(policy=st.sampled_from(sorted(POLICIES)))
    def begin(self, policy: str) -> None:
        self.scheduler = Scheduler(POLICIES[policy](), Bounds(requests=6, bytes=300))
        self.now = 0.0
        self.waiting: list[Ticket] = []
        self.running: list[Ticket] = []
        self.slots: dict[str, int | None] = {}
        self.open: dict[str, bool] = {}

    @rule(
        name=st.sampled_from("abc"),
        accepting=st.booleans(),
        slots=st.sampled_from([None, 0, 1, 3]),
        models=st.sampled_from([None, frozenset("x"), frozenset("xy")]),
        running=st.sampled_from([None, 0, 2]),
    )
    def set_backend(
        self, name: str, accepting: bool, slots: int | None, models: frozenset[str] | None, running: int | None
    ) -> None:
        load = None if running is None else Load(running, 1, 0.5, self.now)
        self.scheduler.set_backend(
            name, self.now, models=models, accepting=accepting, slots=slots, kv_tokens=5000 if slots == 3 else None, load=load
        )
        self.slots[name], self.open[name] = slots, accepting

    @precondition(lambda self: self.slots)
    @rule(data=st.data(), gone=st.booleans())
    def lose_backend(self, data: st.DataObject, gone: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.slots)))
        if gone:
            self.scheduler.remove_backend(name, self.now)
            del self.slots[name], self.open[name]
        else:
            self.scheduler.forget_cache(name)

    @rule(passed=st.floats(0.0, 20.0))
    def wait(self, passed: float) -> None:
        self.now += passed

    @rule(
        model=st.sampled_from("xy"),
        tenant=st.sampled_from("pq"),
        priority=st.integers(0, 2),
        patience=st.sampled_from([1.0, 30.0, math.inf]),
        length=st.integers(0, 4000),
        streams=st.booleans(),
        session=st.sampled_from([None, "s"]),
        tried=st.sampled_from([frozenset(), frozenset("a")]),
    )
    def submit(
        self,
        model: str,
        tenant: str,
        priority: int,
        patience: float,
        length: int,
        streams: bool,
        session: str | None,
        tried: frozenset[str],
    ) -> None:
        ticket = Ticket(
            model,
            self.now,
            tenant=tenant,
            priority=priority,
            deadline=self.now + patience,
            size=70,
            prompt=blocks_of(model, TEXT[:length]),
            streams=streams,
            session=session,
            tried=tried,
        )
        try:
            bound = self.scheduler.submit(ticket, self.now)
        except QueueFull:
            assert len(self.waiting) >= 4  # 300 bytes
        except Hopeless as refused:
            assert 1.0 <= refused.retry_after <= LONGEST
        else:
            if bound:
                self.granted(ticket)
            else:
                for displaced in self.scheduler.displaced():
                    assert displaced.priority > priority
                    self.waiting.remove(displaced)
                self.waiting.append(ticket)

    @rule()
    def schedule(self) -> None:
        for ticket in self.scheduler.schedule(self.now):
            self.waiting.remove(ticket)
            self.granted(ticket)

    def granted(self, ticket: Ticket) -> None:
        name = ticket.backend
        assert name is not None
        assert self.open[name]
        assert name not in ticket.tried
        self.running.append(ticket)
        slots = self.slots[name]
        assert slots is None or sum(other.lane == ticket.lane for other in self.running) <= slots

    @rule()
    def expire(self) -> None:
        late = [ticket for ticket in self.waiting if ticket.deadline - ticket.spare <= self.now]
        assert {id(ticket) for ticket in self.scheduler.expire(self.now)} == {id(ticket) for ticket in late}
        self.waiting = [ticket for ticket in self.waiting if ticket not in late]

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        ticket = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
        self.scheduler.withdraw(ticket, self.now)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def first_token(self, data: st.DataObject) -> None:
        ticket = self.running[data.draw(st.integers(0, len(self.running) - 1))]
        if ticket.streams:
            self.scheduler.first_token(ticket, self.now)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), usage=st.sampled_from([None, Usage(), Usage(500, 20, 0), Usage(500, 20, 400), Usage(9, 9, 99)]))
    def release(self, data: st.DataObject, usage: Usage | None) -> None:
        ticket = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.scheduler.release(ticket, self.now, usage)

    @invariant()
    def bounds_hold(self) -> None:
        snapshot = self.scheduler.snapshot()
        assert sum(snapshot.depth.values()) == len(self.waiting) <= 6
        assert snapshot.bytes == 70 * len(self.waiting) <= 300
        for place, name in enumerate(self.scheduler.backends.names):
            mine = [ticket for ticket in self.running if ticket.lane == place]
            assert self.scheduler.backends.inflight[place] == len(mine)
            assert all(ticket.backend == name for ticket in mine)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for ticket in self.waiting:
            self.scheduler.withdraw(ticket, self.now)
        for ticket in self.running:
            self.scheduler.release(ticket, self.now, None)
        backends, queue = self.scheduler.backends, self.scheduler.queue
        assert (len(queue), queue.bytes, sum(queue.work)) == (0, 0, 0.0)
        assert not any(backends.inflight) and not any(backends.decoding) and not any(backends.pending)
        assert not any(backends.queued) and not any(backends.tokens)
        assert self.scheduler.schedule(self.now) == []


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
