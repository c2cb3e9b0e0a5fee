"""Child processes: how they are started, watched, described once they have ended, and ended together with their parent.

Three parents use this module: an engine with tensor-parallel ranks (`workers`), `Replicas` with one process per engine
(`data_parallel`), and the server with its engine and HTTP workers (`fastgen.server.supervisor`). Each child has a pipe
to its parent; the end of the pipe tells either process that the other one has ended.
"""

import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing import process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from tqdm.auto import tqdm

KILL_TIMEOUT_SECONDS = 30.0  # for the kernel to remove a killed process, which may use a device


class ChildFailure(NamedTuple):
    """The error that ended a child, as `run_child` sends it to the parent."""

    time: float  # of time.monotonic(), which all processes of a machine share
    message: str
    is_value_error: bool  # whether the caller's input was wrong


class ChildProcess:
    """A child process and the parent's end of the pipe to it.

    The child calls `target(pipe, *args)` with the other end. Forks of the parent leave the child alone when they end.
    """

    def __init__(self, context: Any, name: str, target: Callable[..., Any], *args: Any, daemon: bool = False) -> None:
        self.pipe, child_pipe = context.Pipe()
        self.process: BaseProcess = context.Process(target=target, args=(child_pipe, *args), name=name, daemon=daemon)
        self.process.start()
        _detached_processes.add(self.process)
        child_pipe.close()  # the child has the only copy, so that the pipe ends with the child
        self.name, self.pid, self.is_ready = name, self.process.pid or 0, False
        self.failure: ChildFailure | None = None  # set by the parent, which reads the pipe
        self.sentinel = self.process.sentinel  # a file descriptor that is readable once the process has ended
        self._pidfd: int | None = None
        with suppress(OSError, AttributeError):  # not on every system
            # A fork server's children outlive the fork server, whose end would make `process.sentinel` readable.
            self.sentinel = self._pidfd = os.pidfd_open(self.pid)
            weakref.finalize(self, os.close, self._pidfd).atexit = False

    @property
    def is_alive(self) -> bool:
        """Whether the process has not ended."""
        return not wait([self.sentinel], 0)

    def send_signal(self, number: int) -> None:
        """Sends a signal, or does nothing if the process has ended."""
        with suppress(OSError):
            if self._pidfd is None:
                os.kill(self.pid, number)
            else:
                signal.pidfd_send_signal(self._pidfd, number)

    def describe_end(self) -> str:
        """Returns why the process has ended, such as "rank 1 (process 7) was killed by SIGKILL"."""
        code, failure = self.process.exitcode or 0, self.failure
        cause = f"failed: {failure.message}" if failure else f"ended with exit code {code}"
        cause = f"was killed by {signal.Signals(-code).name}" if code < 0 else cause
        return f"{self.name} (process {self.pid}) {cause}"

    def wait_or_kill(self, timeout: float) -> None:
        """Waits `timeout` seconds for the process to end, then kills it."""
        if not wait([self.sentinel], max(0.0, timeout)):
            self.send_signal(signal.SIGKILL)
        self.process.join(KILL_TIMEOUT_SECONDS)


def end_children(children: Iterable[ChildProcess], timeout: float) -> None:
    """Waits up to `timeout` seconds until all children have ended, then kills those that have not."""
    end = time.monotonic() + timeout
    for child in children:
        child.wait_or_kill(end - time.monotonic())


def run_child(
    pipe: Connection, serve: Callable[[Connection, queue.SimpleQueue[Any]], None],
    self_explanatory: tuple[type[Exception], ...] = (ValueError,), on_parent_exit: Callable[[], object] = lambda: None,
) -> NoReturn:  # fmt: skip
    """Runs `serve` with the queue of the parent's messages, then ends this process; ends it at once with the parent.

    An error of `serve` is sent to the parent as a `ChildFailure`: its message if its type is one of `self_explanatory`,
    otherwise its traceback. `on_parent_exit` cleans up where the parent no longer can.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the parent too, which decides
    tqdm.set_lock(threading.RLock())  # by default a semaphore of the machine, which a process that is killed leaves
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def receive() -> None:
        with suppress(EOFError, OSError):
            while True:
                messages.put(pipe.recv())
        with suppress(OSError):
            on_parent_exit()
        os._exit(1)  # the main thread may wait for a collective that will never complete

    threading.Thread(target=receive, daemon=True).start()
    try:
        serve(pipe, messages)
    except BaseException as e:
        message = str(e) if isinstance(e, self_explanatory) else traceback.format_exc().strip()
        with suppress(OSError):
            pipe.send(ChildFailure(time.monotonic(), message, isinstance(e, ValueError)))
        os._exit(1)
    os._exit(0)  # whatever other threads do


def exit_with_parent(grace_seconds: Callable[[], float]) -> None:
    """Starts a thread that ends this process, even one that hangs, `grace_seconds()` after its parent has ended."""

    def watch(parent: BaseProcess) -> None:
        wait([parent.sentinel])
        time.sleep(grace_seconds())
        os._exit(1)

    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=watch, args=(parent,), daemon=True).start()


def find_stopped_descendants() -> list[int]:
    """Returns the ids of this process's descendants that a signal or debugger has stopped; none without /proc."""
    states, children = dict[int, str](), defaultdict[int, list[int]](list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # the process has ended
            # The fields follow the process's name, which may hold anything, in parentheses.
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            states[int(path.parent.name)] = state
            children[int(parent)].append(int(path.parent.name))
    pending, stopped = [os.getpid()], list[int]()
    while pending:
        pids = children[pending.pop()]
        pending += pids
        stopped += [pid for pid in pids if states[pid] in ("T", "t")]
    return sorted(stopped)


_detached_processes: "weakref.WeakSet[BaseProcess]" = weakref.WeakSet()


def _detach_after_fork() -> None:
    """Makes multiprocessing forget the parent's children in a fork, which it would terminate when the fork ends."""
    children: set[Any] = process._children  # type: ignore[attr-defined]
    children.difference_update(_detached_processes)


os.register_at_fork(after_in_child=_detach_after_fork)
