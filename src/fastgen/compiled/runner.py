"""ModelRunner: runs an engine's steps eagerly, compiled, or as CUDA graphs, on one device or one tensor-parallel rank.

eager      the plain torch ops one after the other, and the attention backend
inductor   whatever lies between two matmuls or attentions is one kernel (`compiled_ops`)
graphs     the same, and steps of few tokens are captured (`cuda_graphs`)
"""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from fastgen.compiled import cuda_graphs
from fastgen.compiled.compiled_ops import CompiledOps
from fastgen.compiled.cuda_graphs import CudaGraphs, largest_shape
from fastgen.compiled.input_buffers import GPUInputBuffers
from fastgen.config import EngineConfig
from fastgen.core.batch import InputBuffers
from fastgen.core.model_config import ModelConfig, shard_config, vocab_shard
from fastgen.core.request import SequenceState
from fastgen.core.runner import EagerRunner, StepInputs, StepShape, sampled_states
from fastgen.core.scheduler import Plan
from fastgen.core.step import StepOutput, fill_pending_tokens, forward_and_sample
from fastgen.core.transformer import TORCH_OPS, LoraAdapters, lm_head_weight
from fastgen.core.types import KVCache, Params, SamplerOutput, SamplingTensors
from fastgen.distributed import tensor_parallel
from fastgen.distributed.peer_memory import PeerBuffers
from fastgen.distributed.tensor_parallel import TPGroup, TPProcessGroup, shard_ops
from fastgen.kernels import batch_invariant, select


class ModelRunner(EagerRunner):
    """Runs the steps of one engine. `model_config` is the full model's; the attribute is that of this rank's shard."""

    def __init__(
        self, params: Params, model_config: ModelConfig, config: EngineConfig,
        tp_group: TPGroup | None = None, adapters: LoraAdapters | None = None,
    ) -> None:  # fmt: skip
        shard = model_config if tp_group is None else shard_config(model_config, tp_group.shard.size)
        largest = largest_shape(config.schedule)
        super().__init__(params, shard, config, adapters=adapters)
        self.mode, self.tp_group, self.vocab_size = config.compile.mode, tp_group, model_config.vocab_size
        self.graphs, self.kernels_loaded = CudaGraphs(), False
        if self.device.type == "cuda":
            from triton import knobs  # Triton comes with the GPU builds of torch, and not with others

            # Inductor sets it too, but only when it has something to compile: a process that finds everything compiled
            # would look for Triton's kernels elsewhere and compile them again.
            os.environ.setdefault("TRITON_CACHE_DIR", knobs.cache.dir)
        if config.compile.batch_invariant:
            if tp_group is not None and tp_group.shard.size > 1:
                raise ValueError("compile.batch_invariant=true needs one device: all-reduces have no fixed order")
        compiled, plain, self._fill_pending_tokens = CompiledOps(), TORCH_OPS, fill_pending_tokens
        if self.mode != "eager":
            plain, self._fill_pending_tokens = compiled.compile_ops(plain), compiled(fill_pending_tokens)
        ops = select.select_ops(config.compile, self.device, plain)
        ops = select.select_quantized_ops(ops, params, batch_invariant=config.compile.batch_invariant)
        if config.compile.batch_invariant:
            batch_invariant.verify_batch_invariance(params, ops)
        if config.kv_cache.dtype == "fp8" and self.device.type == "cuda":
            capability = torch.cuda.get_device_capability(self.device)
            select.check_fp8_gpu(capability, "fp8 keys and values", "kv_cache.dtype=auto")
        self.ops = select.select_cache_ops(ops, config.kv_cache.dtype, config.kv_cache.page_size, shard)
        self._sample_fn = select.select_sample_fn(config.compile, self.device, self.ops)
        self.fused_sampler = select.select_fused_sampler(config.compile, self.device)
        # One logits buffer for all graphs, which would otherwise each have their own.
        self.logits_buffer = None
        if self.mode == "graphs":
            self.logits_buffer = params.embed.new_empty(largest.num_seqs, len(lm_head_weight(params)))
        self.peer_buffers: PeerBuffers | None = None
        local_lm_head = self.ops.lm_head
        if tp_group is not None:
            if isinstance(tp_group, TPProcessGroup) and self.mode != "eager" and config.parallel.peer_memory:
                self.peer_buffers = tp_group.create_peer_buffers(
                    model_config.hidden_size, largest.num_tokens, params.embed.dtype, self.device
                )
            self.ops = shard_ops(self.ops, tp_group, model_config, self.peer_buffers)
            if self.fused_sampler is not None:
                shard = vocab_shard(self.vocab_size, tp_group.shard)
                self.fused_sampler = partial(
                    self.fused_sampler, vocab_size=self.vocab_size, vocab_shard=shard, all_gather=tp_group.all_gather
                )
        # In a step, each rank keeps the logits of its vocabulary shard; `ops`, for prompt logprobs, gathers them.
        self._step_ops = self.ops._replace(lm_head=local_lm_head)
        self.fused_rope_max_tokens, self._fused_rope_ops = select.select_fused_rope(config.compile, self._step_ops)

    def new_input_buffers(self, *sizes: Any, **options: Any) -> InputBuffers:
        if self.device.type != "cuda":
            return InputBuffers(*sizes, **options)
        if self.config.compile.mode != "eager":
            from fastgen.kernels.page_copy import copy_concatenated  # Triton comes with GPU builds alone

            options["copy_buffer"] = copy_concatenated
        largest = largest_shape(self.config.schedule)
        return GPUInputBuffers(*sizes, max_tokens=largest.num_tokens, max_rows=largest.num_seqs, **options)

    # --- shapes -----------------------------------------------------------------------------------------------------

    def graph_shapes(self) -> tuple[StepShape, ...]:
        """Returns the shapes that are captured, largest first."""
        return cuda_graphs.graph_shapes(self.config) if self.mode == "graphs" else ()

    def padded_shape(
        self, num_tokens: int, num_seqs: int, *, needs_prompt_logprobs: bool, shared_prefix: bool = False
    ) -> StepShape:
        """Returns the shape in which a step of this many tokens and sequences runs."""
        if self.mode == "eager":
            return StepShape(num_tokens, num_seqs, num_tokens == num_seqs, shared_prefix)
        captured, schedule = self.graphs.captured, self.config.schedule
        return cuda_graphs.padded_shape(captured, schedule, num_tokens, num_seqs, needs_prompt_logprobs, shared_prefix)

    # --- steps ------------------------------------------------------------------------------------------------------

    def forward(self, inputs: StepInputs, layer_chunk_ready: Sequence[Any] = ()) -> StepOutput:
        """Runs a step whose inputs are in the input buffers. The output is valid until the next call.

        `layer_chunk_ready`: one event for each chunk of layers, which wait for it before they access the cache; empty:
        nothing to wait for.
        """
        captured = None if inputs.needs_prompt_logprobs else self.graphs.captured.get(inputs.shape)
        if captured is None or (layer_chunk_ready and not inputs.shape.decode):
            return self._run_model(self.cache, inputs, layer_chunk_ready)
        if layer_chunk_ready:
            torch.cuda.current_stream(self.device).wait_event(layer_chunk_ready[-1])
        graph, output = captured
        graph.replay()
        return output

    def _run_model(self, cache: KVCache, inputs: StepInputs, layer_chunk_ready: Sequence[Any] = ()) -> StepOutput:
        batch, sampling, shape, _, scored = inputs
        fused_rope = shape.decode and batch.shared_prefix is None and shape.num_tokens <= self.fused_rope_max_tokens
        ops = self._fused_rope_ops if fused_rope else self._step_ops
        if layer_chunk_ready:
            num_layers, stream = self.model_config.num_layers, torch.cuda.current_stream(self.device)
            layer_events = (layer_chunk_ready[i * len(layer_chunk_ready) // num_layers] for i in range(num_layers))

            def rope_and_cache_kv(*args: Any) -> Any:  # called once by each layer, in order
                stream.wait_event(next(layer_events))
                return inner(*args)

            inner, ops = ops.rope_and_cache_kv, ops._replace(rope_and_cache_kv=rope_and_cache_kv)
        last_token_ids = self.input_buffers.last_token_ids
        with batch_invariant.prefer_cublaslt(split_k=not self.config.compile.batch_invariant):
            batch = batch._replace(token_ids=self._fill_pending_tokens(batch.token_ids, last_token_ids))
            step = self.params, cache, last_token_ids, batch, sampling, self.model_config, ops
            outputs = self.fused_sampler, self.logits_buffer, self.adapters
            return forward_and_sample(*step, *outputs, decode=shape.decode, return_hidden_states=scored)

    def sample(
        self, plan: Plan, states: Mapping[int, SequenceState], inputs: StepInputs, output: StepOutput,
        token_mask: Int[Tensor, "N words"] | None = None,
    ) -> tuple[tuple[Tensor, ...], Any]:  # fmt: skip
        if not isinstance(self.input_buffers, GPUInputBuffers):
            return super().sample(plan, states, inputs, output, token_mask)
        n, sampled = len(plan), sampled_states(plan, states)
        if output.token_ids is not None and not any(s.needs_general_sampler for s in sampled):
            sampled_rows = output.token_ids[:n], output.logprobs[:n]  # type: ignore[index]
            no_tops = torch.empty(n, 0, device="cpu")
            results = *self.input_buffers.copy_sampled_to_host(*sampled_rows, inputs.step), no_tops, no_tops
        else:
            on_device = self.sample_general(plan, states, sampled, inputs, output, token_mask)
            pinned = [torch.empty_like(t, device="cpu", pin_memory=True) for t in on_device]
            results = tuple(host.copy_(t, non_blocking=True) for host, t in zip(pinned, on_device, strict=True))
        done_event = torch.cuda.Event()
        done_event.record()
        return results, done_event

    def sample_logits(
        self, logits: torch.Tensor, sampling: SamplingTensors, num_top_logprobs: int | None
    ) -> SamplerOutput:
        """Samples from a step's logits with every setting that a request may have, unlike the fused sampler."""
        if self.tp_group is None:
            return self._sample_fn(logits.float(), sampling, num_top_logprobs)
        return tensor_parallel.sample_from_shards(logits, sampling, num_top_logprobs, self.tp_group, self.vocab_size)

    # --- start-up ---------------------------------------------------------------------------------------------------

    def run_padding(self, cache: KVCache, shape: StepShape) -> None:
        """Runs a step of padding alone."""
        self._run_model(cache, self._padding_inputs(shape))

    def capture(self, cache: KVCache, shape: StepShape) -> None:
        """Captures the graph of a shape."""
        inputs = self._padding_inputs(shape)
        self.graphs.capture(shape, lambda: self._run_model(cache, inputs))

    def _padding_inputs(self, shape: StepShape) -> StepInputs:
        groups = () if shape.shared_prefix else None
        batch, sampling = self.input_buffers.fill((), {}, shape.num_tokens, shape.num_seqs, 0, groups)
        return StepInputs(batch, sampling, shape, 0, needs_prompt_logprobs=False)

    def device_bytes(self) -> dict[str, int]:
        """Returns the bytes of device memory that buffers and graphs take, by purpose."""
        return {
            "logits": 0 if self.logits_buffer is None else self.logits_buffer.nbytes,
            "graphs": self.graphs.num_bytes,
            "peers": 0 if self.peer_buffers is None else self.peer_buffers.buffer.nbytes,
        }
