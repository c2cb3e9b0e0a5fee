"""Output that follows a grammar: which tokens may come next, as bits. The grammars are llguidance's, an extra:
`pip install fastgen[guide]`.

    regex:[0-9]{4}-[0-9]{2}         a regular expression that matches the whole output
    json:{"type": "object", ...}    a JSON schema; `json:` alone is any JSON object
    lark:start: "yes" | "no"        a context-free grammar (llguidance's variant of Lark)

A grammar is tried in a process of its own before it is compiled here (see `fastgen.grammar_check`).
"""

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import numpy as np

from fastgen import grammar_check
from fastgen.core.types import Tokenizer
from fastgen.grammar_check import MAX_MASK_SECONDS, TrialLimits, compile_grammar, run_with_stack

GRAMMAR_TYPES = ("regex", "json", "lark")
MAX_GRAMMAR_CHARS = 2**20  # characters of a grammar
MAX_JSON_DEPTH = 128  # of JSON
MAX_COMPILED_BYTES = 2**31  # bytes that the compiled grammars of running requests may take
FAST_COMPILE_SECONDS = 0.01  # seconds; what compiles more slowly is compiled once, and copied
MAX_TRIAL_RESULTS, MAX_CACHED_GRAMMARS, MAX_PREBUILT_GRAMMARS = (
    1024,
    8,
    64,
)  # remembered: results of trials; slow and early compilations
MAX_PREBUILT_PER_GRAMMAR = 256  # early ones of a grammar
START_TIMEOUT_SECONDS, ANSWER_TIMEOUT_SECONDS = (
    60.0,
    60.0,
)  # until the process that tries grammars is there, and until it answers


def split_grammar(grammar: str) -> tuple[str, str]:
    """Kind and text of a grammar. ValueError for another kind."""
    kind, colon, text = grammar.partition(":")
    if not colon or kind not in GRAMMAR_TYPES:
        raise ValueError(f"grammar must begin with {', '.join(k + ':' for k in GRAMMAR_TYPES)}, got {grammar[:40]!r}")
    return kind, text


def json_depth(text: str) -> int:
    """Returns how deeply the arrays and objects of a JSON text are nested, without recursion."""
    depth = deepest = 0
    for match in re.finditer(r'"(?:[^"\\]|\\.)*+"|[][{}]', text, re.DOTALL):
        bracket = match[0]
        if bracket in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif bracket in "]}":
            depth -= 1
    return deepest


def parse_grammar(grammar: str) -> tuple[str, str]:
    """Kind and text of a grammar as llguidance takes them. ValueError for what is too large, or no JSON."""
    kind, text = split_grammar(grammar)
    if len(text) > MAX_GRAMMAR_CHARS:
        raise ValueError(f"{kind} grammar: {len(text)} characters are more than the limit of {MAX_GRAMMAR_CHARS}")
    if kind == "json":
        if (depth := json_depth(text)) > MAX_JSON_DEPTH:
            raise ValueError(f"json grammar: it is nested {depth} levels deep, and the limit is {MAX_JSON_DEPTH}")
        try:
            text = json.dumps(json.loads(text) if text.strip() else {"type": "object"})
        except ValueError as e:
            raise ValueError(f"json grammar: {e}") from e
    return kind, text


class GrammarCancelled(Exception):
    """Nobody waits for a grammar any more."""


class GrammarMatcher:
    """Where one completion is in its grammar."""

    def __init__(self, matcher: Any, memory: object = None) -> None:
        self.matcher = matcher
        self.memory_reservation = memory  # counted while this lives
        self.error = ""  # why it cannot be followed any further, where that is not llguidance's doing

    def accept_token(self, token: int) -> None:
        """A token was drawn."""
        if not self.matcher.is_stopped():
            self.matcher.consume_token(token)

    @property
    def failed(self) -> bool:
        """Whether the grammar cannot be followed any further: it has become too large to be parsed."""
        return bool(self.error) or self.matcher.is_error()

    @property
    def failure_reason(self) -> str:
        """Why it has failed."""
        return f"the grammar cannot be followed any further: {self.error or self.matcher.get_error().splitlines()[0]}"

    def copy(self) -> "GrammarMatcher":
        """Another one at the same place. Masks of copies are computed one after the other: they share a lexer."""
        return GrammarMatcher(self.matcher.deep_copy(), self.memory_reservation)


class _MemoryReservation:
    """Memory of a compiled grammar; see `Guides._count`."""


class TrialProcess:
    """The process that tries grammars: started when first needed, and again if it has ended. For several threads."""

    def __init__(self, read_tokenizer: Callable[[], tuple[str, int, Any]]) -> None:
        """`read` gives the tokenizer as tokenizers' JSON, the size of the vocabulary, and the end tokens."""
        self._lock = threading.Lock()
        self._read_tokenizer, self.limits = read_tokenizer, TrialLimits()
        self.process: subprocess.Popen | None = None
        self._control_socket: socket.socket | None = None

    def start(self) -> None:
        """Starts the process, unless it runs. OSError if it does not start."""
        with self._lock:
            self._start_locked()

    def _start_locked(self) -> None:
        if self._control_socket is not None:
            return
        tokenizer, vocab, eos = self._read_tokenizer()
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-P", grammar_check.__file__, str(theirs.fileno())]  # -P: types.py is Python's
            self.process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=2)
        self._finalizer = weakref.finalize(self, _terminate, self.process, ours)
        try:
            ours.settimeout(START_TIMEOUT_SECONDS)
            words = tokenizer.encode()
            about = {"vocab": vocab, "eos": eos, "size": len(words), "limits": self.limits}
            ours.sendall(json.dumps(about).encode() + b"\n" + words)
            if not ours.recv(1):
                raise OSError("it ended before it was ready")
        except OSError:
            self._finalizer()
            raise
        self._control_socket = ours

    def run(self, grammar_type: str, text: str, cancel_event: threading.Event | None) -> dict[str, Any]:
        """What `grammar_trial` says of a grammar; a process that has ended is started again.

        Cancelled soon after `stop` is set, and the trial ends. OSError if there is no such process.
        """
        for _ in range(2):
            with self._lock:
                self._start_locked()
                control = self._control_socket
                ours, theirs = socket.socketpair()
                with theirs, suppress(OSError):
                    socket.send_fds(self._control_socket, [b"t"], [theirs.fileno()])  # type: ignore[list-item]
            with ours:
                if answer := _send_and_receive_line(
                    ours, json.dumps([grammar_type, text]).encode() + b"\n", cancel_event
                ):
                    return json.loads(answer)
            with self._lock:
                if self._control_socket is control:  # nobody else has noticed
                    self._close_locked()
        raise OSError("it ended in the middle of a trial, twice")

    def _close_locked(self) -> None:
        if self._control_socket is not None:
            self._control_socket = None
            self._finalizer()

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            self._close_locked()


def _send_and_receive_line(connection: socket.socket, message: bytes, cancel_event: threading.Event | None) -> bytes:
    """The line that answers a question; empty if the other end is closed. Cancelled soon after `stop` is set."""
    answer = b""
    with suppress(ConnectionError):
        connection.settimeout(ANSWER_TIMEOUT_SECONDS)
        connection.sendall(message)
        end = time.monotonic() + ANSWER_TIMEOUT_SECONDS
        connection.settimeout(0.05)
        while not answer.endswith(b"\n"):
            try:
                if not (part := connection.recv(2**16)):
                    return b""
                answer += part
            except TimeoutError:
                if cancel_event is not None and cancel_event.is_set():
                    raise GrammarCancelled from None
                if time.monotonic() > end:
                    raise
    return answer.partition(b"\n")[0]


def _terminate(process: subprocess.Popen, control: socket.socket) -> None:
    """Ends the process that tries grammars."""
    control.close()
    try:
        process.wait(1)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class GrammarBackend:
    """Makes guides for the tokens of a tokenizer, and their masks, all cores at once. For several threads at once.

    `trusted`: every grammar that comes was tried by another engine's guides.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        *,
        limit_mask_time: bool = True,
    ) -> None:
        """`vocab`: the model's, which may be larger than the tokenizer's. `timed`: slow masks end their request."""
        self.tokenizer, self.vocab_size, self.eos_token_ids, self.limit_mask_time = (
            tokenizer,
            vocab_size,
            eos_token_ids,
            limit_mask_time,
        )
        self.skip_trials = not hasattr(os, "fork")  # on Windows nothing can be tried
        self._ll_tokenizer: Any = None  # made when first wanted: it takes a second
        self._lock = threading.Lock()
        self._trial_process = TrialProcess(self._tokenizer_info)
        self._grammar_locks = [threading.Lock() for _ in range(256)]  # by grammar, so that each is compiled once
        self._trial_results: OrderedDict[bytes, dict[str, Any]] = OrderedDict()
        self._compiled_matchers: OrderedDict[bytes, GrammarMatcher] = (
            OrderedDict()
        )  # at their beginning; those that took long
        self._prebuilt_matchers: OrderedDict[bytes, list[GrammarMatcher]] = OrderedDict()
        self._compiled_bytes = [0]  # of compiled grammars that live
        self._last_fill_slow = False  # whether the last masks took long

    def prepare(self) -> None:
        """Read the tokenizer now, and start the process that tries grammars; not if that is in vain."""
        with suppress(ValueError):
            if self.tokenizer is not None and find_spec("llguidance"):
                self._ensure_tokenizer()

    def close(self) -> None:
        """Ends the process that tries grammars; the next grammar starts it again."""
        self._trial_process.close()

    def _ensure_tokenizer(self) -> Any:
        with self._lock:  # whoever comes second waits for the first
            return self._ll_tokenizer or self._load_tokenizer()

    def _load_tokenizer(self) -> Any:
        from llguidance import LLExecutor
        from llguidance.hf import from_tokenizer

        try:
            tokens = from_tokenizer(self.tokenizer, self.vocab_size, sorted(self.eos_token_ids) or None)  # type: ignore[arg-type]
        except ValueError as e:
            raise ValueError(f"this model's tokenizer cannot be used with grammars: {e}") from e
        self._executor = LLExecutor(num_threads=max(1, (os.cpu_count() or 2) - 1))
        if not self.skip_trials:
            with suppress(OSError):  # whoever has a grammar tries again, and says it
                self._trial_process.start()
        self._ll_tokenizer = tokens
        return tokens

    def _tokenizer_info(self) -> tuple[str, int, Any]:
        """The tokenizer as `llguidance.hf.from_tokenizer` reads it."""
        backend = type(self.tokenizer.backend_tokenizer).from_str(self.tokenizer.backend_tokenizer.to_str())  # type: ignore[union-attr]
        backend.no_padding()
        backend.no_truncation()
        return backend.to_str(), self.vocab_size, sorted(self.eos_token_ids) or self.tokenizer.eos_token_id  # type: ignore[union-attr]

    def check_grammar(self, grammar: str, cancel_event: threading.Event | None = None) -> None:
        """ValueError if a grammar cannot be used, with the reason. Cancelled soon after `stop` is set."""
        kind, text = self._parse(grammar)
        key = _grammar_key(grammar)
        with self._grammar_locks[key[0]]:
            self._run_trial(key, kind, text, cancel_event)

    def make_matchers(
        self, grammar: str, num_matchers: int = 1, cancel_event: threading.Event | None = None
    ) -> list[GrammarMatcher]:
        """Guides at the beginning of a grammar, for `count` completions. As `check` if it cannot be used."""
        kind, text = self._parse(grammar)
        key = _grammar_key(grammar)
        with self._grammar_locks[key[0]]:
            if len(self._prebuilt_matchers.get(key, ())) >= num_matchers:
                stock = self._prebuilt_matchers.pop(key)
                guides, rest = stock[:num_matchers], stock[num_matchers:]
                if rest:
                    self._prebuilt_matchers[key] = rest
                return guides
            size = self._run_trial(key, kind, text, cancel_event)
            try:
                return run_with_stack(
                    2 * self._trial_process.limits.stack_bytes,
                    lambda: self._compile_matchers(key, kind, text, num_matchers, size),
                )
            except ValueError as e:
                raise ValueError(f"{kind} grammar: {e}") from e

    def prebuild_matchers(self, grammar: str, num_matchers: int) -> None:
        """Makes guides, in a thread, for the next calls of `make`."""

        def fill() -> None:
            with suppress(ValueError):
                self.add_prebuilt(grammar, self.make_matchers(grammar, num_matchers))

        threading.Thread(target=fill, daemon=True).start()

    def add_prebuilt(self, grammar: str, matchers: list[GrammarMatcher]) -> None:
        """Keeps guides at the beginning of a grammar for the next calls of `make`; the newest ones, of few grammars."""
        key = _grammar_key(grammar)
        with self._grammar_locks[key[0]]:
            self._prebuilt_matchers[key] = [*self._prebuilt_matchers.pop(key, ()), *matchers][
                -MAX_PREBUILT_PER_GRAMMAR:
            ]
            while len(self._prebuilt_matchers) > MAX_PREBUILT_GRAMMARS:
                with suppress(KeyError):  # another thread was faster
                    self._prebuilt_matchers.popitem(last=False)

    def has_prebuilt(self, grammar: str, num_matchers: int) -> bool:
        """Whether `make` has so many guides."""
        return len(self._prebuilt_matchers.get(_grammar_key(grammar), ())) >= num_matchers

    def _parse(self, grammar: str) -> tuple[str, str]:
        split_grammar(grammar)
        if self.tokenizer is None:
            raise ValueError("a grammar needs a tokenizer, and this model came without one")
        if find_spec("llguidance") is None:
            raise ValueError("a grammar needs llguidance: pip install fastgen[guide]")
        self._ensure_tokenizer()
        return parse_grammar(grammar)

    def _run_trial(self, key: bytes, grammar_type: str, text: str, cancel_event: threading.Event | None) -> int:
        """The bytes that a grammar takes when it is compiled. ValueError, with the reason, if it cannot be."""
        if self.skip_trials:
            return 0
        with self._lock:
            verdict = self._trial_results.get(key)
        if verdict is None:
            try:
                verdict = self._trial_process.run(grammar_type, text, cancel_event)
            except OSError as e:
                raise ValueError(f"{grammar_type} grammar: the process that tries grammars failed: {e}") from e
        with self._lock:
            self._trial_results[key] = verdict
            self._trial_results.move_to_end(key)
            if len(self._trial_results) > MAX_TRIAL_RESULTS:
                self._trial_results.popitem(last=False)
        if "error" in verdict:
            raise ValueError(f"{grammar_type} grammar: {verdict['error']}")
        return verdict["bytes"]

    def _compile_matchers(
        self, key: bytes, grammar_type: str, text: str, num_matchers: int, num_bytes: int
    ) -> list[GrammarMatcher]:
        guides = list[GrammarMatcher]()
        with self._lock:
            first = self._compiled_matchers.get(key)
        first = None if first is None or first.failed else first
        while len(guides) < num_matchers:
            if first is not None:
                guides.append(first.copy())
                continue
            memory, begin = self._reserve_memory(num_bytes), time.monotonic()
            guide = GrammarMatcher(compile_grammar(self._ll_tokenizer, grammar_type, text), memory)
            if time.monotonic() - begin < FAST_COMPILE_SECONDS:
                guides.append(guide)
                continue
            first = guide
        if first is not None:
            with self._lock:
                self._compiled_matchers[key] = first
                self._compiled_matchers.move_to_end(key)
                if len(self._compiled_matchers) > MAX_CACHED_GRAMMARS:
                    self._compiled_matchers.popitem(last=False)
        return guides

    def _reserve_memory(self, num_bytes: int) -> object:
        """Counts memory of a compiled grammar for as long as the object that this returns lives."""
        with self._lock:
            if self._compiled_bytes[0] + num_bytes > MAX_COMPILED_BYTES:
                self._compiled_matchers.clear()
            if self._compiled_bytes[0] + num_bytes > MAX_COMPILED_BYTES:
                used = f"{self._compiled_bytes[0] >> 20} of at most {MAX_COMPILED_BYTES >> 20} MiB"
                raise ValueError(f"the grammars of running requests take {used} of memory: try again later")
            self._compiled_bytes[0] += num_bytes
        memory, total = _MemoryReservation(), self._compiled_bytes
        weakref.finalize(memory, lambda: total.__setitem__(0, total[0] - num_bytes)).atexit = False
        return memory

    def compute_token_masks(self, rows: list[tuple[int, GrammarMatcher]], num_rows: int) -> np.ndarray:
        """[count, words] int32: bit t % 32 of word t // 32 is whether token t may come next. All may in other rows.

        A guide whose mask takes too long fails, as one whose grammar llguidance gives up; what it draws is dropped.
        """
        bits = np.full((num_rows, -(-self.vocab_size // 32)), -1, np.int32)
        going = [(guide, row) for row, guide in rows if not (guide.failed or guide.matcher.is_stopped())]
        if going:
            self._fill_masks(going, bits)
        for row, guide in rows:
            if guide.failed:
                bits[row] = -1
            elif guide.matcher.is_stopped():  # nothing may come but the end
                bits[row] = 0
                for token in self.eos_token_ids:
                    bits[row, token // 32] |= np.int32(np.uint32(1 << token % 32).view(np.int32))
        return bits

    def _fill_masks(self, active: list[tuple[GrammarMatcher, int]], bits: np.ndarray) -> None:
        """Masks of several guides; one by one after a call that took long, to find out whose do."""
        from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par

        if not self._last_fill_slow and len(active) > 1:
            begin = time.monotonic()
            try:
                fill_next_token_bitmask_par(self._executor, [(guide.matcher, row) for guide, row in active], bits)
                self._last_fill_slow = self.limit_mask_time and time.monotonic() - begin > MAX_MASK_SECONDS
                return
            except Exception:  # of one of them, and which one is seen below
                pass
        self._last_fill_slow = False
        for guide, row in active:
            begin = time.thread_time()
            try:
                fill_next_token_bitmask(guide.matcher, bits, row)
            except Exception as e:
                guide.error = f"{type(e).__name__}: {e}"
            if self.limit_mask_time and time.thread_time() - begin > MAX_MASK_SECONDS:
                guide.error = f"its next tokens take longer than {MAX_MASK_SECONDS} s to find"


def _grammar_key(grammar: str) -> bytes:
    return hashlib.blake2b(grammar.encode("utf-8", "surrogatepass"), digest_size=16).digest()
