"""Logprobs of tokens that are given, by the functions that generate: for references, old policies, and gradients."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from numbers import Integral
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastgen.compiled import batch_invariant as invariant_ops
from fastgen.config import MIN_TEMPERATURE, check_int
from fastgen.core.attention import sdpa
from fastgen.core.batch import build_batch
from fastgen.core.model_config import ModelConfig, shard_config
from fastgen.core.request import Output
from fastgen.core.scheduler import Span
from fastgen.core.step import LOGITS_PER_CHUNK
from fastgen.core.tokenizer import encode
from fastgen.core.transformer import TORCH_OPS, ModelOps, decoder_layer, lm_head_weight
from fastgen.core.types import Batch, Params, Tokenizer
from fastgen.distributed.tensor_parallel import TPGroup, shard_ops
from fastgen.thread_safety import check_fork, no_autocast
from fastgen.training.weight_sync import attach_gradients

PAGE_SIZE = 64  # tokens; of the cache that lives as long as a call


@no_autocast
def score(
    params: Params,
    model_config: ModelConfig,
    sequences: Tensor | Sequence[Sequence[int] | Tensor],
    *,
    first: int | Sequence[int] = 1,
    temperature: float = 1.0,
    batch_invariant: bool = False,
    activation_checkpointing: bool = False,
    token_budget: int = 8192,
    ops: ModelOps | None = None,
    tp_group: TPGroup | None = None,
) -> list[Float[Tensor, " n"]]:
    """Natural-log probability of each sequence's tokens from `first` on, given those before: fp32, a tensor each.

    `first` is one index for all or one for each, 1 at least: a prompt's length scores what was generated. The
    probabilities are of logits / temperature.

    Differentiable: where gradients are enabled and a leaf of `params` requires one, or a parameter of the model that
    it was adopted from, so do the results; `checkpointed` computes each block again on the way back instead of keeping
    its activations. Logits are never held for more than 2**24 entries at once, with gradients or without.

    `deterministic`: with the kernels of an engine's `compile.batch_invariant`, so that the results are its logprobs, bit
    for bit. Sequences are computed whole, as many at once as fit `token_budget`. ValueError for what cannot be scored.

    `group`: `params` are a rank's of it, and every rank makes this call; without gradients, and not `deterministic`.
    """
    check_fork("score")
    many = to_token_ids(sequences)
    each = list(first) if isinstance(first, Sequence) else [first] * len(many)
    check_scorable(many, each, model_config, temperature)
    check_int("token_budget", token_budget, 1, 2**31)
    temperature = float(temperature)
    params, device = attach_gradients(params), params.embed.device
    grad = torch.is_grad_enabled() and any(w.requires_grad for w in iter_weights(params))
    if tp_group is not None and (grad or batch_invariant):
        raise ValueError("score: over ranks there are no gradients, and sums have no fixed order; leave both off")
    if ops is None:
        ops = invariant_ops.batch_invariant_ops(device) if batch_invariant else default_ops(device)
    if tp_group is not None:
        ops, model_config = shard_ops(ops, tp_group, model_config), shard_config(model_config, tp_group.shard.size)
    if grad:
        ops = make_differentiable(ops, batch_invariant or device.type == "cuda")
    found: list[Tensor] = []
    with invariant_ops.no_split_k() if batch_invariant else nullcontext():
        for some in split_into_batches([len(s) for s in many], token_budget):
            found += _score_batch(params, model_config, [many[i] for i in some], [each[i] for i in some], temperature, ops,
                             activation_checkpointing=grad and activation_checkpointing, needs_grad=grad)  # fmt: skip
    return found


def to_token_ids(sequences: Any, tokenizer: Tokenizer | None = None) -> list[list[int]]:
    """Token ids as lists, from lists, arrays, tensors or, with a tokenizer, texts. ValueError for other things."""
    wrong = isinstance(sequences, str | bytes | Mapping) or getattr(sequences, "ndim", 1) == 0
    if wrong or not isinstance(sequences, Iterable):
        raise ValueError(f"score takes a list of sequences, each a list of token ids, not {type(sequences).__name__}")
    many = []
    s: Any
    for i, s in enumerate(sequences):
        if isinstance(s, str):
            if tokenizer is None:
                raise ValueError(f"sequence {i} is a text, and there is no tokenizer: give token ids")
            s = encode(tokenizer, s) if s else []
        tokens = s.tolist() if hasattr(s, "tolist") else s
        if isinstance(tokens, Integral):
            raise ValueError(f"sequence {i} is a number: score takes a list of sequences, [[1, 2, 3]] for a single one")
        if not isinstance(tokens, list | tuple):
            raise ValueError(f"sequence {i} is a {type(tokens).__name__}, not a list of token ids")
        for kind in set(map(type, tokens)):
            if kind is bool or not issubclass(kind, Integral):
                raise ValueError(f"sequence {i} has a {kind.__name__} in it: score takes lists of token ids")
        many.append(list(map(int, tokens)))
    return many


def check_scorable(sequences: list[list[int]], first: list[int], model_config: ModelConfig, temperature: float) -> None:
    """ValueError for what cannot be scored."""
    if not all(isinstance(f, Integral) for f in first):
        raise ValueError(f"first is one index for all sequences or one for each, not {first!r:.80}")
    if len(first) != len(sequences):
        raise ValueError(f"{len(first)} values of `first` for {len(sequences)} sequences")
    number = isinstance(temperature, int | float) and abs(temperature) <= sys.float_info.max
    if not number or temperature < MIN_TEMPERATURE:
        raise ValueError(f"temperature must be finite and at least {MIN_TEMPERATURE}, got {temperature!r}")
    for i, (tokens, start) in enumerate(zip(sequences, first, strict=True)):
        if not 1 <= start <= len(tokens):
            problem = "it has no tokens" if not tokens else f"first={start} is not within 1 to {len(tokens)}"
            raise ValueError(f"sequence {i}: {problem}; the first token has no probability")
        if len(tokens) > model_config.context_length:
            raise ValueError(
                f"sequence {i}: {len(tokens)} tokens do not fit the model's context of {model_config.context_length}"
            )
        for wrong in (t for t in tokens if not (isinstance(t, Integral) and 0 <= t < model_config.vocab_size)):
            raise ValueError(f"sequence {i}: token {wrong!r} is outside the vocabulary of {model_config.vocab_size}")


def iter_weights(params: Params) -> Iterator[Tensor]:
    """The weights that are there."""
    yield from (w for w in (params.embed, params.final_norm, params.lm_head) if w is not None)
    yield from (w for layer in params.layers for w in layer if w is not None)


def default_ops(device: torch.device) -> ModelOps:
    """The functions of a forward that nobody compiled."""
    if device.type != "cuda":
        return TORCH_OPS
    from fastgen.kernels.attention import paged_attention
    from fastgen.kernels.rope_cache import (
        rope_and_cache_kv,  # Triton comes with the GPU builds of torch, and not with others
    )

    return TORCH_OPS._replace(attention=paged_attention, rope_and_cache_kv=rope_and_cache_kv)


def split_into_batches(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Indices in order, as many at once as have `budget` tokens together; one at least."""
    some, total = list[int](), 0
    for i, n in enumerate(lengths):
        if some and total + n > token_budget:
            yield some
            some, total = [], 0
        some.append(i)
        total += n
    if some:
        yield some


def _score_batch(
    params: Params, model_config: ModelConfig, sequences: list[list[int]], first: list[int], temperature: float, ops: ModelOps, *,
    activation_checkpointing: bool, needs_grad: bool,
) -> list[Tensor]:  # fmt: skip
    """Of sequences that are one batch."""
    device = params.embed.device
    x, y = _run_layers(
        params, model_config, _build_batch(sequences, device), ops, activation_checkpointing=activation_checkpointing
    )
    start = torch.tensor([0, *(len(s) for s in sequences)], device="cpu").cumsum(0).tolist()
    row = [i for at, f, s in zip(start, first, sequences, strict=False) for i in range(at + f - 1, at + len(s) - 1)]
    h = ops.final_norm(x, y, params.final_norm, model_config.rms_norm_eps)[
        torch.tensor(row, dtype=torch.long, device=device)
    ]
    target = torch.tensor([t for f, s in zip(first, sequences, strict=True) for t in s[f:]], device=device).long()

    def part(h: Tensor, w: Tensor, target: Tensor) -> Tensor:
        logits = ops.lm_head(h, w).float()
        return ops.logprobs(logits if temperature == 1 else logits / temperature, target, 0)[0]

    rows, w, value = max(1, LOGITS_PER_CHUNK // model_config.vocab_size), lm_head_weight(params), []
    for some, t in zip(h.split(rows), target.split(rows), strict=True):
        value.append(checkpoint(part, some, w, t, use_reentrant=False) if needs_grad else part(some, w, t))
    return list(torch.cat(value).split([len(s) - f for f, s in zip(first, sequences, strict=True)]))


def _build_batch(sequences: list[list[int]], device: torch.device) -> Batch:
    """Whole sequences in one step, in pages that follow each other after scratch."""
    pages, plan = 1, list[Span]()
    for i, s in enumerate(sequences):
        more = -(-len(s) // PAGE_SIZE)
        plan.append(Span(i, 0, len(s), True, tuple(range(pages, pages + more))))
        pages += more
    return build_batch(tuple(plan), dict(enumerate(sequences)), PAGE_SIZE, device)


def _run_layers(
    params: Params, model_config: ModelConfig, batch: Batch, ops: ModelOps, *, activation_checkpointing: bool
) -> tuple[Float[Tensor, "T D"], Float[Tensor, "T D"]]:
    """As `transformer.blocks`, with keys and values that live as long as their block."""
    x, y, *turn = ops.embed(params.embed, batch.token_ids, batch.positions, model_config)
    attend = ops.attention(batch, model_config)
    shape = ((int(batch.page_table.max()) + 1) * PAGE_SIZE, model_config.num_kv_heads, model_config.head_dim)

    def one(x: Tensor, y: Tensor, layer: Any, window: int | None) -> tuple[Tensor, Tensor]:
        k, v = x.new_zeros(shape), x.new_zeros(shape)
        return decoder_layer(
            x, y, layer, k, v, window, (turn[0], turn[1]), batch.slot_mapping, attend, model_config, ops
        )

    for layer, window in zip(params.layers, model_config.sliding_windows, strict=True):
        if activation_checkpointing:
            x, y = checkpoint(one, x, y, layer, window, use_reentrant=False)
        else:
            x, y = one(x, y, layer, window)
    return x, y


# --- gradients of kernels -------------------------------------------------------------------------------------------


class _ReferenceBackward(torch.autograd.Function):
    """A fast function forward, and its plain twin's gradient, computed from the inputs, backward."""

    @staticmethod
    def forward(ctx: Any, kernel: Callable[..., Any], reference: Callable[..., Any], *args: Any) -> Any:
        ctx.plain, ctx.rest = reference, [None if isinstance(a, Tensor) else a for a in args]
        ctx.save_for_backward(*(a if isinstance(a, Tensor) else None for a in args))
        return kernel(*args)

    @staticmethod
    @no_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        wanted = ctx.needs_input_grad[2:]
        saved = [None if x is None else x.detach().requires_grad_(w) for x, w in zip(ctx.saved_tensors, wanted,
                                                                                     strict=True)]  # fmt: skip
        with torch.enable_grad():
            found = ctx.plain(*(r if x is None else x for x, r in zip(saved, ctx.rest, strict=True)))
        outs = found if isinstance(found, tuple) else (found,)
        pairs = [(o, g) for o, g in zip(outs, grads, strict=True) if g is not None and o.requires_grad]
        inputs = [x for x, w in zip(saved, wanted, strict=True) if x is not None and w]
        got = iter(torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True))
        return None, None, *(next(got) if w else None for w in wanted)


class _RopeAndCacheKV(torch.autograd.Function):
    """`ops.store`, whose caches take part: written keys and values carry gradients to attention."""

    @staticmethod
    def forward(
        ctx: Any, kernel: Any, qkv: Tensor, cos: Tensor, sin: Tensor, slot: Tensor, k: Tensor, v: Tensor
    ) -> Any:
        ctx.save_for_backward(cos, sin, slot)
        q = kernel(qkv, cos, sin, slot, k, v)
        ctx.mark_dirty(k, v)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
        cos, sin, slot = ctx.saved_tensors

        def back(g: Tensor) -> Tensor:  # a rotation's gradient is the rotation back
            a, b = g.float().chunk(2, -1)
            return torch.cat((a * cos + b * sin, b * cos - a * sin), -1).to(g.dtype)

        return None, torch.cat((back(q), back(k[slot]), v[slot]), 1), None, None, None, None, None


def make_differentiable(ops: ModelOps, reference_gradients: bool) -> ModelOps:
    """`ops` with gradients, those of their plain twins; `kernels`: they have none themselves."""
    if not reference_gradients:
        return ops

    def through(fast: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
        return fast if fast is plain else lambda *args: _ReferenceBackward.apply(fast, plain, *args)

    def attention(batch: Batch, spec: ModelConfig) -> Callable[..., Tensor]:
        return through(ops.attention(batch, spec), sdpa(batch, spec))

    def store(qkv: Tensor, cos: Tensor, sin: Tensor, slot: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _RopeAndCacheKV.apply(ops.rope_and_cache_kv, qkv, cos, sin, slot.long(), k, v)[0]

    def logprobs(logits: Tensor, token: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
        one = through(lambda x, t: ops.logprobs(x, t, 0)[0], lambda x, t: TORCH_OPS.logprobs(x, t, 0)[0])
        none = logits.new_zeros(len(logits), 0)
        return one(logits, token), none.long(), none

    names = ("add_norm_qkv", "add_norm_gate_up", "apply_qk_norm", "linear", "final_norm", "lm_head")
    fields = {name: through(getattr(ops, name), getattr(TORCH_OPS, name)) for name in names}
    return ops._replace(attention=attention, rope_and_cache_kv=store, logprobs=logprobs, **fields)


# --- sampler against scorer -----------------------------------------------------------------------------------------


class LogprobMismatch(NamedTuple):
    """How a scorer's logprobs differ from a sampler's, over all tokens of all completions."""

    num_tokens: int
    max_abs_diff: float  # of |scorer - sampler|, nats
    mean_abs_diff: float
    kl: float  # of sampler from scorer, a token: mean of r - 1 - log r, r = scorer / sampler (J. Schulman's k3)

    def __str__(self) -> str:
        return f"{self.num_tokens} tokens: |difference| max {self.max_abs_diff:.3g}, mean {self.mean_abs_diff:.3g}; KL {self.kl:.3g}"


def logprob_mismatch(outputs: Sequence[Output], logprobs: Sequence[Tensor]) -> LogprobMismatch:
    """Of outputs sampled with `logprobs=0`, raw ones, and the scores of their completions, one after the other."""
    sampled = [c.logprobs for o in outputs for c in o.completions]
    if any(x is None for x in sampled):
        raise ValueError("the completions have no logprobs: sample with SamplingParams(logprobs=0)")
    mine = torch.tensor([x for values in sampled for x in values or ()], dtype=torch.float64, device="cpu")
    if len(mine) != sum(len(x) for x in logprobs):
        raise ValueError(f"{len(mine)} sampled tokens and {sum(len(x) for x in logprobs)} scores")
    if not len(mine):
        return LogprobMismatch(0, 0.0, 0.0, 0.0)
    d = torch.cat([x.detach().double().cpu() for x in logprobs]) - mine
    return LogprobMismatch(len(d), float(d.abs().max()), float(d.abs().mean()), float((d.expm1() - d).mean()))


def compare_logprobs(
    outputs: Sequence[Output], params: Params, model_config: ModelConfig, **score_kwargs: Any
) -> LogprobMismatch:
    """Scores what was sampled, by `score` with the arguments given, and says how far apart the two are."""
    pairs = [(o.prompt_token_ids, c.token_ids) for o in outputs for c in o.completions]
    with torch.no_grad():
        found = score(
            params, model_config, [[*p, *c] for p, c in pairs], first=[len(p) for p, _ in pairs], **score_kwargs
        )
    return logprob_mismatch(outputs, found)
