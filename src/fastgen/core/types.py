"""The pytrees that the functions of the package take and return. A request's settings are `SamplingParams`.

Legend of the axes in all annotations of the package:

    T  tokens of one step       D  hidden size          V  vocabulary
    R  sequences of one step    Q  query heads          F  feed-forward width
    N  sampled rows             K  key/value heads      S  cache slots (pages x page size)
    P  pages of a sequence      H  head dimension       L  layers
    E  rows of the request tables (req_idx); row 0 is for padding
    A  LoRA adapters, the first of which is none; r their rank
"""

from typing import NamedTuple

from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


class Layer(NamedTuple):
    """Weights of one decoder layer. Weights that a model family does not have are None."""

    attn_norm: Float[Tensor, " D"]
    qkv: Float[Tensor, "QK2H D"]  # rows: all query heads, then key heads, then value heads
    qkv_bias: Float[Tensor, " QK2H"] | None
    q_norm: Float[Tensor, " H"] | None
    k_norm: Float[Tensor, " H"] | None
    out: Float[Tensor, "D QH"]
    out_bias: Float[Tensor, " D"] | None
    ffn_norm: Float[Tensor, " D"]
    gate_up: Float[Tensor, "F2 D"]  # rows: gate, then up
    down: Float[Tensor, "D F"]


class Params(NamedTuple):
    """Weights of a model. `lm_head` is None if it is tied to `embed`."""

    embed: Float[Tensor, "V D"]
    layers: tuple[Layer, ...]
    final_norm: Float[Tensor, " D"]
    lm_head: Float[Tensor, "V D"] | None


class KVCache(NamedTuple):
    """Paged keys and values, one tensor for each layer, so that a CUDA graph reads and writes its own inputs.

    Page p is slots [p * page_size, (p + 1) * page_size). Page 0 is the scratch page, which padding writes to.
    """

    k: tuple[Shaped[Tensor, "S K H"], ...]  # of a quantized cache [S, 1, bytes]: see `quantization.kv_cache`
    v: tuple[Shaped[Tensor, "S K H"], ...]


class PartialSum(NamedTuple):
    """One tensor-parallel rank's part of a sublayer's output; the op that reads the output sums all ranks' parts."""

    local: Float[Tensor, "T D"]
    # Device addresses of all ranks' partial sums, where one rank's kernels read them; None: `local` is all-reduced.
    rank_ptrs: Int[Tensor, " ranks"] | None = None


class SharedPrefix(NamedTuple):
    """Groups of decoding sequences that begin with the same pages, which attention reads once for each group.

    A sequence is in one group at most. The sequences of a group share the pages of their first `num_shared_tokens`
    tokens. The number of groups and their size are fixed; unused groups share 0 tokens.
    """

    group_rows: Int[Tensor, "groups W"]  # rows of the batch; -1: none
    num_shared_tokens: Int[Tensor, " groups"]
    num_skipped_tokens: Int[Tensor, " R"]  # tokens of a row that its group covers; 0: the row is in no group


class Batch(NamedTuple):
    """The inputs of one step. Sequence r owns tokens [query_start_loc[r], query_start_loc[r + 1]).

    These are the last tokens of a context of `seq_lens[r]` tokens, whose keys and values are in the pages
    `page_table[req_idx[r]]`. A sequence without tokens is padding.
    """

    token_ids: Int[Tensor, " T"]  # -i: the last sampled token of request row i (see `step.fill_pending_tokens`)
    positions: Int[Tensor, " T"]
    slot_mapping: Int[Tensor, " T"]  # the cache slot that each token's key and value are written to
    query_start_loc: Int[Tensor, " R1"]
    seq_lens: Int[Tensor, " R"]
    req_idx: Int[Tensor, " R"]
    page_table: Int[Tensor, "E P"]  # a row's unused entries are the scratch page
    logits_indices: Int[Tensor, " N"]  # tokens whose next-token logits are computed
    page_size: int  # tokens of a page
    shared_prefix: SharedPrefix | None = None  # None: every sequence reads all its keys by itself
    adapter_idx: Int[Tensor, " T"] | None = None  # each token's index in StackedAdapters; 0 is no adapter


class LogitEdits(NamedTuple):
    """Sparse edits of logits, with at most one entry for each (row, token)."""

    rows: Int[Tensor, " E"]
    token_ids: Int[Tensor, " E"]
    bias: Float[Tensor, " E"]  # added last; -inf bans the token
    output_counts: Float[Tensor, " E"]  # times the token was generated, for frequency and presence penalties
    seen: Bool[Tensor, " E"]  # whether prompt or output has the token, for the repetition penalty
    presence_penalty: Float[Tensor, " E"]
    frequency_penalty: Float[Tensor, " E"]
    repetition_penalty: Float[Tensor, " E"]


class TopKTopP(NamedTuple):
    """Filters of the tokens that may be sampled, for each row. Off: top_k = V, top_p = 1, min_p = 0."""

    top_k: Int[Tensor, " N"]
    top_p: Float[Tensor, " N"]
    min_p: Float[Tensor, " N"]


class SamplingTensors(NamedTuple):
    """Sampling settings of each sampled row. A field is None if no row needs it."""

    temperature: Float[Tensor, " N"]  # below 1e-5 is greedy
    seed: Int[Tensor, " N"] | None  # None: every row is greedy
    positions: Int[Tensor, " N"]  # of the sampled token, counted from the start of the prompt
    processed_logprobs: Bool[Tensor, " N"]  # logprobs of the sampled distribution instead of the model's
    top_k_top_p: TopKTopP | None
    logit_edits: LogitEdits | None
    token_mask: Int[Tensor, "N words"] | None = None  # bit t % 32 of word t // 32: token t may be sampled


class SamplerOutput(NamedTuple):
    """The sampled tokens of one step. `top_*` are the k most likely tokens, in order; k may be 0."""

    token_ids: Int[Tensor, " N"]
    logprobs: Float[Tensor, " N"]  # not finite if logits are NaN or infinite: the token then means nothing
    top_token_ids: Int[Tensor, "N k"]
    top_logprobs: Float[Tensor, "N k"]
