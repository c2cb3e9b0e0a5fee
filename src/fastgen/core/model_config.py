"""The shape of a model as data: families differ by the flags of a `ModelConfig`, never by a file of their own."""

from dataclasses import dataclass, replace
from typing import NamedTuple


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: `rope_type` is default, linear, llama3 or yarn, whose parameters the others are."""

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0  # context the model was trained on before scaling (llama3, yarn)
    low_freq_factor: float = 1.0  # llama3: low_freq_factor;  yarn: beta_slow
    high_freq_factor: float = 1.0  # llama3: high_freq_factor; yarn: beta_fast
    attention_factor: float = 1.0  # yarn: cos and sin are multiplied by it
    truncate: bool = True  # yarn: round the correction range to integer dimensions


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape and flags of a dense decoder. Hashable: compiled graphs are keyed by it."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int  # longest prompt + output, tokens
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    sliding_windows: tuple[int | None, ...]  # per layer: keys a query sees, its own included; None: all
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    dtype: str = "bfloat16"  # of the checkpoint


class TPShard(NamedTuple):
    """The shard of a model that one tensor-parallel rank holds: number `rank` of `size` equal ones."""

    rank: int = 0
    size: int = 1


UNSHARDED = TPShard()


def vocab_shard(vocab_size: int, tp_shard: TPShard) -> tuple[int, int]:
    """Returns the first row and the number of rows of a rank's vocabulary shard.

    Shards have ceil(vocab_size / size) rows; the last ones may have fewer, and are padded to that number in memory.
    """
    rows_per_rank = -(-vocab_size // tp_shard.size)
    start = min(tp_shard.rank * rows_per_rank, vocab_size)
    return start, min(rows_per_rank, vocab_size - start)


def shard_config(model_config: ModelConfig, tp_size: int) -> ModelConfig:
    """Returns the shape of one tensor-parallel shard: its heads and its slice of the feed-forward width.

    `vocab_size` stays the model's. With fewer key heads than ranks, several ranks hold the same key head. Raises
    ValueError, with the possible sizes, for a `tp_size` that does not divide the model.
    """
    q_heads, kv_heads, width = model_config.num_q_heads, model_config.num_kv_heads, model_config.intermediate_size

    def divides(n: int) -> bool:
        return not (q_heads % n or width % n or (kv_heads % n and n % kv_heads))

    if tp_size < 1 or not divides(tp_size):
        possible = ", ".join(str(n) for n in range(1, q_heads + 1) if divides(n))
        raise ValueError(
            f"tensor parallelism of {tp_size} does not divide {q_heads} query heads, {kv_heads} key heads and a "
            f"feed-forward width of {width}; possible: {possible}"
        )
    heads = {"num_q_heads": q_heads // tp_size, "num_kv_heads": max(1, kv_heads // tp_size)}
    return replace(model_config, **heads, intermediate_size=width // tp_size)
