"""Runs steps: the Runner protocol, and EagerRunner in plain torch, for any device and by itself.

    prepare_inputs   plan -> padded Batch and sampling settings on the device
    forward          Batch -> hidden states and logits, keys and values into the cache
    sample           logits -> tokens and logprobs, on their way to the host

A PageCopier carries out what a plan copies besides: pages on the device, to the host and back.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastgen.config import EngineConfig
from fastgen.core import attention
from fastgen.core.batch import InputBuffers, build_logit_edits
from fastgen.core.model_config import ModelConfig
from fastgen.core.prefix_cache import PageCopies
from fastgen.core.request import SequenceState
from fastgen.core.sampling import sample
from fastgen.core.scheduler import Plan
from fastgen.core.scheduling_policy import SharedPrefixGroup
from fastgen.core.step import StepOutput, compute_target_logprobs, fill_pending_tokens, forward_and_sample
from fastgen.core.transformer import TORCH_OPS, ModelOps
from fastgen.core.types import Batch, KVCache, Params, SamplerOutput, SamplingTensors, StackedAdapters, TopKTopP

SampledRow = tuple[int, float, list[tuple[int, float]]]  # token, logprob, (token, logprob) of the most likely tokens


class StepShape(NamedTuple):
    """Tokens and sequences of a step, padding included. `decode`: every sequence has one token."""

    num_tokens: int
    num_seqs: int
    decode: bool
    shared_prefix: bool = False  # whether attention reads shared prefixes once for a group


class StepInputs(NamedTuple):
    """The padded inputs of one step, on the device."""

    batch: Batch
    sampling: SamplingTensors
    shape: StepShape
    step: int  # counts the steps
    needs_prompt_logprobs: bool


class InFlightStep(NamedTuple):
    """A step that may still be running: its plan, and where its results will be on the host."""

    plan: Plan
    results: tuple[Tensor, ...]  # token, logprob, top tokens, top logprobs: a row for each sequence of the plan
    done_event: Any  # torch.cuda.Event; None: the results are there
    weight_version: int

    def read(self) -> tuple[list[int], Iterator[SampledRow]]:
        """Waits for the step. Returns the token of every row, and the rows."""
        if self.done_event is not None:
            self.done_event.synchronize()
        token_ids, logprobs, top_ids, top_logprobs = (t.tolist() for t in self.results)
        tops = (list(zip(*pair, strict=True)) for pair in zip(top_ids, top_logprobs, strict=True))
        return token_ids, zip(token_ids, logprobs, tops if top_ids else itertools.repeat([]), strict=False)


@runtime_checkable
class Runner(Protocol):
    """Owns the tensors of one model, or of one rank's shard: parameters, cache and input buffers."""

    params: Params
    cache: KVCache
    model_config: ModelConfig  # of what runs here: a rank's shard
    device: torch.device
    max_group_size: int  # sequences whose shared prefix attention reads together; 0: it cannot

    def prepare_inputs(
        self,
        plan: Plan,
        states: Mapping[int, SequenceState],
        step: int,
        groups: Sequence[SharedPrefixGroup] = (),
        *,
        needs_prompt_logprobs: bool = False,
    ) -> StepInputs:
        """Puts a plan's inputs on the device; valid until the next call. `step` counts the steps."""
        ...

    def forward(self, inputs: StepInputs, layer_chunk_ready: Sequence[Any] = ()) -> StepOutput:
        """Computes a step. `layer_chunk_ready`: events that equal shares of the layers wait for, in order."""
        ...

    def sample(
        self,
        plan: Plan,
        states: Mapping[int, SequenceState],
        inputs: StepInputs,
        output: StepOutput,
        token_mask: Int[Tensor, "N words"] | None = None,
    ) -> tuple[tuple[Tensor, ...], Any]:
        """Samples a token for each sequence of a plan. Returns an InFlightStep's results and event."""
        ...

    def prompt_logprobs(
        self, hidden_states: Float[Tensor, "T D"], target_ids: list[int], num_top_logprobs: int
    ) -> tuple[list[float], list[dict[int, float]]]:
        """Returns the logprob of each row's target token, and its most likely tokens with their logprobs."""
        ...


@runtime_checkable
class PageCopier(Protocol):
    """Copies pages between the steps of one engine: on the device, to the host's memory, and back."""

    num_host_pages: int

    def start_copies(self, copies: PageCopies) -> Sequence[Any]:
        """Starts a step's copies. Returns events, each for an equal share of the layers to wait for, in order."""
        ...

    def read_pages(self, pages: Sequence[int], num_tokens: int) -> Float[Tensor, "layers 2 tokens K H"]:
        """Returns the keys and values of the first `num_tokens` tokens in `pages`, on the host."""
        ...

    def write_pages(self, pages: Sequence[int], values: Float[Tensor, "layers 2 tokens K H"]) -> None:
        """Writes full pages of keys and values; skips those whose page number is 0."""
        ...

    def close(self) -> None:
        """Frees the host's pages."""
        ...


class TorchPageCopier:
    """Copies pages within the cache, in plain torch: the null implementation, without pages on the host."""

    num_host_pages = 0

    def __init__(self, cache: KVCache, page_size: int) -> None:
        heads = cache.k[0].shape[1:]
        # [pages, page_size, heads, head_dim], a view of each layer's keys and of its values
        self._pages = [[x.view(-1, page_size, *heads) for x in pair] for pair in zip(cache.k, cache.v, strict=True)]

    def start_copies(self, copies: PageCopies) -> Sequence[Any]:
        if copies.on_device:
            source, target = map(list, zip(*copies.on_device, strict=True))
            for x in itertools.chain(*self._pages):
                x[target] = x[source]
        return ()

    def read_pages(self, pages: Sequence[int], num_tokens: int) -> Float[Tensor, "layers 2 tokens K H"]:
        layers = [torch.stack([x[list(pages)].flatten(0, 1) for x in pair]) for pair in self._pages]
        return torch.stack(layers)[:, :, :num_tokens].cpu()

    def write_pages(self, pages: Sequence[int], values: Float[Tensor, "layers 2 tokens K H"]) -> None:
        rows = [i for i, page in enumerate(pages) if page]
        for pair, layer in zip(self._pages, values, strict=True):
            for x, value in zip(pair, layer, strict=True):
                x[[pages[i] for i in rows]] = value.view(len(pages), *x.shape[1:])[rows].to(x)

    def close(self) -> None:
        self._pages = []


class EagerRunner:
    """Runs the plain torch ops one after the other, or the given `ops`, on the parameters' device.

    `largest` bounds the padded steps of a subclass. `copy_buffer` is as for InputBuffers.
    """

    def __init__(
        self,
        params: Params,
        model_config: ModelConfig,
        config: EngineConfig,
        *,
        adapters: StackedAdapters | None = None,
        largest: StepShape | None = None,
        copy_buffer: Callable[..., Any] | None = None,
    ) -> None:
        self.params, self.model_config, self.config, self.adapters = params, model_config, config, adapters
        self.device, self.dtype = params.embed.device, params.embed.dtype
        pages, limits, attend = config.kv_cache, config.schedule, config.compile.attention
        self.ops: ModelOps = TORCH_OPS
        if backend := {"reference": attention.reference, "sdpa": attention.sdpa}.get(attend):
            self.ops = TORCH_OPS._replace(attention=backend)
        largest = largest or StepShape(limits.token_budget, limits.max_num_seqs, False)
        context = min(model_config.context_length, pages.cache_tokens or model_config.context_length)
        max_pages = -(-max(context, limits.token_budget) // pages.page_size)  # padding has a row as well
        # So many sequences that their queries fill one tile of attention.
        group_size = max(1, 64 // (model_config.num_q_heads // model_config.num_kv_heads))
        sizes = limits.max_num_seqs, *largest[:2], max_pages, pages.page_size, model_config.vocab_size
        self.input_buffers = InputBuffers(
            *sizes, self.device, group_size, use_adapters=adapters is not None, copy_buffer=copy_buffer
        )
        shares = pages.prefix_cache and pages.shared_prefix_attention and attend == "triton"
        self.max_group_size = group_size if shares and not config.compile.batch_invariant else 0

    def attach_cache(self, cache: KVCache) -> None:
        """Sets the cache that steps read and write."""
        self.cache = cache

    def padded_shape(
        self, num_tokens: int, num_seqs: int, *, needs_prompt_logprobs: bool, shared_prefix: bool = False
    ) -> StepShape:
        """Returns the shape in which a step of this many tokens and sequences runs: here, without padding."""
        return StepShape(num_tokens, num_seqs, num_tokens == num_seqs, shared_prefix)

    def prepare_inputs(
        self,
        plan: Plan,
        states: Mapping[int, SequenceState],
        step: int,
        groups: Sequence[SharedPrefixGroup] = (),
        *,
        needs_prompt_logprobs: bool = False,
    ) -> StepInputs:
        num_tokens, scored = sum(span.stop - span.start for span in plan), needs_prompt_logprobs
        shape = self.padded_shape(num_tokens, len(plan), needs_prompt_logprobs=scored, shared_prefix=bool(groups))
        shared = groups if shape.shared_prefix else None
        batch, sampling = self.input_buffers.fill(plan, states, shape.num_tokens, shape.num_seqs, step, shared)
        return StepInputs(batch, sampling, shape, step, scored)

    def forward(self, inputs: StepInputs, layer_chunk_ready: Sequence[Any] = ()) -> StepOutput:
        last_token_ids, (batch, sampling, shape, _, scored) = self.input_buffers.last_token_ids, inputs
        batch = batch._replace(token_ids=fill_pending_tokens(batch.token_ids, last_token_ids))
        step = self.params, self.cache, last_token_ids, batch, sampling, self.model_config, self.ops
        return forward_and_sample(*step, adapters=self.adapters, decode=shape.decode, return_hidden_states=scored)

    def sample_logits(
        self, logits: Float[Tensor, "N V"], sampling: SamplingTensors, num_top_logprobs: int | None
    ) -> SamplerOutput:
        """Samples from a step's logits with every setting that a request may have."""
        return sample(logits.float(), sampling, num_top_logprobs)

    def sample(
        self,
        plan: Plan,
        states: Mapping[int, SequenceState],
        inputs: StepInputs,
        output: StepOutput,
        token_mask: Int[Tensor, "N words"] | None = None,
    ) -> tuple[tuple[Tensor, ...], Any]:
        n, cuda = len(plan), self.device.type == "cuda"
        sampled = [s for x in plan if x.needs_sampling and (s := states.get(x.id)) and not s.completion.finish_reason]
        if output.token_ids is not None and not any(s.needs_general_sampler for s in sampled):
            token_ids, logprobs = output.token_ids[:n], output.logprobs[:n]  # type: ignore[index]
            no_tops = torch.empty(n, 0, device="cpu")
            results = *self.input_buffers.copy_sampled_to_host(token_ids, logprobs, inputs.step), no_tops, no_tops
        else:
            num_tops = max((s.params.logprobs for s in sampled if s.params.logprobs is not None), default=None)
            settings, top_k_top_p = inputs.sampling, inputs.sampling.top_k_top_p
            random = any(s.params.temperature for s in sampled)
            filtered = top_k_top_p is not None and any(s.uses_top_k_top_p for s in sampled)
            general = SamplingTensors(
                temperature=settings.temperature[:n],
                seed=settings.seed[:n] if random and settings.seed is not None else None,
                positions=settings.positions[:n],
                processed_logprobs=settings.processed_logprobs[:n].bool(),
                top_k_top_p=TopKTopP(*(x[:n] for x in top_k_top_p)) if filtered and top_k_top_p is not None else None,
                logit_edits=build_logit_edits(plan, states, self.device),
                token_mask=token_mask,
            )
            results = self.sample_logits(output.logits[:n], general, num_tops)
            self.input_buffers.last_token_ids[inputs.batch.req_idx[:n]] = results.token_ids.int()
            if cuda:
                pinned = [torch.empty_like(t, device="cpu", pin_memory=True) for t in results]
                results = [host.copy_(t, non_blocking=True) for host, t in zip(pinned, results, strict=True)]
        if not cuda:
            return tuple(results), None
        done_event = torch.cuda.Event()
        done_event.record()
        return tuple(results), done_event

    def prompt_logprobs(
        self, hidden_states: Float[Tensor, "T D"], target_ids: list[int], num_top_logprobs: int
    ) -> tuple[list[float], list[dict[int, float]]]:
        return compute_target_logprobs(self.params, hidden_states, target_ids, num_top_logprobs, self.ops)
