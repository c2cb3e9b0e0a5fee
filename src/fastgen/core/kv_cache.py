"""The pool of free pages, as a value: the bits of an int. Taking and giving return a new pool."""


def new_pool(num_pages: int) -> int:
    """All pages of a cache free, but page 0: it is scratch, where padding writes."""
    return (1 << num_pages) - 2


def num_free(pool: int) -> int:
    """How many pages are free."""
    return pool.bit_count()


def allocate(pool: int, n: int) -> tuple[tuple[int, ...], int]:
    """The n lowest free pages, and the pool without them."""
    taken = []
    for _ in range(n):
        lowest = pool & -pool
        assert lowest, "took more pages than are free"
        taken.append(lowest.bit_length() - 1)
        pool ^= lowest
    return tuple(taken), pool


def free(pool: int, pages: tuple[int, ...]) -> int:
    """The pool with `pages` back in it."""
    for page in pages:
        assert page and not pool >> page & 1, "freed a page that is not taken"
        pool |= 1 << page
    return pool
