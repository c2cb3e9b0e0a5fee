"""Grammars, compiled by llguidance (the extra `guide`), and the token masks of their matchers.

    regex:[0-9]{4}-[0-9]{2}         a regular expression that matches the complete output
    json:{"type": "object", ...}    a JSON schema; `json:` alone is any JSON object
    lark:start: "yes" | "no"        a context-free grammar (llguidance's variant of Lark)

A grammar is compiled on trial in another process before it is compiled here (see grammar_compiler.py).
"""

import hashlib
import json
import os
import re
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from threading import Event, Lock, Thread
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from fastgen.core.extensions import Grammars, Matcher
from fastgen.extras import install_command
from fastgen.sampling_params import SamplingParams
from fastgen.structured_output.grammar_compiler import MAX_MASK_SECONDS, compile_grammar, run_with_stack
from fastgen.structured_output.token_filter import TokenFilter, build_filters
from fastgen.structured_output.trial_process import TrialProcess
from fastgen.text import Tokenizer

GRAMMAR_TYPES = ("regex", "json", "lark")
MAX_GRAMMAR_CHARS, MAX_JSON_DEPTH = 2**20, 128
MAX_COMPILED_BYTES = 2**31  # of all compiled grammars of running requests
FAST_COMPILE_SECONDS = 0.01  # a grammar that compiles more slowly is compiled once and copied
MAX_TRIAL_RESULTS, MAX_CACHED_GRAMMARS, MAX_PREBUILT_GRAMMARS = 1024, 8, 64
MAX_PREBUILT_PER_GRAMMAR = 256


def json_depth(text: str) -> int:
    """Returns how deeply the arrays and objects of a JSON text are nested, without recursion."""
    depth = max_depth = 0
    for match in re.finditer(r'"(?:[^"\\]|\\.)*+"|[][{}]', text, re.DOTALL):
        if match[0] in "[{":
            depth += 1
            max_depth = max(max_depth, depth)
        elif match[0] in "]}":
            depth -= 1
    return max_depth


class ParsedGrammar(NamedTuple):
    """A grammar as llguidance takes it; `key` is a hash of the grammar as it was given."""

    key: bytes
    type: str  # regex, json or lark
    text: str


def _grammar_key(grammar: str) -> bytes:
    return hashlib.blake2b(grammar.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class GrammarMatcher(Matcher):
    """The state of one completion in its grammar. The grammar's memory is counted while `memory_reservation` lives."""

    def __init__(self, matcher: Any, memory_reservation: object = None) -> None:
        """Wraps llguidance's matcher."""
        self.matcher, self.memory_reservation = matcher, memory_reservation
        self.error = ""  # a reason to stop that llguidance does not know

    def accept_token(self, token: int) -> None:
        if not self.matcher.is_stopped():
            self.matcher.consume_token(token)

    @property
    def failed(self) -> bool:
        return bool(self.error) or self.matcher.is_error()

    @property
    def failure_reason(self) -> str:
        return f"the grammar cannot be followed any further: {self.error or self.matcher.get_error().splitlines()[0]}"

    def copy(self) -> "GrammarMatcher":
        """Returns another matcher in the same state. Masks of copies are computed one at a time: they share a lexer."""
        return GrammarMatcher(self.matcher.deep_copy(), self.memory_reservation)


class _MemoryReservation:
    """Memory of a compiled grammar, counted while this object lives; see `GrammarBackend._reserve_memory`."""


class GrammarBackend(Grammars):
    """Compiles grammars for a tokenizer and computes token masks on all cores. Several threads may use it at once.

    A single process tries a grammar (see grammar_compiler.py) and compiles it. Over several ranks:

    Rank 0 with workers  tries the grammar, makes the workers compile it beside their steps, and compiles it.
    A worker             compiles it without a trial (`skip_trials`): rank 0 has tried every grammar that arrives.
    The caller's ranks   (torchrun) all try it, and refuse it together if one of them does.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: frozenset[int], *,
        is_single_rank: bool = True, precompile_on_workers: Callable[[str, int], object] | None = None,
        all_reduce_min: Callable[[int], int] = int,
    ) -> None:  # fmt: skip
        """`vocab_size` is the model's, which may exceed the tokenizer's. `is_single_rank`: slow matchers fail, and
        requests may have logits processors.
        `precompile_on_workers` calls `prebuild_matchers` on the workers; `all_reduce_min` is that of the ranks."""
        self.tokenizer, self.vocab_size, self.eos_token_ids = tokenizer, vocab_size, eos_token_ids
        self.is_single_rank = is_single_rank
        self._precompile_on_workers, self._all_reduce_min = precompile_on_workers, all_reduce_min
        # True also where another process has tried every grammar that arrives.
        self.skip_trials = not hasattr(os, "fork")  # Windows
        self._ll_tokenizer: Any = None  # built at first use: it takes a second
        self._lock = Lock()
        self._trial_process = TrialProcess(self._tokenizer_info)
        self._grammar_locks = [Lock() for _ in range(256)]  # by grammar: each is compiled once at a time
        self._trial_results: OrderedDict[bytes, dict[str, Any]] = OrderedDict()
        self._compiled_matchers: OrderedDict[bytes, GrammarMatcher] = OrderedDict()  # initial states, to copy
        self._prebuilt_matchers: OrderedDict[bytes, list[GrammarMatcher]] = OrderedDict()
        self._compiled_bytes = [0]
        self._last_fill_slow = False

    def prepare(self) -> None:
        """Reads the tokenizer and starts the trial process now, if grammars can be used at all: a second or two."""
        with suppress(ValueError):
            if self.tokenizer is not None and find_spec("llguidance"):
                self._load_tokenizer()

    def close(self) -> None:
        """Ends the trial process; the next grammar starts it again."""
        self._trial_process.close()

    def _load_tokenizer(self) -> None:
        """Builds llguidance's tokenizer and starts the trial process, the first time."""
        from llguidance import LLExecutor
        from llguidance.hf import from_tokenizer

        with self._lock:
            if self._ll_tokenizer is not None:
                return
            eos: Any = sorted(self.eos_token_ids) or None
            try:
                ll_tokenizer = from_tokenizer(self.tokenizer, self.vocab_size, eos)  # type: ignore[arg-type]
            except ValueError as e:
                raise ValueError(f"this model's tokenizer cannot be used with grammars: {e}") from e
            self._executor = LLExecutor(num_threads=max(1, (os.cpu_count() or 2) - 1))
            if not self.skip_trials:
                with suppress(OSError):  # the next trial starts it, or reports the error
                    self._trial_process.start()
            self._ll_tokenizer = ll_tokenizer

    def _tokenizer_info(self) -> tuple[str, int, Any]:
        """Returns tokenizers' JSON, the vocabulary size and EOS ids, as `llguidance.hf.from_tokenizer` reads them."""
        assert self.tokenizer is not None
        original: Any = self.tokenizer.backend_tokenizer
        backend = type(original).from_str(original.to_str())
        backend.no_padding()
        backend.no_truncation()
        return backend.to_str(), self.vocab_size, sorted(self.eos_token_ids) or self.tokenizer.eos_token_id

    def compile(self, sampling: SamplingParams, cancel_event: Event | None = None) -> list[Matcher | None]:
        """Returns a matcher for each completion of a request; None without a grammar or another constraint.

        Any thread may call this. Raises ValueError for an unusable constraint, GrammarCancelled once `cancel_event` is
        set.
        """
        self.build_filters(sampling, [])
        return self.build_filters(sampling, self._compile_grammar(sampling, cancel_event))

    def build_filters(self, sampling: SamplingParams, matchers: Sequence[Matcher | None]) -> list[Matcher | None]:
        """Returns matchers that also apply a request's constraints besides its grammar. ValueError for wrong ones."""
        rank: Any = {"is_single_rank": self.is_single_rank}
        return build_filters(sampling, matchers, self.tokenizer, self.vocab_size, **rank)

    def _compile_grammar(
        self, sampling: SamplingParams, cancel_event: Event | None = None
    ) -> list[GrammarMatcher | None]:
        """Returns a matcher of the grammar for each completion of a request; None without a grammar.

        Changes nothing but caches, so any thread may call it beside an engine's steps; the caller's ranks call it in
        step with each other. Raises ValueError for an unusable grammar, GrammarCancelled once `cancel_event` is set.
        """
        grammar, matchers, error = sampling.grammar, list[GrammarMatcher | None](), None
        if grammar is None:
            return [None] * sampling.n
        try:
            if self._precompile_on_workers is not None and not self.has_prebuilt(grammar, sampling.n):
                self.check_grammar(grammar, cancel_event)
                self._precompile_on_workers(grammar, sampling.n)
            matchers += self.make_matchers(grammar, sampling.n, cancel_event)
        except ValueError as e:
            error = e
        if self._precompile_on_workers is None and not self.skip_trials:
            if not self._all_reduce_min(int(error is None)):
                error = error or ValueError("another rank refuses the grammar")
        if error is not None:
            raise error
        return matchers

    def precompile(self, sampling: SamplingParams, cancel_event: Event) -> None:
        """Compiles matchers for the next request with these settings. Raises as `compile` does."""
        matchers = [m for m in self._compile_grammar(sampling, cancel_event) if m is not None]
        if sampling.grammar is not None and not cancel_event.is_set():  # a cancelled request will not use them
            self._store_prebuilt(sampling.grammar, matchers)

    def check_grammar(self, grammar: str, cancel_event: Event | None = None) -> None:
        """Raises ValueError, with the reason, for an unusable grammar; GrammarCancelled after `cancel_event` is set."""
        parsed = self._parse(grammar)
        with self._grammar_locks[parsed.key[0]]:
            self._run_trial(parsed, cancel_event)

    def make_matchers(
        self, grammar: str, num_matchers: int = 1, cancel_event: Event | None = None
    ) -> list[GrammarMatcher]:
        """Returns matchers in a grammar's initial state, one for each completion. Raises as `check_grammar` does."""
        parsed = self._parse(grammar)
        with self._grammar_locks[parsed.key[0]]:
            if self.has_prebuilt(grammar, num_matchers):
                prebuilt = self._prebuilt_matchers.pop(parsed.key)
                if len(prebuilt) > num_matchers:
                    self._prebuilt_matchers[parsed.key] = prebuilt[num_matchers:]
                return prebuilt[:num_matchers]
            num_bytes = self._run_trial(parsed, cancel_event)
            stack_bytes = 2 * self._trial_process.limits.stack_bytes
            try:
                return run_with_stack(stack_bytes, lambda: self._compile_matchers(parsed, num_matchers, num_bytes))
            except ValueError as e:
                raise ValueError(f"{parsed.type} grammar: {e}") from e

    def prebuild_matchers(self, grammar: str, num_matchers: int) -> None:
        """Makes matchers in a thread, for the next calls of `make_matchers`."""

        def prebuild() -> None:
            with suppress(ValueError):
                self._store_prebuilt(grammar, self.make_matchers(grammar, num_matchers))

        Thread(target=prebuild, daemon=True).start()

    def _store_prebuilt(self, grammar: str, matchers: list[GrammarMatcher]) -> None:
        """Stores unused matchers for the next calls of `make_matchers`; keeps a bounded number of the newest."""
        key = _grammar_key(grammar)
        with self._grammar_locks[key[0]]:
            stored = [*self._prebuilt_matchers.pop(key, ()), *matchers]
            self._remember(self._prebuilt_matchers, key, stored[-MAX_PREBUILT_PER_GRAMMAR:], MAX_PREBUILT_GRAMMARS)

    def has_prebuilt(self, grammar: str, num_matchers: int) -> bool:
        """Returns whether `make_matchers` has this many stored matchers."""
        return len(self._prebuilt_matchers.get(_grammar_key(grammar), ())) >= num_matchers

    def _parse(self, grammar: str) -> ParsedGrammar:
        """Parses "type:text". Raises ValueError for an unknown type, a text that is too long, too deep or not JSON, and
        without a tokenizer that grammars can use, or llguidance."""
        grammar_type, colon, text = grammar.partition(":")
        if not colon or grammar_type not in GRAMMAR_TYPES:
            types = ", ".join(f"{t}:" for t in GRAMMAR_TYPES)
            raise ValueError(f"grammar must begin with {types}, got {grammar[:40]!r}")
        if self.tokenizer is None:
            raise ValueError("a grammar needs a tokenizer, and this model came without one")
        if find_spec("llguidance") is None:
            raise ValueError(f"a grammar needs llguidance: {install_command('guide')}")
        self._load_tokenizer()
        if len(text) > MAX_GRAMMAR_CHARS:
            raise ValueError(f"{grammar_type} grammar: {len(text)} characters exceed the limit of {MAX_GRAMMAR_CHARS}")
        if grammar_type == "json":
            if (depth := json_depth(text)) > MAX_JSON_DEPTH:
                raise ValueError(f"json grammar: it is nested {depth} levels deep, and the limit is {MAX_JSON_DEPTH}")
            try:
                text = json.dumps(json.loads(text) if text.strip() else {"type": "object"})
            except ValueError as e:
                raise ValueError(f"json grammar: {e}") from e
        return ParsedGrammar(_grammar_key(grammar), grammar_type, text)

    def _run_trial(self, grammar: ParsedGrammar, cancel_event: Event | None) -> int:
        """Returns the bytes that a compiled grammar takes. Raises ValueError, with the reason, if the trial fails."""
        if self.skip_trials:
            return 0
        if (result := self._trial_results.get(grammar.key)) is None:
            try:
                result = self._trial_process.run(grammar.type, grammar.text, cancel_event)
            except OSError as e:
                raise ValueError(f"{grammar.type} grammar: the process that tries grammars failed: {e}") from e
        self._remember(self._trial_results, grammar.key, result, MAX_TRIAL_RESULTS)
        if "error" in result:
            raise ValueError(f"{grammar.type} grammar: {result['error']}")
        return result["bytes"]

    def _remember(self, table: OrderedDict[bytes, Any], key: bytes, value: Any, max_entries: int) -> None:
        """Stores an entry as the newest of a table, and drops the oldest above `max_entries`."""
        with self._lock:
            table[key] = value
            table.move_to_end(key)
            if len(table) > max_entries:
                table.popitem(last=False)

    def _compile_matchers(self, grammar: ParsedGrammar, num_matchers: int, num_bytes: int) -> list[GrammarMatcher]:
        """Compiles a grammar once for each matcher; a grammar that compiles slowly, once for all."""
        original, matchers = self._compiled_matchers.get(grammar.key), list[GrammarMatcher]()
        original = None if original is None or original.failed else original
        while len(matchers) < num_matchers:
            if original is not None:
                matchers.append(original.copy())
                continue
            reservation, start = self._reserve_memory(num_bytes), time.monotonic()
            matcher = GrammarMatcher(compile_grammar(self._ll_tokenizer, grammar.type, grammar.text), reservation)
            if time.monotonic() - start < FAST_COMPILE_SECONDS:
                matchers.append(matcher)
            else:
                original = matcher
        if original is not None:
            self._remember(self._compiled_matchers, grammar.key, original, MAX_CACHED_GRAMMARS)
        return matchers

    def _reserve_memory(self, num_bytes: int) -> object:
        """Counts a compiled grammar's memory while the returned object lives. Raises ValueError at the limit."""
        with self._lock:
            if self._compiled_bytes[0] + num_bytes > MAX_COMPILED_BYTES:
                self._compiled_matchers.clear()
            if self._compiled_bytes[0] + num_bytes > MAX_COMPILED_BYTES:
                used = f"{self._compiled_bytes[0] >> 20} of at most {MAX_COMPILED_BYTES >> 20} MiB"
                raise ValueError(f"the grammars of running requests take {used} of memory: try again later")
            self._compiled_bytes[0] += num_bytes
        reservation, total = _MemoryReservation(), self._compiled_bytes
        weakref.finalize(reservation, lambda: total.__setitem__(0, total[0] - num_bytes)).atexit = False
        return reservation

    def token_masks(self, rows: list[tuple[int, Matcher]], num_rows: int) -> Int32[np.ndarray, "rows words"]:
        """Returns masks in which bit t % 32 of word t // 32 is set if token t may come next; all bits in other rows.

        A matcher fails if its mask takes too long or llguidance reports an error. The caller drops its next token.
        """
        bits = np.full((num_rows, -(-self.vocab_size // 32)), -1, np.int32)
        filters = [(row, matcher) for row, matcher in rows if isinstance(matcher, TokenFilter)]
        matchers = ((row, m.grammar_matcher if isinstance(m, TokenFilter) else m) for row, m in rows)
        grammars = [(row, m) for row, m in matchers if isinstance(m, GrammarMatcher)]
        active = [(matcher, row) for row, matcher in grammars if not (matcher.failed or matcher.matcher.is_stopped())]
        if active:
            self._fill_masks(active, bits)
        for row, matcher in grammars:
            if matcher.failed:
                bits[row] = -1
            elif matcher.matcher.is_stopped():  # only the end may come
                bits[row] = 0
                for token in self.eos_token_ids:
                    bits.view(np.uint32)[row, token // 32] |= np.uint32(1 << token % 32)
        for row, matcher in filters:
            matcher.apply_to_mask(bits[row])
        return bits

    def _fill_masks(self, active: list[tuple[GrammarMatcher, int]], bits: np.ndarray) -> None:
        """Fills the masks of several matchers in parallel; after a slow call, one by one to find the slow one."""
        from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par

        if not self._last_fill_slow and len(active) > 1:
            start = time.monotonic()
            try:
                fill_next_token_bitmask_par(self._executor, [(matcher.matcher, row) for matcher, row in active], bits)
                self._last_fill_slow = self.is_single_rank and time.monotonic() - start > MAX_MASK_SECONDS
                return
            except Exception:  # one matcher's: the loop below finds which
                pass
        self._last_fill_slow = False
        for matcher, row in active:
            start = time.thread_time()
            try:
                fill_next_token_bitmask(matcher.matcher, bits, row)
            except Exception as e:
                matcher.error = f"{type(e).__name__}: {e}"
            if self.is_single_rank and time.thread_time() - start > MAX_MASK_SECONDS:
                matcher.error = f"its next tokens take longer than {MAX_MASK_SECONDS} s to find"
