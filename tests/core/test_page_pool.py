"""The pool of free pages, against a plain set."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.core import page_pool

QUICK = settings(derandomize=True, database=None, deadline=None, max_examples=200)


def listed(free: int) -> set[int]:
    """The pages in a pool."""
    return {page for page in range(free.bit_length()) if free >> page & 1}


@pytest.mark.parametrize("size", [1, 2, 3, 64, 65, 1000])
def test_new_pool_is_every_page_but_scratch(size: int) -> None:
    """Page 0 in the pool would let padding overwrite a sequence; a missing page would be wasted."""
    assert listed(page_pool.new_pool(size)) == set(range(1, size))
    assert page_pool.num_free(page_pool.new_pool(size)) == size - 1


def test_allocates_the_lowest_first() -> None:
    """A freed low page is used again before untouched ones, so that the pages in use stay close together."""
    first, free = page_pool.allocate(page_pool.new_pool(8), 4)
    assert first == (1, 2, 3, 4)
    assert page_pool.allocate(page_pool.free(free, (3, 1)), 3)[0] == (1, 3, 5)


def test_pools_are_values() -> None:
    """An interrupted step keeps the old pool, so allocating and freeing must not change it."""
    free = page_pool.new_pool(5)
    held, rest = page_pool.allocate(free, 2)
    assert listed(free) == {1, 2, 3, 4} and listed(rest) == {3, 4}
    assert page_pool.free(rest, held) == free and listed(rest) == {3, 4}


def test_empty_requests_change_nothing() -> None:
    """Allocating or freeing no page is not an error, even with an empty pool."""
    assert page_pool.allocate(0, 0) == ((), 0)
    assert page_pool.free(0, ()) == 0


def test_allocating_more_than_is_free_fails() -> None:
    """Fewer pages than asked for, or one page twice, would mix up two sequences."""
    assert len(page_pool.allocate(page_pool.new_pool(4), 3)[0]) == 3
    with pytest.raises(AssertionError, match="more pages than are free"):
        page_pool.allocate(page_pool.new_pool(4), 4)


@pytest.mark.parametrize("freed", [(1,), (2, 3, 1), (3, 3), (0,)])
def test_freeing_a_free_page_fails(freed: tuple[int, ...]) -> None:
    """A page freed twice, within one call too, or scratch freed, would get two owners."""
    _, free = page_pool.allocate(page_pool.new_pool(4), 3)
    free = page_pool.free(free, (1,))
    with pytest.raises(AssertionError, match="not allocated"):
        page_pool.free(free, freed)


@QUICK
@given(size=st.integers(1, 140), operations=st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=40))
def test_behaves_like_a_set(size: int, operations: list[tuple[bool, int]]) -> None:
    """The pool agrees with a set after any sequence of allocations and releases: no page is lost or doubled."""
    free, model, held = page_pool.new_pool(size), set(range(1, size)), []
    for allocates, n in operations:
        if allocates and n <= len(model):
            pages, free = page_pool.allocate(free, n)
            assert list(pages) == sorted(model)[:n]
            model -= set(pages)
            held.append(pages)
        elif held and not allocates:
            pages = held.pop(n % len(held))
            free = page_pool.free(free, pages)
            model |= set(pages)
        assert listed(free) == model
        assert page_pool.num_free(free) == len(model)
    for pages in held:
        free = page_pool.free(free, pages)
    assert free == page_pool.new_pool(size)
