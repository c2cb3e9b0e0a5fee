"""Engine: the public entry point. Wires an EngineCore to runner, memory, ranks and adapters, and guards every call."""

import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastgen import lora
from fastgen import snapshot as snapshots
from fastgen.checkpoint import files, hub, tokenizer, weights
from fastgen.compiled import warm_up
from fastgen.compiled.cache_size import cache_capacity
from fastgen.compiled.runner import ModelRunner
from fastgen.config import EngineConfig, QuantizationConfig, check_int
from fastgen.core import scheduler
from fastgen.core.engine_core import INT64_RANGE, EngineCore
from fastgen.core.extensions import Adapters, Matcher, Ranks, call_collectively, on_all_ranks
from fastgen.core.kv_cache import new_kv_cache
from fastgen.core.model_config import UNSHARDED, ModelConfig, TPShard, shard_config
from fastgen.core.prefix_cache import CacheStats
from fastgen.core.request import Event, Output
from fastgen.core.types import Batch, KVCache, Params
from fastgen.distributed import workers
from fastgen.distributed.tensor_parallel import TPGroup
from fastgen.event_stream import GenerateMethods, OneOrManyPrompts, OneOrManySampling, map_prompts
from fastgen.lora import Adapter, AdapterManager, LoadedAdapter
from fastgen.offload.host_offload import HostOffload, page_bytes
from fastgen.profiling.profiler import Profiler, ProfileWindow
from fastgen.quantization.fp8 import is_quantized
from fastgen.quantization.kv_cache import row_format
from fastgen.sampling_params import SamplingParams
from fastgen.snapshot import Snapshot
from fastgen.structured_output.token_masks import GrammarBackend
from fastgen.text import Tokenizer
from fastgen.text.text_processor import TextProcessor
from fastgen.text.tokenizer import Prompt
from fastgen.thread_safety import AccessGuard, check_fork, disable_torch_modes, exclusive
from fastgen.training import logprobs, weight_sync
from fastgen.training.shared_params import QuantizedShadow, adopted_models, version_counters
from fastgen.training.sleep import EngineMemory, ReleasableMemory


def get_tp_size(config: EngineConfig) -> int:
    """Returns the number of ranks of one engine. Raises ValueError if the config is of several engines."""
    if (n := config.parallel.replicas) > 1:
        raise ValueError(
            f"parallel.replicas={n} are several engines: use fastgen.Replicas.from_pretrained, fgrun, fgbench "
            "or fgserve, or leave it at 1"
        )
    return config.parallel.tensor_parallel


def _load_model(
    path: Path,
    dtype: torch.dtype | None,
    seed: int | None,
    shard: TPShard,
    device: str,
    *,
    quantization: str = "auto",
    progress: bool = False,
    allocate: Callable[[int], ReleasableMemory] | None = None,
) -> tuple[ModelConfig, Params, Tokenizer | None]:
    """Returns config, parameters and tokenizer of one rank; with a `seed`, random parameters.

    `quantization` is a value of `QuantizationConfig.weights`.
    """
    if seed is None:
        common: Any = {"progress": progress, "tp_shard": shard, "allocate": allocate, "quantization": quantization}
        model_config, params = weights.load(path, device=device, dtype=dtype, **common)
    else:
        model_config = files.read_model_config(path)
        params_dtype: torch.dtype = dtype or getattr(torch, model_config.dtype)
        quantization = "none" if quantization == "auto" else quantization
        num_bytes = weights.param_bytes(model_config, params_dtype, shard, quantization)
        common = {"tp_shard": shard, "memory": None if allocate is None else allocate(num_bytes)}
        params = weights.init(
            model_config, seed, device=device, dtype=params_dtype, quantization=quantization, **common
        )
    return model_config, params, tokenizer.load(path)


def resolve_model(model: str | Path | None, dtype: str, device: str) -> tuple[Path, str]:
    """Returns a model's path, and the device that "auto" means. Raises ValueError for an unknown model or dtype."""
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return hub.default_model_path() if model is None else hub.resolve(model), device


class Engine(GenerateMethods):
    """Generates from a dense transformer; many requests share each step.

    `params` are used as they are, without a copy, on their device and in their dtype. With `quantization="fp8"` and
    parameters that are not quantized, the engine keeps fp8 copies of the layers' matmuls beside them, made anew when
    `params` are written in place. Settings are the names in `fastgen.config` (`token_budget=512, page_size=32, …`).

    `tensor_parallel=N` spreads `params`, the full model's, over N ranks (see `fastgen.distributed.workers`): this
    process, and others that end with it. With a `tp_group` this is one of several ranks: `params` are this rank's
    shard (`init` and `load` take a `tp_shard`), `model_config` is the full model's, and every rank makes the same calls
    in the same order (see `fastgen.distributed.tensor_parallel`).

    For one thread at a time, of the process that made it: others get a RuntimeError, and nothing changes. `close()` (or
    `with`) frees the cache. `core` is the EngineCore; whoever calls it must hold the engine.
    """

    @disable_torch_modes()
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
            types = f"{type(params).__name__} and {type(model_config).__name__}"
            raise ValueError(
                f"Engine takes Params and their ModelConfig, not {repr(params) if isinstance(params, str) else types}: "
                "Engine.from_pretrained(…) takes a folder or hub id, and fastgen.adopt(…) makes both of a transformers "
                "model"
            )
        self.access_guard = AccessGuard(
            "this engine", "fastgen.AsyncEngine serves any number of threads and coroutines"
        )
        config = EngineConfig.from_flat(**settings)
        quantization = config.quantization.weights
        if quantization == "none" and is_quantized(params):
            raise ValueError(
                "quantization=none, but these parameters are quantized: load them with "
                'fastgen.load(…, quantization="none"), which dequantizes them'
            )
        if (size := get_tp_size(config)) > 1 and tp_group is None:
            shard_config(model_config, size)  # raises ValueError before anything is started
            load = workers.shard_loader(params, model_config, tokenizer, size, quantization)
            tp_group = workers.create_tp_group(size, params.embed.device.type, load, settings, type(self))
            params = load(tp_group.shard, str(params.embed.device))[1]
        self.tp_group, self.ranks = tp_group, tp_group or Ranks()
        weakref.finalize(self, self.ranks.close)
        with workers.close_workers_on_error(tp_group):
            self.model_config, self.device, self.dtype = model_config, params.embed.device, params.embed.dtype
            self.memory, self._adopted_models = EngineMemory(), adopted_models(params)
            version_tensors = version_counters(params)
            self.shadow: QuantizedShadow | None = None  # of parameters that were given in full precision
            if quantization == "fp8" and not is_quantized(params):
                allocate = partial(self.memory.allocate, "params", self.device)
                self.shadow = QuantizedShadow(params, model_config, self.tp_shard, allocate=allocate)
                params = self.shadow.params
            weight_format = QuantizationConfig(weights="fp8" if is_quantized(params) else "none")
            self.config = config = replace(config.resolve(self.device.type), quantization=weight_format)
            self._text = TextProcessor(tokenizer, special_tokens_in_content=config.special_tokens_in_content)
            page_size, offload = config.kv_cache.page_size, config.offload
            self.adapter_manager = adapters = Adapters()
            if config.lora.max_adapters:
                manager = AdapterManager(model_config, config.lora, self.device, self.dtype, tp_group)
                self.adapter_manager = adapters = manager
            self.runner = runner = ModelRunner(params, model_config, config, tp_group, adapters.adapters)
            shard = runner.model_config
            host_bytes = offload.host_gb * 1e9 if offload.target == "host" else 0
            self.cache_rows = rows = row_format(shard, config.kv_cache.dtype, self.dtype)
            num_host_pages = int(host_bytes // page_bytes(shard.num_layers, page_size, rows))
            if host_bytes and not num_host_pages:
                raise ValueError(f"offload.host_gb={offload.host_gb} holds not even a page: raise it")
            self.page_copier = page_copier = HostOffload(shard.num_layers, page_size, rows, self.device, num_host_pages)
            self.cache_capacity = cache_capacity(runner, config, rows, self.ranks)  # tokens
            num_slots = self.cache_capacity + page_size
            num_bytes = weights.bytes_needed([(num_slots, *rows.shape)] * 2 * shard.num_layers, rows.dtype)
            allocate = partial(self.memory.allocate("cache", self.device, num_bytes).allocate, dtype=rows.dtype)
            runner.attach_cache(new_kv_cache(shard, num_slots, allocate=allocate, row_shape=rows.shape))
            page_copier.attach_cache(runner.cache)
            warm_up.warm_up(runner, progress=progress)
            # A reference to this engine would keep its memory until Python looks for cycles.
            memory_usage = partial(_memory_usage_of, weakref.ref(self))
            self.profiler = Profiler(shard, self.dtype, self.device, memory_usage, rows.bytes_per_element)
            end_token_ids = self._text.end_token_ids(model_config.eos_token_ids)
            precompile = partial(self.ranks.broadcast_call, Engine._precompile_grammar.__qualname__)
            self.grammars = GrammarBackend(
                tokenizer, model_config.vocab_size, end_token_ids, is_single_rank=tp_group is None,
                all_reduce_min=self.ranks.all_reduce_min,
                precompile_on_workers=precompile if self.ranks.has_workers else None,
            )  # fmt: skip
            self.core = EngineCore(
                runner, config, page_copier, model_config=model_config, text=self._text, ranks=self.ranks,
                adapters=adapters, grammars=self.grammars, profiler=self.profiler,
                version_tensors=version_tensors,
            )  # fmt: skip

    @classmethod
    @disable_torch_modes()
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        dtype: str = "auto",
        device: str = "auto",
        random_weights: bool = False,
        random_seed: int = 0,
        adapters: Mapping[str, str | Path] | None = None,
        progress: bool = True,
        **settings: Any,
    ) -> "Engine":
        """Returns an engine for a Hugging Face directory, hub id, `.safetensors` or `.gguf` file, or the default model.

        `dtype` auto is the checkpoint's on a GPU and float32 on a CPU; `device` auto takes a GPU if there is one.
        `random_weights` samples weights instead of reading them: `model` is then a config.json or its folder.
        `adapters` are PEFT folders or hub ids by the names that requests use; the engine is made large enough for them.
        """
        config = EngineConfig.from_flat(**settings)  # checked before anything is loaded
        size, config = get_tp_size(config), replace(config, lora=lora.expand_lora_config(config.lora, adapters or {}))
        settings = {f.name: getattr(config, f.name) for f in fields(EngineConfig)}
        path, device = resolve_model(model, dtype, device)
        torch_dtype = getattr(torch, dtype) if dtype != "auto" else torch.float32 if device == "cpu" else None
        seed, quantization = random_seed if random_weights else None, config.quantization.weights
        load = partial(_load_model, path, torch_dtype, seed, quantization=quantization)
        group = None
        if size > 1:
            shard_config(files.read_model_config(path), size)
            group = workers.create_tp_group(size, device.partition(":")[0], load, settings, cls)
            device = workers.rank_device(device, group.shard.rank) if device == "cuda" else device
        memory = EngineMemory()
        with workers.close_workers_on_error(group):
            shard = UNSHARDED if group is None else group.shard
            allocate = partial(memory.allocate, "params", torch.device(device))
            model_config, params, words = load(shard, device, progress=progress, allocate=allocate)
        engine = cls(params, model_config, words, progress=progress, tp_group=group, **settings)
        engine.memory.regions |= memory.regions
        try:
            engine.load_adapters(adapters or {})
        except BaseException:
            engine.close()
            raise
        if progress and device != "cpu":
            print(engine.summary(), file=sys.stderr, flush=True)
        return engine

    # --- requests -----------------------------------------------------------------------------------------------------

    @property
    def requests(self) -> EngineCore:
        """The core, for `generate`, `stream` and `as_completed`."""
        return self.core

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer. With None, prompts are token ids, and outputs have no text."""
        return self._text.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer | None) -> None:
        self._text.tokenizer = tokenizer

    @exclusive()
    def add_many(
        self, prompts: OneOrManyPrompts, sampling: OneOrManySampling = None, *, stream_text: bool = True,
        on_error: str = "raise",
    ) -> list[int]:  # fmt: skip
        """Queues one or many prompts at once and returns their ids; the options are as for `add` and `generate`."""
        prepare = partial(self.core.prepare, stream_text=stream_text)
        return self.core.submit(map_prompts(prepare, prompts, sampling, on_error))

    @exclusive()
    def add(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        stream_text: bool = True,
        matchers: Sequence[Matcher | None] | None = None,
    ) -> int:
        """Queues a request and returns its id. `prompt` is text, token ids, or chat messages.

        `stream_text` false: the text comes with the last event only, which saves the host most of the work for it.
        `matchers`: what `compile_grammar` returned for these settings. Raises ValueError, with the numbers, for a
        request that can never run; nothing else is disturbed.
        """
        params = SamplingParams() if sampling is None else sampling
        return self.core.add(prompt, params, stream_text=stream_text, matchers=matchers)

    def compile_grammar(
        self, sampling: SamplingParams, cancel_event: threading.Event | None = None
    ) -> Sequence[Matcher | None]:
        """Returns the `matchers` of `add` for these settings, from any thread, concurrently with the steps.

        `cancel_event` cancels it. Raises ValueError for a grammar that cannot be used.
        """
        self.access_guard.check()
        return self.grammars.compile(sampling, cancel_event)

    @exclusive("params", "cache")
    def step(self) -> list[Event]:
        """Launches one step; returns what was added to each request. An error or interrupt aborts all requests.

        With `overlap`, the events are those of the step before, which is waited for while the new one runs. Raises
        ValueError, and nothing is lost, while memory is released (`sleep`), or if an adopted model has other parameters
        now.
        """
        for model in self._adopted_models:
            model.check()
        self._refresh_shadow()
        return self.core.step()

    def _refresh_shadow(self) -> None:
        """Quantizes the given parameters again if they were written in place. Needs the memory of "params"."""
        if self.shadow is not None:
            self.shadow.refresh()

    @exclusive()
    def abort(self, request_id: int) -> Output | None:
        """Ends a request now; returns its output so far, or None if it does not run. Last events come with a step."""
        check_int("request_id", request_id, *INT64_RANGE)
        return self.core.abort({request_id}).get(request_id)

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether a step has anything left to compute or to report."""
        return self.core.has_unfinished_requests

    @property
    def worker_failure(self) -> str:
        """Why the other ranks have ended, if they have: then this engine has ended, too."""
        return self.ranks.failure_cause

    @exclusive()
    def fork(self, request_id: int, n: int = 1, *, index: int = 0, seeds: Sequence[int] | None = None) -> list[int]:
        """Continues a request from its last token in `n` further requests, each with its own seed; returns their ids.

        They share the computed pages and copy the partly filled one. Their events have new tokens only; their outputs
        begin with the tokens so far. `index` chooses one of several completions. Raises ValueError if that has ended,
        or if there are not n `seeds`.
        """
        check_int("fork: n", n, 1, 4096)
        check_int("fork: index", index, 0, 4095)
        if seeds is not None and not isinstance(seeds, Sequence):
            raise ValueError(f"fork: seeds must be a list, got {seeds!r:.100}")
        if seeds is not None and len(seeds) != n:
            raise ValueError(f"fork of request {request_id}: n={n} copies and {len(seeds)} seeds")
        for seed in seeds or ():
            check_int("fork: a seed", seed, *INT64_RANGE)
        new_seeds = [self.core.new_seed() for _ in range(n)] if seeds is None else list(seeds)
        return self.core.fork(request_id, index, new_seeds)

    @exclusive()
    @torch.no_grad()
    def snapshot(self, request_id: int, *, include_pages: bool = False) -> Snapshot:
        """Returns a running request as a value that can be saved and restored, by this engine or another one.

        `include_pages` adds its keys and values, so that nothing has to be computed again; only those of the present
        parameters. The request goes on. Raises ValueError if it has ended.
        """
        if include_pages:
            if self.ranks.has_workers:
                raise ValueError("snapshot: pages of several ranks cannot be saved; leave include_pages=False")
            self.memory.require("params", "cache")
            self._refresh_shadow()
            self.core.notice_changed_params()  # pages computed before are of other parameters than the fingerprint
        self.core.finish_step_on_all_ranks()
        return snapshots.take(self.core, request_id, include_pages=include_pages)

    @exclusive("params", "cache")
    def restore(self, snapshot: Snapshot) -> int:
        """Continues a request that was saved, with the tokens that it would have produced; returns its id here.

        Pages are used if they are of this model and the engine has a prefix cache. Raises ValueError for what cannot
        run.
        """
        if not isinstance(snapshot, Snapshot):
            raise ValueError(f"restore takes a Snapshot (Snapshot.load reads a file), not {type(snapshot).__name__}")
        snapshot.check(self.model_config.vocab_size)
        if self.ranks.has_workers:
            snapshot = replace(snapshot, pages={}, checksum="")
        self.grammars.precompile(snapshot.sampling, threading.Event())
        return self._restore(snapshot)

    @on_all_ranks(checks_input=True)
    @torch.no_grad()
    def _restore(self, snapshot: Snapshot) -> int:
        return snapshots.restore(self.core, snapshot)

    # --- parameters ---------------------------------------------------------------------------------------------------

    @property
    def params(self) -> Params:
        """The parameters that steps read. Raises ValueError while their memory is released (`sleep`).

        Tensors taken from here before must not be read meanwhile: their memory is gone. fp8 copies of parameters in
        full precision are those of the present parameters; a write to a copy is lost with the next update.
        """
        self.access_guard.check()
        self.memory.require("params")
        self._refresh_shadow()
        return self.runner.params

    @property
    def weight_version(self) -> int:
        """How often the parameters have changed."""
        return self.core.weight_version

    @exclusive()
    def params_changed(self) -> None:
        """Counts a change of the parameters in `weight_version`; nothing that is cached is used again.

        Running requests go on with the keys and values they have. Writes in place that torch sees (optimizers, `copy_`)
        are noticed without this before the next step; others are not (`.data`, other processes, graphs).
        """
        if self.shadow is not None:
            self.shadow.mark_stale()
        self.core.params_changed()

    @exclusive("params")
    def update_params(
        self, source: Any, *, partial: bool = False, recompute: bool = False, check_finite: bool = True
    ) -> int:
        """Copies other parameters into the engine's, in place, so that captured graphs stay valid; returns the version.

        `source`: a tree like `params`, a module, a mapping or iterable of (checkpoint name, tensor), or `handles` of
        another process. Names may be those of DDP, FSDP, `torch.compile` and PEFT, and a module's LoRA is merged into
        copies. Tensors are unsharded, of any floating-point dtype and device; shards of a DTensor are put together, one
        at a time. All weights must be given, once, unless `partial`. Running requests go on with the keys and values
        they have, or, with `recompute`, compute them again. ValueError names what is missing, unknown or mis-shaped;
        where not all tensors are in memory, parameters may have changed in part then. In a process group each rank
        makes this call; an engine that has started its ranks broadcasts the tensors to them, in buckets.

        `check_finite`: ValueError for values that are NaN or infinite, or too large for the engine's dtype. Nothing is
        written then if all tensors are in memory, or else those before it, as the error says.

        With `quantization="fp8"` tensors are quantized when they are written. An engine that has fp8 copies of
        parameters in full precision writes those parameters, and makes the copies anew.
        """
        config, is_tree = self.model_config, isinstance(source, Params)
        pairs = list(weights.named_weights(source, config)) if is_tree else weight_sync.named_tensors(source)
        if isinstance(pairs, list):
            checks: Any = {"partial": partial, "check_finite": check_finite, "tp_shard": self.tp_shard}
            weights.check_update(self.source_params, config, pairs, source="update_params", **checks)
            check_finite = False
        options = partial, recompute, check_finite
        if not self.ranks.has_workers:
            self._write_params(source if is_tree and self.tp_group is None else pairs, *options)
            return self.weight_version
        self.ranks.broadcast_call(Engine._write_received_params.__qualname__, *options)
        sent = weight_sync.broadcast_weights(_as_value_errors(pairs), device=self.device)
        call_collectively(self.ranks, lambda: self._write_params(sent, *options), checks_input=True)
        return self.weight_version

    @property
    def tp_shard(self) -> TPShard:
        """The rank's shard of the parameters."""
        return UNSHARDED if self.tp_group is None else self.tp_group.shard

    @property
    def source_params(self) -> Params:
        """The parameters that updates are written to: those in full precision that fp8 copies are made of, else
        `params`. Raises ValueError as `params` does."""
        self.access_guard.check()
        self.memory.require("params")
        return self.runner.params if self.shadow is None else self.shadow.source

    def _write_params(
        self, source: Params | Iterable[tuple[str, Any]], partial: bool, recompute: bool, check_finite: bool
    ) -> None:
        core = self.core
        core.finish_step()
        try:
            if isinstance(source, Params):
                weights.copy_params(self.source_params, source)
            else:
                with closing(source) if isinstance(source, Generator) else nullcontext():
                    options: Any = {"partial": partial, "check_finite": check_finite, "tp_shard": self.tp_shard}
                    weights.update(self.source_params, self.model_config, source, source="update_params", **options)
        finally:
            self._refresh_shadow()
            core.params_changed_here()
            if recompute:
                core.preempt_all()

    @on_all_ranks(checks_input=True)
    def _write_received_params(self, *options: bool) -> None:
        """Writes the parameters that rank 0 broadcasts, on a worker."""
        self._write_params(weight_sync.receive(device=self.device), *options)

    @exclusive("params")
    def score(self, sequences: Tensor | Sequence[Sequence[int] | Tensor | str], **options: Any) -> list[Tensor]:
        """Returns `fastgen.score` of sequences with this engine's parameters and mode; texts are tokenized as prompts.

        Over several ranks, all take part, and there are no gradients.
        """
        return self._score(logprobs.to_token_ids(sequences, self.tokenizer), options)

    @on_all_ranks(checks_input=True)
    def _score(self, token_ids: Any, options: dict[str, Any]) -> list[Tensor]:
        self._refresh_shadow()
        c = self.config
        mode = {"batch_invariant": c.compile.batch_invariant, "kv_cache_dtype": c.kv_cache.dtype}
        options = mode | {"tp_group": self.tp_group} | options
        with torch.set_grad_enabled(self.tp_group is None and torch.is_grad_enabled()):
            return logprobs.score(self.runner.params, self.model_config, token_ids, **options)

    # --- memory -------------------------------------------------------------------------------------------------------

    @exclusive()
    def sleep(self, memory: str = "all") -> int:
        """Releases the device's memory of the "cache", the "params" or "all"; returns the bytes of this rank.

        `wake_up()` maps it again. Addresses stay reserved, so nothing is compiled or captured again. Running requests
        wait, and are computed again; parameters are kept in the host's memory. Only memory that the engine allocated
        can be released: parameters that were given to it are the caller's, ValueError.
        """
        self.memory.select(memory)  # raises ValueError
        return self._sleep(memory)

    @on_all_ranks()
    def _sleep(self, memory: str) -> int:
        self.core.preempt_all()
        return self.memory.release(memory)

    @exclusive()
    def wake_up(self) -> int:
        """Maps the memory that `sleep` released again; returns its bytes on this rank.

        Raises torch.OutOfMemoryError if others use the device's memory, on any rank; the engine then stays asleep.
        """
        num_bytes, error = self._wake_up()
        if error is not None:
            raise error
        return num_bytes

    @on_all_ranks()
    @torch.no_grad()
    def _wake_up(self) -> tuple[int, torch.OutOfMemoryError | None]:
        self.core.notice_changed_params()  # a trainer's step while memory was released
        result = self.memory.reacquire(self.ranks.all_reduce_min)
        self.core.record_param_versions()
        return result

    @property
    def cache(self) -> KVCache:
        """The paged keys and values. Raises ValueError while their memory is released, as for `params`."""
        self.access_guard.check()
        self.memory.require("cache")
        return self.runner.cache

    def _memory_usage(self) -> dict[str, int]:
        """Returns the bytes of device memory by what they hold."""
        runner, adapters = self.runner, self.adapter_manager
        params = {w.data_ptr(): w.nbytes for w in tree_leaves(runner.params) if w is not None}
        cache = sum(w.nbytes for w in tree_leaves(runner.cache))
        usage = {"params": sum(params.values()), "cache": cache, "tables": runner.input_buffers.nbytes}
        if self.shadow is not None:  # in full precision, the caller's
            source = {w.data_ptr(): w.nbytes for w in tree_leaves(self.shadow.source) if w is not None}
            usage["source params"] = sum(size for address, size in source.items() if address not in params)
        usage |= {"adapters": adapters.num_bytes} if adapters.num_bytes else {}
        return usage | {"staging": self.page_copier.staging_bytes} | runner.device_bytes()

    # --- adapters -----------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> dict[str, LoadedAdapter]:
        """The adapters that requests may choose, by name."""
        self.access_guard.check()
        return dict(self.adapter_manager.loaded)

    @exclusive()
    def add_adapter(self, name: str, adapter: Adapter, scale: float | None = None) -> Adapter:
        """Copies a LoRA adapter into the engine, for requests with `SamplingParams(adapter=name)`.

        Returns the engine's own tree, which an optimizer may change in place: see `update_adapter`. `scale` is the
        adapter's unless given. `adapter` is unsharded; each of several ranks takes its shard. Raises ValueError if
        there is no room for it.
        """
        adapter = lora.with_scale(adapter, scale)
        if self.ranks.has_workers:
            self.adapter_manager.check_new(name, adapter)  # raises ValueError before anything is broadcast
            adapter = lora.to_cpu(adapter)
        return self._add_adapter(name, adapter)

    @on_all_ranks(checks_input=True)
    def _add_adapter(self, name: str, adapter: Adapter) -> Adapter:
        return self.adapter_manager.add(name, adapter).adapter

    @exclusive()
    def load_adapters(self, adapter_folders: Mapping[str, str | Path]) -> None:
        """Adds PEFT folders or hub ids, by the names that requests use. Raises ValueError for another model's."""
        if not isinstance(adapter_folders, Mapping):
            raise ValueError(
                f"load_adapters takes folders by the names that requests use, got {adapter_folders!r:.100}"
            )
        for name, folder in adapter_folders.items():
            self.add_adapter(name, lora.load(folder, self.model_config, device="cpu"))

    @exclusive()
    def adapter_params(self, name: str) -> Adapter:
        """Returns the tensors that steps read, as a tree of views: they stay where they are until `remove_adapter`."""
        return self.adapter_manager[name].adapter

    @exclusive()
    def update_adapter(self, name: str, adapter: Adapter | None = None) -> None:
        """Counts a change of an adapter's tensors that was made in place, or copies others into them.

        The `weight_versions` of tokens sampled with it from now on are one more. Nothing cached under the adapter is
        used any more; what is cached of others, and of the model alone, is. Where this engine has started other ranks,
        `adapter` must be given: their tensors are in other processes.
        """
        if self.ranks.has_workers:
            if adapter is None:
                raise ValueError(f"adapter {name!r}: other ranks have shards of it: give the tree that it has become")
            self.adapter_manager.check_update(name, adapter)  # raises ValueError before anything is broadcast
            adapter = lora.to_cpu(adapter)
        self._update_adapter(name, adapter)

    @on_all_ranks(checks_input=True)
    def _update_adapter(self, name: str, adapter: Adapter | None) -> None:
        self.core.finish_step()  # the step in flight was launched with the adapter as it was
        index = self.adapter_manager.update(name, adapter).adapter_idx
        self.core.state.prefix_cache.reset_adapter(index)

    @exclusive()
    def remove_adapter(self, name: str) -> None:
        """Removes an adapter. Raises ValueError while requests use it."""
        core, index = self.core, self.adapter_manager.index(name)
        core.drain_aborts()
        if used := sorted({s.output.request_id for s in core.sequence_states.values() if s.adapter_idx == index}):
            raise ValueError(f"adapter {name!r} is used by requests {used[:8]}: abort them or let them end first")
        self._remove_adapter(name)

    @on_all_ranks()
    def _remove_adapter(self, name: str) -> None:
        removed = self.adapter_manager.remove(name)
        self.core.state.prefix_cache.reset_adapter(removed.adapter_idx)

    # --- inspection ---------------------------------------------------------------------------------------------------

    @property
    def state(self) -> scheduler.State:
        """The scheduler's state."""
        return self.core.state

    @property
    def num_steps(self) -> int:
        """How many steps were launched."""
        return self.core.num_steps

    @property
    def cache_stats(self) -> CacheStats:
        """Counts of prefix cache hits, host pages and preemptions so far."""
        return self.core.state.prefix_cache.stats

    def stats(self) -> dict[str, int]:
        """Returns the present load, and totals since the start."""
        state, prefix_cache = self.state, self.state.prefix_cache
        num_pages = prefix_cache.num_device_pages - 1
        held, counts = num_pages - prefix_cache.num_available_pages(), prefix_cache.stats
        return {
            "running": len(state.running), "waiting": len(state.waiting), "pages": num_pages, "held_pages": held,
            "prefix_queries": counts.num_queried_tokens, "prefix_hits": counts.num_hit_tokens,
            "preemptions": counts.num_preemptions, "steps": self.num_steps,
        }  # fmt: skip

    @property
    def last_batch(self) -> Batch | None:
        """The last step's Batch, for inspection or `fastgen.forward`. None before the first step.

        Its token ids are complete, also those that were sampled while it was prepared. On a GPU the other tensors
        change with the next step.
        """
        self.access_guard.check()
        if self.core.last_step is None:
            return None
        plan, states, batch = self.core.last_step
        first = [s.token_ids[x.start] if x.start < len(s.token_ids) else 0 for x, s in zip(plan, states, strict=True)]
        token_ids = batch.token_ids.clone()
        rows = batch.query_start_loc[: len(plan)].long()
        token_ids[rows] = torch.tensor(first, dtype=token_ids.dtype, device=token_ids.device)
        return batch._replace(token_ids=token_ids)

    def prepare_grammars(self) -> None:
        """Does now what the first grammar would wait for, a second or two, if grammars can be used at all."""
        self.access_guard.check()
        self.grammars.prepare()

    @on_all_ranks()
    def _precompile_grammar(self, grammar: str, num_matchers: int) -> None:
        """Compiles on a worker what rank 0 compiles now."""
        self.grammars.prebuild_matchers(grammar, num_matchers)

    def profile(self, num_steps: int = 8, path: str | Path | None = None, *, skip_first: int = 2) -> ProfileWindow:
        """Returns a context that traces the first `num_steps` steps inside it, after `skip_first` others.

        After `with engine.profile() as p:`, `print(p.summary)` says where the time went, and `p.trace` is a file for
        Perfetto or chrome://tracing, written to `path` or the working directory.
        """
        self.access_guard.check()
        return self.profiler.window(num_steps, path, skip_first)

    @exclusive()
    def summary(self) -> str:
        """Returns what the engine chose for its settings and the memory, in a few lines."""
        s, page, gb = self.config.schedule, self.state.page_size, {k: v / 1e9 for k, v in self._memory_usage().items()}
        shapes, copier = self.runner.graph_shapes(), self.page_copier
        decode, mixed = (sorted({x.num_tokens for x in shapes if x.decode is is_decode}) for is_decode in (True, False))
        sizes = {"decode": decode, "mixed": mixed}
        graphs = " ".join(f"{name} {x[0]}-{x[-1]} ({len(x)})" for name, x in sizes.items() if x)
        n, host = copier.num_host_pages, ""
        if n:
            host_gb = n * page_bytes(self.runner.model_config.num_layers, page, self.cache_rows) / 1e9
            host = f"{host_gb:.1f} GB: {n} pages, taken in {copier.alloc_seconds:.1f} s"
        capacity, cache_dtype = self.cache_capacity, " fp8" if self.config.kv_cache.dtype == "fp8" else ""
        rows = {
            "weights": f"{gb['params']:.1f} GB {self._weight_format()} on {self.device}",
            "cache": f"{gb['cache']:.1f} GB{cache_dtype}: {capacity} tokens, {capacity // page} pages of {page}",
            "host": host,
            "steps": f"up to {s.token_budget} tokens, {s.max_num_seqs} sequences; {self.config.compile.mode}, "
            f"{self.config.compile.attention}{', overlapped' if s.overlap else ''}",
            "graphs": f"{gb['graphs']:.1f} GB: {graphs}" if graphs else "none",
        }
        return "\n".join(f"{name:8s} {text}" for name, text in rows.items() if text)

    def _weight_format(self) -> str:
        """Returns the dtypes of the weights, and what they were quantized from."""
        dtype, text = str(self.dtype).removeprefix("torch."), "fp8 and " if is_quantized(self.runner.params) else ""
        copied = f", copies of {self._memory_usage()['source params'] / 1e9:.1f} GB {dtype}" if self.shadow else ""
        return f"{text}{dtype}{copied}"

    # --- the end ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Aborts all requests and frees cache, parameters and other ranks; a second call does nothing.

        In a forked process it does nothing either: everything belongs to the process that made the engine.
        """
        if self.access_guard.owned and not self.access_guard.closed:
            self._close()

    @exclusive()
    def _close(self) -> None:
        self.access_guard.closed = True
        self.core.close()
        del self.runner, self.page_copier, self.adapter_manager
        self.memory, self._adopted_models, self.shadow = EngineMemory(), (), None
        self.ranks.close()


def _as_value_errors(named_tensors: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yields a caller's pairs. Raises ValueError if their source fails: this ends no rank."""
    try:
        yield from named_tensors
    except ValueError:
        raise
    except Exception as e:
        raise ValueError(f"update_params: the source of the tensors failed: {type(e).__name__}: {e}") from e


def _memory_usage_of(engine: "weakref.ref[Engine]") -> dict[str, int]:
    return {} if (alive := engine()) is None else alive._memory_usage()
