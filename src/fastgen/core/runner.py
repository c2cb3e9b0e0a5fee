"""Runs steps: EagerRunner, in plain torch on any device, and the base class of `compiled.runner.ModelRunner`.

    prepare_inputs   plan -> padded Batch and sampling settings on the device
    forward          Batch -> hidden states and logits, keys and values into the cache
    sample           logits -> tokens and logprobs, on their way to the host

A PageCopier copies the pages that a plan copies: on the device; with `offload.host_offload`, to the host and back, too.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from fastgen.config import EngineConfig
from fastgen.core import attention
from fastgen.core.batch import InputBuffers, build_logit_edits
from fastgen.core.model_config import ModelConfig
from fastgen.core.prefix_cache import PageCopies
from fastgen.core.request import SequenceState
from fastgen.core.sampling import edit_logits, sample, sample_rows
from fastgen.core.scheduler import Plan
from fastgen.core.scheduling_policy import SharedPrefixGroup
from fastgen.core.step import StepOutput, compute_target_logprobs, fill_pending_tokens, forward_and_sample
from fastgen.core.transformer import TORCH_OPS, LoraAdapters, ModelOps
from fastgen.core.types import Batch, KVCache, Params, SamplerOutput, SamplingTensors, TopKTopP

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


class PageCopier:
    """Copies pages of one KV cache between the steps of an engine. Here: within the cache, in plain torch."""

    num_host_pages = 0

    def __init__(self, cache: KVCache, page_size: int) -> None:
        # [pages, page_size, kv heads, head_dim], a view of each layer's keys and of its values
        pairs = zip(cache.k, cache.v, strict=True)
        self.pages = [[rearrange(x, "(p t) k h -> p t k h", t=page_size) for x in pair] for pair in pairs]

    def start_copies(self, copies: PageCopies) -> Sequence[Any]:
        """Starts a step's copies. Returns events, each for an equal share of the layers to wait for, in order."""
        if copies.on_device:
            source, target = map(list, zip(*copies.on_device, strict=True))
            for x in itertools.chain(*self.pages):
                x[target] = x[source]
        return ()

    def read_pages(self, pages: Sequence[int], num_tokens: int) -> Shaped[Tensor, "layers 2 tokens K H"]:
        """Returns the keys and values of the first `num_tokens` tokens in `pages`, on the host."""
        layers = [torch.stack([x[list(pages)].flatten(0, 1) for x in pair]) for pair in self.pages]
        return torch.stack(layers)[:, :, :num_tokens].cpu()

    def write_pages(self, pages: Sequence[int], values: Shaped[Tensor, "layers 2 tokens K H"]) -> None:
        """Writes full pages of keys and values; skips those whose page number is 0."""
        rows = [i for i, page in enumerate(pages) if page]
        for pair, layer in zip(self.pages, values, strict=True):
            for x, value in zip(pair, layer, strict=True):
                x[[pages[i] for i in rows]] = value.view(len(pages), *x.shape[1:])[rows].to(x)

    def close(self) -> None:
        """Frees the host's pages."""
        self.pages = []


class EagerRunner:
    """Owns the tensors of one model, or of one rank's shard, and runs the plain torch ops one after the other.

    `model_config` is that of what runs here: a rank's shard.
    """

    cache: KVCache

    def __init__(
        self, params: Params, model_config: ModelConfig, config: EngineConfig, adapters: LoraAdapters | None = None
    ) -> None:
        self.params, self.model_config, self.config, self.adapters = params, model_config, config, adapters
        self.device, self.dtype = params.embed.device, params.embed.dtype
        pages, limits, backend = config.kv_cache, config.schedule, config.compile.attention
        self.ops: ModelOps = TORCH_OPS
        if backend in attention.BACKENDS:
            self.ops = TORCH_OPS._replace(attention=attention.BACKENDS[backend])
        context = min(model_config.context_length, pages.cache_tokens or model_config.context_length)
        max_pages = -(-max(context, limits.token_budget) // pages.page_size)  # padding has a row as well
        # So many sequences that their queries fill one tile of attention.
        group_size = max(1, 64 // (model_config.num_q_heads // model_config.num_kv_heads))
        shares = pages.prefix_cache and pages.shared_prefix_attention and backend == "triton"
        # Sequences whose shared prefix attention reads together; 0: it cannot.
        self.max_group_size = group_size if shares and not config.compile.batch_invariant else 0
        sizes = limits.max_num_seqs, max_pages, pages.page_size, model_config.vocab_size, self.device, group_size
        self.input_buffers = self.new_input_buffers(*sizes, use_adapters=adapters is not None)

    def new_input_buffers(self, *sizes: Any, **options: Any) -> InputBuffers:
        """Returns the buffers of this runner's inputs."""
        return InputBuffers(*sizes, **options)

    def attach_cache(self, cache: KVCache) -> None:
        """Sets the cache that steps read and write."""
        self.cache = cache

    def padded_shape(
        self, num_tokens: int, num_seqs: int, *, needs_prompt_logprobs: bool, shared_prefix: bool = False
    ) -> StepShape:
        """Returns the shape in which a step of this many tokens and sequences runs: here, without padding."""
        return StepShape(num_tokens, num_seqs, num_tokens == num_seqs, shared_prefix)

    def prepare_inputs(
        self, plan: Plan, states: Mapping[int, SequenceState], step: int, groups: Sequence[SharedPrefixGroup] = (), *,
        needs_prompt_logprobs: bool = False,
    ) -> StepInputs:  # fmt: skip
        """Puts a plan's inputs on the device; valid until the next call. `step` counts the steps."""
        num_tokens, scored = sum(span.stop - span.start for span in plan), needs_prompt_logprobs
        shape = self.padded_shape(num_tokens, len(plan), needs_prompt_logprobs=scored, shared_prefix=bool(groups))
        shared = groups if shape.shared_prefix else None
        batch, sampling = self.input_buffers.fill(plan, states, shape.num_tokens, shape.num_seqs, step, shared)
        return StepInputs(batch, sampling, shape, step, scored)

    def forward(self, inputs: StepInputs, layer_chunk_ready: Sequence[Any] = ()) -> StepOutput:
        """Computes a step. `layer_chunk_ready`: events that equal shares of the layers wait for, in order."""
        last_token_ids, (batch, sampling, shape, _, scored) = self.input_buffers.last_token_ids, inputs
        batch = batch._replace(token_ids=fill_pending_tokens(batch.token_ids, last_token_ids))
        step = self.params, self.cache, last_token_ids, batch, sampling, self.model_config, self.ops
        return forward_and_sample(*step, adapters=self.adapters, decode=shape.decode, return_hidden_states=scored)

    def sample(
        self, plan: Plan, states: Mapping[int, SequenceState], inputs: StepInputs, output: StepOutput,
        token_mask: Int[Tensor, "N words"] | None = None,
    ) -> tuple[tuple[Tensor, ...], Any]:  # fmt: skip
        """Samples a token for each sequence of a plan. Returns an InFlightStep's results and event."""
        sampled = sampled_states(plan, states)
        return tuple(x.cpu() for x in self.sample_general(plan, states, sampled, inputs, output, token_mask)), None

    def sample_general(
        self, plan: Plan, states: Mapping[int, SequenceState], sampled: Sequence[SequenceState], inputs: StepInputs,
        output: StepOutput, token_mask: Int[Tensor, "N words"] | None,
    ) -> SamplerOutput:  # fmt: skip
        """Samples with every setting that a request may have, and writes the tokens to `last_token_ids`."""
        n, settings, filters = len(plan), inputs.sampling, inputs.sampling.top_k_top_p
        num_tops = max((s.params.logprobs for s in sampled if s.params.logprobs is not None), default=None)
        random = settings.seed is not None and any(s.params.temperature for s in sampled)
        filtered = filters is not None and any(s.uses_top_k_top_p for s in sampled)
        sampling = SamplingTensors(
            temperature=settings.temperature[:n],
            seed=settings.seed[:n] if random else None,  # type: ignore[index]
            positions=settings.positions[:n],
            processed_logprobs=settings.processed_logprobs[:n].bool(),
            top_k_top_p=TopKTopP(*(x[:n] for x in filters)) if filtered else None,  # type: ignore[union-attr]
            logit_edits=build_logit_edits(plan, states, self.device),
            token_mask=token_mask,
        )
        sampled_rows = [(r, s) for r, x in enumerate(plan) if x.needs_sampling and (s := states.get(x.id))]
        edited_rows = [(r, s, m) for r, s in sampled_rows if (m := s.matcher) is not None and m.edit_logits]
        if edited_rows:  # by functions of the requests, row by row
            logits = output.logits[:n].float()
            z = logits.clone()
            for r, s, matcher in edited_rows:
                z[r] = matcher.edit_logits(s.output.prompt_token_ids, s.completion.token_ids, z[r])
            results = sample_rows(edit_logits(z, sampling), logits, sampling, num_tops)
        else:
            results = self.sample_logits(output.logits[:n], sampling, num_tops)
        self.input_buffers.last_token_ids[inputs.batch.req_idx[:n]] = results.token_ids.int()
        return results

    def sample_logits(
        self, logits: Float[Tensor, "N V"], sampling: SamplingTensors, num_top_logprobs: int | None
    ) -> SamplerOutput:
        """Samples a token for each row of a step's logits."""
        return sample(logits.float(), sampling, num_top_logprobs)

    def prompt_logprobs(
        self, hidden_states: Float[Tensor, "T D"], target_ids: list[int], num_top_logprobs: int
    ) -> tuple[list[float], list[dict[int, float]]]:
        """Returns the logprob of each row's target token, and its most likely tokens with their logprobs."""
        return compute_target_logprobs(self.params, hidden_states, target_ids, num_top_logprobs, self.ops)


def sampled_states(plan: Plan, states: Mapping[int, SequenceState]) -> list[SequenceState]:
    """Returns the sequences of a plan whose next token is sampled, without those that have ended."""
    return [s for x in plan if x.needs_sampling and (s := states.get(x.id)) and not s.completion.finish_reason]
