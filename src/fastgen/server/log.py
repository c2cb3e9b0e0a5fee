"""Standard error of the server's processes. Whoever reads it, or does not, no request waits for it."""

import os
import queue
import select
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

CHUNK_BYTES, MAX_CHUNKS = 4096, 256  # bytes that are read at once, and chunks that are held for a slow reader
END_MARKER = b"\0end of the log\0"
_num_dropped_lines = 0  # lines of this process


def log_line(line: str) -> None:
    """Write a line to standard error, or drop and count it where the write would block or nobody reads any more."""
    global _num_dropped_lines
    lost = f"fgserve: {_num_dropped_lines} lines were dropped, since nobody read them\n" if _num_dropped_lines else ""
    try:
        poll = select.poll()
        poll.register(2, select.POLLOUT)
        if not any(event & select.POLLOUT for _, event in poll.poll(0)):
            _num_dropped_lines += 1
            return
        os.write(2, f"{lost}{line}\n".encode("utf-8", "replace")[-CHUNK_BYTES:])  # this much fits where anything does
        _num_dropped_lines = 0
    except OSError:
        _num_dropped_lines += 1


@contextmanager
def nonblocking_stderr() -> Iterator[None]:
    """Give this process, and those it starts meanwhile, a standard error that never blocks and never breaks.

    It is a pipe. One thread reads it, another writes what was read to the real one; what that does not take in time is
    dropped and counted. A terminal stays as it is, for progress bars.
    """
    if sys.stderr is None:  # closed by whoever started this process
        real = os.open(os.devnull, os.O_WRONLY)
    elif os.isatty(2):
        yield
        return
    else:
        real = os.dup(2)
    source, sink = os.pipe()
    os.dup2(sink, 2)
    os.close(sink)
    if sys.stderr is None:
        sys.stderr = open(2, "w", buffering=1, closefd=False)
    chunks: queue.Queue[bytes] = queue.Queue(MAX_CHUNKS)
    threads = [
        threading.Thread(target=f, args=(source, real, chunks), daemon=True) for f in (_read_pipe, _write_stderr)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        with suppress(OSError):
            sys.stderr.flush()
        os.write(2, END_MARKER)
        os.dup2(real, 2)
        for thread in threads:  # the second may wait for the real one, which this process must not
            thread.join(1.0)


def _read_pipe(pipe_fd: int, stderr_fd: int, chunks: queue.Queue[bytes]) -> None:
    dropped = 0
    while not (data := os.read(pipe_fd, CHUNK_BYTES)).endswith(END_MARKER):
        if dropped and not chunks.full():
            data = f"fgserve: {dropped} lines were dropped, since nobody read them\n".encode() + data
            dropped = 0
        try:
            chunks.put_nowait(data)
        except queue.Full:
            dropped += data.count(b"\n")
    with suppress(queue.Full):
        chunks.put(data, timeout=1.0)


def _write_stderr(pipe_fd: int, stderr_fd: int, chunks: queue.Queue[bytes]) -> None:
    data = b""
    while not data.endswith(END_MARKER):
        data = chunks.get()
        left = data.removesuffix(END_MARKER)
        while left:
            try:
                left = left[os.write(stderr_fd, left) :]
            except BlockingIOError:  # its other users may have made it so
                select.select([], [stderr_fd], [])
            except OSError:
                break  # its reader has gone
