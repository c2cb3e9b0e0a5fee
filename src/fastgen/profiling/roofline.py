"""What a machine allows at most: the work of a step or of a whole workload, and the least time it can take."""

from typing import NamedTuple

from fastgen.core.model_config import ModelConfig


class StepWork(NamedTuple):
    """What one step computes. Keys and pairs are means over the layers, whose windows may differ."""

    num_tokens: int  # through the layers
    num_sampled: int = 0  # rows unembedded
    num_prefill_pairs: float = 0  # (query, key) of prefill attention
    num_decode_keys: float = 0  # read by sequences that compute one token
    num_prefill_keys: float = 0  # read by the others


class Machine(NamedTuple):
    """`power` is the share of the machine's power that full memory traffic takes from computing."""

    name: str
    flops_per_second: float  # sustained, dense, FLOP/s
    bytes_per_second: float  # bytes/s
    memory_bytes: float  # bytes
    memory_power_fraction: float = 0.0

    def scaled(self, num_devices: int) -> "Machine":
        """`n` of them that exchange data for nothing."""
        return Machine(
            self.name,
            num_devices * self.flops_per_second,
            num_devices * self.bytes_per_second,
            num_devices * self.memory_bytes,
            self.memory_power_fraction,
        )


KNOWN_MACHINES = {"H200": Machine("H200", 670e12, 4.28e12, 139 * 2**30, 180 / 580)}  # measured; see `limit`


def _count_elements(model_config: ModelConfig) -> tuple[int, int, int]:
    """Weights of all layers' matrices, weights of the head, cache elements a token."""
    heads = 2 * model_config.num_q_heads + 2 * model_config.num_kv_heads  # of qkv and out
    linear = (
        model_config.num_layers
        * model_config.hidden_size
        * (heads * model_config.head_dim + 3 * model_config.intermediate_size)
    )
    return (
        linear,
        model_config.vocab_size * model_config.hidden_size,
        2 * model_config.num_layers * model_config.num_kv_heads * model_config.head_dim,
    )


def operation_costs(
    model_config: ModelConfig, work: StepWork, bytes_per_element: int = 2
) -> dict[str, tuple[float, float]]:
    """(FLOPs, bytes moved) of each kind of operation in a step; `width` bytes a weight, activation or cache element.

    Matrices and cache are read once; what goes in and out of a matrix product or attention is counted where it is
    made or used, in "pointwise". That is one kernel each for the embedding, residual add + norm, rope + cache write,
    and swiglu: per token 2D, 4D, 2(q + k + v) and 3F elements. Sampling is not counted.
    """
    linear, head, kv = _count_elements(model_config)
    pair = 4 * model_config.num_q_heads * model_config.head_dim * model_config.num_layers  # FLOPs
    qkv = (model_config.num_q_heads + 2 * model_config.num_kv_heads) * model_config.head_dim
    pointwise = 4 * model_config.hidden_size + model_config.num_layers * (
        8 * model_config.hidden_size + 2 * qkv + 3 * model_config.intermediate_size
    )  # the first norm adds nothing
    return {
        "linear": (2 * linear * work.num_tokens, linear * bytes_per_element),
        "head": (2 * head * work.num_sampled, head * bytes_per_element if work.num_sampled else 0),
        "prefill attention": (pair * work.num_prefill_pairs, kv * work.num_prefill_keys * bytes_per_element),
        "decode attention": (pair * work.num_decode_keys, kv * work.num_decode_keys * bytes_per_element),
        "pointwise": (0, pointwise * work.num_tokens * bytes_per_element),
    }


def count_attended_keys(model_config: ModelConfig, first_position: int, last_position: int) -> float:
    """Keys seen by the queries at positions `first` to `last`, counted from 1; mean over the layers."""

    def seen(n: int, window: int | None) -> int:
        full = min(n, window or n)
        return full * (full + 1) // 2 + (n - full) * full

    return (
        sum(seen(last_position, w) - seen(first_position - 1, w) for w in model_config.sliding_windows)
        / model_config.num_layers
    )


def min_seconds(
    model_config: ModelConfig,
    num_requests: int,
    num_prompt_tokens: int,
    num_output_tokens: int,
    num_completions: int = 1,
    *,
    machine: Machine,
    bytes_per_element: int = 2,
    prefix_shared: bool = False,
    num_shared_tokens: int = 0,
) -> float:
    """Least seconds for `requests` prompts of `prompt` tokens, `samples` completions of `output` tokens for each.

    All computing and all traffic that cannot be avoided overlap perfectly:

        traffic = (steps x matrices + cache reads of decoding + cache writes) / bandwidth
        seconds = max(traffic, FLOPs / flops + power x traffic)

    with steps >= output, and >= tokens held x steps / tokens that fit (0.9 of the memory, less the weights). The
    second term is a machine at its power limit: of an H200's 700 W about 120 are static, matrix products alone fill
    the rest, and memory-bound decoding at full bandwidth takes 180 of the 580 (arXiv 2605.11999). Its rates are those
    measured over seconds: 670 TFLOP/s in bf16 products of random data, 4.28 TB/s copied.

    `prefix_shared`: what sequences have in common is computed, kept and read once: a prompt by its samples, and the
    first `common` tokens by all requests. ValueError if a sequence does not fit the memory.
    """
    linear, head, kv = _count_elements(model_config)
    n, last = (
        num_requests * num_completions,
        num_prompt_tokens + num_output_tokens - 1,
    )  # the last token drawn is not computed
    attended = n * count_attended_keys(model_config, num_prompt_tokens + 1, last)  # by decoding
    if prefix_shared:
        every, rest = (
            count_attended_keys(model_config, num_prompt_tokens + 1, last),
            count_attended_keys(model_config, num_prompt_tokens + 1 - num_shared_tokens, last - num_shared_tokens),
        )
        own = count_attended_keys(model_config, 1, num_output_tokens - 1)
        read = n * own + num_requests * (rest - own) + every - rest
        prefill = num_shared_tokens + num_requests * (num_prompt_tokens - num_shared_tokens)
        pairs = count_attended_keys(model_config, 1, num_shared_tokens) + num_requests * count_attended_keys(
            model_config, num_shared_tokens + 1, num_prompt_tokens
        )
    else:
        read, prefill, pairs = (
            attended,
            n * num_prompt_tokens,
            n * count_attended_keys(model_config, 1, num_prompt_tokens),
        )
    tokens = prefill + n * (num_output_tokens - 1)
    weights = (linear + (head if model_config.tie_word_embeddings else 2 * head)) * bytes_per_element
    fit = (0.9 * machine.memory_bytes - weights) / (kv * bytes_per_element)
    if fit < last:
        raise ValueError(f"{last} tokens do not fit the memory of {machine.name}: room for {max(fit, 0):.0f}")
    flops = sum(
        f
        for f, _ in operation_costs(
            model_config, StepWork(tokens, n * num_output_tokens, pairs, attended), bytes_per_element
        ).values()
    )
    steps = max(num_output_tokens, read / fit)
    traffic = bytes_per_element * (steps * (linear + head) + kv * (read + tokens)) / machine.bytes_per_second
    return max(traffic, flops / machine.flops_per_second + machine.memory_power_fraction * traffic)
