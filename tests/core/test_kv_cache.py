"""The pool of free pages, against a plain set."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.core import kv_cache

QUICK = settings(derandomize=True, database=None, deadline=None, max_examples=200)


def listed(free: int) -> set[int]:
    """The pages in a pool."""
    return {page for page in range(free.bit_length()) if free >> page & 1}


@pytest.mark.parametrize("size", [1, 2, 3, 64, 65, 1000])
def test_new_pool_is_every_page_but_scratch(size: int) -> None:
    """Handing out page 0 would let padding overwrite a sequence; missing a page would waste it."""
    assert listed(kv_cache.new_pool(size)) == set(range(1, size))
    assert kv_cache.num_free(kv_cache.new_pool(size)) == size - 1


def test_takes_the_lowest_first() -> None:
    """A freed low page must be used again before untouched ones, or the cache would be read all over."""
    first, free = kv_cache.allocate(kv_cache.new_pool(8), 4)
    assert first == (1, 2, 3, 4)
    assert kv_cache.allocate(kv_cache.free(free, (3, 1)), 3)[0] == (1, 3, 5)


def test_pools_are_values() -> None:
    """A step that is interrupted keeps the old pool, so taking and giving must not change it."""
    free = kv_cache.new_pool(5)
    held, rest = kv_cache.allocate(free, 2)
    assert listed(free) == {1, 2, 3, 4} and listed(rest) == {3, 4}
    assert kv_cache.free(rest, held) == free and listed(rest) == {3, 4}


def test_taking_and_giving_nothing_changes_nothing() -> None:
    """The empty request is not an error, even on an empty pool."""
    assert kv_cache.allocate(0, 0) == ((), 0)
    assert kv_cache.free(0, ()) == 0


def test_taking_more_than_there_is_fails() -> None:
    """Silently handing out fewer pages, or a page twice, would mix up two sequences."""
    assert len(kv_cache.allocate(kv_cache.new_pool(4), 3)[0]) == 3
    with pytest.raises(AssertionError, match="more pages than are free"):
        kv_cache.allocate(kv_cache.new_pool(4), 4)


@pytest.mark.parametrize("freed", [(1,), (2, 3, 1), (3, 3), (0,)])
def test_giving_what_is_not_taken_fails(freed: tuple[int, ...]) -> None:
    """A page freed twice, within one call too, or scratch freed, would get two owners."""
    _, free = kv_cache.allocate(kv_cache.new_pool(4), 3)
    free = kv_cache.free(free, (1,))
    with pytest.raises(AssertionError, match="not taken"):
        kv_cache.free(free, freed)


@QUICK
@given(size=st.integers(1, 140), moves=st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=40))
def test_behaves_like_a_set(size: int, moves: list[tuple[bool, int]]) -> None:
    """Any sequence of takes and gives: pages get lost or doubled where the pool and a set disagree."""
    free, model, held = kv_cache.new_pool(size), set(range(1, size)), []
    for take, n in moves:
        if take and n <= len(model):
            got, free = kv_cache.allocate(free, n)
            assert list(got) == sorted(model)[:n]
            model -= set(got)
            held.append(got)
        elif held and not take:
            back = held.pop(n % len(held))
            free = kv_cache.free(free, back)
            model |= set(back)
        assert listed(free) == model
        assert kv_cache.num_free(free) == len(model)
    for back in held:
        free = kv_cache.free(free, back)
    assert free == kv_cache.new_pool(size)
