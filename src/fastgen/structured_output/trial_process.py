"""The process in which grammars are compiled on trial (see grammar_compiler.py), as the engine's process uses it."""

import json
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from fastgen.structured_output import grammar_compiler
from fastgen.structured_output.grammar_compiler import TrialLimits

START_TIMEOUT_SECONDS, REPLY_TIMEOUT_SECONDS = 60.0, 60.0


class GrammarCancelled(Exception):
    """The compilation of a grammar was cancelled."""


class TrialProcess:
    """Starts the process at the first trial, and again if it has ended. Several threads may use it at once."""

    def __init__(self, read_tokenizer: Callable[[], tuple[str, int, Any]]) -> None:
        """`read_tokenizer` returns the tokenizer as tokenizers' JSON, the vocabulary size and the EOS token ids."""
        self._lock = threading.RLock()
        self._read_tokenizer, self.limits = read_tokenizer, TrialLimits()
        self.process: subprocess.Popen | None = None
        self._control_socket: socket.socket | None = None  # None while no process runs

    def start(self) -> socket.socket:
        """Starts the process if it does not run; returns its control socket. Raises OSError on failure."""
        with self._lock:
            if self._control_socket is not None:
                return self._control_socket
            tokenizer, vocab_size, eos = self._read_tokenizer()
            ours, theirs = socket.socketpair()
            with theirs:
                fd = theirs.fileno()
                # -P keeps the program's folder off the import path.
                command = [sys.executable, "-P", grammar_compiler.__file__, str(fd)]
                self.process = subprocess.Popen(command, pass_fds=(fd,), stdin=subprocess.DEVNULL, stdout=2)
            self._finalizer = weakref.finalize(self, _terminate, self.process, ours)
            try:
                ours.settimeout(START_TIMEOUT_SECONDS)
                text = tokenizer.encode()
                header = {"vocab": vocab_size, "eos": eos, "size": len(text), "limits": self.limits}
                ours.sendall(json.dumps(header).encode() + b"\n" + text)
                if not ours.recv(1):
                    raise OSError("it ended before it was ready")
            except OSError:
                self._finalizer()
                raise
            self._control_socket = ours
            return ours

    def run(self, grammar_type: str, text: str, cancel_event: threading.Event | None) -> dict[str, Any]:
        """Runs a trial: {"bytes": memory of the compiled grammar} or {"error": reason}. Restarts a process that ended.

        Raises GrammarCancelled soon after `cancel_event` is set, which ends the trial; OSError if the process fails.
        """
        request = json.dumps([grammar_type, text]).encode() + b"\n"
        for _ in range(2):
            with self._lock:
                control = self.start()
                ours, theirs = socket.socketpair()
                with theirs, suppress(OSError):
                    socket.send_fds(control, [b"t"], [theirs.fileno()])
            with ours:
                if reply := _send_and_receive_line(ours, request, cancel_event):
                    return json.loads(reply)
            with self._lock:
                if self._control_socket is control:  # another thread may have restarted it
                    self.close()
        raise OSError("it ended in the middle of a trial, twice")

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            if self._control_socket is not None:
                self._control_socket = None
                self._finalizer()


def _send_and_receive_line(connection: socket.socket, message: bytes, cancel_event: threading.Event | None) -> bytes:
    """Sends a message and returns the line that replies to it; empty if the other end is closed. Raises TimeoutError,
    and GrammarCancelled soon after `cancel_event` is set."""
    reply, deadline = b"", time.monotonic() + REPLY_TIMEOUT_SECONDS
    with suppress(ConnectionError):
        connection.settimeout(REPLY_TIMEOUT_SECONDS)
        connection.sendall(message)
        connection.settimeout(0.05)
        while not reply.endswith(b"\n"):
            try:
                if not (part := connection.recv(2**16)):
                    return b""
                reply += part
            except TimeoutError:
                if cancel_event is not None and cancel_event.is_set():
                    raise GrammarCancelled from None
                if time.monotonic() > deadline:
                    raise
    return reply.partition(b"\n")[0]


def _terminate(process: subprocess.Popen, control: socket.socket) -> None:
    """Closes the control socket, which ends the process; kills the process after a second."""
    control.close()
    try:
        process.wait(1)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
