"""Tries a grammar in a process of its own before an engine compiles it. llguidance overflows the stack for some
grammars, and for others computes or allocates without end: that ends the trial, and nothing else.

    engine ── a socket ── this file as a program, which reads the tokenizer once ── a fork for each grammar

The program imports neither torch nor the rest of fastgen, and has one thread, so that it starts and forks quickly. A
fork answers on a socket of its own. It is killed when the other end of that is closed, or a limit is reached.
"""

import gc
import json
import os
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
MAX_MASK_SECONDS = 0.25  # of CPU time, for one mask
MASK_STACK_BYTES = 2**19  # bytes, for masks; the threads that compute an engine's have 2 MiB
ALLOCATOR_ARENA_BYTES = 2**27  # bytes of addresses that the allocator reserves for two threads
BASELINE_BYTES = 16 * 2**20  # bytes that any trial takes
MAX_TRIAL_TOKENS, MAX_TRIAL_TOKENS_SECONDS = 8, 0.002  # tokens that a trial follows, and how long
# llguidance's own, per grammar. The fuel also bounds each mask; what needs more is refused or ends its request.
PARSER_LIMITS: dict[str, Any] = {"initial_lexer_fuel": 250_000, "max_grammar_size": 25_000, "max_lexer_states": 50_000}


class TrialLimits(NamedTuple):
    """What a trial may take."""

    cpu_seconds: float = 2.0  # of CPU time, for the grammar and its first masks
    memory_bytes: int = 256 * 2**20  # bytes
    stack_bytes: int = 64 * 2**20  # bytes, for the compilation; an engine's has twice as many


def compile_grammar(ll_tokenizer: Any, grammar_type: str, text: str) -> Any:
    """Returns the LLMatcher of a grammar. ValueError, with llguidance's reason, if it cannot be used.

    `tokens` is the LLTokenizer; `kind` is regex, json or lark.
    """
    from llguidance import LLMatcher, LLParserLimits

    read = {
        "json": LLMatcher.grammar_from_json_schema,
        "regex": LLMatcher.grammar_from_regex,
        "lark": LLMatcher.grammar_from_lark,
    }[grammar_type]
    matcher = LLMatcher(ll_tokenizer, read(text), log_level=0, limits=LLParserLimits(**PARSER_LIMITS))
    if error := matcher.get_error():
        raise ValueError(error.splitlines()[0])
    return matcher


def run_with_stack(stack_bytes: int, function: Callable[[], T]) -> T:
    """Calls a function in a thread with a stack of `size` bytes; returns or raises what it does."""
    done: list[T] = []
    failed: list[BaseException] = []

    def call() -> None:
        try:
            done.append(function())
        except BaseException as e:
            failed.append(e)

    before = threading.stack_size(stack_bytes)  # is everybody's: a thread that starts meanwhile gets more than it needs
    try:
        thread = threading.Thread(target=call)
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    if failed:
        raise failed[0]
    return done[0]


# --- the program ------------------------------------------------------------------------------------------------------


def _process_bytes(field: int) -> int:
    """Bytes of this process's memory: 0 is what it has asked for, 1 what it uses. 0 where the system does not say."""
    with suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[field]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _try_tokens(matcher: Any) -> None:
    """Takes some steps. ValueError if a mask is slow or fails."""
    begin = time.thread_time()
    for step in range(MAX_TRIAL_TOKENS):
        if matcher.is_stopped():
            break
        before = time.thread_time()
        mask = matcher.compute_bitmask()
        # The first token, or one from the middle: strings begin with other tokens than they go on with.
        allowed = [32 * i + bit.bit_length() - 1 for i, bit in _first_allowed_per_word(mask)]
        if not matcher.is_error() and allowed:
            matcher.consume_token(allowed[step % 2 * len(allowed) // 2])
        now = time.thread_time()
        if now - before > MAX_MASK_SECONDS:
            raise ValueError(f"the tokens that may come next take longer than {MAX_MASK_SECONDS} s to find")
        if matcher.is_error():
            raise ValueError(f"it cannot be followed: {matcher.get_error().splitlines()[0]}")
        if now - begin > MAX_TRIAL_TOKENS_SECONDS:
            break


def _first_allowed_per_word(mask: bytes) -> list[tuple[int, int]]:
    """Of each word of 32 tokens that has any: its index, and the first one as a bit."""
    words = struct.unpack(f"<{len(mask) // 4}I", mask)
    return [(i, word & -word) for i, word in enumerate(words) if word]


def _run_trial(ll_tokenizer: Any, grammar_type: str, text: str, limits: TrialLimits) -> dict[str, Any]:
    """What a trial says: the bytes of memory that the grammar needs, or why it is refused."""
    before = _process_bytes(1)
    try:
        matcher = run_with_stack(limits.stack_bytes, lambda: compile_grammar(ll_tokenizer, grammar_type, text))
        run_with_stack(MASK_STACK_BYTES, lambda: _try_tokens(matcher))
    except ValueError as e:
        return {"error": str(e)}
    except MemoryError:
        return {"error": _failure_reason(signal.SIGABRT, limits)}
    except BaseException as e:  # llguidance's panics too
        return {"error": f"{type(e).__name__}: {e}"}
    return {"bytes": max(0, _process_bytes(1) - before - BASELINE_BYTES)}


def _failure_reason(signal_number: int, limits: TrialLimits) -> str:
    """Why a trial was ended by a signal."""
    if signal_number in (signal.SIGPROF, signal.SIGALRM):
        return f"it takes longer than {limits.cpu_seconds:g} s to compile"
    if signal_number in (signal.SIGABRT, signal.SIGKILL):
        return f"it takes more than {limits.memory_bytes >> 20} MiB of memory to compile"
    return "it is nested too deeply, or its rules or references form too long a chain"


def _fork_trial(ll_tokenizer: Any, connection: socket.socket, limits: TrialLimits) -> int:
    """Starts the trial of the grammar that comes over a socket; its process id."""
    import fcntl  # this and the next not on Windows
    import resource

    if pid := os.fork():
        return pid
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # of what ends it, the system's words
        os.closerange(3, connection.fileno())  # other trials' sockets
        os.closerange(connection.fileno() + 1, connection.fileno() + 1024)
        for number in (signal.SIGCHLD, signal.SIGIO, signal.SIGPROF, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
        with connection.makefile("rb") as file:
            kind, text = json.loads(file.readline())
        flags = fcntl.fcntl(connection, fcntl.F_GETFL)
        fcntl.fcntl(connection, fcntl.F_SETFL, flags | os.O_ASYNC)  # SIGIO when the other end closes
        if used := _process_bytes(0):
            size = used + limits.memory_bytes + limits.stack_bytes + MASK_STACK_BYTES + ALLOCATOR_ARENA_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
        signal.setitimer(signal.ITIMER_PROF, limits.cpu_seconds)
        signal.setitimer(signal.ITIMER_REAL, 20 * limits.cpu_seconds)
        answer = json.dumps(_run_trial(ll_tokenizer, kind, text, limits)) + "\n"
        fcntl.fcntl(connection, fcntl.F_SETFL, flags)
        connection.sendall(answer.encode())
    finally:
        os._exit(0)


def main() -> None:
    """Serves trials until the other end of the socket, whose number is the only argument, is closed."""
    control = socket.socket(fileno=int(sys.argv[1]))
    for number in (signal.SIGINT, signal.SIGTERM):  # the engine's process gets them as well, and decides
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    from llguidance import LLTokenizer

    with control.makefile("rb") as file:
        about = json.loads(file.readline())
        limits = TrialLimits(*about["limits"])
        tokens = LLTokenizer(file.read(about["size"]).decode(), n_vocab=about["vocab"], eos_token=about["eos"])
    gc.freeze()  # or each fork would copy the pages of what lives here
    control.sendall(b"r")  # ready
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    running: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as ready:
        ready.register(control, selectors.EVENT_READ)
        ready.register(ours, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                if key.fileobj is ours:
                    ours.recv(4096)
                    continue
                message, handles, _, _ = socket.recv_fds(control, 1, 1)
                if not message:
                    return
                link = socket.socket(fileno=handles[0])
                running[_fork_trial(tokens, link, limits)] = link
            while running:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                with running.pop(pid) as link, suppress(OSError):
                    if os.WIFSIGNALED(status):
                        link.sendall(
                            (json.dumps({"error": _failure_reason(os.WTERMSIG(status), limits)}) + "\n").encode()
                        )


if __name__ == "__main__":
    main()
