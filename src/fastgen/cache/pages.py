"""The pool of free pages, as a value: the bits of an int. Taking and giving return a new pool."""


def pool(pages: int) -> int:
    """All pages of a cache free, but page 0: it is scratch, where padding writes."""
    return (1 << pages) - 2


def count(free: int) -> int:
    """How many pages are free."""
    return free.bit_count()


def take(free: int, n: int) -> tuple[tuple[int, ...], int]:
    """The n lowest free pages, and the pool without them."""
    taken = []
    for _ in range(n):
        lowest = free & -free
        assert lowest, "took more pages than are free"
        taken.append(lowest.bit_length() - 1)
        free ^= lowest
    return tuple(taken), free


def give(free: int, pages: tuple[int, ...]) -> int:
    """The pool with `pages` back in it."""
    for page in pages:
        assert page and not free >> page & 1, "freed a page that is not taken"
        free |= 1 << page
    return free
