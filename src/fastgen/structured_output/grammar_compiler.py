"""Compiles a grammar on trial, in a process of its own, before an engine compiles it.

For some grammars llguidance overflows the stack, and for others it computes or allocates without end. Then only the
trial ends:

    engine ── socket ── this file as a program, which reads the tokenizer once ── a forked process for each grammar

The program imports neither torch nor the rest of fastgen and has one thread, so that it starts and forks quickly. A
forked process answers on a socket of its own; a reached limit, or the end of the socket's other end, kills it.
"""

import gc
import json
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
MAX_MASK_SECONDS = 0.25  # of CPU time, for one mask
REAP_SECONDS = 0.02  # between checks for trials that a signal has ended
MASK_STACK_BYTES = 2**19  # for masks; the threads that compute an engine's masks have 2 MiB
ALLOCATOR_ARENA_BYTES = 2**27  # of addresses that the allocator reserves for two threads
BASELINE_BYTES = 16 * 2**20  # that any trial uses
MAX_TRIAL_TOKENS, MAX_TRIAL_TOKENS_SECONDS = 8, 0.002  # of the grammar's first steps
# llguidance's own limits per grammar; the fuel also bounds each mask. A grammar that needs more is refused or fails.
PARSER_LIMITS: dict[str, Any] = {"initial_lexer_fuel": 250_000, "max_grammar_size": 25_000, "max_lexer_states": 50_000}


class TrialLimits(NamedTuple):
    """The resources that a trial may use."""

    cpu_seconds: float = 2.0  # for compiling the grammar and its first masks
    memory_bytes: int = 256 * 2**20
    stack_bytes: int = 64 * 2**20  # for compiling; an engine has twice as many


def compile_grammar(ll_tokenizer: Any, grammar_type: str, text: str) -> Any:
    """Returns the LLMatcher of a grammar of type regex, json or lark. Raises ValueError with llguidance's reason."""
    from llguidance import LLMatcher, LLParserLimits

    parsers = {
        "json": LLMatcher.grammar_from_json_schema, "regex": LLMatcher.grammar_from_regex,
        "lark": LLMatcher.grammar_from_lark,
    }  # fmt: skip
    limits = LLParserLimits(**PARSER_LIMITS)
    matcher = LLMatcher(ll_tokenizer, parsers[grammar_type](text), log_level=0, limits=limits)
    if error := matcher.get_error():
        raise ValueError(error.splitlines()[0])
    return matcher


def run_with_stack(stack_bytes: int, function: Callable[[], T]) -> T:
    """Calls a function in a thread with a stack of `stack_bytes` bytes. Returns its result or raises its exception."""
    # The setting is the process's: another thread that starts at this moment gets a larger stack than it needs.
    default, pool = threading.stack_size(stack_bytes), ThreadPoolExecutor(1)
    try:
        future = pool.submit(function)
    finally:
        threading.stack_size(default)
        pool.shutdown(wait=False)  # the thread ends after the call
    return future.result()


# --- one trial, in a forked process -----------------------------------------------------------------------------------


def _process_bytes(field: int) -> int:
    """Returns this process's virtual (field 0) or resident (field 1) memory in bytes; 0 if the system has no /proc."""
    with suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[field]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _try_tokens(matcher: Any) -> None:
    """Advances a matcher by a few tokens. Raises ValueError if a mask is slow or fails."""
    start = time.thread_time()
    for step in range(MAX_TRIAL_TOKENS):
        if matcher.is_stopped():
            break
        step_start, mask = time.thread_time(), matcher.compute_bitmask()
        words = struct.unpack(f"<{len(mask) // 4}I", mask)
        allowed = [32 * i + (word & -word).bit_length() - 1 for i, word in enumerate(words) if word]
        # The first token, or one from the middle: a string starts with other tokens than it continues with.
        if not matcher.is_error() and allowed:
            matcher.consume_token(allowed[step % 2 * len(allowed) // 2])
        now = time.thread_time()
        if now - step_start > MAX_MASK_SECONDS:
            raise ValueError(f"finding the tokens that may come next takes longer than {MAX_MASK_SECONDS} s")
        if matcher.is_error():
            raise ValueError(f"it cannot be followed: {matcher.get_error().splitlines()[0]}")
        if now - start > MAX_TRIAL_TOKENS_SECONDS:
            break


def _run_trial(ll_tokenizer: Any, grammar_type: str, text: str, limits: TrialLimits) -> dict[str, Any]:
    """Returns {"bytes": memory that the compiled grammar needs} or {"error": why the grammar is refused}."""
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
    """Returns why a signal ended a trial."""
    if signal_number in (signal.SIGPROF, signal.SIGALRM):
        return f"it takes longer than {limits.cpu_seconds:g} s to compile"
    if signal_number in (signal.SIGABRT, signal.SIGKILL):
        return f"it takes more than {limits.memory_bytes >> 20} MiB of memory to compile"
    return "it is nested too deeply, or its rules or references form too long a chain"


def _fork_trial(ll_tokenizer: Any, connection: socket.socket, limits: TrialLimits) -> int:
    """Forks a process that tries the grammar arriving on a socket. Returns the process id."""
    import fcntl  # not on Windows, as the next
    import resource

    if pid := os.fork():
        return pid
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # hides the system's message about a crash
        os.closerange(3, connection.fileno())  # other trials' sockets
        os.closerange(connection.fileno() + 1, connection.fileno() + 1024)
        for number in (signal.SIGIO, signal.SIGPROF, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
        with connection.makefile("rb") as file:
            grammar_type, text = json.loads(file.readline())
        flags = fcntl.fcntl(connection, fcntl.F_GETFL)
        fcntl.fcntl(connection, fcntl.F_SETFL, flags | os.O_ASYNC)  # SIGIO ends this process when the other end closes
        if used := _process_bytes(0):
            size = used + limits.memory_bytes + limits.stack_bytes + MASK_STACK_BYTES + ALLOCATOR_ARENA_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
        signal.setitimer(signal.ITIMER_PROF, limits.cpu_seconds)
        signal.setitimer(signal.ITIMER_REAL, 20 * limits.cpu_seconds)
        result = json.dumps(_run_trial(ll_tokenizer, grammar_type, text, limits)) + "\n"
        fcntl.fcntl(connection, fcntl.F_SETFL, flags)
        connection.sendall(result.encode())
    finally:
        os._exit(0)


# --- the program ------------------------------------------------------------------------------------------------------


def main() -> None:
    """Serves trials until the other end of the control socket, whose number is the only argument, is closed."""
    control = socket.socket(fileno=int(sys.argv[1]))
    for number in (signal.SIGINT, signal.SIGTERM):  # the engine's process gets them too, and decides when to end
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    from llguidance import LLTokenizer

    with control.makefile("rb") as file:
        header = json.loads(file.readline())
        limits = TrialLimits(*header["limits"])
        tokenizer = LLTokenizer(file.read(header["size"]).decode(), n_vocab=header["vocab"], eos_token=header["eos"])
    gc.freeze()  # otherwise the collector touches, and so copies, the memory that forks share
    control.sendall(b"r")  # ready
    trials: dict[int, socket.socket] = {}  # by process id
    while True:
        if select.select([control], [], [], REAP_SECONDS if trials else None)[0]:
            message, fds, _, _ = socket.recv_fds(control, 1, 1)
            if not message:
                return
            connection = socket.socket(fileno=fds[0])
            trials[_fork_trial(tokenizer, connection, limits)] = connection
        while trials:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            with trials.pop(pid) as connection, suppress(OSError):
                if os.WIFSIGNALED(status):
                    error = {"error": _failure_reason(os.WTERMSIG(status), limits)}
                    connection.sendall((json.dumps(error) + "\n").encode())


if __name__ == "__main__":
    main()
