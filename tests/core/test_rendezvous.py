from __future__ import annotations

from collections import Counter

from gateway.core.rendezvous import KEYS, Rendezvous, mark

KEYS_OF_1000 = [f"key {i}" for i in range(1000)]


def rendezvous_of(*names: str) -> Rendezvous:
    found = Rendezvous()
    for i, name in enumerate(names):
        found.put(i, name)
    return found


def first(rendezvous: Rendezvous, names: str) -> dict[str, str]:
    return {key: names[rendezvous.order(key)[0]] for key in KEYS_OF_1000}


def test_every_process_has_the_same_order() -> None:
    assert mark("a prompt") == 14578589762345421207
    assert rendezvous_of("a", "b", "c", "d").order("a prompt") == (1, 2, 0, 3)


def test_the_order_is_of_names_and_not_of_places() -> None:
    one, other = rendezvous_of(*"abcd"), rendezvous_of(*"dbca")
    for key in KEYS_OF_1000[:50]:
        assert ["abcd"[i] for i in one.order(key)] == ["dbca"[i] for i in other.order(key)]


def test_keys_are_spread_evenly() -> None:
    counts = Counter(first(rendezvous_of(*"abcdefgh"), "abcdefgh").values())
    assert 80 < min(counts.values()) <= max(counts.values()) < 175  # 125 and 4.8 standard deviations of 10.5


def test_a_backend_that_comes_takes_its_share_and_moves_nothing_else() -> None:
    rendezvous = rendezvous_of(*"abcd")
    before = first(rendezvous, "abcd")
    rendezvous.put(4, "e")
    after = first(rendezvous, "abcde")
    moved = [key for key in KEYS_OF_1000 if before[key] != after[key]]
    assert {after[key] for key in moved} == {"e"}
    assert 140 < len(moved) < 260  # a fifth


def test_a_place_that_another_backend_gets_is_that_ones() -> None:
    rendezvous = rendezvous_of(*"abcd")
    rendezvous.order("key 1")
    rendezvous.put(2, "x")
    assert [rendezvous.order(key) for key in KEYS_OF_1000] == [rendezvous_of(*"abxd").order(key) for key in KEYS_OF_1000]


def test_what_is_remembered_is_bounded() -> None:
    rendezvous = rendezvous_of("a", "b")
    for number in range(2 * KEYS + 5):
        rendezvous.order(f"key {number}")
    assert len(rendezvous._orders) <= KEYS


def test_any_text_has_a_mark() -> None:
    assert mark("\ud800") != mark("\udc00") != mark("")
