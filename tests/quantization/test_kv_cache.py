"""KV caches in fp8: the rows, attention over them, and engines with everything that touches the cache."""

import math
import random
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from test_attention import (
    BATCH_INVARIANT,
    GARBAGE,
    STEP_TYPES,
    assert_close_but_for_padding,
    formula,
    random_batch,
    random_shared_batch,
    shape,
)
from torch import Tensor

import fastgen
from fastgen import SamplingParams, lora
from fastgen.core import attention
from fastgen.core.layers import rope_and_cache_kv, rope_cos_sin
from fastgen.kernels import attention as kernels
from fastgen.kernels.attention import paged_attention
from fastgen.kernels.rope_cache import rope_and_cache_kv as rope_kernel
from fastgen.quantization import kv_cache
from fastgen.quantization.kv_cache import (
    dequantize_kv,
    fp8_row_bytes,
    pages_to_rows,
    quantize_kv,
    read_pages,
    row_format,
    rows_to_pages,
    scale_offset,
)

SPEC = fastgen.from_hf_config(tiny.config("Mistral", **tiny.WINDOWED))
PARAMS = tiny.weights(SPEC)
PROMPTS = [[5, 9, 2, 40, 7, 7, 31, 8, 19, 60], [5, 9, 2, 40, 7, 1], [3]]
GREEDY = SamplingParams(temperature=0, max_tokens=12, logprobs=0)


def engine(**settings: Any) -> fastgen.Engine:
    return fastgen.Engine(PARAMS, SPEC, **{"page_size": 4, "cache_tokens": 256, "kv_cache_dtype": "fp8"} | settings)


def tokens(outputs: list[fastgen.Output]) -> list[list[int]]:
    return [c.token_ids for o in outputs for c in o.completions]


@pytest.mark.parametrize(("heads", "head"), [(2, 64), (1, 128), (3, 6), (1, 2), (8, 96)])
def test_rows(heads: int, head: int, device: str) -> None:
    """A row is values, scales and zeros; values return within e4m3's rounding of the largest of their head."""
    x = torch.randn(9, heads, head) * torch.logspace(-6, 6, 9)[:, None, None]
    x[4] = 0
    rows, first, config = quantize_kv(x), scale_offset(heads, head), shape(heads, heads, head)
    assert rows.shape == (9, 1, fp8_row_bytes(heads, head)) and rows.shape[2] % 16 == 0
    assert row_format(config, "fp8", torch.bfloat16) == ((1, rows.shape[2]), torch.uint8, (heads, head))
    assert not rows[:, 0, first + 4 * heads :].any() and not rows[:, 0, heads * head : first].any()
    scales = rows[:, 0, first : first + 4 * heads].contiguous().view(torch.float32)
    amax = x.abs().amax(-1)
    assert torch.equal(scales, torch.where(amax > 0, amax * (1 / 448), 1.0))
    error = (dequantize_kv(config, rows, torch.float32) - x).abs()
    # Half a unit in the last of three mantissa bits; below 2^-6, half of 2^-9, in units of the scale.
    assert (error <= torch.maximum(x.abs() * 2**-4, scales[..., None] * 2**-10) * (1 + 1e-6)).all()
    again = quantize_kv(dequantize_kv(config, rows, torch.float32))
    torch.testing.assert_close(dequantize_kv(config, again, torch.float32), dequantize_kv(config, rows, torch.float32))


def test_a_value_that_is_not_finite_stays_so() -> None:
    """An overflow is not turned into a large number, which nobody would notice."""
    x = torch.ones(2, 1, 16)
    x[0, 0, 3], x[1, 0, 5] = math.nan, math.inf
    back = dequantize_kv(shape(1, 1, 16), quantize_kv(x), torch.float32)
    assert not back[0].isfinite().any() and not back[1, 0, 5].isfinite()


BACKENDS = {
    "reference": attention.reference, "sdpa": attention.sdpa, "batch-invariant": BATCH_INVARIANT["tiles"],
}  # fmt: skip


@pytest.mark.parametrize("kind", ["continuation", "decode", "mixed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_attention(backend: str, kind: str, device: str) -> None:
    """Plain attention over an fp8 cache is attention over the dequantized keys and values, near that over exact ones.

    With rounded keys a score is off by at most |q| |k| 2^-4 / sqrt(H), so a weight by that exponent; values are off by
    2^-4 of themselves.
    """
    spec = shape(6, 2, 16)
    batch, q, k, v, kv_by_seq = random_batch(len(kind), kind, spec, 4, device)
    rounded = [tuple(dequantize_kv(spec, quantize_kv(x), torch.float32) for x in pair) for pair in kv_by_seq]
    attend = BACKENDS[backend](batch, spec, read=partial(read_pages, spec, 4))
    k, v = (rows_to_pages((2, 16), 4, quantize_kv(x)) for x in (k, v))
    for window in (None, 6):
        actual = attend(q, k, v, window).double()
        torch.testing.assert_close(actual, formula(batch, q, rounded, window), atol=1e-5, rtol=0)
        exact = formula(batch, q, kv_by_seq, window)
        largest_k = max(float(keys.norm(dim=-1).max()) for keys, _ in kv_by_seq)
        shift = float(q.norm(dim=-1).max()) * largest_k * 2**-4 / spec.head_dim**0.5
        largest_v = max(float(values.abs().max()) for _, values in kv_by_seq)
        assert (actual - exact).abs().max() <= (math.expm1(2 * shift) + 2**-4) * largest_v
        assert (actual - exact).abs().mean() < 0.05 and not torch.allclose(actual, exact, atol=1e-4)


def test_write() -> None:
    """RoPE is applied before keys are quantized; queries are the plain op's."""
    config, position = shape(3, 1, 16), torch.tensor([0, 5, 17])
    qkv, slot, cos_sin = torch.randn(3, 5, 16), torch.tensor([4, 0, 7]), rope_cos_sin(position, config)
    plain, caches = [torch.zeros(9, 1, 16) for _ in "kv"], [torch.zeros(9, 1, 32, dtype=torch.uint8) for _ in "kv"]
    expected = rope_and_cache_kv(qkv, *cos_sin, slot, *plain)
    sizes = {"num_kv_heads": 1, "page_size": 3}
    assert torch.equal(kv_cache.rope_and_cache_kv(qkv, *cos_sin, slot, *caches, **sizes), expected)
    for rows, values in zip((pages_to_rows((1, 16), 3, x) for x in caches), plain, strict=True):
        assert torch.equal(rows[slot], quantize_kv(values[slot])) and not rows[[1, 2, 3, 5, 6, 8]].any()


# --- engines ----------------------------------------------------------------------------------------------------------


def test_setting() -> None:
    """The setting has vLLM's name as a keyword, and its own in the group; other values are refused."""
    config = fastgen.EngineConfig.from_flat(kv_cache_dtype="fp8", page_size=8)
    assert (config.kv_cache.dtype, config.kv_cache.page_size) == ("fp8", 8)
    with pytest.raises(ValueError, match="kv_cache.dtype must be one of auto, fp8, got 'fp8_e5m2'"):
        fastgen.EngineConfig.from_flat(kv_cache_dtype="fp8_e5m2")
    with pytest.raises(ValueError, match="unknown setting 'dtype'"):
        fastgen.EngineConfig.from_flat(dtype="fp8")


def test_memory() -> None:
    """Capacity, host pages and memory by owner follow from the bytes of the rows."""
    sizes = tiny.config(hidden_size=256, num_attention_heads=2, num_key_value_heads=1)  # heads of 128
    spec = fastgen.from_hf_config(sizes)
    params = fastgen.init(spec, dtype=torch.bfloat16)
    settings: dict[str, Any] = {"cache_tokens": 64, "page_size": 4, "offload": "host", "host_gb": 1e-3}
    pages = []
    for dtype, num_bytes, name in (("auto", 256, " GB: "), ("fp8", 144, " GB fp8: ")):
        with fastgen.Engine(params, spec, kv_cache_dtype=dtype, **settings) as e:
            assert e.cache_rows.num_bytes == num_bytes
            assert e._memory_usage()["cache"] == 68 * 2 * spec.num_layers * num_bytes
            pages.append(e.page_copier.num_host_pages)
            assert pages[-1] == int(1e6 // (4 * 2 * spec.num_layers * num_bytes)) and name in e.summary()
    assert pages[1] == pytest.approx(pages[0] * 256 / 144, abs=1)


@pytest.mark.parametrize(("backend", "page"), [("sdpa", 1), ("reference", 64)])
def test_engine(backend: str, page: int) -> None:
    """An engine with an fp8 cache is the forward with its ops; a cached prefix gives what a computed prompt gives."""
    with engine(attention=backend, page_size=page) as e:
        first, again = (e.generate(PROMPTS, GREEDY) for _ in range(2))
        assert tokens(first) == tokens(again) and (e.cache_stats.num_hit_tokens or page == 64)
        exact = fastgen.score(PARAMS, SPEC, [[*PROMPTS[0], *tokens(first)[0]]], first=10)[0]
        got = torch.tensor(first[0].completions[0].logprobs)
        assert 1e-4 < (got - exact).abs().max() < 1
        ops, page_size = e.runner.ops, e.config.kv_cache.page_size
        plan = (fastgen.core.scheduler.Span(0, 0, 10, True, tuple(range(1, 1 + -(-10 // page_size)))),)
        batch = fastgen.build_batch(plan, {0: PROMPTS[0]}, page_size)
        num_slots = page_size * (1 + len(plan[0].pages))
        row = fastgen.new_kv_cache(SPEC, num_slots, dtype=e.cache_rows.dtype, row_shape=e.cache_rows.shape)
        logits = fastgen.forward(PARAMS, row, batch, SPEC, ops.attention, ops)
        assert int(logits[0].argmax()) == tokens(first)[0][0]


def test_sampler_and_scorer(device: str) -> None:
    """`score` with the engine's settings returns the sampler's logprobs: up to rounding, or in batch-invariant mode
    bit for bit; for gradients it says that there are none."""
    sampling = SamplingParams(seed=3, max_tokens=16, logprobs=0)
    for batch_invariant in (False, True):
        with engine(batch_invariant=batch_invariant) as e:
            outputs = [*e.generate(PROMPTS, sampling), *e.generate(PROMPTS[:1], sampling)]
            sequences = [[*o.prompt_token_ids, *o.completions[0].token_ids] for o in outputs]
            scores = e.score(sequences, first=[len(o.prompt_token_ids) for o in outputs])
        mismatch = fastgen.logprob_mismatch(outputs, scores)
        # A rounding error of fp32 may move a value to the next of e4m3.
        assert mismatch.max_abs_diff <= (0 if batch_invariant else 1e-4 if device == "cpu" else 0.05)
        without = fastgen.score(PARAMS, SPEC, sequences, first=[len(o.prompt_token_ids) for o in outputs])
        assert fastgen.logprob_mismatch(outputs, without).max_abs_diff > 1e-3
    trained = PARAMS._replace(embed=PARAMS.embed.clone().requires_grad_())
    with pytest.raises(ValueError, match=r'has no gradient; score under torch.no_grad\(\), or .*="auto"'):
        fastgen.score(trained, SPEC, sequences, kv_cache_dtype="fp8")
    with torch.no_grad():
        assert len(fastgen.score(trained, SPEC, sequences, kv_cache_dtype="fp8")) == len(sequences)
    with pytest.raises(ValueError, match="kv_cache_dtype must be one of|unknown kv_cache_dtype"):
        fastgen.score(PARAMS, SPEC, sequences, kv_cache_dtype="int8")


def test_engine_of_kernels() -> None:
    """Triton attention generates the tokens of the plain twin, from what the plain op writes."""
    sampling = SamplingParams(temperature=0, max_tokens=2)
    with engine() as plain, engine(attention="triton", shared_prefix_attention=False) as kernels:
        assert tokens(kernels.generate(PROMPTS[1:], sampling)) == tokens(plain.generate(PROMPTS[1:], sampling))


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_with_quantized_weights(batch_invariant: bool) -> None:
    """Weights and cache may both be fp8; `score` has both."""
    with engine(quantization="fp8", batch_invariant=batch_invariant) as e:
        outputs = e.generate(PROMPTS, GREEDY)
        sequences = [[*o.prompt_token_ids, *o.completions[0].token_ids] for o in outputs]
        scores = e.score(sequences, first=[len(o.prompt_token_ids) for o in outputs])
    assert fastgen.logprob_mismatch(outputs, scores).max_abs_diff <= (0 if batch_invariant else 1e-4)


def test_adapters() -> None:
    """An adapter over an fp8 cache gives what merged parameters give."""
    adapter = lora.init(SPEC, 4)
    adapter = adapter._replace(
        layers=tuple(
            type(layer)(*(None if p is None else p._replace(b=torch.randn_like(p.b) * 0.3) for p in layer))
            for layer in adapter.layers
        )
    )
    merged = lora.merge(PARAMS, SPEC, adapter)
    with fastgen.Engine(merged, SPEC, page_size=4, cache_tokens=256, kv_cache_dtype="fp8") as e:
        expected = tokens(e.generate(PROMPTS, GREEDY))
    with engine(max_adapters=1, max_rank=4) as e:
        e.add_adapter("one", adapter)
        sampling = SamplingParams(temperature=0, max_tokens=12, adapter="one")
        assert tokens(e.generate(PROMPTS, sampling)) == expected != tokens(e.generate(PROMPTS, GREEDY))


@pytest.mark.parametrize(("heads", "page"), [((1, 6), 1), ((2, 16), 3), ((3, 10), 4)])
def test_pages_hold_the_bytes_of_rows(heads: tuple[int, int], page: int) -> None:
    rows = quantize_kv(torch.randn(2, 4 * page, *heads).flatten(0, 1)).unflatten(0, (2, -1))
    pages = rows_to_pages(heads, page, rows)
    assert torch.equal(pages_to_rows(heads, page, pages), rows) and (page == 1) == torch.equal(pages, rows)


def test_sleep() -> None:
    """Pages that were released are computed again."""
    with engine() as e:
        expected = tokens(e.generate(PROMPTS, GREEDY))
        assert e.sleep("cache") >= sum(x.nbytes for x in e.runner.cache.k) and e.wake_up()
        assert tokens(e.generate(PROMPTS, GREEDY)) == expected


# --- kernels ----------------------------------------------------------------------------------------------------------


def quantized(config: fastgen.ModelConfig, page: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the pages of a cache, and what they hold."""
    rows = quantize_kv(x)
    return rows_to_pages((config.num_kv_heads, config.head_dim), page, rows), dequantize_kv(config, rows, x.dtype)


@pytest.mark.parametrize(
    ("kind", "page", "ratio", "head", "window"),
    [
        ("prefill", 1, 3, 16, 6), ("mixed", 16, 4, 128, 20), ("long", 64, 5, 96, None), ("decode", 128, 8, 64, None),
        ("continuation", 16, 7, 16, None), ("long", 64, 2, 64, None), ("decode", 1, 4, 128, 6),
    ],
)  # fmt: skip
def test_kernels_match_the_formula(
    kind: str, page: int, ratio: int, head: int, window: int | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill and decode over an fp8 cache are attention over its dequantized keys and values."""
    spec = shape(2 * ratio, 2, head)
    monkeypatch.setitem(STEP_TYPES, "long", lambda r: (r.randint(130, 200), r.randint(2, 9)))  # several tiles
    batch, q, k, v, kv_by_seq = random_batch(ratio * page + head, kind, spec, page, device, sequences=2)
    rounded = [tuple(quantized(spec, 1, x)[1] for x in pair) for pair in kv_by_seq]
    (k, _), (v, _) = quantized(spec, page, k), quantized(spec, page, v)
    attend = paged_attention(batch, spec)
    expected = formula(batch, q, rounded, window)
    torch.testing.assert_close(attend(q, k, v, window).double(), expected, atol=1e-5, rtol=0)
    if page in (16, 64):  # in half precision, queries and weights are rounded
        half = attend(q.half(), k, v, window).double()
        assert (half - expected).abs().max() < 4e-3 * max(float(x.abs().max()) for _, x in rounded)


@pytest.mark.parametrize("seed", range(2))
def test_kernel_of_shared_prefixes(seed: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups that share a prefix give what each sequence gives alone."""
    r = random.Random(seed)
    monkeypatch.setitem(kernels.SHARED_PREFIX_TILE, "MIN_TILES", (1, 8)[seed % 2])
    ratio, kv_heads, head = ((1, 2, 64), (5, 1, 96))[seed]
    page, spec = (1, 16)[seed], shape(ratio * kv_heads, kv_heads, head)
    batch, q, k, v = random_shared_batch(seed, spec, page, device, r.choice([2, max(1, 64 // ratio)]))
    alone, pad = batch._replace(shared_prefix=None), int((batch.req_idx == 0).sum())
    (k, k_values), (v, v_values) = quantized(spec, page, k), quantized(spec, page, v)
    window = (None, r.randint(2, 90))[seed % 2]
    expected = attention.reference(alone, spec)(q, k_values, v_values, window)
    assert_close_but_for_padding(paged_attention(batch, spec)(q, k, v, window), expected, pad)


@pytest.mark.parametrize("kind", ["mixed", "decode", "shared"])
def test_unowned_rows_are_not_used(kind: str, device: str) -> None:
    """NaN in every row that no sequence owns, values and scales, changes no bit of any result."""
    spec, pad = shape(4, 2, 16), 0
    if kind == "shared":
        batch, q, k, v = random_shared_batch(4, spec, 16, device, 2)
        pad = int((batch.req_idx == 0).sum())
    else:
        batch, q, k, v, _ = random_batch(4, kind, spec, 16, device, sequences=3)
    rows, unowned = [quantize_kv(x) for x in (k, v)], [(x == GARBAGE).flatten(1).all(1) for x in (k, v)]
    nan_rows = [torch.where(free[:, None, None], 255, x) for free, x in zip(unowned, rows, strict=True)]
    assert all(free.sum() > 16 and x.dtype == torch.uint8 for free, x in zip(unowned, nan_rows, strict=True))
    clean, nan = ([rows_to_pages((2, 16), 16, x) for x in xs] for xs in (rows, nan_rows))
    for name, backend in (BACKENDS | {"triton": paged_attention}).items():
        options = {} if name == "triton" else {"read": partial(read_pages, spec, 16)}
        for window in (None, 6) if name != "triton" else (6 if kind == "mixed" else None,):
            expected, actual = (backend(batch, spec, **options)(q, *x, window)[: len(q) - pad] for x in (clean, nan))
            assert actual.isfinite().all() and torch.equal(actual, expected), (name, window)


def test_batch_invariant_kernel(device: str) -> None:
    spec = shape(6, 2, 64)
    batch, q, k, v, kv_by_seq = random_batch(0, "mixed", spec, 16, device, sequences=3)
    rounded = [tuple(quantized(spec, 1, x)[1] for x in pair) for pair in kv_by_seq]
    attend = paged_attention(batch, spec, batch_invariant=True)
    actual = attend(q, quantized(spec, 16, k)[0], quantized(spec, 16, v)[0], None)
    torch.testing.assert_close(actual.double(), formula(batch, q, rounded, None), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("q_heads", "kv_heads", "head"), [(4, 2, 64), (3, 1, 6), (28, 4, 16), (5, 5, 96)])
def test_kernel_writes_the_bits_of_the_plain_op(
    q_heads: int, kv_heads: int, head: int, dtype: torch.dtype, device: str
) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("NumPy, in Triton's interpreter, has no bf16")
    tokens, config, sizes = 5, shape(q_heads, kv_heads, head), {"num_kv_heads": kv_heads, "page_size": 4}
    qkv = (torch.randn(tokens, q_heads + 2 * kv_heads, head) * torch.logspace(-3, 2, tokens)[:, None, None]).to(dtype)
    qkv[2], slot = 0, torch.tensor([3, 9, 1, 4, 7], device=device)
    qkv[3, q_heads + kv_heads, 1], qkv[4, q_heads, 0] = -0.0, math.nan
    cos_sin = rope_cos_sin(torch.arange(tokens, device=device) * 7, config)
    plain, actual = ([torch.zeros(12, 1, fp8_row_bytes(kv_heads, head), dtype=torch.uint8) for _ in "kv"] for _ in "ab")
    q = kv_cache.rope_and_cache_kv(qkv, *cos_sin, slot, *plain, **sizes)
    written = rope_kernel(qkv, *cos_sin, slot, *actual, **sizes)
    plain, actual = ([pages_to_rows((kv_heads, head), 4, x) for x in caches] for caches in (plain, actual))
    assert torch.equal(written[:4], q[:4])
    finite = [i for i in range(12) if i != 7]
    assert all(torch.equal(x[finite], y[finite]) for x, y in zip(actual, plain, strict=True))
    assert dequantize_kv(config, actual[0][7:8], torch.float32)[0, 0].isnan().all()  # NaN is not hidden
    with pytest.raises(ValueError, match="fp8 cache of rows of"):
        rope_kernel(qkv, *cos_sin, slot, *actual, num_kv_heads=kv_heads + 4, page_size=4)


@pytest.mark.parametrize("seed", [1, 2])
def test_fused_rope_kernel(seed: int, device: str) -> None:
    """Attention that applies RoPE writes the bits of the plain op, and reads the new key and value as they are
    written."""
    r, kv_heads, dtype = random.Random(seed), (1, 2)[seed % 2], (torch.float32, torch.float16)[seed // 2]
    ratio, head = ((1, 64), (4, 128), (5, 96), (7, 16))[seed]
    page, spec = (16, 1, 64, 16)[seed], shape(ratio * kv_heads, kv_heads, head)
    lengths = [1, r.choice([64, 65, 128, 129]), r.randint(300, 700)]
    needed = [-(-n // page) for n in lengths]
    ids = r.sample(range(1, sum(needed) + 3), sum(needed))
    plan = [fastgen.core.scheduler.Span(i, n - 1, n, True, tuple(ids.pop() for _ in range(count)))
            for i, (n, count) in enumerate(zip(lengths, needed, strict=True))]  # fmt: skip
    batch = fastgen.build_batch(tuple(plan), {i: [0] * n for i, n in enumerate(lengths)}, page, device, pad_to=4)
    cos_sin = rope_cos_sin(batch.positions, spec)
    num_slots = (sum(needed) + 3) * page
    k, v = (quantized(spec, page, torch.randn(num_slots, kv_heads, head).to(dtype))[0] for _ in "kv")
    for window in (None, r.choice([1, 5, 100])):
        qkv = torch.randn(4, (ratio + 2) * kv_heads, head).to(dtype)
        qkv[:, -2 * kv_heads :] *= 1 + 9 * torch.rand(4, 2 * kv_heads, 1).to(dtype)
        fused, plain = (k.clone(), v.clone()), (k.clone(), v.clone())
        out = paged_attention(batch, spec)(kernels.UnrotatedQKV(qkv, *cos_sin, batch.slot_mapping), *fused, window)
        sizes = {"num_kv_heads": kv_heads, "page_size": page}
        q = kv_cache.rope_and_cache_kv(qkv, *cos_sin, batch.slot_mapping, *plain, **sizes)
        expected = attention.reference(batch, spec, partial(read_pages, spec, page))(q, *fused, window)
        unit = 2e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out, expected, atol=unit, rtol=0)
        for x, y in zip(fused, plain, strict=True):
            # fused multiply-adds of RoPE round differently: a value at the middle of two may become the other
            assert (x == y).float().mean() > 0.999
