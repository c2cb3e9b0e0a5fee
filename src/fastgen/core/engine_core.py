"""EngineCore: requests that share steps, advanced one step at a time, on one thread and in plain Python.

    add -> prepare, submit        a SequenceState for each completion; the scheduler queues their sequences
    step -> scheduler.plan        tokens of this step, pages, admission, preemption
            page_copier, runner   copy pages, forward, sample: launched, not waited for
            scheduler.commit      the state as if the step were done
            finish the last step  its tokens become events; sequences that stop leave

With `overlap` the step before is read while the new one runs on the device, so an event comes one step late.
"""

import itertools
import random
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastgen.config import EngineConfig, check_int
from fastgen.core import extensions, scheduler
from fastgen.core.batch import max_groups, to_device
from fastgen.core.extensions import Adapters, Grammars, Matcher, Profiler, Ranks, TextProcessor, on_all_ranks
from fastgen.core.model_config import ModelConfig
from fastgen.core.prefix_cache import CacheStats, PrefixCache, make_namespace
from fastgen.core.request import Completion, Event, Output, SequenceState, max_length, rejected_output, rejection_events
from fastgen.core.runner import EagerRunner, InFlightStep, PageCopier
from fastgen.core.scheduling_policy import POLICIES, SharedPrefixGroup, find_shared_prefix_groups
from fastgen.core.types import Batch
from fastgen.sampling_params import SamplingParams

INT64_RANGE = -(2**63), 2**63 - 1  # of request ids and seeds
Prepared = list[SequenceState] | Output  # the completions of a request, or the output of one that cannot run


class EngineCore:
    """Runs many requests on one runner. For one thread at a time; users call `fastgen.Engine`.

    `model_config` is the full model's, where the runner's is a rank's shard. `version_tensors`: their version counters
    move when the parameters are written in place; by default those of the parameters themselves.
    """

    def __init__(
        self, runner: EagerRunner, config: EngineConfig, page_copier: PageCopier, *,
        model_config: ModelConfig | None = None, version_tensors: Sequence[Tensor] | None = None,
        text: TextProcessor | None = None, ranks: Ranks | None = None, adapters: Adapters | None = None,
        grammars: Grammars | None = None, profiler: Profiler | None = None,
    ) -> None:  # fmt: skip
        self.runner, self.config, self.page_copier = runner, config, page_copier
        self.model_config, self.policy = model_config or runner.model_config, POLICIES[config.schedule.policy]
        self.text, self.ranks, self.adapters = text or TextProcessor(), ranks or Ranks(), adapters or Adapters()
        self.grammars, self.profiler = grammars or Grammars(), profiler or Profiler()
        page_size = config.kv_cache.page_size
        self.cache_capacity = len(runner.cache.k[0]) - page_size  # tokens; page 0 is scratch
        self.state = scheduler.State(self._new_prefix_cache())
        self.sequence_states: dict[int, SequenceState] = {}  # by sequence id
        self._token_ids: dict[int, list[int]] = {}  # the same lists as in `sequence_states`
        self.events: list[Event] = []  # not yet returned by a step
        # Ids of requests whose events have no reader any more. Finalizers append, in any thread and in the middle of
        # anything; `step` and `submit` abort them.
        self.abandoned = deque[frozenset[int]]()
        self.num_steps = 0  # launched
        self.weight_version = 0  # how often the parameters have changed
        self._failed_request_ids = set[int]()  # of completions that failed in the last step, on this rank alone
        self._in_flight: InFlightStep | None = None
        self.last_step: tuple[scheduler.Plan, list[SequenceState], Batch] | None = None
        self._last_token_ids: list[int] = []  # sampled in the step that was finished last
        self._sequence_ids, self._request_ids = itertools.count(), itertools.count()
        seed = random.SystemRandom().getrandbits(62) if config.seed is None else config.seed
        self._seeds = random.Random(self.ranks.all_reduce_min(seed))
        self.eos_token_ids = self.text.end_token_ids(self.model_config.eos_token_ids)
        leaves = tree_leaves(runner.params) if version_tensors is None else version_tensors
        self._version_tensors = [x for x in leaves if x is not None]
        self._last_version_sum = self._version_sum()

    def _new_prefix_cache(self, stats: CacheStats | None = None) -> PrefixCache:
        """Returns an empty prefix cache."""
        cache, offload = self.config.kv_cache, self.config.offload
        prefix_cache = PrefixCache(
            cache.page_size, self.cache_capacity // cache.page_size + 1, self.page_copier.num_host_pages,
            enable_prefix_caching=cache.prefix_cache, offload_preempted_only=offload.offload_policy == "preempted",
        )  # fmt: skip
        prefix_cache.stats = stats or prefix_cache.stats
        return prefix_cache

    # --- requests -----------------------------------------------------------------------------------------------------

    def add(
        self, prompt: Any, sampling: SamplingParams, *, stream_text: bool = True,
        matchers: Sequence[Matcher | None] | None = None,
    ) -> int:  # fmt: skip
        """Queues a request and returns its id; see `Engine.add`."""
        return self.submit([self.prepare(prompt, sampling, stream_text=stream_text, matchers=matchers)])[0]

    def prepare(
        self, prompt: Any, sampling: SamplingParams, *, stream_text: bool = True,
        matchers: Sequence[Matcher | None] | None = None,
    ) -> list[SequenceState]:  # fmt: skip
        """Returns a request's completions, not yet queued. Raises ValueError for what can never run.

        `matchers` are what `grammars.compile` returned for these settings.
        """
        if not isinstance(sampling, SamplingParams):
            raise ValueError(f"sampling must be SamplingParams, got {sampling!r:.100}")
        prompt_ids, text = self.text.encode(prompt, sampling)
        limit = self.max_length(prompt_ids, sampling)
        seed = self.new_seed() if sampling.seed is None else sampling.seed
        output = Output(-1, prompt_ids, [Completion() for _ in range(sampling.n)], prompt=text)
        if sampling.prompt_logprobs is not None:
            output.prompt_logprobs = [None]
            output.prompt_top_logprobs = [None] if sampling.prompt_logprobs else None
        self.adapter_index(sampling)
        common, new_detokenizer = (sampling, seed, limit, self.eos_token_ids), self.text.new_detokenizer
        return [
            SequenceState(
                output, index, *common, new_detokenizer(prompt_ids, sampling, stream_text=stream_text), matcher
            )
            for index, matcher in enumerate(self.grammars.compile(sampling) if matchers is None else matchers)
        ]

    def max_length(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> int:
        """Returns the most tokens of a sequence, prompt included. Raises ValueError for what can never run."""
        has_text = self.text.tokenizer is not None
        return max_length(prompt_token_ids, sampling, self.model_config, self.cache_capacity, has_text)

    def adapter_index(self, sampling: SamplingParams) -> int:
        """Returns the index of a request's adapter, 0 for none. Raises ValueError for an unknown one."""
        return 0 if sampling.adapter is None else self.adapters.index(sampling.adapter)

    def submit(self, requests: Sequence[Prepared]) -> list[int]:
        """Queues prepared requests on every rank, and reports those that cannot run. Returns all ids."""
        self.drain_aborts()
        if self.ranks.has_workers:  # a worker takes no state of rank 0, and checking hundreds of settings takes a while
            first = (None if isinstance(r, Output) else r[0] for r in requests)
            prompts = [s and (s.output.prompt_token_ids, replace(s.params, seed=s.seed)) for s in first]
            self.ranks.broadcast_call(EngineCore._add_from_rank0.__qualname__, prompts)
        return self.enqueue(requests)

    @on_all_ranks()
    def _add_from_rank0(self, prompts: Sequence[tuple[list[int], SamplingParams] | None]) -> None:
        """Queues what rank 0 has submitted; None counts a request that cannot run."""
        self.enqueue([rejected_output("", 1) if x is None else self.prepare(*x, stream_text=False) for x in prompts])

    def enqueue(self, requests: Sequence[Prepared]) -> list[int]:
        """Queues prepared requests on this rank, all at once: the queue is a value, and copying it for each is slow."""
        outputs = [r if isinstance(r, Output) else r[0].output for r in requests]
        for output in outputs:
            output.request_id = next(self._request_ids)
            self.events += rejection_events(output) if output.error is not None else ()
        states = [s for r in requests if not isinstance(r, Output) for s in r]
        for s in states:
            s.adapter_idx = self.adapter_index(s.params)
        new = {next(self._sequence_ids): s for s in states}
        self.sequence_states |= new
        self._token_ids |= {id: s.token_ids for id, s in new.items()}
        self.state = scheduler.add(self.state, *(self._new_sequence(id, s) for id, s in new.items()))
        return [output.request_id for output in outputs]

    def _new_sequence(self, id: int, s: SequenceState) -> scheduler.Sequence:
        namespace = make_namespace(s.adapter_idx, s.params.cache_salt)
        return scheduler.Sequence(id, len(s.token_ids), s.max_length, s.needs_prompt_logprobs, namespace=namespace)

    def new_seed(self) -> int:
        """Returns a random seed for a request that has none."""
        return self._seeds.getrandbits(63)

    @on_all_ranks(checks_input=True)
    def fork(self, request_id: int, index: int, seeds: Sequence[int]) -> list[int]:
        """Continues a completion from its last token in a further request for each seed; see `Engine.fork`."""
        running = self.unfinished_sequences(request_id)
        if index not in running:
            raise ValueError(f"fork of request {request_id}: completion {index} has ended; {[*running]} go on")
        source, new_ids = running[index], list[int]()
        for seed in seeds:
            id, copy = next(self._sequence_ids), self.sequence_states[source].fork(next(self._request_ids), seed)
            self.sequence_states[id], self._token_ids[id] = copy, copy.token_ids
            self.state = scheduler.fork(self.state, source, self._new_sequence(id, copy), self._token_ids)
            new_ids.append(copy.output.request_id)
        return new_ids

    def unfinished_sequences(self, request_id: int) -> dict[int, int]:
        """Finishes the step in flight; returns a request's running completions, index -> sequence id, or ValueError."""
        check_int("request_id", request_id, *INT64_RANGE)
        self.finish_step()
        ids = {s.index: id for id, s in self.sequence_states.items() if s.output.request_id == request_id}
        if not ids:
            raise ValueError(f"request {request_id} is not running here: it has ended, or never was")
        return ids

    def has_events_for(self, request_ids: Collection[int]) -> bool:
        """Returns whether there are, or will be, events of any of these requests."""
        return not (self.running_request_ids | {e.request_id for e in self.events}).isdisjoint(request_ids)

    @property
    def running_request_ids(self) -> set[int]:
        """Ids of the requests with a completion that has not ended."""
        return {s.output.request_id for s in self.sequence_states.values()}

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether a step has anything left to compute or to report."""
        if not self.abandoned:
            return bool(self.sequence_states or self.events)
        ids = self.running_request_ids | {e.request_id for e in self.events}
        return not ids <= frozenset[int]().union(*self.abandoned)

    def drain_events(self) -> list[Event]:
        """Aborts abandoned requests. Returns the events that no call has returned yet."""
        self.drain_aborts()
        events, self.events = self.events, []
        return events

    # --- the end of requests ------------------------------------------------------------------------------------------

    def abort(self, request_ids: Collection[int]) -> dict[int, Output]:
        """Ends running requests on every rank. Returns their outputs; their last events come with a step."""
        if self.running_request_ids.isdisjoint(request_ids):
            return {}
        return self._abort(frozenset(request_ids))

    @on_all_ranks()
    def _abort(self, request_ids: Collection[int]) -> dict[int, Output]:
        return self._abort_here(request_ids)

    def _abort_here(self, request_ids: Collection[int]) -> dict[int, Output]:
        ended = {id: s for id, s in self.sequence_states.items() if s.output.request_id in request_ids}
        self.state = scheduler.remove(self.state, ended.keys(), self._token_ids)
        for id, s in ended.items():
            del self.sequence_states[id], self._token_ids[id]
            if not s.completion.finish_reason:
                self.events.append(s.finish("abort"))
        return {s.output.request_id: s.output for s in ended.values()}

    def _abort_after_error(self) -> None:
        """Aborts everything after an error in a step. Drops the prefix cache: its pages may not have been computed."""
        if self.ranks.has_workers and not self.ranks.failure_cause:
            self.abort(self.running_request_ids)  # an interrupt, which comes when every rank has finished the call
            return
        self._in_flight = None
        self.state = scheduler.State(self._new_prefix_cache(self.state.prefix_cache.stats))
        self._abort_here(self.running_request_ids)

    def drain_aborts(self) -> None:
        """Aborts abandoned requests and drops their events."""
        if self.ranks.failure_cause:  # every request has ended with the other ranks
            self.abandoned.clear()
        while self.abandoned:
            request_ids = self.abandoned.popleft()
            self.abort(request_ids)
            self.events = [e for e in self.events if e.request_id not in request_ids]

    def close(self) -> None:
        """Aborts everything on this rank, and drops runner, cache and parameters. No other call may follow."""
        self._in_flight = self.last_step = None
        self._abort_here(self.running_request_ids)
        self.grammars.close()
        self.page_copier.close()
        del self.runner, self.page_copier, self._version_tensors  # graphs first
        self.adapters = Adapters()

    # --- steps --------------------------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """Launches one step and returns new events. An error or interrupt aborts all requests, and is raised."""
        if self.abandoned:
            self.drain_aborts()
        try:
            self._step()
        except BaseException:
            self._abort_after_error()
            raise
        if self._failed_request_ids:  # the other ranks know nothing of the error
            failed, self._failed_request_ids = self._failed_request_ids, set()
            self.abort(failed)
        return self.drain_events()

    @on_all_ranks()
    @torch.no_grad()
    def _step(self) -> None:
        if not self.sequence_states:
            self.finish_step()
            return
        self.notice_changed_params()
        with self.profiler.range("plan"):
            self.state, scheduled = scheduler.plan(self.state, self.config.schedule, self.policy, self._token_ids)
        plan = scheduled.plan
        self.ranks.check_step(self.num_steps, scheduled, self._last_token_ids)
        with self.profiler.step(plan) if plan else extensions.NULL_CONTEXT:
            try:
                launched = self._launch_step(scheduled) if plan else None
            finally:
                self.finish_step()  # the step before
            self._in_flight = launched
        if not self.config.schedule.overlap:
            self.finish_step()

    def _launch_step(self, scheduled: scheduler.SchedulerOutput) -> InFlightStep:
        """Launches a planned step. The state is then as if the step were done and no sequence had stopped."""
        runner, states, plan = self.runner, self.sequence_states, scheduled.plan
        planned = [states[span.id] for span in plan]
        for s in scheduled.admitted:
            states[s.id].record_admission(s.num_cached_tokens)
        scored = any(s.needs_prompt_logprobs for s in planned)
        with self.profiler.range("stage"):
            groups = () if scored or not runner.max_group_size else self._shared_prefix_groups(plan)
            inputs = runner.prepare_inputs(plan, states, self.num_steps, groups, needs_prompt_logprobs=scored)
        with self.profiler.range("move"):
            layer_chunk_ready = self.page_copier.start_copies(scheduled.page_copies)
        with self.profiler.range("forward"):
            output = runner.forward(inputs, layer_chunk_ready)
            if output.hidden_states is not None:
                self._append_prompt_logprobs(plan, output.hidden_states)
            if any(s.depends_on_last_token for s in planned):
                self.finish_step()  # sampling needs the last tokens; the forward goes on meanwhile
            results = runner.sample(plan, states, inputs, output, self._token_mask(plan))
        self.state = scheduler.commit(self.state, plan, self._token_ids)
        self.last_step = plan, planned, inputs.batch
        self.num_steps += 1
        return InFlightStep(plan, *results, self.weight_version)

    def _shared_prefix_groups(self, plan: scheduler.Plan) -> Sequence[SharedPrefixGroup]:
        """Returns groups of decoding sequences whose shared prefix attention reads once; none if the step prefills."""
        if any(span.stop - span.start > 1 for span in plan):
            return ()
        return find_shared_prefix_groups(self.state, plan, self.runner.max_group_size, max_groups(len(plan)))

    def _token_mask(self, plan: scheduler.Plan) -> Tensor | None:
        """Returns the tokens that grammars allow, as bits on the device; None without grammars."""
        states = self.sequence_states
        rows = [
            (r, s.matcher) for r, x in enumerate(plan) if x.needs_sampling and (s := states.get(x.id)) and s.matcher
        ]
        if not rows:
            return None
        return to_device(torch.from_numpy(self.grammars.token_masks(rows, len(plan))), self.runner.device)

    def finish_step_on_all_ranks(self) -> None:
        """Calls `finish_step` on every rank. An error aborts all requests, as an error of `step` does."""
        try:
            self._finish_step_on_all_ranks()
        except BaseException:
            self._abort_after_error()
            raise

    @on_all_ranks()
    def _finish_step_on_all_ranks(self) -> None:
        self.finish_step()

    def finish_step(self) -> None:
        """Waits for the step in flight, if any, on this rank; its tokens become events, and stopped sequences leave."""
        launched, self._in_flight = self._in_flight, None
        if launched is None:
            return
        with self.profiler.range("wait"):
            self._last_token_ids, rows = launched.read()
        stopped, adapter_versions = set[int](), self.adapters.versions
        with self.profiler.range("commit"):
            for span, row in zip(launched.plan, rows, strict=False):
                s = self.sequence_states.get(span.id) if span.needs_sampling else None
                if s is None or s.completion.finish_reason:  # aborted, or stopped one step earlier
                    continue
                try:
                    event = s.append_token(*row, launched.weight_version + adapter_versions[s.adapter_idx])
                except Exception as e:  # a tokenizer's or grammar's, which concerns this request alone
                    event = s.fail(f"{type(e).__name__}: {e}")
                    self._failed_request_ids.add(s.output.request_id)
                self.events.append(event)
                if event.finish_reason and s.output.request_id not in self._failed_request_ids:
                    stopped.add(span.id)
        self.state = scheduler.remove(self.state, stopped, self._token_ids)
        for id in stopped:
            del self.sequence_states[id], self._token_ids[id]

    def _append_prompt_logprobs(self, plan: scheduler.Plan, hidden_states: Tensor) -> None:
        """Appends the prompt logprobs of a plan's spans, from the hidden states [T, D] of all its tokens."""
        end = 0
        for span in plan:
            row, end = end, end + span.stop - span.start
            s = self.sequence_states[span.id]
            out, num_tops = s.output, s.params.prompt_logprobs
            if out.prompt_logprobs is None or num_tops is None or s.index:
                continue
            first = max(span.start, len(out.prompt_logprobs) - 1)  # a preempted request is computed again
            stop = min(span.stop, len(out.prompt_token_ids) - 1)  # the last token predicts no prompt token
            if first >= stop:
                continue
            offset, targets = row - span.start, out.prompt_token_ids[first + 1 : stop + 1]
            rows = hidden_states[offset + first : offset + stop]
            logprobs, tops = self.runner.prompt_logprobs(rows, targets, num_tops)
            s.has_nan_prompt_logprobs |= any(x != x for x in logprobs)
            out.prompt_logprobs += logprobs
            if out.prompt_top_logprobs is not None:
                out.prompt_top_logprobs += tops

    def preempt_all(self) -> None:
        """Finishes the step in flight and makes every sequence wait, with nothing computed and nothing cached."""
        self.finish_step()
        prefix_cache = self._new_prefix_cache(self.state.prefix_cache.stats)
        self.state = scheduler.preempt_all(self.state, prefix_cache, self._token_ids)

    # --- parameters ---------------------------------------------------------------------------------------------------

    @on_all_ranks()
    def params_changed(self) -> None:
        """Counts a new version of the parameters on every rank, and stops the use of what is cached."""
        self.params_changed_here()

    def params_changed_here(self) -> None:
        """As `params_changed`, on this rank alone."""
        self.weight_version += 1
        self.record_param_versions()
        self.state.prefix_cache.reset()

    def notice_changed_params(self) -> None:
        """Counts a new version if the parameters were written in place since the last check."""
        if self._version_sum() != self._last_version_sum:
            self.params_changed_here()

    def record_param_versions(self) -> None:
        """Records the parameters' current version counters."""
        self._last_version_sum = self._version_sum()

    def _version_sum(self) -> int:
        with torch._C.DisableTorchFunction():  # a default device intercepts every check, and makes it 40 times slower
            return sum(map(attrgetter("_version"), self._version_tensors))
