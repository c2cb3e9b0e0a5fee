"""A thread for tokenization, which keeps the event loop free."""

import asyncio
import itertools
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import PriorityQueue
from typing import Any, TypeVar

T = TypeVar("T")
DELAY_PER_CHAR = 0.001  # seconds of priority that a text loses per character


class TokenizerThread:
    """A thread that processes one text at a time, short texts first, so that long ones do not delay them."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, name)
        self._waiting: PriorityQueue[tuple[float, int, Future[Any], Callable[[], Any]]] = PriorityQueue()
        self._sequence_numbers = itertools.count()  # break ties, since futures cannot be compared

    async def run(self, function: Callable[[], T], num_chars: int = 0) -> T:
        """Returns or raises the result of `function`, which processes a text of `num_chars` characters."""
        future: Future[T] = Future()
        priority = time.monotonic() + num_chars * DELAY_PER_CHAR
        self._waiting.put((priority, next(self._sequence_numbers), future, function))
        self._executor.submit(self._run_next)
        return await asyncio.wrap_future(future)

    def _run_next(self) -> None:
        _, _, future, function = self._waiting.get_nowait()
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function())
        except BaseException as e:
            future.set_exception(e)
