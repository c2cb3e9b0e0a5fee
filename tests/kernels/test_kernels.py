"""Compares the fused kernels with the torch functions that they replace."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.core import sampling
from fastgen.core.layers import apply_rope, rms_norm, swiglu
from fastgen.core.sampling import sample
from fastgen.core.types import SamplingTensors

pytest.importorskip("triton")
from fastgen.kernels import page_copy, pdl, rope_cache, small_batch
from fastgen.kernels import sample as sample_kernels
from fastgen.kernels.select import small_batch_ops

OPS = small_batch_ops()

HALF = torch.float16 if torch.get_default_device().type == "cpu" else torch.bfloat16  # the interpreter has no bf16
EPS = 1e-5
SHAPES = [(2, 33, 100), (3, 20, 576), (16, 40, 300), (9, 16, 1), (2, 1, 512)]  # (rows, N, K)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def weights(n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns a matrix [n, k], its bias, and a norm's weight [k]."""
    return (torch.randn(n, k) * k**-0.5).to(dtype), torch.randn(n).to(dtype), (1 + torch.randn(k) / 4).to(dtype)


def assert_as_close_as_torch(actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Asserts that `actual` is no further from the exact values than torch, but for half a unit in the last place."""
    assert actual.dtype == plain.dtype and actual.shape == plain.shape
    unit = torch.finfo(actual.dtype).eps
    allowed = 1 if unit > 1e-5 else 16  # in fp32 sums round too: by the root of some hundred terms
    actual, plain, exact = actual.double(), plain.double(), exact.double()
    size = exact.abs().clamp(min=exact.square().mean().sqrt().item())  # at least that of a typical entry
    error = (actual - exact).abs() / size
    assert error.max() <= 1.5 * ((plain - exact).abs() / size).max() + allowed * unit


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("rows", "n", "k"), SHAPES)
def test_linear(rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    """linear agrees with torch for every shape, with and without bias."""
    x, (w, bias, _) = torch.randn(rows, k).to(dtype), weights(n, k, dtype)
    for b in (None, bias):
        exact = F.linear(x.double(), w.double(), None if b is None else b.double())
        assert_as_close_as_torch(small_batch.linear(x, w, b), F.linear(x, w, b), exact)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("rows", "n", "k"), SHAPES)
def test_add_norm_qkv_and_gate_up(rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    """The residual sum is exact; matmul of its norm, and SwiGLU of that, agree with torch; inputs are unchanged."""
    x, y = (3 * torch.randn(rows, k).to(dtype) for _ in range(2))
    w, bias, norm = weights(2 * n, k, dtype)
    before = x.clone()
    h = x + y
    exact = h.double() * torch.rsqrt(h.double().square().mean(-1, keepdim=True) + EPS) * norm.double()
    plain = rms_norm(h, norm, EPS)
    for b in (None, bias):
        total, out = OPS.add_norm_qkv(x, y, norm, EPS, w, b)
        assert torch.equal(total, h)
        assert_as_close_as_torch(
            out, F.linear(plain, w, b), F.linear(exact, w.double(), None if b is None else b.double())
        )
    total, out = OPS.add_norm_gate_up(x, y, norm, EPS, w)
    assert torch.equal(total, h) and torch.equal(x, before)
    assert_as_close_as_torch(out, swiglu(F.linear(plain, w)), swiglu(F.linear(exact, w.double())))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_rows_do_not_depend_on_the_batch(dtype: torch.dtype, device: str) -> None:
    """A row has the same bits alone, among other rows, and at any index."""
    picks = [[3], [7, 0], list(range(7, -1, -1))]
    shapes = [
        (64, 520),
        (1024, 896),
        (6144, 2048),
        (512, 9000),
        (70000, 512),
    ]  # one for every tile of `select_linear_tile`
    if device == "cpu":
        shapes = [(24, 300)]
    for n, k in shapes:
        x, y = (torch.randn(8, k).to(dtype) for _ in range(2))
        w, bias, norm = weights(2 * n, k, dtype)

        def run(pick: list[int] | slice) -> list[Tensor]:
            a, b = x[pick], y[pick]  # noqa: B023
            return [small_batch.linear(a, w, bias), *OPS.add_norm_qkv(a, b, norm, EPS, w, bias),  # noqa: B023
                    *OPS.add_norm_gate_up(a, b, norm, EPS, w)]  # fmt: skip  # noqa: B023

        full = run(slice(None))
        for pick in picks:
            assert all(torch.equal(x, y[pick]) for x, y in zip(run(pick), full, strict=True))


def test_dependent_launch(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """With programmatic dependent launch, chained kernels compute the same bits."""
    if device == "cpu" or torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a Hopper GPU")
    x, (w, bias, norm) = torch.randn(2, 2048).to(HALF), weights(4096, 2048, HALF)
    results = []
    for use_pdl in (False, True):
        monkeypatch.setattr(pdl, "USE_PDL", use_pdl)
        h, y = x, x
        for _ in range(50):
            h, gated = OPS.add_norm_gate_up(h, y, norm, EPS, w)
            _, wide = OPS.add_norm_qkv(h, gated, norm, EPS, w, bias)
            y = small_batch.linear(wide[:, 2048:].contiguous(), w[:2048])
        results.append((h, y))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_too_many_rows() -> None:
    """linear refuses more rows than a tile has, and weights that are not contiguous."""
    w = torch.zeros(4, 8)
    with pytest.raises(ValueError, match="rows"):
        small_batch.linear(torch.zeros(17, 8), w, None)
    with pytest.raises(ValueError, match="contiguous"):
        small_batch.linear(torch.zeros(2, 4), w.T, None)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("q_heads", "kv", "head"), [(2, 2, 64), (10, 2, 96), (14, 2, 128), (7, 1, 16), (20, 4, 128)])
def test_rope_and_cache_kv(q_heads: int, kv: int, head: int, dtype: torch.dtype) -> None:
    """The kernel has the bits of RoPE and two indexed writes, for slots in any order; other slots keep theirs."""
    for tokens, slot_dtype in ((2, torch.int32), (37, torch.int64)):
        qkv = torch.randn(tokens, q_heads + 2 * kv, head).to(dtype)
        angle = 100 * torch.rand(tokens, 1, head // 2)
        cos, sin = angle.cos(), angle.sin()
        slot = torch.randperm(90)[:tokens].to(slot_dtype)
        caches = [torch.randn(90, kv, head).to(dtype) for _ in "kv"]
        expected = [cache.clone() for cache in caches]
        q, k, v = qkv.split((q_heads, kv, kv), 1)
        expected[0][slot.long()], expected[1][slot.long()] = apply_rope(k, cos, sin), v
        actual = rope_cache.rope_and_cache_kv(qkv, cos, sin, slot, *caches)
        assert actual.is_contiguous()
        assert torch.equal(actual, apply_rope(q, cos, sin))
        assert all(torch.equal(a, b) for a, b in zip(caches, expected, strict=True))


def assert_same_samples(logits: Tensor, temperature: Tensor, processed: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Asserts that the kernel samples the tokens of `sampling.sample`, with seeds and positions of every size."""
    rows = len(logits)
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=torch.Generator(logits.device).manual_seed(seed))
    position = torch.arange(rows) * 12345
    last, req_idx = torch.full((rows + 9,), -1, dtype=torch.int32), torch.randperm(rows + 8)[:rows].int() + 1
    token, logprob = sample_kernels.sample_tokens(logits, temperature, seeds, position, processed, last, req_idx)
    assert torch.equal(last[req_idx], token) and (last == -1).sum() == 9
    plain = sample(
        logits.float(), SamplingTensors(temperature, seeds, position, processed, None, None), num_top_logprobs=0
    )
    assert token.dtype == torch.int32 and logprob.dtype == torch.float32
    assert token.tolist() == plain.token_ids.tolist()
    torch.testing.assert_close(logprob, plain.logprobs, atol=1e-5, rtol=1e-5)
    return token, logprob


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 7), (5, 2001), (20, 30), (3, 1024), (2, 20000)])
def test_sample(rows: int, vocab: int, dtype: torch.dtype) -> None:
    """The kernel samples the tokens of `sampling.sample`, and their logprobs, at every temperature."""
    logits = (4 * torch.randn(rows, vocab)).to(dtype)
    logits[:, ::3] = float("-inf")
    logits[:, -1] = 1.0
    temperature = torch.tensor([0.0, 1.0, 0.3, 1.7, 30.0])[torch.arange(rows) % 5]
    assert_same_samples(logits, temperature, torch.arange(rows) % 2 == 1)
    assert_same_samples(logits, temperature.flip(0), torch.arange(rows) % 3 == 1, seed=1)


@pytest.mark.parametrize("cold", [1e-45, 9.9e-6])
def test_sample_near_temperature_0(cold: float) -> None:
    """Below 1e-5 a temperature is 0, logprob included, however large the logits are; from 1e-5 on, tokens vary."""
    logits = torch.tensor([1.0, 1e30, 1.0])[:, None] * torch.randn(3, 1100)
    processed = torch.tensor([True, True, False])
    token, logprob = assert_same_samples(logits, torch.full((3,), cold), processed)
    greedy = assert_same_samples(logits, torch.zeros(3), processed)
    assert torch.equal(token, greedy[0]) and torch.equal(logprob, greedy[1]) and torch.isfinite(logprob).all()
    sampled, _ = assert_same_samples(
        torch.zeros(16, 9), torch.tensor([cold, 1e-5]).repeat(8), torch.zeros(16, dtype=torch.bool)
    )
    assert not sampled[::2].any() and sampled[1::2].unique().numel() > 2


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of Triton's interpreter, which computes by NumPy
@pytest.mark.parametrize(("value", "count"), [(float("nan"), 1), (float("inf"), 1100)])
def test_sample_nonfinite_logits(value: float, count: int) -> None:
    """A row with one or only non-finite logits has logprob NaN and a valid token; other rows are unaffected."""
    logits, rows = torch.randn(5, 1100), torch.tensor([0, 2, 4])
    corrupted = logits.clone()
    corrupted[1::2, -count:] = value
    args = (torch.tensor([0.0, 0.0, 1.0, 1.0, 0.5]), torch.arange(5), torch.arange(5), torch.arange(5) % 2 == 1)
    last, req_idx = torch.zeros(6, dtype=torch.int32), torch.arange(1, 6)
    token, logprob = sample_kernels.sample_tokens(corrupted, *args, last, req_idx, batch_invariant=count == 1)
    expected = sample_kernels.sample_tokens(logits, *args, last.clone(), req_idx, batch_invariant=count == 1)
    assert logprob.isnan().tolist() == [False, True, False, True, False]
    assert ((token >= 0) & (token < 1100)).all() and torch.equal(last[1:], token)
    assert torch.equal(token[rows], expected[0][rows]) and torch.equal(logprob[rows], expected[1][rows])
    logprob = sample_kernels.logprobs(corrupted, token, 2)[0]
    assert logprob.isnan().tolist() == [False, True, False, True, False]


def test_sample_ties() -> None:
    """Greedy sampling takes the first of equal logits, wherever the splits of the vocabulary end."""
    logits = torch.zeros(3, 5000)
    logits[0, [1500, 4999, 2600]] = logits[1, [4100, 4101]] = 2.0
    token, _ = assert_same_samples(logits, torch.zeros(3), torch.ones(3, dtype=torch.bool))
    assert token.tolist() == [1500, 4100, 0]


@pytest.mark.parametrize(("rows", "vocab", "ranks"), [(5, 2001, 2), (3, 9, 4), (2, 7001, 8), (12, 1300, 4)])
def test_sample_over_ranks(rows: int, vocab: int, ranks: int) -> None:
    """Ranks with padded vocabulary shards all sample the token that one rank samples from the full logits."""
    logits = 4 * torch.randn(rows, vocab)
    logits[:, ::3] = float("-inf")
    logits[0] = logits[0].round()  # ties
    width = -(-vocab // ranks)
    padded = torch.zeros(rows, width * ranks)
    padded[:, :vocab] = logits
    temperature = torch.tensor([0.0, 1.0, 0.3, 1.7])[torch.arange(rows) % 4]
    seed, position, processed = torch.arange(rows) * 7, torch.arange(rows) + 5, torch.arange(rows) % 3 == 1
    args = temperature, seed, position, processed
    want = sample(logits, SamplingTensors(*args, None, None), num_top_logprobs=0)
    stats: list[Tensor] = []

    def sample_shard(rank: int, gather: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        first = min(rank * width, vocab)
        last, req_idx = torch.zeros(rows + 1, dtype=torch.int32), torch.arange(1, rows + 1)
        logits, shard = padded[:, rank * width :][:, :width], (first, min(width, vocab - first))
        token, logprob = sample_kernels.sample_tokens(
            logits, *args, last, req_idx, vocab_size=vocab, vocab_shard=shard, all_gather=gather
        )
        return token, logprob, last[1:]

    def record(x: Tensor) -> Tensor:
        stats.append(x.clone())
        return torch.ones_like(x)[None]

    for rank in range(ranks):
        sample_shard(rank, record)
    for rank in range(ranks):
        token, logprob, last = sample_shard(rank, lambda _: torch.stack(stats))
        assert torch.equal(token, want.token_ids.int()) and torch.equal(last, token)
        torch.testing.assert_close(logprob, want.logprobs, atol=1e-5, rtol=1e-5)


def test_sample_rows_do_not_depend_on_the_batch() -> None:
    """A row's token is the same alone and among other rows, and its logprob but for rounding."""
    logits, flags = torch.randn(24, 1100), torch.zeros(24, dtype=torch.bool)
    seed, temperature, position = torch.arange(24), torch.full((24,), 0.8), torch.arange(24)
    args, last = (logits, temperature, seed, position, flags), torch.zeros(24, dtype=torch.int32)
    token, logprob = sample_kernels.sample_tokens(*args, last, seed)
    for pick in ([0], [23, 7], list(range(8, 14))):
        t, p = sample_kernels.sample_tokens(*(x[pick] for x in args), last, seed[pick])
        assert torch.equal(t, token[pick])
        torch.testing.assert_close(p, logprob[pick], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_logprobs_of_given_tokens(dtype: torch.dtype) -> None:
    """Logprobs of sampled tokens have the sampler's bits in any number of rows; all agree with torch."""
    logits = (3 * torch.randn(9, 5003)).to(dtype)
    args = (logits, torch.full((9,), 0.9), torch.arange(9), torch.arange(9), torch.zeros(9, dtype=torch.int32))
    last, req_idx = torch.zeros(9, dtype=torch.int32), torch.arange(9)
    token, logprob = sample_kernels.sample_tokens(*args, last, req_idx, batch_invariant=True)
    target, top_token, top = sample_kernels.logprobs(logits, token, 3)
    assert torch.equal(target, logprob)
    for plain, actual in zip(
        sampling.gather_logprobs(logits.float(), token.long(), 3), (target, top_token, top), strict=True
    ):
        torch.testing.assert_close(actual, plain, atol=1e-5, rtol=0)
    two, two_top, _ = sample_kernels.logprobs(logits[4:6].float(), token[4:6], 1)
    assert torch.equal(two, target[4:6])
    assert torch.equal(two_top, top_token[4:6, :1])
    assert not len(sample_kernels.logprobs(logits[:0], token[:0], 2)[0])


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_norm_of_heads(dtype: torch.dtype) -> None:
    """The norm of heads that are not contiguous agrees with torch."""
    x, weight = torch.randn(13, 2, 96).to(dtype)[:, 1], torch.rand(96).to(dtype)  # not contiguous
    torch.testing.assert_close(small_batch.rms_norm(x, weight, 1e-6), rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize(("n", "m"), [(1, 0), (5, 5), (2048, 1), (3, 2049), (5000, 4100)])
def test_copy_concatenated(n: int, m: int) -> None:
    """One tensor, or two of any lengths, are written one after the other; the end of the target keeps its values."""
    first, second, target = torch.arange(n).int(), -torch.arange(m).int(), torch.full((n + m + 3,), 7).int()
    page_copy.copy_concatenated(target, first, second if m else None)
    assert torch.equal(target, torch.cat((first, second, torch.full((3,), 7).int())))
