"""A pool of free pages, or of free rows of the request tables, as an immutable value: the bits of an int."""


def new_pool(num_pages: int) -> int:
    """Returns a pool in which all pages are free except page 0, the scratch page that padding writes to."""
    return (1 << num_pages) - 2


def num_free(pool: int) -> int:
    """Returns the number of free pages."""
    return pool.bit_count()


def allocate(pool: int, n: int) -> tuple[tuple[int, ...], int]:
    """Returns the n lowest free pages, and the pool without them."""
    pages = []
    for _ in range(n):
        lowest = pool & -pool
        assert lowest, "allocated more pages than are free"
        pages.append(lowest.bit_length() - 1)
        pool ^= lowest
    return tuple(pages), pool


def free(pool: int, pages: tuple[int, ...]) -> int:
    """Returns the pool with `pages` added to it."""
    for page in pages:
        assert page and not pool >> page & 1, "freed a page that is not allocated"
        pool |= 1 << page
    return pool
