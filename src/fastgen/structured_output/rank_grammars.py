"""Which rank tries a grammar, and which compiles it."""

import threading
from collections.abc import Callable

import numpy as np

from fastgen.config import SamplingParams
from fastgen.structured_output.backend import GrammarBackend, GrammarMatcher


class RankGrammars:
    """The grammars of one rank's requests, compiled in agreement with the other ranks of its engine.

    A single process   tries a grammar (see trial.py) and compiles it.
    Rank 0             of ranks that it started: tries it, makes the others compile it beside their steps, compiles it.
    A started rank     compiles it without a trial (`backend.skip_trials`): rank 0 has tried every grammar that arrives.
    The caller's ranks (torchrun) all try it, and refuse it together if one of them does.
    """

    def __init__(
        self,
        backend: GrammarBackend,
        *,
        precompile_on_ranks: Callable[[str, int], object] | None = None,
        all_ranks: Callable[[bool], bool] | None = None,
    ) -> None:
        """Rank 0 of ranks that it started passes `precompile_on_ranks`, which calls `precompile_here` on the others.

        A rank of a group passes `all_ranks`, which returns whether its argument is true on every rank.
        """
        self.backend, self._precompile_on_ranks, self._all_ranks = backend, precompile_on_ranks, all_ranks

    def compile(
        self, sampling: SamplingParams, cancel_event: threading.Event | None = None
    ) -> list[GrammarMatcher | None]:
        """Returns a matcher for each completion of a request; None without a grammar.

        Changes nothing but the backend's caches, so any thread may call it beside an engine's steps. Raises ValueError
        for a grammar that cannot be used, and GrammarCancelled soon after `cancel_event` is set.
        """
        grammar, matchers = sampling.grammar, list[GrammarMatcher | None]()
        if grammar is None:
            return [None] * sampling.n
        error: ValueError | None = None
        try:
            if self._precompile_on_ranks is not None and not self.backend.has_prebuilt(grammar, sampling.n):
                self.backend.check_grammar(grammar, cancel_event)
                self._precompile_on_ranks(grammar, sampling.n)
            matchers += self.backend.make_matchers(grammar, sampling.n, cancel_event)
        except ValueError as e:
            error = e
        # The caller's ranks make this call in step with each other.
        if self._precompile_on_ranks is None and self._all_ranks is not None and not self.backend.skip_trials:
            if not self._all_ranks(error is None):
                error = error or ValueError("another rank refuses the grammar")
        if error is not None:
            raise error
        return matchers

    def precompile(self, sampling: SamplingParams, cancel_event: threading.Event) -> None:
        """Compiles matchers for the next request with these settings. Raises as `compile` does."""
        matchers = [m for m in self.compile(sampling, cancel_event) if m is not None]
        if sampling.grammar is not None and not cancel_event.is_set():  # a cancelled request will not use them
            self.backend.add_prebuilt(sampling.grammar, matchers)

    def precompile_here(self, grammar: str, num_matchers: int) -> None:
        """Compiles on a started rank, in a thread, what rank 0 compiles now."""
        self.backend.prebuild_matchers(grammar, num_matchers)

    def token_masks(self, rows: list[tuple[int, GrammarMatcher]], num_rows: int) -> np.ndarray:
        """Returns the token masks of a step's rows; see `GrammarBackend.compute_token_masks`."""
        return self.backend.compute_token_masks(rows, num_rows)

    def prepare(self) -> None:
        """Does the work that the first grammar would wait for, a second or two, if grammars can be used at all."""
        self.backend.prepare()

    def close(self) -> None:
        """Ends the process that tries grammars."""
        self.backend.close()
