"""Standard error of the server's processes. No request waits for whatever reads it."""

import os
import queue
import select
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

CHUNK_BYTES, MAX_CHUNKS = 4096, 256  # bytes per read, and chunks that wait for a slow reader
END_MARKER = b"\0end of the log\0"
_num_dropped_lines = 0  # since this process last wrote one


def print_message(text: str) -> None:
    """Prints a message of the server to `sys.stderr`, in one write: other processes print there too."""
    with suppress(OSError, AttributeError):  # the reader is gone, or there is no standard error
        sys.stderr.write(f"fgserve: {text}\n")
        sys.stderr.flush()


def log_line(line: str) -> None:
    """Writes a line to standard error; drops and counts the line if the write would block or fail."""
    global _num_dropped_lines
    prefix = _dropped_message(_num_dropped_lines) if _num_dropped_lines else ""
    _num_dropped_lines += 1
    with suppress(OSError):
        poll = select.poll()
        poll.register(2, select.POLLOUT)
        if any(event & select.POLLOUT for _, event in poll.poll(0)):  # this promises CHUNK_BYTES of space
            os.write(2, f"{prefix}{line}\n".encode("utf-8", "replace")[-CHUNK_BYTES:])
            _num_dropped_lines = 0


def _dropped_message(num_lines: int) -> str:
    return f"fgserve: {num_lines} lines were dropped, since nothing read them\n"


@contextmanager
def nonblocking_stderr() -> Iterator[None]:
    """Gives this process, and processes it starts meanwhile, a standard error that never blocks and never breaks.

    Standard error becomes a pipe. One thread reads the pipe and another writes to the original; what the original does
    not accept in time is dropped and counted. A terminal stays as it is, for progress bars.
    """
    if sys.stderr is None:  # this process was started with standard error closed
        original = os.open(os.devnull, os.O_WRONLY)
    elif os.isatty(2):
        yield
        return
    else:
        original = os.dup(2)
    source, sink = os.pipe()
    os.dup2(sink, 2)
    os.close(sink)
    if sys.stderr is None:
        sys.stderr = open(2, "w", buffering=1, closefd=False)
    chunks: queue.Queue[bytes] = queue.Queue(MAX_CHUNKS)
    steps = (_read_pipe, (source, chunks)), (_write_stderr, (original, chunks))
    threads = [threading.Thread(target=target, args=args, daemon=True) for target, args in steps]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        with suppress(OSError):
            sys.stderr.flush()
        os.write(2, END_MARKER)
        os.dup2(original, 2)
        for thread in threads:  # the second thread may wait for the original, which this process must not
            thread.join(1.0)


def _read_pipe(pipe_fd: int, chunks: queue.Queue[bytes]) -> None:
    num_dropped = 0
    while not (data := os.read(pipe_fd, CHUNK_BYTES)).endswith(END_MARKER):
        if num_dropped and not chunks.full():
            data = _dropped_message(num_dropped).encode() + data
            num_dropped = 0
        try:
            chunks.put_nowait(data)
        except queue.Full:
            num_dropped += data.count(b"\n")
    with suppress(queue.Full):
        chunks.put(data, timeout=1.0)


def _write_stderr(stderr_fd: int, chunks: queue.Queue[bytes]) -> None:
    data = b""
    while not data.endswith(END_MARKER):
        data = chunks.get()
        unwritten = data.removesuffix(END_MARKER)
        while unwritten:
            try:
                unwritten = unwritten[os.write(stderr_fd, unwritten) :]
            except BlockingIOError:  # another process that uses the file may have made it non-blocking
                select.select([], [stderr_fd], [])
            except OSError:
                break  # its reader is gone
