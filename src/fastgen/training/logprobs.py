"""Log probabilities of given tokens, by the ops that generate: for reference models, old policies and gradients."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import accumulate
from numbers import Integral
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from fastgen.config import MIN_TEMPERATURE, check_choice, check_int
from fastgen.core.autocast import no_autocast
from fastgen.core.batch import build_batch
from fastgen.core.model_config import ModelConfig, shard_config
from fastgen.core.request import NON_FINITE_LOGITS, Output
from fastgen.core.scheduler import Span
from fastgen.core.step import LOGITS_PER_CHUNK
from fastgen.core.transformer import ModelOps, SublayerOutput, decoder_layer, lm_head_weight, run_layers
from fastgen.core.types import Batch, KVCache, Layer, Params
from fastgen.distributed.tensor_parallel import TPGroup, shard_ops
from fastgen.kernels.batch_invariant import prefer_cublaslt
from fastgen.kernels.select import select_cache_ops, select_quantized_ops, select_scoring_ops
from fastgen.quantization.fp8 import is_quantized
from fastgen.quantization.kv_cache import RowFormat, row_format
from fastgen.text import Tokenizer
from fastgen.text.tokenizer import encode
from fastgen.thread_safety import check_fork
from fastgen.training.differentiable_ops import make_differentiable
from fastgen.training.shared_params import attach_gradients
from fastgen.training.weight_sync import split_by_size

PAGE_SIZE = 64  # tokens per page of the KV cache, which exists for one layer at a time


@no_autocast
def score(
    params: Params, model_config: ModelConfig, sequences: Tensor | Sequence[Sequence[int] | Tensor], *,
    first: int | Sequence[int] = 1, temperature: float = 1.0, batch_invariant: bool = False,
    activation_checkpointing: bool = False, token_budget: int = 8192, ops: ModelOps | None = None,
    tp_group: TPGroup | None = None, kv_cache_dtype: str = "auto",
) -> list[Float[Tensor, " n"]]:  # fmt: skip
    """Returns the natural-log probabilities of each sequence's tokens from index `first` on: one fp32 tensor each.

    `first` is one index for all sequences or one for each, at least 1: a prompt's length scores the completion. The
    probabilities are those of logits / temperature. A batch has at most `token_budget` tokens or is one sequence.

    Differentiable: the results require gradients if gradients are enabled and a leaf of `params`, or a parameter of the
    model that `params` were adopted from, requires one. `activation_checkpointing` recomputes each layer backward
    instead of storing its activations. At most 2**24 logits exist at a time, with gradients or without.

    `batch_invariant` uses the kernels of an engine with `compile.batch_invariant`: the results equal that engine's
    logprobs bit for bit. With `tp_group`, `params` are one rank's shard and every rank makes this call, without
    gradients and without `batch_invariant`. `kv_cache_dtype="fp8"` quantizes keys and values as an engine with that
    setting does, so that its logprobs are reproduced; there are no gradients then. Raises ValueError for sequences that
    cannot be scored.
    """
    check_fork("score")
    token_ids = to_token_ids(sequences)
    starts = list(first) if isinstance(first, Sequence) else [first] * len(token_ids)
    check_scorable(token_ids, starts, model_config, temperature)
    check_int("token_budget", token_budget, 1, 2**31)
    temperature = float(temperature)
    params, device = attach_gradients(params), params.embed.device
    needs_grad = torch.is_grad_enabled() and any(w.requires_grad for w in iter_weights(params))
    if needs_grad and is_quantized(params):
        raise ValueError(
            "score: gradients do not pass through fp8 weights, which are rounded copies: score under torch.no_grad(), "
            "or call fastgen.score with the parameters in full precision"
        )
    if tp_group is not None and (needs_grad or batch_invariant):
        raise ValueError("score: several ranks compute no gradients and no batch-invariant sums; turn both off")
    check_choice("kv_cache_dtype", kv_cache_dtype, ("auto", "fp8"))
    if needs_grad and kv_cache_dtype == "fp8":
        raise ValueError(
            "score: rounding keys and values to fp8 has no gradient; score under torch.no_grad(), or pass "
            'kv_cache_dtype="auto" for gradients of the model without quantization'
        )
    if ops is None:
        ops = select_scoring_ops(device, batch_invariant=batch_invariant)
        ops = select_quantized_ops(ops, params, batch_invariant=batch_invariant)
    if tp_group is not None:
        ops, model_config = shard_ops(ops, tp_group, model_config), shard_config(model_config, tp_group.shard.size)
    ops = select_cache_ops(ops, kv_cache_dtype, PAGE_SIZE, model_config)
    cache_rows = row_format(model_config, kv_cache_dtype, params.embed.dtype)
    if needs_grad:
        ops = make_differentiable(ops, batch_invariant or device.type == "cuda")
    options: Any = {"activation_checkpointing": needs_grad and activation_checkpointing, "needs_grad": needs_grad}
    options |= {"cache_rows": cache_rows}
    logprobs: list[Tensor] = []
    with prefer_cublaslt(split_k=False) if batch_invariant else nullcontext():
        for batch in split_by_size(zip(token_ids, starts, strict=True), lambda pair: len(pair[0]), token_budget):
            batch_ids, batch_starts = map(list, zip(*batch, strict=True))
            logprobs += _score_batch(params, model_config, batch_ids, batch_starts, temperature, ops, **options)
    return logprobs


def to_token_ids(sequences: Any, tokenizer: Tokenizer | None = None) -> list[list[int]]:
    """Converts lists, arrays, tensors and, with a tokenizer, texts to lists of token ids; else raises ValueError."""
    not_a_list = isinstance(sequences, str | bytes | Mapping) or getattr(sequences, "ndim", 1) == 0
    if not_a_list or not isinstance(sequences, Iterable):
        raise ValueError(f"score takes a list of sequences, each a list of token ids, not {type(sequences).__name__}")
    token_ids = []
    sequence: Any
    for i, sequence in enumerate(sequences):
        if isinstance(sequence, str):
            if tokenizer is None:
                raise ValueError(f"sequence {i} is a text, and there is no tokenizer: pass token ids")
            sequence = encode(tokenizer, sequence) if sequence else []
        tokens = sequence.tolist() if hasattr(sequence, "tolist") else sequence
        if isinstance(tokens, Integral):
            raise ValueError(f"sequence {i} is a number: score takes a list of sequences, [[1, 2, 3]] for a single one")
        if not isinstance(tokens, list | tuple):
            raise ValueError(f"sequence {i} is a {type(tokens).__name__}, not a list of token ids")
        for token_type in set(map(type, tokens)):
            if token_type is bool or not issubclass(token_type, Integral):
                raise ValueError(f"sequence {i} has a {token_type.__name__} in it: score takes lists of token ids")
        token_ids.append(list(map(int, tokens)))
    return token_ids


def check_scorable(sequences: list[list[int]], first: list[int], model_config: ModelConfig, temperature: float) -> None:
    """Raises ValueError for sequences, first indices and temperatures that cannot be scored."""
    if not all(isinstance(f, Integral) for f in first):
        raise ValueError(f"first is one index for all sequences or one for each, not {first!r:.80}")
    if len(first) != len(sequences):
        raise ValueError(f"{len(first)} values of `first` for {len(sequences)} sequences")
    is_finite = isinstance(temperature, int | float) and abs(temperature) <= sys.float_info.max
    if not is_finite or temperature < MIN_TEMPERATURE:
        raise ValueError(f"temperature must be finite and at least {MIN_TEMPERATURE}, got {temperature!r}")
    context, vocab = model_config.context_length, model_config.vocab_size
    for i, (tokens, start) in enumerate(zip(sequences, first, strict=True)):
        if not 1 <= start <= len(tokens):
            problem = "it has no tokens" if not tokens else f"first={start} is not within 1 to {len(tokens)}"
            raise ValueError(f"sequence {i}: {problem}; the first token has no probability")
        if len(tokens) > context:
            raise ValueError(f"sequence {i}: {len(tokens)} tokens do not fit the model's context of {context}")
        if (token := min(tokens)) < 0 or (token := max(tokens)) >= vocab:
            raise ValueError(f"sequence {i}: token {token} is outside the vocabulary of {vocab}")


def iter_weights(params: Params) -> Iterator[Tensor]:
    """Yields the tensors of `params`; of a quantized weight, its values and its scales."""
    yield from (w for w in (params.embed, params.final_norm, params.lm_head) if w is not None)
    yield from (w for w in tree_leaves(params.layers) if w is not None)


def _score_batch(
    params: Params, model_config: ModelConfig, sequences: list[list[int]], first: list[int], temperature: float,
    ops: ModelOps, *, activation_checkpointing: bool, needs_grad: bool, cache_rows: RowFormat,
) -> list[Float[Tensor, " n"]]:  # fmt: skip
    """Returns `score` of sequences that are one batch."""
    device = params.embed.device
    batch = _build_batch(sequences, device)
    # A placeholder of stride 0: each layer allocates its own cache and frees it.
    shape = (int(batch.page_table.max()) + 1) * PAGE_SIZE, *cache_rows.shape
    placeholder = (params.embed.new_zeros(1, 1, 1, dtype=cache_rows.dtype).expand(shape),) * model_config.num_layers
    layer_fn = partial(checkpoint, _layer_with_own_cache, use_reentrant=False)
    x, y = run_layers(params, KVCache(placeholder, placeholder), batch, model_config, ops,
                      layer_fn=layer_fn if activation_checkpointing else _layer_with_own_cache)  # fmt: skip
    starts = list(accumulate(map(len, sequences), initial=0))
    # The hidden state of the token before predicts each target.
    rows = [i for at, f, s in zip(starts, first, sequences, strict=False) for i in range(at + f - 1, at + len(s) - 1)]
    h = ops.final_norm(x, y, params.final_norm, model_config.rms_norm_eps)
    h = h[torch.tensor(rows, dtype=torch.long, device=device)]
    targets = torch.tensor([t for f, s in zip(first, sequences, strict=True) for t in s[f:]], device=device).long()

    def target_logprobs(h: Tensor, w: Tensor, targets: Tensor) -> Tensor:
        logits = ops.lm_head(h, w).float()
        return ops.logprobs(logits if temperature == 1 else logits / temperature, targets, 0)[0]

    if needs_grad:
        target_logprobs = partial(checkpoint, target_logprobs, use_reentrant=False)
    chunk, w = max(1, LOGITS_PER_CHUNK // model_config.vocab_size), lm_head_weight(params)
    logprobs = [target_logprobs(x, w, t) for x, t in zip(h.split(chunk), targets.split(chunk), strict=True)]
    return list(torch.cat(logprobs).split([len(s) - f for f, s in zip(first, sequences, strict=True)]))


def _build_batch(sequences: list[list[int]], device: torch.device) -> Batch:
    """Returns a step that prefills all of each sequence, in consecutive pages from page 1 on."""
    next_page, plan = 1, list[Span]()
    for i, s in enumerate(sequences):
        stop = next_page + -(-len(s) // PAGE_SIZE)
        plan.append(Span(i, 0, len(s), True, tuple(range(next_page, stop))))
        next_page = stop
    return build_batch(tuple(plan), dict(enumerate(sequences)), PAGE_SIZE, device)


def _layer_with_own_cache(
    x: Tensor, y: SublayerOutput, layer: Layer, k_cache: Tensor, v_cache: Tensor, *args: Any
) -> tuple[Tensor, SublayerOutput]:
    """Runs a decoder layer with a new KV cache like the given one, which lives as long as the layer's graph."""
    k_cache, v_cache = (c.new_zeros(c.shape) for c in (k_cache, v_cache))
    return decoder_layer(x, y, layer, k_cache, v_cache, *args)


# --- sampler against scorer -----------------------------------------------------------------------------------------


class LogprobMismatch(NamedTuple):
    """Difference between a scorer's logprobs and a sampler's, over all tokens of all completions, in nats."""

    num_tokens: int
    max_abs_diff: float
    mean_abs_diff: float
    kl: float  # KL(sampler || scorer) per token: mean of r - 1 - log r, r = scorer / sampler (J. Schulman's k3)

    def __str__(self) -> str:
        difference = f"|difference| max {self.max_abs_diff:.3g}, mean {self.mean_abs_diff:.3g}"
        return f"{self.num_tokens} tokens: {difference}; KL {self.kl:.3g}"


def logprob_mismatch(outputs: Sequence[Output], logprobs: Sequence[Tensor]) -> LogprobMismatch:
    """Compares outputs sampled with `logprobs=0`, mode "raw", with the scores of their completions, in order."""
    sampled = [c.logprobs for o in outputs for c in o.completions]
    if any(x is None for x in sampled):
        raise ValueError("the completions have no logprobs: sample with SamplingParams(logprobs=0)")
    sampler = torch.tensor([x for values in sampled for x in values or ()], dtype=torch.float64, device="cpu")
    if len(sampler) != sum(len(x) for x in logprobs):
        raise ValueError(f"{len(sampler)} sampled tokens and {sum(len(x) for x in logprobs)} scores")
    if not len(sampler):
        return LogprobMismatch(0, 0.0, 0.0, 0.0)
    d = torch.cat([x.detach().double().cpu() for x in logprobs]) - sampler
    return LogprobMismatch(len(d), float(d.abs().max()), float(d.abs().mean()), float((d.expm1() - d).mean()))


def compare_logprobs(
    outputs: Sequence[Output], params: Params, model_config: ModelConfig, **score_kwargs: Any
) -> LogprobMismatch:
    """Scores sampled outputs with `score(..., **score_kwargs)` and compares the scores with the sampler's logprobs."""
    pairs = [(o.prompt_token_ids, c.token_ids) for o in outputs for c in o.completions]
    with torch.no_grad():
        sequences, first = [[*p, *c] for p, c in pairs], [len(p) for p, _ in pairs]
        return logprob_mismatch(outputs, score(params, model_config, sequences, first=first, **score_kwargs))


def raise_on_non_finite_logits(outputs: Sequence[Output]) -> None:
    """Raises RuntimeError if NaN or infinite logits ended a completion: training cannot continue with these weights."""
    if count := sum(c.error == NON_FINITE_LOGITS for o in outputs for c in o.completions):
        raise RuntimeError(f"the logits of {count} completions are NaN or infinite: the parameters have diverged")
