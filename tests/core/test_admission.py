from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.admission import AdmissionQueue
from gateway.core.fair import Accounts
from gateway.core.tickets import Bounds, Ticket


def queue_of(*tickets: Ticket, accounts: Accounts | None = None) -> AdmissionQueue:
    queue = AdmissionQueue(Bounds(), accounts or Accounts())
    for ticket in tickets:
        ticket.key = ticket.arrived
        queue.put(ticket, ticket.arrived)
    return queue


def order(queue: AdmissionQueue, now: float, most: int = 99) -> list[Ticket]:
    return list(queue.scan(queue.models(), now, most))


def test_tickets_of_one_tenant_and_priority_go_by_their_key() -> None:
    a, b, c = (Ticket("m", at) for at in (3.0, 1.0, 2.0))
    assert order(queue_of(a, b, c), 3.0) == [b, c, a]


def test_a_higher_priority_goes_first() -> None:
    batch, default, interactive = (Ticket("m", 0.0, priority=p) for p in (2, 1, 0))
    assert order(queue_of(batch, default, interactive), 1.0) == [interactive, default, batch]


def test_a_ticket_that_waited_long_enough_counts_as_interactive() -> None:
    accounts = Accounts()
    old = Ticket("m", 0.0, tenant="patient", priority=2)
    new = Ticket("m", 50.0, tenant="eager", priority=0)
    accounts.charge("eager", 1.0, 10.0)
    queue = queue_of(old, new, accounts=accounts)
    assert order(queue, 59.0) == [new, old]
    assert order(queue, 60.0) == [old, new]


def test_waiting_long_gives_no_advantage_over_the_same_priority() -> None:
    accounts = Accounts()
    accounts.charge("heavy", 1.0, 1000.0)
    old = Ticket("m", 0.0, tenant="heavy")
    new = Ticket("m", 30.0, tenant="light")
    assert order(queue_of(old, new, accounts=accounts), 31.0) == [new, old]


def test_the_tenant_that_has_had_less_goes_first_and_the_weight_counts() -> None:
    accounts = Accounts()
    accounts.charge("a", 2.0, 100.0)
    accounts.charge("b", 1.0, 60.0)
    a = [Ticket("m", float(i), tenant="a", weight=2.0, prompt_tokens=20) for i in range(3)]
    b = [Ticket("m", float(i), tenant="b", prompt_tokens=20) for i in range(2)]
    for ticket in a + b:
        ticket.tokens = 20.0
    assert order(queue_of(*a, *b, accounts=accounts), 5.0) == [a[0], b[0], a[1], a[2], b[1]]


def test_an_idle_tenant_has_earned_nothing_when_it_comes_back() -> None:
    accounts = Accounts()
    for tenant in "ab":
        accounts.charge(tenant, 1.0, 1e6)
    queue = queue_of(Ticket("m", 0.0, tenant="a"), Ticket("m", 0.0, tenant="b"), accounts=accounts)
    order(queue, 0.0)
    queue.put(Ticket("m", 1.0, tenant="idle"), 1.0)
    assert accounts.of("idle") == 1e6


def test_only_models_asked_for_are_seen_and_no_more_than_asked() -> None:
    x, y = [Ticket("x", 0.0) for _ in range(5)], [Ticket("y", 1.0) for _ in range(5)]
    queue = queue_of(*x, *y)
    assert list(queue.scan({"y"}, 2.0, 3)) == y[:3]


def test_room_is_counted_in_requests_and_bytes() -> None:
    queue = AdmissionQueue(Bounds(requests=2, bytes=100), Accounts())
    first = Ticket("m", 0.0, size=60)
    queue.put(first, 0.0)
    assert not queue.fits(Ticket("m", 0.0, size=41))
    assert queue.fits(Ticket("m", 0.0, size=40))
    queue.put(Ticket("m", 0.0), 0.0)
    assert not queue.fits(Ticket("m", 0.0))
    queue.remove(first)
    assert queue.fits(Ticket("m", 0.0, size=100))


def test_tickets_expire_at_the_earlier_of_their_times() -> None:
    a, b, c = Ticket("m", 0.0, deadline=5.0), Ticket("m", 0.0, deadline=9.0, expires=3.0), Ticket("m", 0.0)
    queue = queue_of(a, b, c)
    assert queue.due() == 3.0
    assert queue.expire(2.9) == []
    assert queue.expire(5.0) == [b, a]
    assert len(queue) == 1


def test_the_time_for_a_number_of_tickets_is_that_of_the_ones_before() -> None:
    queue = AdmissionQueue(Bounds(), Accounts())
    tickets = [Ticket("m", 0.0) for _ in range(40)]
    for ticket in tickets:
        queue.put(ticket, 0.0)
    assert queue.seconds_for(10) is None
    for number, ticket in enumerate(tickets[:30], 1):
        queue.serve(ticket, number * 0.5)
    assert queue.seconds_for(10) == pytest.approx(5.0, rel=0.05)


def test_accounts_of_many_tenants_are_bounded_and_the_busiest_are_kept() -> None:
    accounts = Accounts(most=10)
    for number in range(100):
        accounts.charge(f"tenant {number}", 1.0, float(number))
    assert len(accounts) <= 10
    assert len(accounts.served) <= 10
    assert accounts.of("tenant 99") == 99.0


@given(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from("ab"), st.sampled_from("xy"), st.floats(0, 9)), max_size=30),
    st.data(),
)
def test_every_ticket_comes_up_once_and_all_sums_end_at_nothing(
    rows: list[tuple[int, str, str, float]], data: st.DataObject
) -> None:
    tickets = [Ticket(m, at, tenant=t, priority=p, size=3, deadline=99.0) for p, t, m, at in rows]
    queue = queue_of(*tickets)
    seen = order(queue, 20.0)
    assert len(seen) == len(tickets) == len(queue)
    assert {id(ticket) for ticket in seen} == {id(ticket) for ticket in tickets}
    for ticket in data.draw(st.permutations(tickets)):
        queue.remove(ticket)
    assert (len(queue), queue.bytes, sum(queue.work), queue.models()) == (0, 0, 0.0, set())
    assert queue.due() == float("inf")


def test_a_full_queue_makes_room_for_a_higher_priority_by_the_last_of_the_lowest() -> None:
    queue = AdmissionQueue(Bounds(requests=3, bytes=100), Accounts())
    first, second, default = (Ticket("m", at, priority=p, size=30) for at, p in ((0.0, 2), (1.0, 2), (2.0, 1)))
    for ticket in (first, second, default):
        ticket.key = ticket.arrived
        queue.put(ticket, ticket.arrived)
    assert not queue.has_place(Ticket("m", 3.0, priority=2))
    assert queue.has_place(Ticket("m", 3.0, priority=1, size=70))
    assert not queue.has_place(Ticket("m", 3.0, priority=1, size=71))
    assert queue.make_room(Ticket("m", 3.0, priority=1, size=30)) == [second]
    assert queue.make_room(Ticket("m", 3.0, priority=0, size=90)) == [first, default]
    assert (len(queue), queue.bytes) == (0, 0)


def test_of_two_tenants_the_one_that_got_more_makes_room() -> None:
    accounts = Accounts()
    accounts.charge("heavy", 1.0, 100.0)
    queue = AdmissionQueue(Bounds(requests=2), accounts)
    heavy, light = Ticket("m", 0.0, priority=2, tenant="heavy"), Ticket("m", 1.0, priority=2, tenant="light")
    for ticket in (heavy, light):
        queue.put(ticket, 1.0)
    assert queue.make_room(Ticket("m", 2.0, priority=0)) == [heavy]
