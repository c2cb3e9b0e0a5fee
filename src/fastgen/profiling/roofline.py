"""Roofline of a machine: the work of a step or of a workload, and the least time that the machine can take for it."""

from functools import partial
from typing import NamedTuple

from fastgen.core.model_config import ModelConfig


class StepWork(NamedTuple):
    """Work of one step. Keys and pairs are means over the layers, whose sliding windows may differ."""

    num_tokens: int  # through the layers
    num_sampled: int = 0  # rows of logits
    num_prefill_pairs: float = 0  # (query, key) pairs of prefill attention
    num_decode_keys: float = 0  # read by sequences that compute one token
    num_prefill_keys: float = 0  # read by the other sequences


class Machine(NamedTuple):
    """Sustained rates of a machine."""

    name: str
    flops_per_second: float  # dense
    bytes_per_second: float
    memory_bytes: float
    memory_power_fraction: float = 0.0  # of the power available for compute, taken by full memory traffic

    def scaled(self, n: int) -> "Machine":
        """Returns `n` such machines that exchange data at no cost."""
        rates = (n * self.flops_per_second, n * self.bytes_per_second, n * self.memory_bytes)
        return Machine(self.name, *rates, self.memory_power_fraction)


# Measured; see `min_seconds`.
KNOWN_MACHINES = {"H200": Machine("H200", 670e12, 4.28e12, 139 * 2**30, 180 / 580)}


def _count_elements(config: ModelConfig) -> tuple[int, int, int]:
    """Returns the elements of all layers' matrices, of the LM head, and of the KV cache per token."""
    c, kv_heads = config, config.num_kv_heads
    qkv_and_out = 2 * (c.num_q_heads + kv_heads) * c.head_dim
    linear = c.num_layers * c.hidden_size * (qkv_and_out + 3 * c.intermediate_size)
    return linear, c.vocab_size * c.hidden_size, 2 * c.num_layers * kv_heads * c.head_dim


def operation_costs(
    model_config: ModelConfig, work: StepWork, bytes_per_element: int = 2, cache_bytes_per_element: float | None = None
) -> dict[str, tuple[float, float]]:
    """Returns (FLOPs, bytes moved) of a step by operation. All weights and activations have one size, and elements of
    the KV cache too unless `cache_bytes_per_element` is given.

    Matrices and cache are read once. Inputs and outputs of matmuls and attention count in "pointwise", where they are
    produced or consumed: one kernel each for the embedding, residual add + norm, RoPE + cache write, and SwiGLU, with
    2D, 4D, 2(q + k + v) and 3F elements per token. Sampling is not counted.
    """
    c = model_config
    linear, head, kv = _count_elements(c)
    flops_per_pair = 4 * c.num_q_heads * c.head_dim * c.num_layers
    qkv = (c.num_q_heads + 2 * c.num_kv_heads) * c.head_dim
    # The first norm adds no residual.
    pointwise = 4 * c.hidden_size + c.num_layers * (8 * c.hidden_size + 2 * qkv + 3 * c.intermediate_size)
    elements = {
        "linear": (2 * linear * work.num_tokens, linear),
        "head": (2 * head * work.num_sampled, head if work.num_sampled else 0),
        "prefill attention": (flops_per_pair * work.num_prefill_pairs, kv * work.num_prefill_keys),
        "decode attention": (flops_per_pair * work.num_decode_keys, kv * work.num_decode_keys),
        "pointwise": (0, pointwise * work.num_tokens),
    }
    cache_size = bytes_per_element if cache_bytes_per_element is None else cache_bytes_per_element
    size = {"prefill attention": cache_size, "decode attention": cache_size}
    return {name: (flops, moved * size.get(name, bytes_per_element)) for name, (flops, moved) in elements.items()}


def count_attended_keys(model_config: ModelConfig, first_position: int, last_position: int) -> float:
    """Returns the keys that queries at positions first to last (from 1, inclusive) attend to: the mean over layers."""

    def count_up_to(position: int, window: int | None) -> int:
        growing = min(position, window or position)
        return growing * (growing + 1) // 2 + (position - growing) * growing

    windows = model_config.sliding_windows
    counts = (count_up_to(last_position, w) - count_up_to(first_position - 1, w) for w in windows)
    return sum(counts) / model_config.num_layers


def min_seconds(
    model_config: ModelConfig,
    num_requests: int,
    num_prompt_tokens: int,
    num_output_tokens: int,
    num_completions: int = 1,
    *,
    machine: Machine,
    bytes_per_element: int = 2,
    cache_bytes_per_element: float | None = None,
    prefix_shared: bool = False,
    num_shared_tokens: int = 0,
) -> float:
    """Returns a lower bound on the seconds for equal requests with `num_completions` completions each.

    Compute and unavoidable memory traffic overlap perfectly:

        traffic = (steps x matrices + cache reads of decoding + cache writes) / bandwidth
        seconds = max(traffic, FLOPs / flops_per_second + memory_power_fraction x traffic)

    with steps >= output tokens, and >= tokens in use x steps / tokens that fit (0.9 of the memory, minus the weights).
    The second term is a machine at its power limit: of an H200's 700 W about 120 are static, matmuls alone use the
    rest, and memory-bound decoding at full bandwidth takes 180 of the 580 (arXiv 2605.11999). Its rates were measured
    over seconds: 670 TFLOP/s in bf16 matmuls of random data, and 4.28 TB/s in copies.

    `cache_bytes_per_element` is `bytes_per_element` unless the KV cache is quantized.

    With `prefix_shared`, common tokens are computed, stored and read once: a prompt by its completions, and the first
    `num_shared_tokens` tokens by all requests. Raises ValueError if a sequence does not fit the memory.
    """
    attended = partial(count_attended_keys, model_config)
    linear, head, kv = _count_elements(model_config)
    n, prompt, shared = num_requests * num_completions, num_prompt_tokens, num_shared_tokens
    last = prompt + num_output_tokens - 1  # the last sampled token is not computed
    decode_keys = n * attended(prompt + 1, last)
    if prefix_shared:
        total, unshared = attended(prompt + 1, last), attended(prompt + 1 - shared, last - shared)
        unique = attended(1, num_output_tokens - 1)  # keys of a completion's own tokens
        keys_read = n * unique + num_requests * (unshared - unique) + total - unshared
        num_prefill = shared + num_requests * (prompt - shared)
        prefill_pairs = attended(1, shared) + num_requests * attended(shared + 1, prompt)
    else:
        keys_read, num_prefill, prefill_pairs = decode_keys, n * prompt, n * attended(1, prompt)
    num_tokens = num_prefill + n * (num_output_tokens - 1)
    weight_bytes = (linear + (head if model_config.tie_word_embeddings else 2 * head)) * bytes_per_element
    cache_size = bytes_per_element if cache_bytes_per_element is None else cache_bytes_per_element
    max_tokens = (0.9 * machine.memory_bytes - weight_bytes) / (kv * cache_size)
    if max_tokens < last:
        raise ValueError(f"{last} tokens do not fit the memory of {machine.name}: room for {max(max_tokens, 0):.0f}")
    work = StepWork(num_tokens, n * num_output_tokens, prefill_pairs, decode_keys)
    flops = sum(f for f, _ in operation_costs(model_config, work, bytes_per_element).values())
    steps = max(num_output_tokens, keys_read / max_tokens)
    moved = bytes_per_element * steps * (linear + head) + cache_size * kv * (keys_read + num_tokens)
    traffic = moved / machine.bytes_per_second
    return max(traffic, flops / machine.flops_per_second + machine.memory_power_fraction * traffic)
