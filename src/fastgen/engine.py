"""The engine: what one calls. Its loop of steps is in `fastgen.core.engine_core`."""

import hashlib
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastgen import lora
from fastgen.checkpoint import files, hub, tokenizer, weights
from fastgen.config import EngineConfig, SamplingParams, check_choice, check_int
from fastgen.core import scheduler
from fastgen.core.engine_core import INT64_RANGE, EngineCore, get_tp_size
from fastgen.core.model_config import UNSHARDED, ModelConfig, TPShard, shard_config
from fastgen.core.prefix_cache import CacheStats, Namespace, make_namespace
from fastgen.core.request import Output, SequenceState, map_prompts, max_length
from fastgen.core.tokenizer import Prompt
from fastgen.core.types import Adapter, Params, Tokenizer
from fastgen.distributed import workers
from fastgen.event_stream import GenerateMethods
from fastgen.lora import LoadedAdapter
from fastgen.offload.host_cache import page_bytes
from fastgen.profiling.profiler import ProfileWindow
from fastgen.snapshot import Snapshot
from fastgen.thread_safety import exclusive, no_torch_modes
from fastgen.training import logprobs, weight_sync
from fastgen.training.sleep import ReleasableMemory
from fastgen.training.weight_sync import named_tensors

T = TypeVar("T")


def _load_model(
    path: Path,
    dtype: torch.dtype | None,
    seed: int | None,
    shard: TPShard,
    device: str,
    *,
    progress: bool = False,
    allocate: Callable[[int], ReleasableMemory] | None = None,
) -> tuple[ModelConfig, Params, Tokenizer | None]:
    """A model as one rank has it; a `seed` draws its weights."""
    if seed is None:
        spec, params = weights.load(
            path, device=device, dtype=dtype, progress=progress, tp_shard=shard, allocate=allocate
        )
    else:
        spec = files.read_model_config(path)
        kind = dtype or getattr(torch, spec.dtype)
        room = None if allocate is None else allocate(weights.param_bytes(spec, kind, shard))
        params = weights.init(spec, seed, device=device, dtype=dtype, tp_shard=shard, memory=room)
    return spec, params, tokenizer.load(path)


def resolve_model(model: str | Path | None, dtype: str, device: str) -> tuple[Path, str]:
    """Where a model is, and what "auto" is for a device. ValueError for what is none."""
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return hub.default_model_path() if model is None else hub.resolve(model), device


def _as_value_errors(named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """A caller's pairs. ValueError if what gives them fails: that is no rank's end."""
    try:
        yield from named_tensors
    except ValueError:
        raise
    except Exception as e:
        raise ValueError(f"update_params: what gives the tensors failed: {type(e).__name__}: {e}") from e


class Engine(EngineCore, GenerateMethods):
    """Generates from a dense transformer; many requests share each step.

    `params` are used as they are, without a copy, on the device and in the dtype they have. Settings are the names
    in `fastgen.config` (`token_budget=512, page_size=32, …`).

    `tensor_parallel=N` spreads `params`, the whole model's, over N ranks (see `fastgen.distributed.workers`): this process, and
    others that end with it. With a `group` this is one of several ranks: `params` are this rank's (`init` and `load`
    take its place), `spec` is the whole model's, and every rank makes the same calls in the same order (see
    `fastgen.distributed.tensor_parallel`).

    For one thread at a time, of the process that made it: others are refused (RuntimeError), and nothing is changed.
    `close()` (or `with`) frees the cache.
    """

    @classmethod
    @no_torch_modes
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
        """An engine for a Hugging Face directory, hub id, `.safetensors` or `.gguf` file; None: the embedded default.

        `dtype` auto is the checkpoint's on a GPU and float32 on a CPU; `device` auto takes a GPU if there is one.
        `random` draws weights instead of reading them: `model` is then a config.json or the folder that holds it.
        `adapters` are PEFT's folders or hub ids by the names that requests give; room is made for them.
        """
        chosen = EngineConfig.from_flat(**settings)  # before anything is loaded
        size, chosen = get_tp_size(chosen), replace(chosen, lora=lora.expand_lora_config(chosen.lora, adapters or {}))
        settings = {f.name: getattr(chosen, f.name) for f in fields(EngineConfig)}
        path, device = resolve_model(model, dtype, device)
        kind = getattr(torch, dtype) if dtype != "auto" else torch.float32 if device == "cpu" else None
        load = partial(_load_model, path, kind, random_seed if random_weights else None)
        if size > 1:
            shard_config(files.read_model_config(path), size)
            group = workers.create_tp_group(size, device.partition(":")[0], load, settings, cls)
            device = workers.rank_device(device, group.shard.rank) if device == "cuda" else device
        else:
            group = None
        with workers.close_workers_on_error(group):
            made: list[ReleasableMemory] = []

            def region(size: int) -> ReleasableMemory:
                made.append(ReleasableMemory(size, torch.device(device)))
                return made[-1]

            place = UNSHARDED if group is None else group.shard
            spec, params, words = load(place, device, progress=progress, allocate=region)
        engine = cls(params, spec, words, progress=progress, tp_group=group, **settings)
        engine._releasable_memory["params"] = made[0]
        try:
            engine.load_adapters(adapters or {})
        except BaseException:
            engine.close()
            raise
        if progress and device != "cpu":
            print(engine.summary(), file=sys.stderr, flush=True)
        return engine

    def _add_requests(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        *,
        stream_text: bool,
        on_error: str = "raise",
    ) -> list[int]:
        make = partial(self._prepare, stream_text=stream_text)
        new: list[list[SequenceState] | Output] = map_prompts(make, prompts, sampling, on_error)
        return self._submit(new)

    # --- requests as values -------------------------------------------------------------------------------------------

    @exclusive()
    def fork(self, request_id: int, n: int = 1, *, index: int = 0, seeds: Sequence[int] | None = None) -> list[int]:
        """Go on from a request's present token in `n` further requests, each with a seed of its own; their ids.

        They share the pages of what was computed and copy the one that is not full. Events tell what is new; their
        outputs begin with the tokens that were there. `index` says which of several completions. ValueError if that
        has ended, or `seeds` are not n.
        """
        check_int("fork: n", n, 1, 4096)
        check_int("fork: index", index, 0, 4095)
        if seeds is not None and not isinstance(seeds, Sequence):
            raise ValueError(f"fork: seeds must be a list, got {seeds!r:.100}")
        if seeds is not None and len(seeds) != n:
            raise ValueError(f"fork of request {request_id}: n={n} copies and {len(seeds)} seeds")
        for seed in seeds or ():
            check_int("fork: a seed", seed, *INT64_RANGE)
        given = [self._seed_rng.getrandbits(63) for _ in range(n)] if seeds is None else list(seeds)
        self._broadcast("fork", request_id, n, index=index, seeds=given)
        going = self._get_unfinished_sequences(request_id)
        if index not in going:
            raise ValueError(f"fork of request {request_id}: completion {index} has ended; {[*going]} go on")
        source, new = going[index], list[int]()
        sample = self._sequence_states[source]
        for seed in given:
            id, copy = next(self._sequence_id_counter), sample.fork(next(self._request_id_counter), seed)
            self._sequence_states[id] = copy
            self.state = scheduler.fork(self.state, source, self._make_sequence(id, copy), self._tokens_by_sequence())
            new.append(copy.output.request_id)
        return new

    @exclusive()
    @torch.no_grad()
    def snapshot(self, request_id: int, *, include_pages: bool = False) -> Snapshot:
        """A request as it stands, as a value that can be saved and restored, here or by another engine.

        `pages`: with its keys and values, so that nothing has to be computed again. The request goes on.
        Pages are those of the present parameters only. ValueError if it has ended.
        """
        if self._worker_group is not None and include_pages:
            raise ValueError("snapshot: pages of a model over several ranks cannot be saved; leave pages=False")
        if include_pages:
            self._require_memory("params", "cache")
            if self._sum_version_counters() != self._last_version_counter_sum:
                self._on_params_changed()  # pages that were computed before are of other parameters than `model` says
        self._broadcast("_finish_step")
        going = self._get_unfinished_sequences(request_id)
        samples = {i: self._sequence_states[id] for i, id in going.items()}
        found = Snapshot.from_request(next(iter(samples.values())).output, samples)
        if include_pages:
            running = {s.id: s for s in self.state.running}
            current = {id: s for id, s in running.items() if s.root is self.state.prefix_cache.get_root(s.namespace)}
            cached = {i: current[id] for i, id in going.items() if id in current and current[id].num_computed_tokens}
            found.model_fingerprint = self._model_fingerprint()
            found.pages = {
                i: self._host_offload.read_pages(
                    s.pages[: scheduler.num_pages_for(self.state.page_size, s.num_computed_tokens)],
                    s.num_computed_tokens,
                )
                for i, s in cached.items()
            }
            found.checksum = found.compute_pages_checksum()
        return found

    @exclusive()
    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> int:
        """Go on with a request that was saved; its id here. It gets the tokens that it would have got.

        Pages are used if they are of this model and this engine keeps a prefix cache. ValueError for what cannot run.
        """
        self._require_memory("params", "cache")
        if not isinstance(snapshot, Snapshot):
            raise ValueError(f"restore takes a Snapshot (Snapshot.load reads a file), not {type(snapshot).__name__}")
        snapshot.check(self.model_config.vocab_size)
        same = bool(snapshot.pages) and snapshot.model_fingerprint == self._model_fingerprint()
        for i, x in snapshot.pages.items() if same else ():
            here = self._runner.model_config
            want = here.num_layers, 2, x.shape[2], here.num_kv_heads, here.head_dim
            if tuple(x.shape) != want or x.dtype != self.dtype:
                raise ValueError(f"snapshot: the pages of completion {i} are {tuple(x.shape)} {x.dtype}, not {want}")
        if self._worker_group is not None:
            snapshot = replace(snapshot, pages={}, checksum="")
        guides = self._compile_grammar(snapshot.sampling)[: len(snapshot.seeds)]
        self._broadcast("restore", snapshot)
        has_text = self.tokenizer is not None
        limit = max_length(
            snapshot.prompt_token_ids, snapshot.sampling, self.model_config, self.cache_capacity, has_text
        )
        adapter = self._adapter_index(snapshot.sampling)
        output, samples = snapshot.rebuild_request(limit, self._eos_token_ids, self.tokenizer, guides)
        going = [len(s.token_ids) for s in samples]
        if max(going, default=0) >= limit:
            place = f"model's context of {self.model_config.context_length} or cache of {self.cache_capacity}"
            raise ValueError(f"{max(going)} tokens and one more do not fit the {place} tokens")
        if any(s.matcher is not None and s.matcher.failed for s in samples):
            raise ValueError("snapshot: its tokens do not follow its grammar")
        if same and not adapter and self.state.prefix_cache.enable_prefix_caching:
            for i, values in snapshot.pages.items():
                known = (*snapshot.prompt_token_ids, *output.completions[i].token_ids)[: values.shape[2]]
                self._insert_snapshot_pages(known, values, make_namespace(adapter, snapshot.sampling.cache_salt))
        return self._enqueue([samples])[0]

    def _wake_up(self) -> tuple[int, torch.OutOfMemoryError | None]:
        """The memory that was given back, of all ranks or of none; the bytes, and why it could not be."""
        gone, short = [r for r in self._releasable_memory.values() if not r.resident], None
        if self._sum_version_counters() != self._last_version_counter_sum:
            self._on_params_changed()  # a trainer's step while memory was given back
        try:
            for region in gone:
                region.reacquire()
        except torch.OutOfMemoryError as e:
            short = e
        if self.tp_group is not None and not self.tp_group.all_reduce_min(int(short is None)):
            short = short or torch.OutOfMemoryError("restore: another rank's device has not enough memory left")
            self._release_memory([r for r in gone if r.resident])
        self._last_version_counter_sum = self._sum_version_counters()
        return sum(r.nbytes for r in gone), short

    def _release_memory(self, regions: Iterable[ReleasableMemory]) -> None:
        for region in regions:
            region.release(keep_contents=region is self._releasable_memory.get("params"))

    def _model_fingerprint(self) -> str:
        """Tells models apart, and one's parameters before and after training."""
        digest = hashlib.blake2b(repr((self.model_config, self.dtype)).encode(), digest_size=16)
        leaves = [x for x in tree_leaves(self._params) if x is not None]
        words = {2: torch.int16, 4: torch.int32}
        # Sums of bits, all of them: training may have changed any one. The first rows tell orders apart.
        sums = torch.stack([x.view(words[x.itemsize]).sum(dtype=torch.int64) for x in leaves])
        digest.update(sums.cpu().numpy().tobytes())
        for x in leaves:
            digest.update(x[:8].double().cpu().numpy().tobytes())  # of a copy: what NumPy has seen stays allocated
        return digest.hexdigest()

    def _insert_snapshot_pages(self, tokens: Sequence[int], keys_values: Tensor, cache_namespace: Namespace) -> None:
        """Put keys and values of some tokens into the tree, as if a request had left them, if there is room."""
        held = self.state.prefix_cache.insert_idle_pages(tokens, cache_namespace)
        if not held:
            return
        for event in self._host_offload.start_copies(self.state.prefix_cache.pop_page_copies()):
            torch.cuda.current_stream(self.device).wait_event(event)
        self._host_offload.write_pages(held, keys_values[:, :, : len(held) * self.state.page_size])

    # --- parameters ---------------------------------------------------------------------------------------------------

    @exclusive("params")
    def update_params(
        self, source: Any, *, partial: bool = False, recompute: bool = False, check_finite: bool = True
    ) -> int:
        """Copy other parameters into the engine's, in place, so that captured graphs stay valid; the new version.

        `source`: a tree like `params`, a module, a mapping or iterable of (checkpoint name, tensor), or `handles` of
        another process. Names may be those of DDP, FSDP, `torch.compile` and PEFT, and a module's LoRA is merged into
        copies. Tensors are whole ones of any floating-point dtype and device; shards of a DTensor are put together, one
        at a time. All weights must be given, once, unless `partial`. What is running goes on with the keys and values
        it has, or, with `recompute`, computes them again. ValueError names what is missing, unknown or mis-shaped;
        where not all tensors are in memory, parameters may have changed in part then. In a process group each rank
        makes this call; an engine that has started its ranks hands the tensors on to them, in buckets.

        `check_finite`: ValueError for values that are NaN or infinite, or too large for the engine's dtype. Nothing is
        written then if all tensors are in memory, or else those before it, as the error says.
        """
        pairs = (
            list(weights.named_weights(source, self.model_config))
            if isinstance(source, Params)
            else named_tensors(source)
        )
        if isinstance(pairs, list):
            weights.check_tensors(pairs, self.model_config, self.dtype, source="update_params", partial=partial)
            if check_finite:
                weights.check_finite_update(self._params, self.model_config, pairs, self._tp_shard, "update_params")
                check_finite = False
        if self._worker_group is None:
            given = source if isinstance(source, Params) and self.tp_group is None else pairs
            self._write_params(given, partial, recompute, check_finite)
            return self.weight_version
        self._broadcast("_write_received_params", partial, recompute, check_finite)
        handed = weight_sync.broadcast_weights(_as_value_errors(pairs), device=self.device)
        self._run_on_all_ranks(lambda: self._write_params(handed, partial, recompute, check_finite))
        return self.weight_version

    @property
    def _tp_shard(self) -> TPShard:
        """Which rank's parameters these are."""
        return UNSHARDED if self.tp_group is None else self.tp_group.shard

    def _write_params(
        self, source: Params | Iterable[tuple[str, Tensor]], partial: bool, recompute: bool, check_finite: bool
    ) -> None:
        """Write the parameters, or this rank's."""
        self._finish_step()
        try:
            if isinstance(source, Params):
                weights.copy_params(self._params, source)
            else:
                with closing(source) if isinstance(source, Generator) else nullcontext():
                    how: dict[str, Any] = {"partial": partial, "check_finite": check_finite, "tp_shard": self._tp_shard}
                    weights.update(self._params, self.model_config, source, source="update_params", **how)
        finally:
            self._on_params_changed()
            if recompute:
                self._preempt_all()

    def _write_received_params(self, partial: bool, recompute: bool, check_finite: bool) -> None:
        """What rank 0 hands on."""
        self._write_params(weight_sync.receive(device=self.device), partial, recompute, check_finite)

    @exclusive("params")
    def score(self, sequences: Tensor | Sequence[Sequence[int] | Tensor | str], **options: Any) -> list[Tensor]:
        """Scores by `fastgen.score` with this engine's parameters, in its mode; texts are tokenized as prompts are.

        Over several ranks, all take part, and there are no gradients.
        """
        many = logprobs.to_token_ids(sequences, self.tokenizer)
        self._broadcast("score", many, **options)
        fixed: dict[str, Any] = {"batch_invariant": self.config.compile.batch_invariant, "tp_group": self.tp_group}
        with torch.set_grad_enabled(self.tp_group is None and torch.is_grad_enabled()):
            return self._run_on_all_ranks(
                lambda: logprobs.score(self._params, self.model_config, many, **fixed | options)
            )

    def _run_on_all_ranks(self, fn: Callable[[], T]) -> T:
        """What the ranks that were started here have been told to do as well; they refuse wrong input as this one."""
        if self._worker_group is None:
            return fn()
        with self._worker_group.collective_call():
            try:
                return fn()
            except ValueError as e:
                wrong = e
        raise wrong

    # --- memory -------------------------------------------------------------------------------------------------------

    @exclusive()
    @torch.no_grad()
    def wake_up(self) -> int:
        """Maps the memory that `sleep` released again; returns its bytes on this rank.

        Raises torch.OutOfMemoryError if others use the device's memory, on any rank; the engine then sleeps on.
        """
        self._broadcast("_wake_up")
        num_bytes, error = self._run_on_all_ranks(self._wake_up)
        if error is not None:
            raise error
        return num_bytes

    @exclusive()
    def sleep(self, memory: str = "all") -> int:
        """Give back the device's memory of the "cache", the "params" or "all"; the bytes. `wake_up()` takes it again.

        Addresses stay reserved, so that nothing is compiled or captured again. What is running waits, and will be
        computed again; parameters are kept in the host's memory. Only an engine's own can be given back
        (`from_pretrained`): those that were given to it are the caller's, ValueError. The bytes are this rank's.
        """
        check_choice("memory", memory, ["cache", "params", "all"])
        if memory == "params" and "params" not in self._releasable_memory:
            raise ValueError("release: these parameters were given to the engine, and are whose they were")
        chosen = [r for name, r in self._releasable_memory.items() if memory in (name, "all") and r.resident]
        if not all(r.releasable for r in chosen):
            raise ValueError(
                "release: NumPy has seen this memory (`x.numpy()`) and keeps it: give it copies (`x.clone()`)"
            )
        self._broadcast("sleep", memory)
        self._preempt_all()
        self._release_memory(chosen)
        return sum(r.nbytes for r in chosen)

    # --- adapters -----------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> dict[str, LoadedAdapter]:
        """By name, those that requests may choose."""
        self._access_guard.check()
        return {} if self._adapter_manager is None else dict(self._adapter_manager.loaded)

    @exclusive()
    def add_adapter(self, name: str, adapter: Adapter, scale: float | None = None) -> Adapter:
        """Copy a low-rank adapter into the engine, for requests with `SamplingParams(adapter=name)`.

        The tree returned is the engine's own, for an optimizer to change in place: see `update_adapter`. `scale` is
        the adapter's unless given. ValueError if there is no room for it. `adapter` is a whole one, of which each of
        several ranks takes its share.
        """
        adapter = lora.with_scale(adapter, scale)
        held = self._get_adapter_manager().add(name, adapter)
        self._broadcast_adapter("add_adapter", name, adapter)
        return held.adapter

    def _broadcast_adapter(self, method: str, name: str, adapter: Adapter) -> None:
        """An adapter to the other ranks that this process started, once nothing was wrong with it here."""
        if self._worker_group is not None:
            self._broadcast(method, name, lora.to_cpu(adapter))

    @exclusive()
    def load_adapters(self, adapter_folders: Mapping[str, str | Path]) -> None:
        """Add those of PEFT's folders or hub ids, by the names that requests give. ValueError for another model's."""
        if not isinstance(adapter_folders, Mapping):
            raise ValueError(
                f"load_adapters takes folders by the names that requests give, got {adapter_folders!r:.100}"
            )
        for name, folder in adapter_folders.items():
            self.add_adapter(name, lora.load(folder, self.model_config, device="cpu"))

    @exclusive()
    def adapter_params(self, name: str) -> Adapter:
        """The tensors that steps read, as a tree of views: they stay where they are until the adapter is removed."""
        return self._get_adapter_manager()[name].adapter

    @exclusive()
    def update_adapter(self, name: str, adapter: Adapter | None = None) -> None:
        """Say that an adapter's tensors were changed in place, or copy others into them.

        The `versions` of tokens drawn with it from now on are one more. Nothing cached under the adapter is used any
        more; what is cached of others, and of the model alone, is. Where this engine has started other ranks, `adapter`
        must be given: their tensors are in other processes.
        """
        if self._worker_group is not None and adapter is None:
            raise ValueError(f"adapter {name!r}: other ranks have parts of it, too: give the tree that it has become")
        shelf = self._get_adapter_manager()
        self._finish_step()  # what runs was launched with the adapter as it was
        held = shelf.update(name, adapter)
        if adapter is not None:
            self._broadcast_adapter("update_adapter", name, adapter)
        self.state.prefix_cache.reset_adapter(held.adapter_idx)

    @exclusive()
    def remove_adapter(self, name: str) -> None:
        """Make room for another. ValueError while requests use it."""
        index = self._get_adapter_manager()[name].adapter_idx
        if using := sorted({s.output.request_id for s in self._sequence_states.values() if s.adapter_idx == index}):
            raise ValueError(f"adapter {name!r} is used by requests {using[:8]}: abort them or let them end first")
        self._get_adapter_manager().remove(name)
        self._broadcast("remove_adapter", name)
        self.state.prefix_cache.reset_adapter(index)

    # --- to look at ---------------------------------------------------------------------------------------------------

    def prepare_grammars(self) -> None:
        """Do now what the first grammar would wait for, a second or two, if grammars can be used at all."""
        self._access_guard.check()
        self._grammar_backend.prepare()

    def profile(self, num_steps: int = 8, path: str | Path | None = None, *, skip_first: int = 2) -> ProfileWindow:
        """`with engine.profile() as p:` traces the first `steps` steps inside, after `skip` others.

        Then `print(p.summary)` says where their time went, and `p.trace` is a file for Perfetto or chrome://tracing,
        written to `path` or the working directory.
        """
        self._access_guard.check()
        return self.profiler.window(num_steps, path, skip_first)

    @exclusive()
    def summary(self) -> str:
        """What the engine made of its settings and the memory, in a few lines."""
        s, page, gb = self.config.schedule, self.state.page_size, {k: v / 1e9 for k, v in self._memory_usage().items()}
        shapes = self._runner.graph_shapes()
        sizes = {
            name: sorted({x.num_tokens for x in shapes if x.decode is (name == "decode")})
            for name in ("decode", "mixed")
        }
        graphs = " ".join(f"{name} {x[0]}-{x[-1]} ({len(x)})" for name, x in sizes.items() if x)
        rows = {
            "weights": f"{gb['params']:.1f} GB {str(self.dtype).removeprefix('torch.')} on {self.device}",
            "cache": f"{gb['cache']:.1f} GB: {self.cache_capacity} tokens, {self.cache_capacity // page} pages of {page}",
            "host": self._host_cache_summary(),
            "steps": f"up to {s.token_budget} tokens, {s.max_num_seqs} sequences; {self.config.compile.mode}, "
            f"{self.config.compile.attention}{', overlapped' if s.overlap else ''}",
            "graphs": f"{gb['graphs']:.1f} GB: {graphs}" if graphs else "none",
        }
        return "\n".join(f"{name:8s} {text}" for name, text in rows.items() if text)

    def _host_cache_summary(self) -> str:
        mover = self._host_offload
        size = mover.num_host_pages * page_bytes(mover.model_config, mover.page_size, self.dtype.itemsize) / 1e9
        return (
            f"{size:.1f} GB: {mover.num_host_pages} pages, taken in {mover.alloc_seconds:.1f} s"
            if mover.num_host_pages
            else ""
        )

    @property
    def cache_stats(self) -> CacheStats:
        """What prefix reuse, host pages and preemption did so far."""
        return self.state.prefix_cache.stats

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
