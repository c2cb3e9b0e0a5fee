"""Output that follows a grammar: which tokens may come next, as bits. The grammars are llguidance's, an extra:
`pip install fastgen[guide]`.

    regex:[0-9]{4}-[0-9]{2}         a regular expression that matches the whole output
    json:{"type": "object", ...}    a JSON schema; `json:` alone is any JSON object
    lark:start: "yes" | "no"        a context-free grammar (llguidance's variant of Lark)

A grammar is tried in a process of its own before it is compiled here (see `fastgen.grammar_trial`).
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

from fastgen import grammar_trial
from fastgen.grammar_trial import MASK_SECONDS, Limits, compile_grammar, with_stack
from fastgen.types import Tokenizer

KINDS = ("regex", "json", "lark")
LENGTH = 2**20  # characters of a grammar
DEPTH = 128  # of JSON
BUDGET = 2**31  # bytes that the compiled grammars of running requests may take
QUICK = 0.01  # seconds; what compiles more slowly is compiled once, and copied
MAX_VERDICTS, MAX_COMPILED, MAX_STOCK = 1024, 8, 64  # remembered: results of trials; slow and early compilations
MAX_STOCKED = 256  # early ones of a grammar
START_SECONDS, ANSWER_SECONDS = 60.0, 60.0  # until the process that tries grammars is there, and until it answers


def split(grammar: str) -> tuple[str, str]:
    """Kind and text of a grammar. ValueError for another kind."""
    kind, colon, text = grammar.partition(":")
    if not colon or kind not in KINDS:
        raise ValueError(f"grammar must begin with {', '.join(k + ':' for k in KINDS)}, got {grammar[:40]!r}")
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


def parse(grammar: str) -> tuple[str, str]:
    """Kind and text of a grammar as llguidance takes them. ValueError for what is too large, or no JSON."""
    kind, text = split(grammar)
    if len(text) > LENGTH:
        raise ValueError(f"{kind} grammar: {len(text)} characters are more than the limit of {LENGTH}")
    if kind == "json":
        if (depth := json_depth(text)) > DEPTH:
            raise ValueError(f"json grammar: it is nested {depth} levels deep, and the limit is {DEPTH}")
        try:
            text = json.dumps(json.loads(text) if text.strip() else {"type": "object"})
        except ValueError as e:
            raise ValueError(f"json grammar: {e}") from e
    return kind, text


class Cancelled(Exception):
    """Nobody waits for a grammar any more."""


class Guide:
    """Where one completion is in its grammar."""

    def __init__(self, matcher: Any, memory: object = None) -> None:
        self.matcher = matcher
        self.memory = memory  # counted while this lives
        self.error = ""  # why it cannot be followed any further, where that is not llguidance's doing

    def push(self, token: int) -> None:
        """A token was drawn."""
        if not self.matcher.is_stopped():
            self.matcher.consume_token(token)

    @property
    def failed(self) -> bool:
        """Whether the grammar cannot be followed any further: it has become too large to be parsed."""
        return bool(self.error) or self.matcher.is_error()

    @property
    def reason(self) -> str:
        """Why it has failed."""
        return f"the grammar cannot be followed any further: {self.error or self.matcher.get_error().splitlines()[0]}"

    def copy(self) -> "Guide":
        """Another one at the same place. Masks of copies are computed one after the other: they share a lexer."""
        return Guide(self.matcher.deep_copy(), self.memory)


class _Memory:
    """Memory of a compiled grammar; see `Guides._count`."""


class Trials:
    """The process that tries grammars: started when first needed, and again if it has ended. For several threads."""

    def __init__(self, read: Callable[[], tuple[str, int, Any]]) -> None:
        """`read` gives the tokenizer as tokenizers' JSON, the size of the vocabulary, and the end tokens."""
        self._lock = threading.Lock()
        self._read, self.limits = read, Limits()
        self.process: subprocess.Popen | None = None
        self._control: socket.socket | None = None

    def start(self) -> None:
        """Starts the process, unless it runs. OSError if it does not start."""
        with self._lock:
            self._start()

    def _start(self) -> None:
        if self._control is not None:
            return
        tokenizer, vocab, eos = self._read()
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-P", grammar_trial.__file__, str(theirs.fileno())]  # -P: types.py is Python's
            self.process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=2)
        self._finalizer = weakref.finalize(self, _end, self.process, ours)
        try:
            ours.settimeout(START_SECONDS)
            words = tokenizer.encode()
            about = {"vocab": vocab, "eos": eos, "size": len(words), "limits": self.limits}
            ours.sendall(json.dumps(about).encode() + b"\n" + words)
            if not ours.recv(1):
                raise OSError("it ended before it was ready")
        except OSError:
            self._finalizer()
            raise
        self._control = ours

    def run(self, kind: str, text: str, stop: threading.Event | None) -> dict[str, Any]:
        """What `grammar_trial` says of a grammar; a process that has ended is started again.

        Cancelled soon after `stop` is set, and the trial ends. OSError if there is no such process.
        """
        for _ in range(2):
            with self._lock:
                self._start()
                control = self._control
                ours, theirs = socket.socketpair()
                with theirs, suppress(OSError):
                    socket.send_fds(self._control, [b"t"], [theirs.fileno()])  # type: ignore[list-item]
            with ours:
                if answer := _ask(ours, json.dumps([kind, text]).encode() + b"\n", stop):
                    return json.loads(answer)
            with self._lock:
                if self._control is control:  # nobody else has noticed
                    self._close()
        raise OSError("it ended in the middle of a trial, twice")

    def _close(self) -> None:
        if self._control is not None:
            self._control = None
            self._finalizer()

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            self._close()


def _ask(link: socket.socket, question: bytes, stop: threading.Event | None) -> bytes:
    """The line that answers a question; empty if the other end is closed. Cancelled soon after `stop` is set."""
    answer = b""
    with suppress(ConnectionError):
        link.settimeout(ANSWER_SECONDS)
        link.sendall(question)
        end = time.monotonic() + ANSWER_SECONDS
        link.settimeout(0.05)
        while not answer.endswith(b"\n"):
            try:
                if not (part := link.recv(2**16)):
                    return b""
                answer += part
            except TimeoutError:
                if stop is not None and stop.is_set():
                    raise Cancelled from None
                if time.monotonic() > end:
                    raise
    return answer.partition(b"\n")[0]


def _end(process: subprocess.Popen, control: socket.socket) -> None:
    """Ends the process that tries grammars."""
    control.close()
    try:
        process.wait(1)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Guides:
    """Makes guides for the tokens of a tokenizer, and their masks, all cores at once. For several threads at once.

    `trusted`: every grammar that comes was tried by another engine's guides.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab: int, eos: frozenset[int], *, timed: bool = True) -> None:
        """`vocab`: the model's, which may be larger than the tokenizer's. `timed`: slow masks end their request."""
        self.tokenizer, self.vocab, self.eos, self.timed = tokenizer, vocab, eos, timed
        self.trusted = not hasattr(os, "fork")  # on Windows nothing can be tried
        self._tokens: Any = None  # made when first wanted: it takes a second
        self._lock = threading.Lock()
        self._trials = Trials(self._about)
        self._locks = [threading.Lock() for _ in range(256)]  # by grammar, so that each is compiled once
        self._verdicts: OrderedDict[bytes, dict[str, Any]] = OrderedDict()
        self._compiled: OrderedDict[bytes, Guide] = OrderedDict()  # at their beginning; those that took long
        self._stock: OrderedDict[bytes, list[Guide]] = OrderedDict()
        self._bytes = [0]  # of compiled grammars that live
        self._slow = False  # whether the last masks took long

    def prepare(self) -> None:
        """Read the tokenizer now, and start the process that tries grammars; not if that is in vain."""
        with suppress(ValueError):
            if self.tokenizer is not None and find_spec("llguidance"):
                self._ready()

    def close(self) -> None:
        """Ends the process that tries grammars; the next grammar starts it again."""
        self._trials.close()

    def _ready(self) -> Any:
        with self._lock:  # whoever comes second waits for the first
            return self._tokens or self._start()

    def _start(self) -> Any:
        from llguidance import LLExecutor
        from llguidance.hf import from_tokenizer

        try:
            tokens = from_tokenizer(self.tokenizer, self.vocab, sorted(self.eos) or None)  # type: ignore[arg-type]
        except ValueError as e:
            raise ValueError(f"this model's tokenizer cannot be used with grammars: {e}") from e
        self._pool = LLExecutor(num_threads=max(1, (os.cpu_count() or 2) - 1))
        if not self.trusted:
            with suppress(OSError):  # whoever has a grammar tries again, and says it
                self._trials.start()
        self._tokens = tokens
        return tokens

    def _about(self) -> tuple[str, int, Any]:
        """The tokenizer as `llguidance.hf.from_tokenizer` reads it."""
        backend = type(self.tokenizer.backend_tokenizer).from_str(self.tokenizer.backend_tokenizer.to_str())  # type: ignore[union-attr]
        backend.no_padding()
        backend.no_truncation()
        return backend.to_str(), self.vocab, sorted(self.eos) or self.tokenizer.eos_token_id  # type: ignore[union-attr]

    def check(self, grammar: str, stop: threading.Event | None = None) -> None:
        """ValueError if a grammar cannot be used, with the reason. Cancelled soon after `stop` is set."""
        kind, text = self._parse(grammar)
        key = _key(grammar)
        with self._locks[key[0]]:
            self._try(key, kind, text, stop)

    def make(self, grammar: str, count: int = 1, stop: threading.Event | None = None) -> list[Guide]:
        """Guides at the beginning of a grammar, for `count` completions. As `check` if it cannot be used."""
        kind, text = self._parse(grammar)
        key = _key(grammar)
        with self._locks[key[0]]:
            if len(self._stock.get(key, ())) >= count:
                stock = self._stock.pop(key)
                guides, rest = stock[:count], stock[count:]
                if rest:
                    self._stock[key] = rest
                return guides
            size = self._try(key, kind, text, stop)
            try:
                return with_stack(2 * self._trials.limits.stack, lambda: self._compile(key, kind, text, count, size))
            except ValueError as e:
                raise ValueError(f"{kind} grammar: {e}") from e

    def make_early(self, grammar: str, count: int) -> None:
        """Makes guides, in a thread, for the next calls of `make`."""

        def fill() -> None:
            with suppress(ValueError):
                self.put(grammar, self.make(grammar, count))

        threading.Thread(target=fill, daemon=True).start()

    def put(self, grammar: str, guides: list[Guide]) -> None:
        """Keeps guides at the beginning of a grammar for the next calls of `make`; the newest ones, of few grammars."""
        key = _key(grammar)
        with self._locks[key[0]]:
            self._stock[key] = [*self._stock.pop(key, ()), *guides][-MAX_STOCKED:]
            while len(self._stock) > MAX_STOCK:
                with suppress(KeyError):  # another thread was faster
                    self._stock.popitem(last=False)

    def stocked(self, grammar: str, count: int) -> bool:
        """Whether `make` has so many guides."""
        return len(self._stock.get(_key(grammar), ())) >= count

    def _parse(self, grammar: str) -> tuple[str, str]:
        split(grammar)
        if self.tokenizer is None:
            raise ValueError("a grammar needs a tokenizer, and this model came without one")
        if find_spec("llguidance") is None:
            raise ValueError("a grammar needs llguidance: pip install fastgen[guide]")
        self._ready()
        return parse(grammar)

    def _try(self, key: bytes, kind: str, text: str, stop: threading.Event | None) -> int:
        """The bytes that a grammar takes when it is compiled. ValueError, with the reason, if it cannot be."""
        if self.trusted:
            return 0
        with self._lock:
            verdict = self._verdicts.get(key)
        if verdict is None:
            try:
                verdict = self._trials.run(kind, text, stop)
            except OSError as e:
                raise ValueError(f"{kind} grammar: the process that tries grammars failed: {e}") from e
        with self._lock:
            self._verdicts[key] = verdict
            self._verdicts.move_to_end(key)
            if len(self._verdicts) > MAX_VERDICTS:
                self._verdicts.popitem(last=False)
        if "error" in verdict:
            raise ValueError(f"{kind} grammar: {verdict['error']}")
        return verdict["bytes"]

    def _compile(self, key: bytes, kind: str, text: str, count: int, size: int) -> list[Guide]:
        guides = list[Guide]()
        with self._lock:
            first = self._compiled.get(key)
        first = None if first is None or first.failed else first
        while len(guides) < count:
            if first is not None:
                guides.append(first.copy())
                continue
            memory, begin = self._count(size), time.monotonic()
            guide = Guide(compile_grammar(self._tokens, kind, text), memory)
            if time.monotonic() - begin < QUICK:
                guides.append(guide)
                continue
            first = guide
        if first is not None:
            with self._lock:
                self._compiled[key] = first
                self._compiled.move_to_end(key)
                if len(self._compiled) > MAX_COMPILED:
                    self._compiled.popitem(last=False)
        return guides

    def _count(self, size: int) -> object:
        """Counts memory of a compiled grammar for as long as the object that this returns lives."""
        with self._lock:
            if self._bytes[0] + size > BUDGET:
                self._compiled.clear()
            if self._bytes[0] + size > BUDGET:
                used = f"{self._bytes[0] >> 20} of at most {BUDGET >> 20} MiB"
                raise ValueError(f"the grammars of running requests take {used} of memory: try again later")
            self._bytes[0] += size
        memory, total = _Memory(), self._bytes
        weakref.finalize(memory, lambda: total.__setitem__(0, total[0] - size)).atexit = False
        return memory

    def masks(self, rows: list[tuple[int, Guide]], count: int) -> np.ndarray:
        """[count, words] int32: bit t % 32 of word t // 32 is whether token t may come next. All may in other rows.

        A guide whose mask takes too long fails, as one whose grammar llguidance gives up; what it draws is dropped.
        """
        bits = np.full((count, -(-self.vocab // 32)), -1, np.int32)
        going = [(guide, row) for row, guide in rows if not (guide.failed or guide.matcher.is_stopped())]
        if going:
            self._fill(going, bits)
        for row, guide in rows:
            if guide.failed:
                bits[row] = -1
            elif guide.matcher.is_stopped():  # nothing may come but the end
                bits[row] = 0
                for token in self.eos:
                    bits[row, token // 32] |= np.int32(np.uint32(1 << token % 32).view(np.int32))
        return bits

    def _fill(self, going: list[tuple[Guide, int]], bits: np.ndarray) -> None:
        """Masks of several guides; one by one after a call that took long, to find out whose do."""
        from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par

        if not self._slow and len(going) > 1:
            begin = time.monotonic()
            try:
                fill_next_token_bitmask_par(self._pool, [(guide.matcher, row) for guide, row in going], bits)
                self._slow = self.timed and time.monotonic() - begin > MASK_SECONDS
                return
            except Exception:  # of one of them, and which one is seen below
                pass
        self._slow = False
        for guide, row in going:
            begin = time.thread_time()
            try:
                fill_next_token_bitmask(guide.matcher, bits, row)
            except Exception as e:
                guide.error = f"{type(e).__name__}: {e}"
            if self.timed and time.thread_time() - begin > MASK_SECONDS:
                guide.error = f"its next tokens take longer than {MASK_SECONDS} s to find"


def _key(grammar: str) -> bytes:
    return hashlib.blake2b(grammar.encode("utf-8", "surrogatepass"), digest_size=16).digest()
