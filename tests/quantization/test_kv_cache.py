"""KV caches in fp8: the rows, attention over them, and engines with everything that touches the cache."""

import math
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from test_attention import BATCH_INVARIANT, formula, random_batch, shape

import fastgen
from fastgen import SamplingParams, lora
from fastgen.core import attention
from fastgen.core.layers import rope_and_cache_kv, rope_cos_sin
from fastgen.quantization import kv_cache
from fastgen.quantization.kv_cache import dequantize_kv, fp8_row_bytes, quantize_kv, row_format, scale_offset

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
    assert row_format(config, "fp8", torch.bfloat16) == ((1, rows.shape[2]), torch.uint8)
    assert not rows[:, 0, first + 4 * heads :].any() and not rows[:, 0, heads * head : first].any()
    scales = rows[:, 0, first : first + 4 * heads].contiguous().view(torch.float32)
    amax = x.abs().amax(-1)
    assert torch.equal(scales, torch.where(amax > 0, amax / 448, 1.0))
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
    attend = BACKENDS[backend](batch, spec, read=partial(dequantize_kv, spec))
    for window in (None, 6):
        actual = attend(q, quantize_kv(k), quantize_kv(v), window).double()
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
    assert torch.equal(kv_cache.rope_and_cache_kv(qkv, *cos_sin, slot, *caches, num_kv_heads=1), expected)
    for rows, values in zip(caches, plain, strict=True):
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


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_engine(backend: str) -> None:
    """An engine with an fp8 cache is the forward with its ops; a cached prefix gives what a computed prompt gives."""
    with engine(attention=backend, page_size=1) as e:
        first, again = (e.generate(PROMPTS, GREEDY) for _ in range(2))
        assert tokens(first) == tokens(again) and e.cache_stats.num_hit_tokens
        exact = fastgen.score(PARAMS, SPEC, [[*PROMPTS[0], *tokens(first)[0]]], first=10)[0]
        got = torch.tensor(first[0].completions[0].logprobs)
        assert 1e-4 < (got - exact).abs().max() < 1
        batch = fastgen.build_batch(
            (fastgen.core.scheduler.Span(0, 0, 10, True, tuple(range(1, 11))),), {0: PROMPTS[0]}, 1
        )
        ops = e.runner.ops
        row = fastgen.new_kv_cache(SPEC, 11, dtype=e.cache_rows.dtype, row_shape=e.cache_rows.shape)
        logits = fastgen.forward(PARAMS, row, batch, SPEC, ops.attention, ops)
        assert int(logits[0].argmax()) == tokens(first)[0][0]


def test_sampler_and_scorer() -> None:
    """`score` with the engine's settings returns the sampler's logprobs: up to rounding, or in batch-invariant mode
    bit for bit; for gradients it says that there are none."""
    sampling = SamplingParams(seed=3, max_tokens=16, logprobs=0)
    for batch_invariant in (False, True):
        with engine(batch_invariant=batch_invariant) as e:
            outputs = [*e.generate(PROMPTS, sampling), *e.generate(PROMPTS[:1], sampling)]
            sequences = [[*o.prompt_token_ids, *o.completions[0].token_ids] for o in outputs]
            scores = e.score(sequences, first=[len(o.prompt_token_ids) for o in outputs])
        mismatch = fastgen.logprob_mismatch(outputs, scores)
        assert mismatch.max_abs_diff <= (0 if batch_invariant else 1e-4)
        without = fastgen.score(PARAMS, SPEC, sequences, first=[len(o.prompt_token_ids) for o in outputs])
        assert fastgen.logprob_mismatch(outputs, without).max_abs_diff > 1e-3
    trained = PARAMS._replace(embed=PARAMS.embed.clone().requires_grad_())
    with pytest.raises(ValueError, match=r'has no gradient; score under torch.no_grad\(\), or .*="auto"'):
        fastgen.score(trained, SPEC, sequences, kv_cache_dtype="fp8")
    with torch.no_grad():
        assert len(fastgen.score(trained, SPEC, sequences, kv_cache_dtype="fp8")) == len(sequences)
    with pytest.raises(ValueError, match="kv_cache_dtype must be one of|unknown kv_cache_dtype"):
        fastgen.score(PARAMS, SPEC, sequences, kv_cache_dtype="int8")


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


def test_sleep() -> None:
    """Pages that were released are computed again."""
    with engine() as e:
        expected = tokens(e.generate(PROMPTS, GREEDY))
        assert e.sleep("cache") >= sum(x.nbytes for x in e.runner.cache.k) and e.wake_up()
        assert tokens(e.generate(PROMPTS, GREEDY)) == expected
