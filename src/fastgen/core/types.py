"""The pytrees every function here takes and returns.

Legend, used in all annotations of the package:

    T  tokens of one step       D  model width          V  vocabulary
    R  sequences of one step    Q  query heads          F  feed-forward width
    N  sampled rows             K  key/value heads      S  cache slots (pages x page size)
    P  pages of a sequence      H  width of a head      L  layers
    E  seats: places for running sequences; seat 0 is padding's
    A  adapters, the first of which is none; r their rank
"""

from typing import TYPE_CHECKING, NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = object  # transformers takes as long to import as torch, and is needed only by who has text


class Layer(NamedTuple):
    """Weights of one transformer block. Leaves a family does not have are None."""

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
    """Weights of a model. `head` is None where it is tied to `embed`."""

    embed: Float[Tensor, "V D"]
    layers: tuple[Layer, ...]
    final_norm: Float[Tensor, " D"]
    lm_head: Float[Tensor, "V D"] | None


class LoraAB(NamedTuple):
    """A change b @ a of a matrix."""

    a: Float[Tensor, "r D"]
    b: Float[Tensor, "N r"]


class LayerLora(NamedTuple):
    """What an adapter changes in one transformer block: None where it changes nothing."""

    q: LoraAB | None = None
    k: LoraAB | None = None
    v: LoraAB | None = None
    out: LoraAB | None = None
    gate: LoraAB | None = None
    up: LoraAB | None = None
    down: LoraAB | None = None


class Adapter(NamedTuple):
    """A low-rank adapter (LoRA, arXiv 2106.09685): `scale` times its changes is added to the matrices of a model."""

    layers: tuple[LayerLora, ...]
    scale: float


class StackedLora(NamedTuple):
    """Changes of one packed matrix by several adapters, padded with zeros to one rank.

    A matrix that is packed from p others has p changes: rows [i r, (i + 1) r) of `a` belong to the i-th of them.
    """

    a: Float[Tensor, "A pr D"]
    b: Float[Tensor, "A N r"]


class LayerStackedLora(NamedTuple):
    """Of one transformer block."""

    qkv: StackedLora
    out: StackedLora
    gate_up: StackedLora
    down: StackedLora


class StackedAdapters(NamedTuple):
    """Several adapters side by side, so that rows of a batch may each have another. The first one is zero."""

    layers: tuple[LayerStackedLora, ...]
    scale: Float[Tensor, " A"]


class KVCache(NamedTuple):
    """Paged keys and values: one flat leaf per layer, so that the tensor written is the graph's own input.

    Page p of the pool is slots [p * page, (p + 1) * page). Page 0 is scratch: padding writes there.
    """

    k: tuple[Float[Tensor, "S K H"], ...]
    v: tuple[Float[Tensor, "S K H"], ...]


class PartialSum(NamedTuple):
    """What one tensor-parallel rank adds to a sublayer's output; the op that reads the output adds up all ranks' sums."""

    local: Float[Tensor, "T D"]
    # Device addresses of all ranks' partial sums, where one rank's kernels read them; None: `local` is all-reduced.
    rank_ptrs: Int[Tensor, " ranks"] | None = None


class SharedPrefix(NamedTuple):
    """Groups of decoding sequences whose contexts begin with the same pages, which attention reads once for a group.

    A sequence is in one group at most, and a group's sequences share the first `keys` tokens of their page tables,
    whole pages. What is fixed is the number of groups and of members; groups that are not needed have no keys.
    """

    group_rows: Int[Tensor, "groups W"]  # rows of the batch; -1: none
    num_shared_tokens: Int[Tensor, " groups"]
    num_skipped_tokens: Int[Tensor, " R"]  # of each row, the tokens that its group covers; 0: it is in none


class Batch(NamedTuple):
    """Everything one step needs to know. Sequence r owns tokens [start[r], start[r + 1]).

    Those tokens are the last ones of a context of `length[r]` tokens, whose keys and values lie in the pages
    `pages[seat[r]]`. A sequence may have no token: then it is padding.
    """

    token_ids: Int[Tensor, " T"]  # as staged, -s is the token last drawn in seat s (see `step.feed`)
    positions: Int[Tensor, " T"]
    slot_mapping: Int[Tensor, " T"]  # where this token's key and value are written
    query_start_loc: Int[Tensor, " R1"]
    seq_lens: Int[Tensor, " R"]
    req_idx: Int[Tensor, " R"]
    page_table: Int[Tensor, "E P"]  # the page table, a row for each seat; a row's unused end points at scratch
    logits_indices: Int[Tensor, " N"]  # tokens whose next-token logits are wanted
    page_size: int  # tokens of a page: without it `slot` and `pages` say nothing
    shared_prefix: SharedPrefix | None = None  # None: every sequence reads all its keys by itself
    adapter_idx: Int[Tensor, " T"] | None = None  # each token's among the Adapters; 0 is none


class LogitEdits(NamedTuple):
    """Sparse changes to logits: at most one entry for each (row, token)."""

    rows: Int[Tensor, " E"]
    token_ids: Int[Tensor, " E"]
    bias: Float[Tensor, " E"]  # added last; -inf bans the token
    output_counts: Float[Tensor, " E"]  # times the token was generated: frequency and presence penalties
    seen: Bool[Tensor, " E"]  # in prompt or output: repetition penalty
    presence_penalty: Float[Tensor, " E"]
    frequency_penalty: Float[Tensor, " E"]
    repetition_penalty: Float[Tensor, " E"]


class TopKTopP(NamedTuple):
    """Which tokens may be drawn, a row each. Off: top_k = V, top_p = 1, min_p = 0."""

    top_k: Int[Tensor, " N"]
    top_p: Float[Tensor, " N"]
    min_p: Float[Tensor, " N"]


class SamplingTensors(NamedTuple):
    """Sampling settings as arrays, a row for each sampled token. None: no row asks for it."""

    temperature: Float[Tensor, " N"]  # below 1e-5, 0 included, is greedy
    seed: Int[Tensor, " N"] | None  # None: every row is greedy
    positions: Int[Tensor, " N"]  # of the token being drawn, counted from the start of the prompt
    processed_logprobs: Bool[Tensor, " N"]  # logprobs of the sampled distribution instead of the model's
    top_k_top_p: TopKTopP | None
    logit_edits: LogitEdits | None
    token_mask: Int[Tensor, "N words"] | None = None  # bit t % 32 of word t // 32: token t may be drawn


class SamplerOutput(NamedTuple):
    """What one step drew. `top_*` are sorted by falling logprob; k may be 0."""

    token_ids: Int[Tensor, " N"]
    logprobs: Float[Tensor, " N"]  # not finite where logits are NaN or inf: the token then means nothing
    top_token_ids: Int[Tensor, "N k"]
    top_logprobs: Float[Tensor, "N k"]
