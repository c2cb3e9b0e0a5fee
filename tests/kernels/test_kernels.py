"""The fused kernels against the plain functions they replace."""

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

HALF = torch.float16 if torch.get_default_device().type == "cpu" else torch.bfloat16  # the interpreter has no bf16
EPS = 1e-5
SHAPES = [(2, 33, 100), (3, 20, 576), (16, 40, 300), (9, 16, 1), (2, 1, 512)]  # (rows, N, K)


@pytest.fixture(autouse=True)
def fixed() -> None:
    torch.manual_seed(0)


def weights(n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix, its bias, a norm."""
    return (torch.randn(n, k) * k**-0.5).to(dtype), torch.randn(n).to(dtype), (1 + torch.randn(k) / 4).to(dtype)


def close(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """No further from the exact values than the plain computation, but for half a unit in the last place."""
    assert ours.dtype == plain.dtype and ours.shape == plain.shape
    unit = torch.finfo(ours.dtype).eps
    allowed = 1 if unit > 1e-5 else 16  # in fp32 sums round too: by the root of some hundred terms
    ours, plain, exact = ours.double(), plain.double(), exact.double()
    size = exact.abs().clamp(min=exact.square().mean().sqrt().item())  # of a typical entry at least
    error = (ours - exact).abs() / size
    assert error.max() <= 1.5 * ((plain - exact).abs() / size).max() + allowed * unit


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("rows", "n", "k"), SHAPES)
def test_linear(rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    """With and without bias, whatever the shape."""
    x, (w, bias, _) = torch.randn(rows, k).to(dtype), weights(n, k, dtype)
    for b in (None, bias):
        exact = F.linear(x.double(), w.double(), None if b is None else b.double())
        close(small_batch.linear(x, w, b), F.linear(x, w, b), exact)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("rows", "n", "k"), SHAPES)
def test_project(rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    """Residual sum, norm and product; and with SwiGLU, whose gate and up are halves of the rows."""
    x, y = (3 * torch.randn(rows, k).to(dtype) for _ in range(2))
    w, bias, norm = weights(2 * n, k, dtype)
    before = x.clone()
    h = x + y
    exact = h.double() * torch.rsqrt(h.double().square().mean(-1, keepdim=True) + EPS) * norm.double()
    plain = rms_norm(h, norm, EPS)
    for b in (None, bias):
        total, out = small_batch.add_norm_qkv(x, y, norm, EPS, w, b)
        assert torch.equal(total, h)
        close(out, F.linear(plain, w, b), F.linear(exact, w.double(), None if b is None else b.double()))
    total, out = small_batch.add_norm_gate_up(x, y, norm, EPS, w)
    assert torch.equal(total, h) and torch.equal(x, before)
    close(out, swiglu(F.linear(plain, w)), swiglu(F.linear(exact, w.double())))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_rows_do_not_depend_on_the_batch(dtype: torch.dtype, device: str) -> None:
    """A row is bitwise the same alone, among others and in any place."""
    picks = [[3], [7, 0], list(range(7, -1, -1))]
    shapes = [(64, 520), (1024, 896), (6144, 2048), (512, 9000), (70000, 512)]  # every class of `tile`
    if device == "cpu":
        shapes = [(24, 300)]
    for n, k in shapes:
        x, y = (torch.randn(8, k).to(dtype) for _ in range(2))
        w, bias, norm = weights(2 * n, k, dtype)

        def all_of(pick: list[int] | slice) -> list[Tensor]:
            a, b = x[pick], y[pick]  # noqa: B023
            return [small_batch.linear(a, w, bias), *small_batch.add_norm_qkv(a, b, norm, EPS, w, bias),  # noqa: B023
                    *small_batch.add_norm_gate_up(a, b, norm, EPS, w)]  # fmt: skip  # noqa: B023

        whole = all_of(slice(None))
        for pick in picks:
            assert all(torch.equal(part, full[pick]) for part, full in zip(all_of(pick), whole, strict=True))


def test_dependent_launch(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Kernels that start before the one they read from has ended give the same."""
    if device == "cpu" or torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a Hopper GPU")
    x, (w, bias, norm) = torch.randn(2, 2048).to(HALF), weights(4096, 2048, HALF)
    results = []
    for on in (False, True):
        monkeypatch.setattr(pdl, "USE_PDL", on)
        h, y = x, x
        for _ in range(50):
            h, gated = small_batch.add_norm_gate_up(h, y, norm, EPS, w)
            _, wide = small_batch.add_norm_qkv(h, gated, norm, EPS, w, bias)
            y = small_batch.linear(wide[:, 2048:].contiguous(), w[:2048])
        results.append((h, y))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_too_many_rows() -> None:
    """More rows than a tile has are refused, as are weights that do not lie in order."""
    w = torch.zeros(4, 8)
    with pytest.raises(ValueError, match="rows"):
        small_batch.linear(torch.zeros(17, 8), w, None)
    with pytest.raises(ValueError, match="contiguous"):
        small_batch.linear(torch.zeros(2, 4), w.T, None)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("q_heads", "kv", "head"), [(2, 2, 64), (10, 2, 96), (14, 2, 128), (7, 1, 16), (20, 4, 128)])
def test_store(q_heads: int, kv: int, head: int, dtype: torch.dtype) -> None:
    """Bitwise what rotation and two indexed writes do; slots in any order, others untouched."""
    for tokens, kind in ((2, torch.int32), (37, torch.int64)):
        qkv = torch.randn(tokens, q_heads + 2 * kv, head).to(dtype)
        angle = 100 * torch.rand(tokens, 1, head // 2)
        cos, sin = angle.cos(), angle.sin()
        slot = torch.randperm(90)[:tokens].to(kind)
        caches = [torch.randn(90, kv, head).to(dtype) for _ in "kv"]
        expected = [cache.clone() for cache in caches]
        q, k, v = qkv.split((q_heads, kv, kv), 1)
        expected[0][slot.long()], expected[1][slot.long()] = apply_rope(k, cos, sin), v
        ours = rope_cache.rope_and_cache_kv(qkv, cos, sin, slot, *caches)
        assert ours.is_contiguous()
        assert torch.equal(ours, apply_rope(q, cos, sin))
        assert all(torch.equal(a, b) for a, b in zip(caches, expected, strict=True))


def compare(logits: Tensor, temperature: Tensor, processed: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A draw beside the plain one; they are the same. Seeds and positions of every size."""
    rows = len(logits)
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=torch.Generator(logits.device).manual_seed(seed))
    position = torch.arange(rows) * 12345
    last, seat = torch.full((rows + 9,), -1, dtype=torch.int32), torch.randperm(rows + 8)[:rows].int() + 1
    token, logprob = sample_kernels.sample_tokens(logits, temperature, seeds, position, processed, last, seat)
    assert torch.equal(last[seat], token) and (last == -1).sum() == 9
    plain = sample(
        logits.float(), SamplingTensors(temperature, seeds, position, processed, None, None), num_top_logprobs=0
    )
    assert token.dtype == torch.int32 and logprob.dtype == torch.float32
    assert token.tolist() == plain.token_ids.tolist()
    torch.testing.assert_close(logprob, plain.logprobs, atol=1e-5, rtol=1e-5)
    return token, logprob


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 7), (5, 2001), (20, 30), (3, 1024), (2, 20000)])
def test_draw(rows: int, vocab: int, dtype: torch.dtype) -> None:
    """The very token that plain sampling draws, at every temperature, and its probability."""
    logits = (4 * torch.randn(rows, vocab)).to(dtype)
    logits[:, ::3] = float("-inf")
    logits[:, -1] = 1.0
    temperature = torch.tensor([0.0, 1.0, 0.3, 1.7, 30.0])[torch.arange(rows) % 5]
    compare(logits, temperature, torch.arange(rows) % 2 == 1)
    compare(logits, temperature.flip(0), torch.arange(rows) % 3 == 1, seed=1)


@pytest.mark.parametrize("cold", [1e-45, 9.9e-6])
def test_draw_near_temperature_0(cold: float) -> None:
    """As temperature 0, logprob included, however large the logits are; from 1e-5 on it draws."""
    logits = torch.tensor([1.0, 1e30, 1.0])[:, None] * torch.randn(3, 1100)
    processed = torch.tensor([True, True, False])
    token, logprob = compare(logits, torch.full((3,), cold), processed)
    greedy = compare(logits, torch.zeros(3), processed)
    assert torch.equal(token, greedy[0]) and torch.equal(logprob, greedy[1]) and torch.isfinite(logprob).all()
    drawn, _ = compare(torch.zeros(16, 9), torch.tensor([cold, 1e-5]).repeat(8), torch.zeros(16, dtype=torch.bool))
    assert not drawn[::2].any() and drawn[1::2].unique().numel() > 2


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of Triton's interpreter, which computes by NumPy
@pytest.mark.parametrize(("value", "count"), [(float("nan"), 1), (float("inf"), 1100)])
def test_draw_of_logits_that_are_no_numbers(value: float, count: int) -> None:
    """A logprob of NaN, whether one logit is none or all are; a token of the vocabulary; other rows are as ever."""
    logits, rows = torch.randn(5, 1100), torch.tensor([0, 2, 4])
    spoilt = logits.clone()
    spoilt[1::2, -count:] = value
    args = (torch.tensor([0.0, 0.0, 1.0, 1.0, 0.5]), torch.arange(5), torch.arange(5), torch.arange(5) % 2 == 1)
    last, seat = torch.zeros(6, dtype=torch.int32), torch.arange(1, 6)
    token, logprob = sample_kernels.sample_tokens(spoilt, *args, last, seat, batch_invariant=count == 1)
    wanted = sample_kernels.sample_tokens(logits, *args, last.clone(), seat, batch_invariant=count == 1)
    assert logprob.isnan().tolist() == [False, True, False, True, False]
    assert ((token >= 0) & (token < 1100)).all() and torch.equal(last[1:], token)
    assert torch.equal(token[rows], wanted[0][rows]) and torch.equal(logprob[rows], wanted[1][rows])
    value_of = sample_kernels.logprobs(spoilt, token, 2)[0]
    assert value_of.isnan().tolist() == [False, True, False, True, False]


def test_draw_ties() -> None:
    """Of equal logits greedy takes the first, wherever its share of the vocabulary ends."""
    logits = torch.zeros(3, 5000)
    logits[0, [1500, 4999, 2600]] = logits[1, [4100, 4101]] = 2.0
    token, _ = compare(logits, torch.zeros(3), torch.ones(3, dtype=torch.bool))
    assert token.tolist() == [1500, 4100, 0]


@pytest.mark.parametrize(("rows", "vocab", "ranks"), [(5, 2001, 2), (3, 9, 4), (2, 7001, 8), (12, 1300, 4)])
def test_draw_over_ranks(rows: int, vocab: int, ranks: int) -> None:
    """Each rank draws of its part, padded; what they have found gives all of them the token of the whole."""
    logits = 4 * torch.randn(rows, vocab)
    logits[:, ::3] = float("-inf")
    logits[0] = logits[0].round()  # ties
    most = -(-vocab // ranks)
    padded = torch.zeros(rows, most * ranks)
    padded[:, :vocab] = logits
    temperature = torch.tensor([0.0, 1.0, 0.3, 1.7])[torch.arange(rows) % 4]
    seed, position, processed = torch.arange(rows) * 7, torch.arange(rows) + 5, torch.arange(rows) % 3 == 1
    args = temperature, seed, position, processed
    want = sample(logits, SamplingTensors(*args, None, None), num_top_logprobs=0)
    found: list[Tensor] = []

    def draw(rank: int, gather: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        first = min(rank * most, vocab)
        last, seat = torch.zeros(rows + 1, dtype=torch.int32), torch.arange(1, rows + 1)
        mine, part = padded[:, rank * most :][:, :most], (first, min(most, vocab - first))
        token, logprob = sample_kernels.sample_tokens(
            mine, *args, last, seat, vocab_size=vocab, vocab_shard=part, all_gather=gather
        )
        return token, logprob, last[1:]

    def keep(x: Tensor) -> Tensor:
        found.append(x.clone())
        return torch.ones_like(x)[None]

    for rank in range(ranks):
        draw(rank, keep)
    for rank in range(ranks):
        token, logprob, last = draw(rank, lambda _: torch.stack(found))
        assert torch.equal(token, want.token_ids.int()) and torch.equal(last, token)
        torch.testing.assert_close(logprob, want.logprobs, atol=1e-5, rtol=1e-5)


def test_draw_rows_do_not_depend_on_the_batch() -> None:
    """The same token among others as alone; the same probability but for rounding."""
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
    """Those of the drawn tokens are the draw's own, bit for bit, in any number of rows; all are plain ones."""
    logits = (3 * torch.randn(9, 5003)).to(dtype)
    args = (logits, torch.full((9,), 0.9), torch.arange(9), torch.arange(9), torch.zeros(9, dtype=torch.int32))
    last, seat = torch.zeros(9, dtype=torch.int32), torch.arange(9)
    token, logprob = sample_kernels.sample_tokens(*args, last, seat, batch_invariant=True)
    value, best, top = sample_kernels.logprobs(logits, token, 3)
    assert torch.equal(value, logprob)
    for plain, ours in zip(sampling.gather_logprobs(logits.float(), token.long(), 3), (value, best, top), strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=0)
    some, few, _ = sample_kernels.logprobs(logits[4:6].float(), token[4:6], 1)
    assert torch.equal(some, value[4:6])
    assert torch.equal(few, best[4:6, :1])
    assert not len(sample_kernels.logprobs(logits[:0], token[:0], 2)[0])


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_norm_of_heads(dtype: torch.dtype) -> None:
    x, weight = torch.randn(13, 2, 96).to(dtype)[:, 1], torch.rand(96).to(dtype)  # not contiguous
    torch.testing.assert_close(small_batch.rms_norm(x, weight, 1e-6), rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize(("n", "m"), [(1, 0), (5, 5), (2048, 1), (3, 2049), (5000, 4100)])
def test_copy(n: int, m: int) -> None:
    """One part or two of any length, one after the other; what lies behind them stays."""
    first, second, target = torch.arange(n).int(), -torch.arange(m).int(), torch.full((n + m + 3,), 7).int()
    page_copy.copy_concatenated(target, first, second if m else None)
    assert torch.equal(target, torch.cat((first, second, torch.full((3,), 7).int())))
