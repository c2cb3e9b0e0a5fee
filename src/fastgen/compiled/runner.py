"""How a step is run: the only file that says torch.compile or CUDA graph.

    eager      the plain functions one after the other, and the attention backend
    inductor   what lies between two matrix products or attentions is one compiled kernel (a *region*)
    graphs     the same, and steps of few tokens are captured in CUDA graphs, one for each bucket: replaying one costs
               the host nothing, while launching its kernels would take longer than running them

Regions see activations and weights only, never the cache, and are compiled once with a free number of tokens. So
nothing about a cache can make them copy it or compile again, and start-up costs the compilation of one block.
"""

import inspect
import itertools
import os
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastgen.compiled import batch_invariant
from fastgen.config import EngineConfig, SchedulerConfig
from fastgen.core import transformer
from fastgen.core.attention import AttentionBackend, UnrotatedQKV
from fastgen.core.batch import InputBuffers
from fastgen.core.layers import swiglu
from fastgen.core.model_config import ModelConfig, shard_config, vocab_shard
from fastgen.core.sampling import sample
from fastgen.core.step import FusedSampler, StepOutput, fill_pending_tokens, forward_and_sample
from fastgen.core.transformer import TORCH_OPS, ModelOps, lm_head_weight
from fastgen.core.types import Batch, KVCache, Params, SamplerOutput, SamplingTensors, StackedAdapters
from fastgen.distributed import tensor_parallel
from fastgen.distributed.tensor_parallel import PeerBuffers, TPGroup, TPProcessGroup, shard_ops
from fastgen.kernels.select import select_attention_backend

PREFILL_GRAPH_SIZES = (64, 128, 192, 256, 320, 384, 512, 640, 768, 1024)  # captured sizes of steps that prefill,
PREFILL_GRAPH_NUM_SEQS = 32  # with so many sequences, padding included
MAX_PADDING = 1.03  # a step so much larger than needed costs no more than launching its kernels one by one
# The arguments of each region whose first dimension is the step's tokens.
DYNAMIC_ARGS: dict[Callable[..., Any], tuple[int, ...]] = {
    fill_pending_tokens: (0,),
    transformer.embed: (1, 2),
    transformer.add_norm_qkv: (0, 1),
    transformer.add_norm_gate_up: (0, 1),
    transformer.add_norm: (0, 1),
    swiglu: (0,),
    transformer.apply_qk_norm: (0,),
    transformer.final_norm: (0, 1),
}


class StepShape(NamedTuple):
    """Of a step: tokens and sequences, padding included. `decode`: one token each; `shared`: in groups that share."""

    num_tokens: int
    num_seqs: int
    decode: bool
    shared_prefix: bool = False


def decode_graph_sizes(max_size: int) -> tuple[int, ...]:
    """Numbers of decoding sequences that have a graph: close together, since each padded row costs its share."""
    steps = [*range(2, 8, 2), *range(8, 64, 8), *range(64, 256, 16), *range(256, max_size, 32)]
    return (*(n for n in steps if n < max_size), max(2, max_size))


def shared_prefix_graph_sizes(max_size: int) -> tuple[int, ...]:
    """The same for steps in which sequences share pages: fewer, since a padded row costs them little."""
    return tuple(n for n in decode_graph_sizes(max_size) if n >= 16 and (n % 64 == 0 or n in (16, 32, max_size)))


def largest_shape(schedule: SchedulerConfig) -> StepShape:
    """The most tokens and sequences a step may have, padding included."""
    rows = max(schedule.max_num_seqs + 1, PREFILL_GRAPH_NUM_SEQS)
    return StepShape(max(-(-schedule.token_budget // 64) * 64 + 8, 2 * rows + 16), rows, False)


def full_budget_shape(schedule: SchedulerConfig) -> StepShape:
    """A step that spends its whole budget, as almost all do while many prompts wait."""
    most = largest_shape(schedule)
    return StepShape(most.num_tokens - most.num_tokens % 64, most.num_seqs, False)


def _set_triton_cache_dir() -> None:
    """Say where Triton keeps its kernels. Torch's compiler says so itself, but only once it has something to compile:
    the next process, which has not, would look for them elsewhere and compile all of them again.
    """
    from triton import knobs  # it comes with the GPU builds of torch, and not with others

    os.environ.setdefault("TRITON_CACHE_DIR", knobs.cache.dir)


@contextmanager
def _prefer_blas_library(library: str) -> Iterator[None]:
    """Matrix products by this library: see docs/performance.md for why cuBLASLt."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(library)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


class CompiledOps:
    """Compiled versions of functions, with any number of tokens. Each shape of weights has a compilation of its own."""

    def __init__(self) -> None:
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __call__(self, f: Callable[..., Any]) -> Callable[..., Any]:
        dynamic = DYNAMIC_ARGS[f]

        def call(*args: Any) -> Any:
            fixed = tuple(a.shape if isinstance(a, Tensor) else a for i, a in enumerate(args) if i not in dynamic)
            g = self._compiled.get((f, *fixed))
            if g is None:
                # A code object of its own, or the engines of a process would share one limit of recompilations.
                inner = inspect.unwrap(f)
                code = inner.__code__.replace(co_name=f"{f.__name__}_{len(self._compiled)}")
                fresh = types.FunctionType(code, inner.__globals__, code.co_name, inner.__defaults__, inner.__closure__)
                g = torch.compile(fresh, fullgraph=True)
                self._compiled[(f, *fixed)] = g
                for i in dynamic:
                    torch._dynamo.mark_dynamic(args[i], 0)
            return g(*args)

        return call


def num_compiled_graphs() -> int:
    """Graphs compiled in this process so far."""
    from torch._dynamo.utils import counters  # takes more than a second to import

    return counters["stats"]["unique_graphs"]


class ModelRunner:
    """Runs the steps of one engine."""

    def __init__(
        self,
        params: Params,
        model_config: ModelConfig,
        config: EngineConfig,
        input_buffers: InputBuffers,
        tp_group: TPGroup | None = None,
        adapters: StackedAdapters | None = None,
    ) -> None:
        self.params, self.config, self.input_buffers, self.adapters = params, config, input_buffers, adapters
        self.model_config = (
            model_config if tp_group is None else shard_config(model_config, tp_group.shard.size)
        )  # what runs here
        self.device, self.mode = params.embed.device, config.compile.mode
        self.graphs: dict[StepShape, tuple[torch.cuda.CUDAGraph, StepOutput]] = {}
        self.graph_pool: Any = None
        self.num_captures = 0  # so far
        self.graph_bytes = 0  # bytes of the graphs
        self.compiled_ops = CompiledOps()
        self._profiled = False
        cuda = self.device.type == "cuda"
        if cuda:
            _set_triton_cache_dir()
        self.fused_sampler: FusedSampler | None = None
        # One buffer for all graphs' logits: they would each keep theirs.
        rows = largest_shape(config.schedule).num_seqs
        self.logits_buffer = (
            None if self.mode != "graphs" else params.embed.new_empty(rows, len(lm_head_weight(params)))
        )
        fixed = config.compile.batch_invariant
        backend = select_attention_backend(config.compile.attention, self.device)
        if fixed:
            if tp_group is not None and tp_group.shard.size > 1:
                raise ValueError(
                    "compile.batch_invariant=true holds for one device: sums over ranks have no fixed order"
                )
            batch_invariant.verify_batch_invariance(params)
            self.ops = batch_invariant.batch_invariant_ops(self.device)
        else:
            self.ops = (
                self._select_ops(backend, cuda) if self.mode != "eager" else TORCH_OPS._replace(attention=backend)
            )
        self.fused_rope_max_tokens = (
            0  # tokens of a step that only decodes, up to which attention rotates and stores what is new
        )
        if config.compile.attention == "triton" and self.mode != "eager" and not fixed:
            from fastgen.kernels.pdl import SMALL_BATCH

            self.fused_rope_max_tokens = SMALL_BATCH
        self._sample_fn = partial(batch_invariant.sample, compute_logprobs=self.ops.logprobs) if fixed else sample
        self.tp_group, self.vocab_size, self.local_lm_head = (
            tp_group,
            model_config.vocab_size,
            self.ops.lm_head,
        )  # a step's: each rank keeps its logits
        self.peer_buffers: PeerBuffers | None = None
        if tp_group is not None:
            if isinstance(tp_group, TPProcessGroup) and self.mode != "eager" and config.parallel.peer_memory:
                most = largest_shape(config.schedule).num_tokens
                self.peer_buffers = tp_group.create_peer_buffers(
                    model_config.hidden_size, most, params.embed.dtype, self.device
                )
            self.ops = shard_ops(self.ops, tp_group, model_config, self.peer_buffers)
        if self.mode != "eager" and cuda:
            from fastgen.kernels.rope_cache import (
                sample_tokens,  # Triton comes with the GPU builds of torch, and not with others
            )

            self.fused_sampler = partial(sample_tokens, batch_invariant=True) if fixed else sample_tokens
            if tp_group is not None:
                share = vocab_shard(model_config.vocab_size, tp_group.shard)
                self.fused_sampler = partial(
                    sample_tokens, vocab_size=model_config.vocab_size, vocab_shard=share, all_gather=tp_group.all_gather
                )

    def _select_ops(self, attention: AttentionBackend, use_triton: bool) -> ModelOps:
        region = self.compiled_ops
        parts: dict[str, Any] = {name: region(f) if f in DYNAMIC_ARGS else f for name, f in TORCH_OPS._asdict().items()}
        parts["attention"] = attention
        ops = ModelOps(**parts)
        if not use_triton:
            return ops
        from fastgen.kernels import lora, pdl, rope_cache, small_batch

        def few(fast: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
            return lambda x, *rest: (fast if len(x) <= pdl.SMALL_BATCH else plain)(x, *rest)

        return ops._replace(
            add_norm_qkv=few(small_batch.add_norm_qkv, ops.add_norm_qkv),
            add_norm_gate_up=few(small_batch.add_norm_gate_up, ops.add_norm_gate_up),
            linear=few(small_batch.linear, ops.linear),
            add_norm=few(small_batch.add_norm, ops.add_norm),
            swiglu=few(small_batch.swiglu, ops.swiglu),
            apply_lora=lora.apply_lora,
            final_norm=few(lambda *args: small_batch.add_norm(*args)[1], ops.final_norm),
            lm_head=few(
                lambda h, w, out=None: small_batch.linear(h, w, None, out if out is None else out[: len(h)]),
                ops.lm_head,
            ),
            rope_and_cache_kv=rope_cache.rope_and_cache_kv,
        )

    # --- shapes -----------------------------------------------------------------------------------------------------

    def graph_shapes(self) -> tuple[StepShape, ...]:
        """Those that are captured, largest first: the others then fit into the memory of the first."""
        if self.mode != "graphs":
            return ()
        s = self.config.schedule
        decode = [StepShape(n, n, True) for n in decode_graph_sizes(s.max_num_seqs)]
        mixed = [StepShape(n, PREFILL_GRAPH_NUM_SEQS, False) for n in PREFILL_GRAPH_SIZES if n <= s.token_budget]
        p = self.config.kv_cache
        together = p.prefix_cache and p.shared_prefix_attention and not self.config.compile.batch_invariant
        groups = shared_prefix_graph_sizes(s.max_num_seqs) if together else ()
        shared = [StepShape(n, n, True, True) for n in groups]
        return tuple(sorted({*decode, *shared, *mixed, full_budget_shape(s)}, reverse=True))

    def padded_shape(
        self, num_tokens: int, num_seqs: int, *, needs_prompt_logprobs: bool, shared_prefix: bool = False
    ) -> StepShape:
        """The shape in which a step of so many tokens and sequences is run."""
        decode, limits = num_tokens == num_seqs, self.config.schedule
        if self.mode == "eager":
            return StepShape(num_tokens, num_seqs, decode, shared_prefix)
        if decode:
            fits = [s for s in self.graphs if s.decode and s.shared_prefix == shared_prefix and s.num_seqs >= num_seqs]
            n = max(2, num_seqs)
            return min(fits, default=StepShape(n, n, True, shared_prefix))
        fits = [
            s
            for s in self.graphs
            if not (s.decode or needs_prompt_logprobs) and s.num_tokens >= num_tokens and s.num_seqs > num_seqs
        ]
        fits = [s for s in fits if s != full_budget_shape(limits) or s.num_tokens <= num_tokens * MAX_PADDING]
        # Few different sizes, each with kernels of its own in the libraries.
        grain, wide = (
            64 if num_tokens > 512 else 8,
            1 + min(n for n in decode_graph_sizes(limits.max_num_seqs) if n >= num_seqs),
        )
        size = -(-num_tokens // grain) * grain
        size += 8 * (size == wide)  # as many sequences as tokens would be taken to decode
        return min(fits, default=StepShape(size, wide, False))

    # --- steps ------------------------------------------------------------------------------------------------------

    def run(
        self,
        cache: KVCache,
        batch: Batch,
        sampling: SamplingTensors,
        shape: StepShape,
        *,
        needs_prompt_logprobs: bool = False,
        layer_chunk_ready: Sequence[torch.cuda.Event] = (),
    ) -> StepOutput:
        """Compute a staged step; the result lives until the next one. `scored` steps want all hidden states.

        `ready`: what each group of as many layers waits for before it touches the cache, if anything.
        """
        if shape in self.graphs and not needs_prompt_logprobs and (shape.decode or not layer_chunk_ready):
            if layer_chunk_ready:
                torch.cuda.current_stream(self.device).wait_event(layer_chunk_ready[-1])
            graph, computed = self.graphs[shape]
            graph.replay()
            return computed
        return self._run_model(
            cache, batch, sampling, layer_chunk_ready, decode=shape.decode, return_hidden_states=needs_prompt_logprobs
        )

    def _run_model(self, *args: Any, **options: bool) -> StepOutput:
        with batch_invariant.no_split_k() if self.config.compile.batch_invariant else _prefer_blas_library("cublaslt"):
            return self._forward_and_sample(*args, **options)

    def _forward_and_sample(
        self,
        cache: KVCache,
        batch: Batch,
        sampling: SamplingTensors,
        layer_chunk_ready: Sequence[torch.cuda.Event] = (),
        **options: bool,
    ) -> StepOutput:
        ops = self.ops._replace(lm_head=self.local_lm_head)
        if options["decode"] and batch.shared_prefix is None and len(batch.token_ids) <= self.fused_rope_max_tokens:
            ops = ops._replace(rope_and_cache_kv=UnrotatedQKV)
        if layer_chunk_ready:
            layers, stream = itertools.count(), torch.cuda.current_stream(self.device)

            def store(*args: Any) -> Any:
                stream.wait_event(
                    layer_chunk_ready[next(layers) * len(layer_chunk_ready) // self.model_config.num_layers]
                )
                return now(*args)

            now, ops = ops.rope_and_cache_kv, ops._replace(rope_and_cache_kv=store)
        feed_ = fill_pending_tokens if self.mode == "eager" else self.compiled_ops(fill_pending_tokens)
        batch = batch._replace(token_ids=feed_(batch.token_ids, self.input_buffers.last_token_ids))
        last, out = self.input_buffers.last_token_ids, self.logits_buffer
        inputs = self.params, cache, last, batch, sampling, self.model_config
        return forward_and_sample(*inputs, ops, self.fused_sampler, out, self.adapters, **options)

    def sample(self, logits: Tensor, sampling: SamplingTensors, num_top_logprobs: int | None) -> SamplerOutput:
        """`sampling.sample` of a step's logits."""
        if self.tp_group is None:
            return self._sample_fn(logits.float(), sampling, num_top_logprobs)
        return tensor_parallel.sample_from_shards(logits, sampling, num_top_logprobs, self.tp_group, self.vocab_size)

    def _warm_up_shapes(self) -> list[StepShape]:
        """Shapes that together run every kernel: a library's are loaded when first run, which waits for the device."""
        most = largest_shape(self.config.schedule)
        rows = (
            [n + 1 for n in decode_graph_sizes(self.config.schedule.max_num_seqs)]
            if self.fused_sampler is not None
            else []
        )
        tokens = [2**i for i in range(11, 17) if 2**i <= self.config.schedule.token_budget] if rows else []
        # The first is compiled for: sizes that are no other's, so that nothing is compiled for equal ones.
        mixed = [StepShape(40, 3, False), *(StepShape(2 * r // 8 * 8 + 16, r, False) for r in rows)]
        return [*mixed, *(StepShape(n, min(65, most.num_seqs), False) for n in tokens), StepShape(24, 24, True)]

    def _padding_inputs(self, shape: StepShape) -> tuple[Batch, SamplingTensors]:
        return self.input_buffers.fill((), {}, shape.num_tokens, shape.num_seqs, 0, () if shape.shared_prefix else None)

    @torch.no_grad()
    def profile_peak_memory(self, cache: KVCache) -> int:
        """Compile, and run the largest step and capture the largest graphs on a cache of one page of scratch.

        The bytes of device memory that are taken when all of that is there.
        """
        for shape in (*self._warm_up_shapes(), largest_shape(self.config.schedule)):
            self._run_model(cache, *self._padding_inputs(shape), decode=shape.decode)
        largest_graphs = {(shape.decode, shape.shared_prefix): shape for shape in reversed(self.graph_shapes())}
        for shape in largest_graphs.values():
            self._capture(cache, shape)
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info(self.device)
        self._profiled = True
        self.free_graphs()
        return total - free

    @torch.no_grad()
    def warm_up(self, cache: KVCache, *, progress: bool = True) -> None:
        """Compile and capture everything that steps will need."""
        if self.mode == "eager":
            return
        shapes = self.graph_shapes()
        with tqdm(
            total=len(shapes) + 1,
            desc="warm-up",
            unit="graph",
            delay=1,
            leave=False,
            disable=None if progress else True,
        ) as bar:
            for shape in () if self._profiled else self._warm_up_shapes():
                self._run_model(cache, *self._padding_inputs(shape), decode=shape.decode)
            bar.update()
            for shape in shapes:
                self._capture(cache, shape)
                bar.update()
        if shapes:
            segments = torch.cuda.memory_snapshot()
            self.graph_bytes = sum(x["total_size"] for x in segments if x.get("segment_pool_id") == self.graph_pool)

    def _capture(self, cache: KVCache, shape: StepShape) -> None:
        batch, sampling = self._padding_inputs(shape)
        self._run_model(cache, batch, sampling, decode=shape.decode)  # whatever is done once only is done before
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.graph_pool):
            computed = self._run_model(cache, batch, sampling, decode=shape.decode)
        self.graph_pool = self.graph_pool or graph.pool()
        self.graphs[shape] = graph, computed
        self.num_captures += 1

    def device_bytes(self) -> dict[str, int]:
        """Of the device's memory: buffers, and what the graphs hold."""
        shared = 0 if self.peer_buffers is None else self.peer_buffers.buffer.nbytes
        return {
            "logits": 0 if self.logits_buffer is None else self.logits_buffer.nbytes,
            "graphs": self.graph_bytes,
            "peers": shared,
        }

    def free_graphs(self) -> None:
        """Let go of the graphs and their memory."""
        self.graphs.clear()
        self.graph_pool, self.graph_bytes = None, 0
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
