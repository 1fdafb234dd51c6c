from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from gateway.net.shares import MORE, Shares, shared_file


@pytest.fixture
def three() -> Iterator[list[Shares]]:
    file = shared_file(3)
    yield [Shares(file, 3, number) for number in range(3)]
    os.close(file)


def test_who_has_more_than_another_leaves_it_the_next(three: list[Shares]) -> None:
    for one, connections in zip(three, (0, MORE, MORE + 1), strict=True):
        one.tell(connections)
    assert [one.is_ahead() for one in three] == [False, False, True]


def test_among_many_a_few_more_do_not_matter(three: list[Shares]) -> None:
    for one, connections in zip(three, (800, 900, 902), strict=True):
        one.tell(connections)
    assert [one.is_ahead() for one in three] == [False, False, True]


def test_nothing_is_left_to_one_that_is_gone(three: list[Shares]) -> None:
    first, second, third = three
    first.tell(500)
    assert not first.is_ahead()  # the others have not begun
    second.tell(0)
    third.tell(499)
    assert first.is_ahead()
    second.leave()
    assert not first.is_ahead()
