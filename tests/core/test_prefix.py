from __future__ import annotations

from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st

from gateway.core.prefix import NO_BLOCKS, Blocks, PrefixIndex, blocks_of

TEXT = "".join(f"{i} bottles of beer, " for i in range(3000))


def chain(*names: int) -> Blocks:
    """A prompt of blocks of ten, named by what stands in them."""
    keys, key = [], 0
    for name in names:
        key = hash((key, name))
        keys.append(key)
    return Blocks(keys, range(10, 10 * len(names) + 1, 10), 10 * len(names))


def index_of(n: int, capacity: float = 1e9) -> PrefixIndex:
    index = PrefixIndex()
    for _ in range(n):
        index.add(capacity)
    return index


def insert(index: PrefixIndex, backend: int, blocks: Blocks) -> None:
    index.insert(backend, blocks, dict(index.match(blocks)).get(backend, 0))


def test_texts_share_the_blocks_of_their_common_prefix_and_no_other() -> None:
    a, b = blocks_of("model", TEXT[:20_000] + "a" * 20_000), blocks_of("model", TEXT[:20_000] + "b" * 20_000)
    same = sum(x == y for x, y in zip(a.keys, b.keys, strict=True))
    assert a.keys[:same] == b.keys[:same]
    assert a.ends[same - 1] <= 20_000 < a.ends[same]
    assert not set(a.keys[same:]) & set(b.keys)


def test_a_longer_prompt_keeps_the_keys_of_the_shorter_one() -> None:
    short, long = blocks_of("m", TEXT[:9_000]), blocks_of("m", TEXT[:50_000])
    assert long.keys[: len(short.keys)] == short.keys


def test_prompts_of_different_seeds_share_nothing() -> None:
    assert not set(blocks_of("a", TEXT).keys) & set(blocks_of("b", TEXT).keys)


def test_a_prompt_shorter_than_a_block_has_none() -> None:
    assert blocks_of("m", "hello").keys == []
    assert index_of(1).match(NO_BLOCKS) == []


def test_each_backend_is_matched_as_far_as_it_holds_the_prompt() -> None:
    index = index_of(4)
    insert(index, 0, chain(1, 2, 3))
    insert(index, 1, chain(1, 2, 9))
    insert(index, 3, chain(1))
    assert dict(index.match(chain(1, 2, 3, 4))) == {0: 3, 1: 2, 3: 1}
    assert index.match(chain(2, 3)) == []


def test_the_tail_of_the_oldest_prompt_is_forgotten_first() -> None:
    index = index_of(1, capacity=60)
    insert(index, 0, chain(1, 2, 3))
    insert(index, 0, chain(7, 8))
    insert(index, 0, chain(1, 2))  # used again: its head is newer than 7, 8; its tail is not
    insert(index, 0, chain(5, 6))
    assert dict(index.match(chain(1, 2, 3))) == {0: 2}
    assert index.size[0] <= 60


def test_what_a_failed_request_would_have_computed_is_forgotten() -> None:
    index = index_of(2)
    insert(index, 0, chain(1, 2))
    insert(index, 0, chain(1, 2, 3, 4))
    insert(index, 1, chain(1, 2, 3))
    index.forget(0, chain(1, 2, 3, 4), 2)
    assert dict(index.match(chain(1, 2, 3, 4))) == {0: 2, 1: 3}


def test_an_emptied_backend_holds_nothing_and_others_keep_theirs() -> None:
    index = index_of(2)
    insert(index, 0, chain(1, 2))
    insert(index, 1, chain(1))
    index.clear(0)
    assert index.match(chain(1, 2)) == [(1, 1)]
    assert index.size == [0, 10]
    index.clear(1)
    assert len(index) == 0


PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(lambda names: chain(*names))
STEPS = st.lists(st.tuples(st.sampled_from(["insert", "forget", "clear", "resize"]), st.integers(0, 2), PROMPTS), max_size=60)


@given(STEPS)
def test_sizes_and_masks_agree_with_what_each_backend_is_said_to_hold(steps: list[tuple[str, int, Blocks]]) -> None:
    index = index_of(3, capacity=80)
    for what, backend, blocks in steps:
        if what == "insert":
            insert(index, backend, blocks)
        elif what == "forget":
            index.forget(backend, blocks, 1)
        elif what == "clear":
            index.clear(backend)
        else:
            index.resize(backend, 30 + blocks.total)
        for i in range(3):
            assert 0 <= index.size[i] <= index.capacity[i]
    for i in range(3):
        index.clear(i)
    assert len(index) == 0
    assert index.size == [0, 0, 0]


@given(st.lists(PROMPTS, max_size=40))
def test_it_forgets_what_a_list_of_the_least_recently_used_blocks_would(prompts: list[Blocks]) -> None:
    index = index_of(1, capacity=100)
    model: OrderedDict[int, None] = OrderedDict()
    for prompt in prompts:
        insert(index, 0, prompt)
        for key in reversed(prompt.keys):
            model.pop(key, None)
            model[key] = None
        while len(model) > 10:
            model.popitem(last=False)
        held = dict(index.match(prompt)).get(0, 0)
        assert [key in model for key in prompt.keys[:held]] == [True] * held
        assert held == len(prompt.keys)
