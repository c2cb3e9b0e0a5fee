"""What a machine allows at most: the work of a step or of a whole workload, and the least time it can take."""

from typing import NamedTuple

from fastgen.models.spec import Spec


class Work(NamedTuple):
    """What one step computes. Keys and pairs are means over the layers, whose windows may differ."""

    tokens: int  # through the layers
    samples: int = 0  # rows unembedded
    pairs: float = 0  # (query, key) of prefill attention
    decode_keys: float = 0  # read by sequences that compute one token
    prefill_keys: float = 0  # read by the others


class Machine(NamedTuple):
    """`power` is the share of the machine's power that full memory traffic takes from computing."""

    name: str
    flops: float  # sustained, dense, FLOP/s
    bandwidth: float  # bytes/s
    memory: float  # bytes
    power: float = 0.0

    def times(self, n: int) -> "Machine":
        """`n` of them that exchange data for nothing."""
        return Machine(self.name, n * self.flops, n * self.bandwidth, n * self.memory, self.power)


KNOWN = {"H200": Machine("H200", 670e12, 4.28e12, 139 * 2**30, 180 / 580)}  # measured; see `limit`


def _elements(spec: Spec) -> tuple[int, int, int]:
    """Weights of all layers' matrices, weights of the head, cache elements a token."""
    heads = 2 * spec.q_heads + 2 * spec.kv_heads  # of qkv and out
    linear = spec.layers * spec.dim * (heads * spec.head + 3 * spec.ffn)
    return linear, spec.vocab * spec.dim, 2 * spec.layers * spec.kv_heads * spec.head


def parts(spec: Spec, work: Work, width: int = 2) -> dict[str, tuple[float, float]]:
    """(FLOPs, bytes moved) of each kind of operation in a step; `width` bytes a weight, activation or cache element.

    Matrices and cache are read once; what goes in and out of a matrix product or attention is counted where it is
    made or used, in "pointwise". That is one kernel each for the embedding, residual add + norm, rope + cache write,
    and swiglu: per token 2D, 4D, 2(q + k + v) and 3F elements. Sampling is not counted.
    """
    linear, head, kv = _elements(spec)
    pair = 4 * spec.q_heads * spec.head * spec.layers  # FLOPs
    qkv = (spec.q_heads + 2 * spec.kv_heads) * spec.head
    pointwise = 4 * spec.dim + spec.layers * (8 * spec.dim + 2 * qkv + 3 * spec.ffn)  # the first norm adds nothing
    return {
        "linear": (2 * linear * work.tokens, linear * width),
        "head": (2 * head * work.samples, head * width if work.samples else 0),
        "prefill attention": (pair * work.pairs, kv * work.prefill_keys * width),
        "decode attention": (pair * work.decode_keys, kv * work.decode_keys * width),
        "pointwise": (0, pointwise * work.tokens * width),
    }


def keys(spec: Spec, first: int, last: int) -> float:
    """Keys seen by the queries at positions `first` to `last`, counted from 1; mean over the layers."""

    def seen(n: int, window: int | None) -> int:
        full = min(n, window or n)
        return full * (full + 1) // 2 + (n - full) * full

    return sum(seen(last, w) - seen(first - 1, w) for w in spec.windows) / spec.layers


def limit(
    spec: Spec,
    requests: int,
    prompt: int,
    output: int,
    samples: int = 1,
    *,
    machine: Machine,
    width: int = 2,
    prefix_shared: bool = False,
    common: int = 0,
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
    linear, head, kv = _elements(spec)
    n, last = requests * samples, prompt + output - 1  # the last token drawn is not computed
    attended = n * keys(spec, prompt + 1, last)  # by decoding
    if prefix_shared:
        every, rest = keys(spec, prompt + 1, last), keys(spec, prompt + 1 - common, last - common)
        own = keys(spec, 1, output - 1)
        read = n * own + requests * (rest - own) + every - rest
        prefill = common + requests * (prompt - common)
        pairs = keys(spec, 1, common) + requests * keys(spec, common + 1, prompt)
    else:
        read, prefill, pairs = attended, n * prompt, n * keys(spec, 1, prompt)
    tokens = prefill + n * (output - 1)
    weights = (linear + (head if spec.tied else 2 * head)) * width
    fit = (0.9 * machine.memory - weights) / (kv * width)
    if fit < last:
        raise ValueError(f"{last} tokens do not fit the memory of {machine.name}: room for {max(fit, 0):.0f}")
    flops = sum(f for f, _ in parts(spec, Work(tokens, n * output, pairs, attended), width).values())
    steps = max(output, read / fit)
    traffic = width * (steps * (linear + head) + kv * (read + tokens)) / machine.bandwidth
    return max(traffic, flops / machine.flops + machine.power * traffic)
