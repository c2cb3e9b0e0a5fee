"""The loop of an engine: parameters, a paged cache and a scheduler's state, advanced a step at a time."""

import itertools
import os
import random
import threading
import weakref
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastgen.compiled.cuda_graphs import largest_shape
from fastgen.compiled.runner import ModelRunner
from fastgen.config import EngineConfig, SamplingParams, check_int
from fastgen.core import scheduler, tokenizer
from fastgen.core.batch import InputBuffers, build_logit_edits, max_groups, to_device
from fastgen.core.kv_cache import new_kv_cache
from fastgen.core.model_config import ModelConfig, shard_config
from fastgen.core.prefix_cache import CacheStats, PrefixCache, make_namespace
from fastgen.core.request import Completion, Event, Output, SequenceState, max_length, rejected_output, rejection_events
from fastgen.core.scheduling_policy import POLICIES, SharedPrefixGroup, find_shared_prefix_groups
from fastgen.core.step import StepOutput, compute_target_logprobs
from fastgen.core.tokenizer import Prompt
from fastgen.core.types import Batch, KVCache, Params, SamplingTensors, Tokenizer, TopKTopP
from fastgen.distributed import workers
from fastgen.distributed.tensor_parallel import TPGroup
from fastgen.lora import AdapterManager
from fastgen.offload.host_cache import HostOffload, page_bytes
from fastgen.profiling.profiler import NULL_CONTEXT, Profiler
from fastgen.structured_output.backend import GrammarBackend, GrammarMatcher
from fastgen.thread_safety import AccessGuard, check_fork, exclusive, no_torch_modes
from fastgen.training.shared_params import adopted_models, version_counters
from fastgen.training.sleep import ReleasableMemory

INT64_RANGE = -(2**63), 2**63 - 1  # what numbers of requests may be asked for; seeds, too
MAX_CPU_CACHE_BYTES = 2**30  # bytes at most, where the size is not given


def get_tp_size(settings: EngineConfig) -> int:
    """The ranks of an engine. ValueError where several engines are asked for."""
    p = settings.parallel
    if p.replicas > 1:
        raise ValueError(
            f"parallel.replicas={p.replicas} are several engines: use fastgen.Replicas.from_pretrained, fgrun, fgbench "
            "or fgserve, or leave it at 1"
        )
    return p.tensor_parallel


class InFlightStep(NamedTuple):
    """A step that may still be running: what it computes, and where its results will be on the host."""

    plan: scheduler.Plan
    results: tuple[Tensor, ...]  # token, logprob, top tokens, top logprobs, a row for each sequence of the plan
    done_event: torch.cuda.Event | None
    weight_version: int  # of the parameters

    def read_rows(self) -> Iterator[tuple[int, float, list[tuple[int, float]]]]:
        """Token, logprob and most likely tokens of each sequence; waits for them."""
        if self.done_event is not None:
            self.done_event.synchronize()
        token, logprob, top_token, top_logprob = (t.tolist() for t in self.results)
        tops = (list(zip(*pair, strict=True)) for pair in zip(top_token, top_logprob, strict=True))
        return zip(token, logprob, tops if top_token else itertools.repeat([]), strict=False)


class _TokensBySequence(Mapping[int, Sequence[int]]):
    """The tokens of samples, by sequence."""

    def __init__(self, samples: dict[int, SequenceState]) -> None:
        self._sequence_states = samples

    def __getitem__(self, id: int) -> Sequence[int]:
        return self._sequence_states[id].token_ids

    def __iter__(self) -> Iterator[int]:
        return iter(self._sequence_states)

    def __len__(self) -> int:
        return len(self._sequence_states)


class EngineCore:
    """Requests that share steps: queued, planned, launched, handed out. `Engine` is what one calls."""

    @no_torch_modes
    def __init__(
        self,
        params: Params | Any,
        model_config: ModelConfig | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        progress: bool = True,
        tp_group: TPGroup | None = None,
        **settings: Any,
    ) -> None:
        check_fork("Engine")
        if not isinstance(params, Params) or not isinstance(model_config, ModelConfig):
            what = (
                repr(params)
                if isinstance(params, str)
                else f"{type(params).__name__} and {type(model_config).__name__}"
            )
            raise ValueError(
                f"Engine takes Params and their Spec, not {what}: Engine.from_pretrained(…) takes a folder or hub id, "
                "and fastgen.adopt(…) makes both of a transformers model"
            )
        self._access_guard = AccessGuard(
            "this engine", "fastgen.AsyncEngine serves any number of threads and coroutines"
        )
        self._pending_aborts = deque[
            frozenset[int]
        ]()  # requests that nobody waits for any more, to abort with the next call
        chosen = EngineConfig.from_flat(**settings)
        if (size := get_tp_size(chosen)) > 1 and tp_group is None:
            shard_config(model_config, size)  # a ValueError before anything is started
            load = workers.shard_loader(params, model_config, tokenizer, size)
            tp_group = workers.create_tp_group(size, params.embed.device.type, load, settings, type(self))
            params = load(tp_group.shard, str(params.embed.device))[1]
        self._worker_group = tp_group if isinstance(tp_group, workers.WorkerGroup) else None
        if self._worker_group is not None:
            weakref.finalize(self, self._worker_group.close)
        self._failed_request_ids = set[int]()  # requests of which a completion failed, to abort after the call
        with workers.close_workers_on_error(self._worker_group):
            self._params, self.model_config, self.tokenizer, self.tp_group = params, model_config, tokenizer, tp_group
            here = model_config if tp_group is None else shard_config(model_config, tp_group.shard.size)
            self.device, self.dtype = params.embed.device, params.embed.dtype
            self.config = chosen.resolve(self.device.type)
            page, limits = self.config.kv_cache.page_size, self.config.schedule
            context, most = (
                min(model_config.context_length, self.config.kv_cache.cache_tokens or model_config.context_length),
                largest_shape(limits),
            )
            widest = -(-max(context, limits.token_budget) // page)  # padding has a row as well
            members = max(1, 64 // (here.num_q_heads // here.num_kv_heads))  # whose queries fill a tile of attention
            sizes, lora = (limits.max_num_seqs, *most[:2], widest, page, model_config.vocab_size), self.config.lora
            self._adapter_manager = (
                AdapterManager(model_config, lora, self.device, self.dtype, tp_group) if lora.max_adapters else None
            )
            copy_buffer = None
            if self.device.type == "cuda" and self.config.compile.mode != "eager":
                # Triton comes with the GPU builds of torch, and not with others.
                from fastgen.kernels.page_copy import copy_concatenated as copy_buffer
            self._input_buffers = InputBuffers(
                *sizes, self.device, members, use_adapters=self._adapter_manager is not None, copy_buffer=copy_buffer
            )
            adapters = None if self._adapter_manager is None else self._adapter_manager.adapters
            self._runner = ModelRunner(params, model_config, self.config, self._input_buffers, tp_group, adapters)
            host = self.config.offload.host_gb * 1e9 if self.config.offload.target == "host" else 0
            host_pages = int(host // page_bytes(here, page, self.dtype.itemsize))
            if host and not host_pages:
                raise ValueError(f"offload.host_gb={self.config.offload.host_gb} holds not even a page: raise it")
            self._host_offload = HostOffload(here, page, self.dtype, self.device, host_pages)
            self.weight_version = 0  # of the parameters: how often they have changed
            self._version_counters, self._adoptions = version_counters(params), adopted_models(params)
            self._last_version_counter_sum = self._sum_version_counters()
            self._releasable_memory: dict[str, ReleasableMemory] = {}  # memory of our own, by what it holds
            self.cache_capacity = self._compute_cache_capacity()  # tokens
            slots = self.cache_capacity + page
            size = ReleasableMemory.bytes_needed(
                [(slots, here.num_kv_heads, here.head_dim)] * 2 * here.num_layers, self.dtype
            )
            self._releasable_memory["cache"] = ReleasableMemory(size, self.device)
            memory = self._releasable_memory["cache"]
            self._cache = new_kv_cache(here, slots, allocate=lambda shape: memory.allocate(shape, self.dtype))
            self._host_offload.attach_cache(self._cache)
            self._runner.warm_up(self._cache, progress=progress)
            self.state = scheduler.State(self._new_prefix_cache())
            self._last_batch: tuple[scheduler.Plan, list[SequenceState], Batch] | None = (
                None  # of the last step launched
            )
            self.num_steps = 0  # launched
            me = weakref.ref(self)  # a reference back would keep the memory until Python looks for cycles
            self.profiler = Profiler(here, self.dtype, self.device, lambda: e._memory_usage() if (e := me()) else {})
            self._in_flight: InFlightStep | None = None
            self._sequence_states: dict[int, SequenceState] = {}  # by sequence
            self._sequence_id_counter, self._request_id_counter = itertools.count(), itertools.count()
            self._pending_events: list[Event] = []
            seed = random.SystemRandom().getrandbits(62) if self.config.seed is None else self.config.seed
            self._seed_rng = random.Random(seed if tp_group is None else tp_group.all_reduce_min(seed))
            self._last_tokens_hash = 0  # a digest of the tokens of the last step, for the other ranks
            eos: Any = [] if tokenizer is None or tokenizer.eos_token_id is None else tokenizer.eos_token_id
            self._eos_token_ids = frozenset(model_config.eos_token_ids) | frozenset(
                eos if isinstance(eos, list) else [eos]
            )
            self._grammar_backend = GrammarBackend(
                tokenizer, model_config.vocab_size, self._eos_token_ids, limit_mask_time=tp_group is None
            )

    def _new_prefix_cache(self, stats: CacheStats | None = None) -> PrefixCache:
        """A tree in which nothing is cached."""
        s = self.config
        tree = PrefixCache(
            s.kv_cache.page_size,
            self.cache_capacity // s.kv_cache.page_size + 1,
            self._host_offload.num_host_pages,
            enable_prefix_caching=s.kv_cache.prefix_cache,
            offload_preempted_only=s.offload.offload_policy == "preempted",
        )
        tree.stats = stats or tree.stats
        return tree

    def _tokens_by_sequence(self) -> scheduler.TokensById:
        """Of each sequence, the tokens whose values are known."""
        return _TokensBySequence(self._sequence_states)

    def _compute_cache_capacity(self) -> int:
        """Tokens the cache holds, in whole pages."""
        p, spec, limits = self.config.kv_cache, self._runner.model_config, self.config.schedule
        per_token = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * self.dtype.itemsize
        tokens = p.cache_tokens
        if tokens is None:
            if cuda := self.device.type == "cuda":
                scratch = new_kv_cache(spec, p.page_size, device=self.device, dtype=self.dtype)
                try:
                    taken = self._runner.profile_peak_memory(scratch)
                except torch.OutOfMemoryError as e:
                    raise ValueError(
                        self._out_of_memory_message("the activations of the largest step do not fit")
                    ) from e
                left = p.gpu_memory_utilization * torch.cuda.mem_get_info(self.device)[1] - taken
            # No more than could ever be in use.
            longest = -(-(spec.context_length - 1) // p.page_size) * p.page_size
            tokens = min(int(left if cuda else MAX_CPU_CACHE_BYTES) // per_token, limits.max_num_seqs * longest)
        if tokens < p.page_size:
            raise ValueError(
                self._out_of_memory_message(f"nothing is left for the cache, of {per_token} bytes for each token")
            )
        tokens = tokens if self.tp_group is None else self.tp_group.all_reduce_min(tokens)
        return tokens // p.page_size * p.page_size

    def _out_of_memory_message(self, problem: str) -> str:
        """The message where memory is short, with what would help."""
        p, s, total = self.config.kv_cache, self.config.schedule, 0
        if self.device.type == "cuda":
            total = torch.cuda.mem_get_info(self.device)[1]
        weight = sum(w.nbytes for w in tree_leaves(self._params) if w is not None)
        return (
            f"{problem}: {p.gpu_memory_utilization:.0%} of {total / 1e9:.1f} GB, {weight / 1e9:.1f} GB of which are weights. "
            f"Lower schedule.token_budget ({s.token_budget}) or schedule.max_num_seqs ({s.max_num_seqs}), "
            "or raise kv_cache.gpu_memory_utilization"
        )

    # --- requests -----------------------------------------------------------------------------------------------------

    @exclusive()
    def add(self, prompt: Prompt, sampling: SamplingParams | None = None, *, stream_text: bool = True) -> int:
        """Queue a request; its id. `prompt` is text, token ids, or chat messages.

        `live` false: the text comes with the last event only, which spares the host most of the work for it.

        ValueError, with the numbers, for what can never run; nothing else is disturbed.
        """
        return self._add(prompt, SamplingParams() if sampling is None else sampling, stream_text=stream_text)

    @exclusive()
    def _add(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        *,
        stream_text: bool,
        matchers: Sequence[GrammarMatcher | None] | None = None,
    ) -> int:
        """As `add`; `guides` are what `_compile` made for this request."""
        return self._submit([self._prepare(prompt, sampling, stream_text, matchers)])[0]

    def _compile_grammar(
        self, sampling: SamplingParams, cancel_event: threading.Event | None = None
    ) -> list[GrammarMatcher | None]:
        """Guides for a request's completions. ValueError for a grammar that cannot be used.

        Changes nothing else, so that any thread may call this while another one steps. Cancelled soon after `stop`.
        """
        if sampling.grammar is None:
            return [None] * sampling.n
        guides, problem = list[GrammarMatcher | None](), None
        try:
            if self._worker_group is not None and not self._grammar_backend.has_prebuilt(sampling.grammar, sampling.n):
                self._grammar_backend.check_grammar(sampling.grammar, cancel_event)
                self._worker_group.broadcast_call("_precompile_on_rank", sampling.grammar, sampling.n)
            guides += self._grammar_backend.make_matchers(sampling.grammar, sampling.n, cancel_event)
        except ValueError as e:
            problem = e
        if (
            self.tp_group is not None and self._worker_group is None and not self._grammar_backend.skip_trials
        ):  # in step with other callers
            if not self.tp_group.all_reduce_min(int(problem is None)):
                problem = problem or ValueError("another rank refuses the grammar")
        if problem is not None:
            raise problem
        return guides

    def _precompile_grammar(self, sampling: SamplingParams, cancel_event: threading.Event) -> None:
        """As `_compile`, for the next request with these settings."""
        guides = [guide for guide in self._compile_grammar(sampling, cancel_event) if guide is not None]
        if sampling.grammar is not None and not cancel_event.is_set():  # nobody would take them
            self._grammar_backend.add_prebuilt(sampling.grammar, guides)

    def _precompile_on_rank(self, grammar: str, num_guides: int) -> None:
        """Of a rank: compiles beside the steps what rank 0 compiles now."""
        self._grammar_backend.prebuild_matchers(grammar, num_guides)

    def _prepare(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        stream_text: bool,
        matchers: Sequence[GrammarMatcher | None] | None = None,
    ) -> list[SequenceState]:
        """A request's completions, not yet queued. ValueError for what can never run."""
        if not isinstance(sampling, SamplingParams):
            raise ValueError(f"sampling must be SamplingParams, got {sampling!r:.100}")
        content = self.config.special_tokens_in_content
        prompt_ids = tokenizer.encode(self.tokenizer, prompt, special_tokens_in_content=content)
        limit = max_length(prompt_ids, sampling, self.model_config, self.cache_capacity, self.tokenizer is not None)
        seed = self._seed_rng.getrandbits(63) if sampling.seed is None else sampling.seed
        output = Output(-1, prompt_ids, [Completion() for _ in range(sampling.n)])
        if sampling.prompt_logprobs is not None:
            output.prompt_logprobs = [None]
            output.prompt_top_logprobs = [None] if sampling.prompt_logprobs else None
        self._adapter_index(sampling)
        return [
            SequenceState(
                output,
                index,
                sampling,
                seed,
                limit,
                self._eos_token_ids,
                self.tokenizer,
                stream_text=stream_text,
                matcher=guide,
            )
            for index, guide in enumerate(self._compile_grammar(sampling) if matchers is None else matchers)
        ]

    def _broadcast(self, method: str, *args: Any, **kwargs: Any) -> None:
        """The other ranks that this process started make a call before this one does."""
        if self._worker_group is not None:
            self._worker_group.broadcast_call(method, *args, **kwargs)

    def _submit(self, requests: Sequence[list[SequenceState] | Output]) -> list[int]:
        """New requests, on every rank; an Output in the place of one that cannot run."""
        if self._worker_group is not None:  # checking hundreds of settings again takes a while
            many = [
                None if isinstance(s, Output) else (s[0].output.prompt_token_ids, replace(s[0].params, seed=s[0].seed))
                for s in requests
            ]
            self._worker_group.broadcast_call("_add_from_rank0", many)
        return self._enqueue(requests)

    def _add_from_rank0(self, requests: Sequence[tuple[list[int], SamplingParams] | None]) -> None:
        """What rank 0 has submitted; nobody reads along here."""
        self._enqueue([rejected_output("", 1) if one is None else self._prepare(*one, False) for one in requests])

    def _enqueue(self, requests: Sequence[list[SequenceState] | Output]) -> list[int]:
        """Requests join the others, all at once: the queue is a value, and a copy of it for each takes seconds."""
        outputs = [one if isinstance(one, Output) else one[0].output for one in requests]
        for output in outputs:
            output.request_id = next(self._request_id_counter)
            self._pending_events += rejection_events(output) if output.error is not None else ()
        going = [one for one in requests if not isinstance(one, Output)]
        for samples in going:
            for s in samples:
                s.adapter_idx = self._adapter_index(s.params)
        new = {next(self._sequence_id_counter): sample for samples in going for sample in samples}
        self._sequence_states |= new
        self.state = scheduler.add(self.state, *(self._make_sequence(id, s) for id, s in new.items()))
        return [output.request_id for output in outputs]

    def _make_sequence(self, sequence_id: int, sequence_state: SequenceState) -> scheduler.Sequence:
        space = make_namespace(sequence_state.adapter_idx, sequence_state.params.cache_salt)
        return scheduler.Sequence(
            sequence_id,
            len(sequence_state.token_ids),
            sequence_state.max_length,
            sequence_state.needs_prompt_logprobs,
            namespace=space,
        )

    @exclusive()
    def abort(self, request_id: int) -> Output | None:
        """End a request now; what it has so far. Its last events come with the next step. None if it is not running."""
        check_int("request_id", request_id, *INT64_RANGE)
        return self._abort_requests({request_id}).get(request_id)

    def _abort_requests(self, request_ids: Container[int]) -> dict[int, Output]:
        """Abort those of the requests that run; what each has so far."""
        gone = {id: s for id, s in self._sequence_states.items() if s.output.request_id in request_ids}
        if gone:
            self._broadcast("_abort_requests", {s.output.request_id for s in gone.values()})
            self.state = scheduler.remove(self.state, [*gone], self._tokens_by_sequence())
        for id, one in gone.items():
            del self._sequence_states[id]
            if not one.completion.finish_reason:
                self._pending_events.append(one.finish("abort"))
        return {s.output.request_id: s.output for s in gone.values()}

    @property
    def worker_failure(self) -> str:
        """Why the ranks have ended, if they have: then this engine has, too."""
        return "" if self._worker_group is None else self._worker_group.failure_cause

    def stats(self) -> dict[str, int]:
        """Returns the present load, and totals since the start."""
        state, prefix_cache = self.state, self.state.prefix_cache
        num_pages = prefix_cache.num_device_pages - 1
        return {
            "running": len(state.running),
            "waiting": len(state.waiting),
            "pages": num_pages,
            "held_pages": num_pages - prefix_cache.num_available_pages(),
            "prefix_queries": prefix_cache.stats.num_queried_tokens,
            "prefix_hits": prefix_cache.stats.num_hit_tokens,
            "preemptions": prefix_cache.stats.num_preemptions,
            "steps": self.num_steps,
        }

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether a step has anything left to do or to report."""
        if not self._pending_aborts:
            return bool(self._sequence_states or self._pending_events)
        left = {s.output.request_id for s in self._sequence_states.values()} | {
            e.request_id for e in self._pending_events
        }
        return not left <= frozenset[int]().union(*self._pending_aborts)

    def _has_events_for(self, request_ids: Container[int]) -> bool:
        """Whether there will be events of any of these requests."""
        running = (s.output.request_id for s in self._sequence_states.values())
        return any(id in request_ids for id in itertools.chain(running, (e.request_id for e in self._pending_events)))

    def _get_unfinished_sequences(self, request_id: int) -> dict[int, int]:
        """A request's completions that go on, with all tokens drawn so far: index -> sequence. ValueError if none."""
        check_int("request_id", request_id, *INT64_RANGE)
        self._finish_step()
        found = {s.index: id for id, s in self._sequence_states.items() if s.output.request_id == request_id}
        if not found:
            raise ValueError(f"request {request_id} is not running here: it has ended, or never was")
        return found

    @property
    def last_batch(self) -> Batch | None:
        """The last step's Batch, to look at, or for `fastgen.forward`. None before the first step.

        The staged batch lacks a token that the step before it drew (see `Batch.token`): here that is filled in. On a
        GPU the other tensors change with the next step.
        """
        self._access_guard.check()
        if self._last_batch is None:
            return None
        plan, samples, batch = self._last_batch
        first = [
            s.token_ids[span.start] if span.start < len(s.token_ids) else 0
            for span, s in zip(plan, samples, strict=True)
        ]
        token = batch.token_ids.clone()
        token[batch.query_start_loc[: len(plan)].long()] = torch.tensor(first, dtype=token.dtype, device=token.device)
        return batch._replace(token_ids=token)

    # --- parameters and memory ----------------------------------------------------------------------------------------

    @exclusive()
    def params_changed(self) -> None:
        """Say that the parameters have changed: `version` counts one more, and nothing that is cached is used again.

        What is running goes on with the keys and values it has. Writes in place that torch sees (optimizers, `copy_`)
        are noticed without this before the next step; what goes around it is not (`.data`, other processes, graphs).
        """
        self._broadcast("params_changed")
        self._on_params_changed()

    def _on_params_changed(self) -> None:
        """On this rank."""
        self.weight_version += 1
        self._last_version_counter_sum = self._sum_version_counters()
        self.state.prefix_cache.reset()

    def _sum_version_counters(self) -> int:
        """Changes when the parameters are written in place."""
        with torch._C.DisableTorchFunction():  # a default device takes part in each look, and makes it 40 times slower
            return sum(map(attrgetter("_version"), self._version_counters))

    @property
    def params(self) -> Params:
        """The parameters that steps read. ValueError while their memory is given back (`release`).

        Tensors that were taken from here before must not be read meanwhile: their memory is gone.
        """
        self._access_guard.check()
        self._require_memory("params")
        return self._params

    @property
    def cache(self) -> KVCache:
        """The paged keys and values. ValueError while their memory is given back, as for `params`."""
        self._access_guard.check()
        self._require_memory("cache")
        return self._cache

    def _require_memory(self, *memory: str) -> None:
        """ValueError if one of these parts of the memory is given back."""
        gone = [
            name for name in memory if (region := self._releasable_memory.get(name)) is not None and not region.resident
        ]
        if gone:
            raise ValueError(f"the memory of {' and '.join(gone)} was given back: call wake_up() first")

    def _preempt_all(self) -> None:
        """Everybody waits, with nothing computed and nothing cached."""
        self._finish_step()
        self.state = scheduler.preempt_all(
            self.state, self._new_prefix_cache(self.state.prefix_cache.stats), self._tokens_by_sequence()
        )

    def _get_adapter_manager(self) -> AdapterManager:
        if self._adapter_manager is None:
            raise ValueError("this engine has no room for adapters: start it with max_adapters=N")
        return self._adapter_manager

    def _adapter_index(self, sampling: SamplingParams) -> int:
        """The number of a request's adapter. ValueError if there is none of that name."""
        return 0 if sampling.adapter is None else self._get_adapter_manager()[sampling.adapter].adapter_idx

    def _memory_usage(self) -> dict[str, int]:
        """Bytes of the device's memory by what they hold."""
        params = {w.data_ptr(): w.nbytes for w in tree_leaves(self._params) if w is not None}
        cache = sum(w.nbytes for w in tree_leaves(self._cache))
        found = {"params": sum(params.values()), "cache": cache, "tables": self._input_buffers.nbytes}
        found |= {} if self._adapter_manager is None else {"adapters": self._adapter_manager.num_bytes}
        return found | {"staging": self._host_offload.staging_bytes} | self._runner.device_bytes()

    # --- steps --------------------------------------------------------------------------------------------------------

    @exclusive("params", "cache")
    @torch.no_grad()
    def step(self) -> list[Event]:
        """Launch one step; what was added to each request. An error or interrupt aborts everything that was running.

        With `overlap`, the events are those of the step before: it is waited for while the new one runs.
        ValueError, and nothing is lost, while memory is given back (`release`), or if an adopted model has other
        parameters now.
        """
        for adoption in self._adoptions:
            adoption.check()
        try:
            if self._worker_group is None:
                self._step()
            else:
                self._worker_group.broadcast_call("step")
                with self._worker_group.collective_call():
                    self._step()
        except BaseException:
            if self._worker_group is None or self._worker_group.failure_cause:
                self._reset_after_error()
            else:  # an interrupt: the step was done as a whole
                self._abort_all()
            raise
        if self._failed_request_ids:  # by a call of its own: the other ranks know nothing of the error
            failed, self._failed_request_ids = self._failed_request_ids, set()
            self._abort_requests(failed)
        events, self._pending_events = self._pending_events, []
        return events

    def _step(self) -> None:
        if not self._sequence_states:
            self._finish_step()
            return
        if self._sum_version_counters() != self._last_version_counter_sum:
            self.params_changed()
        with self.profiler.range("plan"):
            limits, tokens_by_id = self.config.schedule, self._tokens_by_sequence()
            self.state, scheduled = scheduler.plan(self.state, limits, POLICIES[limits.policy], tokens_by_id)
        plan = scheduled.plan
        if self.tp_group is not None:
            digest = hash((plan, scheduled.page_copies, scheduled.preempted, self._last_tokens_hash))
            self.tp_group.check_consistent(self.num_steps, digest)
        with self.profiler.step(plan) if plan else NULL_CONTEXT:
            try:
                launched = self._launch_step(scheduled) if plan else None
            finally:
                self._finish_step()  # of the step before
            self._in_flight = launched
        if not self.config.schedule.overlap:
            self._finish_step()

    def _launch_step(self, scheduled: scheduler.SchedulerOutput) -> InFlightStep:
        """Set a planned step going; the state is then as if it had been done, and nobody had stopped."""
        plan = scheduled.plan
        samples = [self._sequence_states[span.id] for span in plan]
        for s in scheduled.admitted:
            self._sequence_states[s.id].record_admission(s.num_cached_tokens)
        scored = any(s.needs_prompt_logprobs for s in samples)
        count = sum(span.stop - span.start for span in plan)
        groups = self._shared_prefix_groups(plan) if count == len(plan) and not scored else ()
        shape = self._runner.padded_shape(count, len(plan), needs_prompt_logprobs=scored, shared_prefix=bool(groups))
        with self.profiler.range("stage"):
            share = groups if shape.shared_prefix else None
            batch, settings = self._input_buffers.fill(
                plan, self._sequence_states, shape.num_tokens, shape.num_seqs, self.num_steps, share
            )
        with self.profiler.range("move"):
            ready = self._host_offload.start_copies(scheduled.page_copies)
        with self.profiler.range("forward"):
            computed = self._runner.run(
                self._cache, batch, settings, shape, needs_prompt_logprobs=scored, layer_chunk_ready=ready
            )
            if computed.hidden_states is not None:
                self._append_prompt_logprobs(plan, computed.hidden_states)
            if any(s.depends_on_last_token for s in samples):
                self._finish_step()  # what is drawn depends on the last tokens; the forward computes meanwhile
            launched = InFlightStep(
                plan, *self._sample_tokens(plan, samples, computed, batch, settings), self.weight_version
            )
        self.state, self._last_batch = (
            scheduler.commit(self.state, plan, self._tokens_by_sequence()),
            (plan, samples, batch),
        )
        self.num_steps += 1
        return launched

    def _shared_prefix_groups(self, plan: scheduler.Plan) -> tuple[SharedPrefixGroup, ...]:
        """Sequences whose shared pages are read together; none where the attention cannot."""
        p = self.config.kv_cache
        c = self.config.compile
        if not (p.prefix_cache and p.shared_prefix_attention and c.attention == "triton") or c.batch_invariant:
            return ()
        return find_shared_prefix_groups(self.state, plan, self._input_buffers.max_group_size, max_groups(len(plan)))

    def _sample_tokens(
        self,
        plan: scheduler.Plan,
        sequence_states: list[SequenceState],
        step_output: StepOutput,
        batch: Batch,
        sampling: SamplingTensors,
    ) -> tuple[tuple[Tensor, ...], torch.cuda.Event | None]:
        """Tokens and logprobs of the step, on their way to the host."""
        n, filter = len(plan), sampling.top_k_top_p
        drawing = [
            s
            for span, s in zip(plan, sequence_states, strict=True)
            if span.needs_sampling and not s.completion.finish_reason
        ]
        top = max((s.params.logprobs for s in drawing if s.params.logprobs is not None), default=None)
        if (
            step_output.token_ids is not None
            and step_output.logprobs is not None
            and not any(s.needs_general_sampler for s in drawing)
        ):
            none = torch.empty(n, 0, device="cpu")
            results = (
                *self._input_buffers.copy_sampled_to_host(
                    step_output.token_ids[:n], step_output.logprobs[:n], self.num_steps
                ),
                none,
                none,
            )
        else:
            drawn = any(s.params.temperature for s in drawing)
            filtered = filter is not None and any(s.uses_top_k_top_p for s in drawing)
            general = SamplingTensors(
                temperature=sampling.temperature[:n],
                seed=sampling.seed[:n] if drawn and sampling.seed is not None else None,
                positions=sampling.positions[:n],
                processed_logprobs=sampling.processed_logprobs[:n].bool(),
                top_k_top_p=TopKTopP(*(x[:n] for x in filter)) if filtered and filter is not None else None,
                logit_edits=build_logit_edits(plan, self._sequence_states, self.device),
                token_mask=self._build_token_mask(plan),
            )
            results = self._runner.sample(step_output.logits[:n], general, top)
            self._input_buffers.last_token_ids[batch.req_idx[:n]] = results.token_ids.int()
            if self.device.type != "cuda":
                return tuple(results), None
            there = (torch.empty_like(t, device="cpu", pin_memory=True) for t in results)
            results = tuple(a.copy_(b, non_blocking=True) for a, b in zip(there, results, strict=True))
        done = torch.cuda.Event()
        done.record()
        return results, done

    def _build_token_mask(self, plan: scheduler.Plan) -> Tensor | None:
        """Tokens that grammars allow, as bits; None where nobody has one."""
        rows = [
            (r, s.matcher)
            for r, x in enumerate(plan)
            if x.needs_sampling and (s := self._sequence_states.get(x.id)) and s.matcher
        ]
        return (
            to_device(torch.from_numpy(self._grammar_backend.compute_token_masks(rows, len(plan))), self.device)
            if rows
            else None
        )

    def _finish_step(self) -> None:
        """Wait for the step that runs, and hand out its tokens."""
        launched, self._in_flight = self._in_flight, None
        if launched is None:
            return
        with self.profiler.range("wait"):
            rows = list(launched.read_rows())
        if self.tp_group is not None:
            self._last_tokens_hash = hash(tuple(row[0] for row in rows))
        stopped, changes = set(), None if self._adapter_manager is None else self._adapter_manager.versions
        with self.profiler.range("commit"):
            for span, row in zip(launched.plan, rows, strict=False):
                sample = self._sequence_states.get(span.id) if span.needs_sampling else None
                if sample is None or sample.completion.finish_reason:  # aborted, or it has stopped a step ago
                    continue
                version = (
                    launched.weight_version
                    if changes is None
                    else launched.weight_version + changes[sample.adapter_idx]
                )
                try:
                    event = sample.append_token(*row, version)
                except Exception as e:  # a tokenizer's or grammar's, which concerns this request alone
                    event = sample.fail(f"{type(e).__name__}: {e}")
                    self._failed_request_ids.add(sample.output.request_id)
                self._pending_events.append(event)
                if event.finish_reason and sample.output.request_id not in self._failed_request_ids:
                    stopped.add(span.id)
        self.state = scheduler.remove(self.state, stopped, self._tokens_by_sequence())
        for id in stopped:
            del self._sequence_states[id]

    def _append_prompt_logprobs(self, plan: scheduler.Plan, hidden: Tensor) -> None:
        """Prompt logprobs of the step's spans, from the hidden states x [T, D]."""
        at = 0
        for span in plan:
            sample = self._sequence_states[span.id]
            out, top = sample.output, sample.params.prompt_logprobs
            if out.prompt_logprobs is not None and top is not None and sample.index == 0:
                first = max(span.start, len(out.prompt_logprobs) - 1)  # a parked request is computed again
                stop = min(span.stop, len(out.prompt_token_ids) - 1)  # the last one predicts no prompt token
                if first >= stop:
                    at += span.stop - span.start
                    continue
                target = out.prompt_token_ids[first + 1 : stop + 1]
                some = hidden[at + first - span.start : at + stop - span.start]
                value, best = compute_target_logprobs(self._params, some, target, top, self._runner.ops)
                sample.has_nan_prompt_logprobs |= any(x != x for x in value)
                out.prompt_logprobs += value
                if out.prompt_top_logprobs is not None:
                    out.prompt_top_logprobs += best
            at += span.stop - span.start

    # --- the end ------------------------------------------------------------------------------------------------------

    def _reset_after_error(self) -> None:
        """After an error anywhere in a step: end everything. What was cached may never have been computed."""
        self._in_flight = None
        self._pending_events += [
            s.finish("abort") for s in self._sequence_states.values() if not s.completion.finish_reason
        ]
        self._sequence_states.clear()
        self.state = scheduler.State(self._new_prefix_cache(self.state.prefix_cache.stats))

    def _abort_all(self) -> None:
        """Abort everything; whoever waits for it hears of it."""
        self._abort_requests({s.output.request_id for s in self._sequence_states.values()})

    def _abort_silently(self, request_ids: Iterable[int]) -> None:
        """Abort requests whose events nobody waits for."""
        self._pending_aborts.append(frozenset(request_ids))
        self._drain_pending_aborts()

    def _drain_pending_aborts(self) -> None:
        """Abort what was dropped, unless other ranks have ended and all requests with them."""
        if self.worker_failure:
            self._pending_aborts.clear()
        while self._pending_aborts:
            gone = self._pending_aborts.popleft()
            self._abort_requests(gone)
            self._pending_events = [e for e in self._pending_events if e.request_id not in gone]

    def close(self) -> None:
        """Abort everything and let go of cache, parameters and other ranks. Nothing is done the second time.

        In a fork of the process nothing is done either: all that is the first process's.
        """
        if self._access_guard.pid == os.getpid() and not self._access_guard.closed:
            self._close()

    @exclusive()
    def _close(self) -> None:
        self._access_guard.closed = True
        crew, self._worker_group = self._worker_group, None
        self._abort_all()
        self._in_flight = None
        if "_grammar_backend" in self.__dict__:
            self._grammar_backend.close()
        if "_host_offload" in self.__dict__:
            self._host_offload.close()
        for name in (
            "_runner",
            "_host_offload",
            "_cache",
            "_adapter_manager",
            "_params",
            "_version_counters",
            "_adoptions",
        ):  # graphs first
            self.__dict__.pop(name, None)
        self._last_batch, self._releasable_memory = None, {}
        if crew is not None:
            crew.close()
