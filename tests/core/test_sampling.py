"""Noise, filters, penalties and logprobs, against plain Python and the statistics they should have."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgen.core.sampling import apply_penalties, exponential_noise, filter_top_k_top_p, gather_logprobs, sample
from fastgen.core.types import LogitEdits, SamplerOutput, SamplingTensors, TopKTopP
from fastgen.distributed.tensor_parallel import merge_shards, sample_shard

QUICK = settings(derandomize=True, database=None, deadline=None, max_examples=200)
SEEDS = [0, 1, -1, 12345, 2**32, 2**63 - 1, -(2**63)]
OFF = float("-inf")


def noise(seed: int, positions: range, vocab: int) -> Tensor:
    """Noise [position, token] of one seed."""
    return exponential_noise(torch.full((len(positions),), seed), torch.tensor(list(positions)), vocab)


def kolmogorov(values: Tensor) -> float:
    """sqrt(n) times the largest distance from the exponential distribution; above 1.95 once in a thousand."""
    x = values.flatten().double().sort().values
    n = len(x)
    cdf, steps = -torch.expm1(-x), torch.arange(n + 1, dtype=torch.float64, device=x.device) / n
    return math.sqrt(n) * max((cdf - steps[:-1]).max().item(), (steps[1:] - cdf).max().item())


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """How many deviations the counts lie from what is expected; rare outcomes are counted together."""
    counts, expected = counts.double(), probabilities.double() * counts.sum()
    rare = expected < 10
    counts, expected = (torch.cat((x[~rare], x[rare].sum()[None])) for x in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum().item() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("seed", SEEDS)
def test_noise_is_exponential(seed: int) -> None:
    """All of it; the smallest of each row, which decides who is drawn; and how many are smaller still."""
    every = noise(seed, range(200), 1000)
    assert every.min() > 0 and every.isfinite().all()
    assert kolmogorov(every) < 1.95
    assert kolmogorov(noise(seed, range(4000), 64).amin(1) * 64) < 1.95
    near = every[every < 0.01]
    assert len(near.unique()) >= len(near) - 1  # fine enough to tell who is first
    small = (noise(seed, range(20), 100_000) < 1e-4).sum().item()
    assert abs(small - 200) < 4 * math.sqrt(200)


def correlation(a: Tensor, b: Tensor) -> float:
    """In deviations from none, of the noise and of its logarithm; the larger."""
    pairs = ((a, b), (a.log(), b.log()))
    found = [torch.corrcoef(torch.stack((x.flatten(), y.flatten())))[0, 1].item() for x, y in pairs]
    return max(map(abs, found)) * math.sqrt(a.numel())


@pytest.mark.parametrize("seed", SEEDS)
def test_noise_is_independent(seed: int) -> None:
    """Of the next token, position and seed, of seeds a power of two away, and where seed and position trade."""
    base = noise(seed, range(1, 101), 1000)
    others = [base.roll(1, 1), base.roll(1, 0), noise(seed, range(2, 102), 1000)]
    for step in (1, 2, 2**31, 2**32, 2**40):
        near = seed + step if seed + step < 2**63 else seed - step
        others += [noise(near, range(1, 101), 1000), noise(near, range(100), 1000)]
    others += [noise(seed, range(1 + 2**16, 101 + 2**16), 1000)]
    for other in others:
        assert correlation(base, other) < 4.5  # 7 x 14 x 2 correlations
        same = (base.argmin(1) == other.argmin(1)).sum().item()
        assert same <= 3  # 0.1 are expected of 100 rows


def test_noise_does_not_repeat() -> None:
    """No two rows of many seeds and positions begin alike."""
    seed, position = torch.arange(64).repeat_interleave(256), torch.arange(256).repeat(64)
    assert len(exponential_noise(seed, position, 3).unique(dim=0)) == 64 * 256


def test_noise_depends_on_seed_and_position_only() -> None:
    """Bit for bit the same, alone or in any company, in any row, and for a larger vocabulary."""
    seed = torch.tensor([5, -7, 5, 2**62, 0])
    position = torch.tensor([0, 3, 1, 900, 3])
    together = exponential_noise(seed, position, 1003)
    order = torch.tensor([4, 0, 3, 1, 2, 0])
    assert torch.equal(exponential_noise(seed[order], position[order], 1003), together[order])
    for i in range(5):
        assert torch.equal(exponential_noise(seed[i : i + 1], position[i : i + 1], 1003)[0], together[i])
    assert torch.equal(exponential_noise(seed, position, 2000)[:, :1003], together)


def params(n: int, **changes: Any) -> SamplingTensors:
    """Settings of n rows; numbers stand for all rows."""
    values = {"temperature": 1.0, "seed": 0, "positions": 0, "processed_logprobs": False, **changes}
    for name, dtype in (
        ("temperature", torch.float32), ("seed", torch.long), ("positions", torch.long),
        ("processed_logprobs", torch.bool)
    ):  # fmt: skip
        if values[name] is not None:
            value = torch.as_tensor(values[name], dtype=dtype)
            values[name] = value.expand(n) if value.ndim == 0 else value
    return SamplingTensors(**{"top_k_top_p": None, "logit_edits": None} | values)


def filters(n: int, vocab: int, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> TopKTopP:
    return TopKTopP(torch.full((n,), top_k or vocab), torch.full((n,), top_p), torch.full((n,), min_p))


def spread(vocab: int, deviation: float = 1.5) -> Tensor:
    """Logits [V], fixed."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(7)
    return torch.randn(vocab, generator=generator) * deviation


DRAWS = 20_000


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("seed", [0, 99, -(2**50)])
def test_frequencies(seed: int, temperature: float) -> None:
    """The positions of a long text draw each token as often as softmax says."""
    logits = spread(50)
    s = params(DRAWS, seed=seed, positions=torch.arange(DRAWS), temperature=temperature)
    counts = sample(logits.expand(DRAWS, -1), s).token_ids.bincount(minlength=50)
    assert abs(chi_square(counts, (logits.double() / temperature).softmax(-1))) < 4


def test_frequencies_over_seeds() -> None:
    """So do many seeds at one position: samples of one prompt."""
    logits = spread(50)
    s = params(DRAWS, seed=torch.arange(DRAWS), positions=17)
    counts = sample(logits.expand(DRAWS, -1), s).token_ids.bincount(minlength=50)
    assert abs(chi_square(counts, logits.double().softmax(-1))) < 4


def test_frequencies_of_a_flat_distribution() -> None:
    """With a vocabulary as large as a model's: no token is favoured by its number."""
    rows, vocab = 256, 65_536
    token = sample(torch.zeros(rows, vocab), params(rows, positions=torch.arange(rows))).token_ids
    assert abs(chi_square((token // 8192).bincount(minlength=8), torch.full((8,), 1 / 8))) < 4
    assert len(token.unique()) > 250


def _rows(s: SamplingTensors, start: int, stop: int) -> SamplingTensors:
    return SamplingTensors(*(None if x is None else x[start:stop] for x in s))


def test_frequencies_after_filter_and_edits() -> None:
    """Drawn from the distribution that is reported as processed."""
    logits = spread(30)
    none = torch.zeros(DRAWS)
    edits = LogitEdits(
        rows=torch.arange(DRAWS),
        token_ids=logits.argmax().expand(DRAWS),
        bias=torch.full((DRAWS,), -1.0),
        output_counts=none,
        seen=none.bool(),
        presence_penalty=none,
        frequency_penalty=none,
        repetition_penalty=none + 1,
    )
    asked = {
        "temperature": 0.8,
        "top_k_top_p": filters(DRAWS, 30, 12, 0.9, 0.02),
        "logit_edits": edits,
        "processed_logprobs": True,
    }
    drawn = sample(logits.expand(DRAWS, -1), params(DRAWS, positions=torch.arange(DRAWS), **asked), num_top_logprobs=30)
    assert (drawn.top_logprobs == drawn.top_logprobs[0]).all()
    probabilities = torch.zeros(30).scatter(0, drawn.top_token_ids[0], drawn.top_logprobs[0].exp())
    counts = drawn.token_ids.bincount(minlength=30)
    assert 3 < (probabilities > 0).sum() < 12 and counts[probabilities == 0].sum() == 0
    assert abs(chi_square(counts, probabilities)) < 4


def test_greedy() -> None:
    """The most likely token whatever the seed; in a step of its own and beside rows that draw."""
    logits = spread(400).view(8, 50) * 0.1
    alone = sample(logits, params(8, temperature=0.0, seed=None)).token_ids
    assert torch.equal(alone, logits.argmax(-1))
    mixed = params(8, temperature=torch.tensor([0.0, 1.0] * 4), positions=torch.arange(8))
    drawn = sample(logits, mixed).token_ids
    assert torch.equal(drawn[::2], alone[::2]) and not torch.equal(drawn, alone)
    assert torch.equal(sample(logits, params(8, temperature=1e-4)).token_ids, alone)


def test_a_row_does_not_depend_on_its_company() -> None:
    """Token and logprobs of each row, alone and in a batch of all kinds of settings: bit for bit."""
    logits = spread(6 * 40, 3.0).view(6, 40)
    logits[:, 5] = -300.0  # a probability of 0 in fp32, but not a banned token
    filter = TopKTopP(
        torch.tensor([40, 5, 40, 3, 40, 40]),
        torch.tensor([1.0, 1.0, 0.7, 0.9, 1.0, 1.0]),
        torch.tensor([0.0, 0.0, 0.0, 0.1, 0.0, 0.3]),
    )
    s = params(
        6,
        temperature=torch.tensor([1.0, 0.7, 0.0, 0.0, 0.0, 1.3]),
        seed=torch.tensor([3, -3, 1, 1, 0, 2**40]),
        positions=torch.arange(6) * 100,
        processed_logprobs=True,
        top_k_top_p=filter,
    )
    together = sample(logits, s, num_top_logprobs=40)
    for i in range(6):
        own = TopKTopP(*(x[i : i + 1] for x in filter))
        greedy = s.temperature[i] == 0
        off = greedy or (own.top_k == 40 and own.top_p == 1 and own.min_p == 0)
        rows = _rows(s._replace(top_k_top_p=None), i, i + 1)
        alone = rows._replace(top_k_top_p=None if off else own, seed=None if greedy else rows.seed)
        for one, all_rows in zip(sample(logits[i : i + 1], alone, num_top_logprobs=40), together, strict=True):
            assert torch.equal(one[0], all_rows[i]), i


def supported(row: Tensor, top_k: int, top_p: float, min_p: float) -> tuple[set[int], float]:
    """The tokens a sort leaves, in float64, and how far the nearest decision was from going the other way."""
    p = row.double().softmax(-1)
    order = p.argsort(descending=True, stable=True).tolist()
    at_least = p[order[min(top_k or len(row), len(row)) - 1]].item()
    kept = [i for i in order if p[i] >= at_least]
    margin = 1.0
    if top_p < 1:
        mass, total = 0.0, sum(p[i].item() for i in kept)
        for i in kept:
            mass += p[i].item()
            margin = min(margin, abs(mass / total - top_p))
            if mass >= top_p * total:
                at_least = p[i].item()
                break
        kept = [i for i in kept if p[i] >= at_least]
    relative = p / p.max()
    if 0 < min_p < 1:  # at 0 and at 1 it is exact
        margin = min(margin, ((relative - min_p).abs() / min_p).min().item())
    return {i for i in kept if relative[i] >= min_p}, margin


@QUICK
@given(
    eighths=st.lists(st.integers(-60, 60), min_size=1, max_size=60),  # logits with ties, else well apart
    top_k=st.sampled_from([0, 1, 2, 3, 5, 20, 60]),
    top_p=st.one_of(st.sampled_from([1.0, 1e-9, 1e-3, 0.5, 0.9, 0.999]), st.integers(1, 99).map(lambda n: n / 100)),
    min_p=st.one_of(st.sampled_from([0.0, 1.0, 0.5, 0.05]), st.integers(1, 99).map(lambda n: n / 100)),
)
def test_support(eighths: list[int], top_k: int, top_p: float, min_p: float) -> None:
    """The tokens that top_k, top_p and min_p leave are those of a sort; what is left keeps its logit."""
    row = torch.tensor(eighths) / 8
    want, margin = supported(row, top_k, top_p, min_p)
    assume(margin > 1e-5)  # else rounding decides
    ours = filter_top_k_top_p(row[None], filters(1, len(row), top_k, top_p, min_p))[0]
    assert {i for i, z in enumerate(ours.tolist()) if z != OFF} == want
    assert all(ours[i] == row[i] for i in want)


@pytest.mark.parametrize("vocab", [1, 100, 50_000])
def test_support_of_many_rows(vocab: int) -> None:
    """Rows of different settings in one call, some with banned tokens, each as if it were alone."""
    logits = spread(8 * vocab, 2.0).view(8, vocab)
    logits[::2, vocab // 2 :] = OFF if vocab > 1 else 0.0
    top_k, top_p = [vocab, 1, 7, vocab, vocab, 40, vocab, 3], [1.0, 1.0, 1.0, 0.4, 1.0, 0.8, 1e-6, 0.5]
    min_p = [0.0, 0.0, 0.0, 0.0, 0.2, 0.01, 0.0, 0.9]
    ours = filter_top_k_top_p(logits, TopKTopP(torch.tensor(top_k), torch.tensor(top_p), torch.tensor(min_p)))
    for i in range(8):
        want, margin = supported(logits[i], top_k[i], torch.tensor(top_p[i]).item(), min_p[i])
        assert margin > 1e-6, "choose another row"
        allowed = (ours[i] != OFF).nonzero().flatten().tolist()
        assert set(allowed) == {t for t in want if logits[i, t] != OFF}


def test_support_of_near_neighbours() -> None:
    """Probabilities a few units in the last place apart are still told apart."""
    row = torch.arange(100)[None] * 3e-7
    p = row.softmax(-1)[0]
    assert len(p.unique()) > 90
    for k in range(1, 100):
        kept = filter_top_k_top_p(row, filters(1, 100, top_k=k))[0] != OFF
        assert torch.equal(kept, p >= p.sort(descending=True).values[k - 1])


def test_ties_stay_together() -> None:
    """Tokens with the same logit have the same right to be drawn: a filter takes all of them or none."""
    row = torch.tensor([[1.0, 3.0, 1.0, 3.0, 1.0, 0.0, 3.0]])
    kept = {
        k: (filter_top_k_top_p(row, filters(1, 7, top_k=k))[0] != OFF).nonzero().flatten().tolist()
        for k in (1, 3, 4, 7)
    }
    assert kept == {1: [1, 3, 6], 3: [1, 3, 6], 4: [0, 1, 2, 3, 4, 6], 7: [0, 1, 2, 3, 4, 5, 6]}
    assert (filter_top_k_top_p(row, filters(1, 7, top_p=0.01))[0] != OFF).nonzero().flatten().tolist() == [1, 3, 6]
    assert (filter_top_k_top_p(row, filters(1, 7, min_p=1.0))[0] != OFF).nonzero().flatten().tolist() == [1, 3, 6]


ENTRY = st.tuples(
    st.sampled_from([0.0, 0.5, -3.0, 100.0, OFF]),  # bias
    st.integers(0, 5),  # count
    st.booleans(),  # seen
    st.sampled_from([0.0, 0.7, -2.0]),  # presence
    st.sampled_from([0.0, 0.3, -1.0]),  # frequency
    st.sampled_from([1.0, 1.3, 0.5]),  # repetition
)


@QUICK
@given(entries=st.dictionaries(st.tuples(st.integers(0, 3), st.integers(0, 9)), ENTRY, max_size=40))
def test_edit(entries: dict[tuple[int, int], tuple]) -> None:
    """Each named entry as a loop would change it, all others and the logits given as they were."""
    logits = spread(40, 3.0).view(4, 10)
    before, want = logits.clone(), logits.tolist()
    for (row, token), (bias, count, seen, presence, frequency, repetition) in entries.items():
        z = want[row][token]
        if seen:
            z = z / repetition if z > 0 else z * repetition
        z -= frequency * count
        z -= presence if count else 0.0
        want[row][token] = z + bias
    where = torch.tensor(list(entries), dtype=torch.long).view(-1, 2)
    columns = [torch.tensor([e[i] for e in entries.values()], dtype=torch.float32) for i in range(6)]
    columns[2] = columns[2].bool()
    ours = apply_penalties(logits, LogitEdits(where[:, 0], where[:, 1], *columns))
    torch.testing.assert_close(ours, torch.tensor(want), atol=1e-5, rtol=1e-6)
    assert torch.equal(logits, before)


def test_banned_tokens_are_not_drawn() -> None:
    """A bias of -inf outlasts every other edit, also for greedy rows."""
    logits = torch.zeros(100, 3)
    logits[:, 1] = 50.0
    ban = LogitEdits(*(torch.full((100,), x) for x in (0, 1, OFF, 1.0, True, -2.0, -2.0, 0.5)))
    ban = ban._replace(rows=torch.arange(100))
    for temperature in (0.0, 1.0):
        token = sample(
            logits, params(100, temperature=temperature, positions=torch.arange(100), logit_edits=ban)
        ).token_ids
        assert (token != 1).all()


def test_logprobs() -> None:
    """log_softmax, of the token and of the most likely ones in falling order; no more than there are."""
    logits = spread(60, 4.0).view(3, 20)
    want = logits.double().log_softmax(-1)
    token = torch.tensor([3, 0, 19])
    for top in (0, 1, 5, 20, 50):
        value, top_token, top_value = gather_logprobs(logits, token, top)
        torch.testing.assert_close(value.double(), want.gather(1, token[:, None])[:, 0], atol=1e-5, rtol=0)
        best = want.sort(-1, descending=True)
        assert torch.equal(top_token, best.indices[:, :top])
        torch.testing.assert_close(top_value.double(), best.values[:, :top], atol=1e-5, rtol=0)


def test_logprobs_raw_and_processed() -> None:
    """Raw is the model's distribution; processed is after edits, temperature and filter, row by row."""
    logits = spread(80, 2.0).view(2, 40).repeat(2, 1)
    one, zero = torch.ones(4), torch.zeros(4)
    edits = LogitEdits(torch.arange(4), logits.argmin(-1), one * 20, zero, zero.bool(), zero, zero, one)
    processed = torch.tensor([False, True, True, True])
    cold = torch.tensor([0.5, 0.5, 0.5, 0.0])
    asked = {"logit_edits": edits, "top_k_top_p": filters(4, 40, top_k=6), "positions": torch.arange(4)}
    drawn = sample(logits, params(4, temperature=cold, processed_logprobs=processed, **asked), num_top_logprobs=8)
    assert drawn.token_ids[3] == logits[3].argmin()  # the biased one
    changed = apply_penalties(logits, edits)
    want = [logits[0], *filter_top_k_top_p(changed[1:3] / 0.5, filters(2, 40, top_k=6)), changed[3]]
    for i, row in enumerate(want):
        exact = row.double().log_softmax(-1)
        assert drawn.logprobs[i].item() == pytest.approx(exact[drawn.token_ids[i]].item(), abs=1e-5)
        assert drawn.top_token_ids[i, :6].tolist() == exact.topk(6).indices.tolist()
        torch.testing.assert_close(drawn.top_logprobs[i].double(), exact.topk(8).values, atol=1e-5, rtol=0)


def test_logprobs_when_nobody_asks() -> None:
    """Zeros and no columns; the token is the same."""
    logits = spread(80).view(2, 40)
    s = params(2, seed=torch.tensor([1, 2]))
    plain, scored = sample(logits, s), sample(logits, s, num_top_logprobs=0)
    assert torch.equal(plain.token_ids, scored.token_ids)
    assert plain.logprobs.tolist() == [0, 0] and (scored.logprobs < 0).all()
    for drawn in (plain, scored):
        assert drawn.top_token_ids.shape == drawn.top_logprobs.shape == (2, 0)


COLD = [1e-45, 1.2e-38, 1e-30, 9.9e-6]  # of fp32, from its smallest number on


@pytest.mark.parametrize("processed", [False, True])
@pytest.mark.parametrize("filtered", [False, True])
def test_a_temperature_near_0_is_greedy(filtered: bool, processed: bool) -> None:
    """Token, logprob and most likely tokens are those of temperature 0, also of large logits and beside other rows."""
    logits = spread(5 * 40, 3.0).view(5, 40)
    logits[1] *= 1e6
    filter = filters(5, 40, top_k=7, top_p=0.9, min_p=0.01) if filtered else None
    how: dict[str, Any] = {"processed_logprobs": processed, "top_k_top_p": filter, "positions": torch.arange(5)}
    wanted = sample(logits, params(5, temperature=torch.tensor([0.0] * 4 + [1.0]), **how), num_top_logprobs=3)
    drawn = sample(logits, params(5, temperature=torch.tensor([*COLD, 1.0]), **how), num_top_logprobs=3)
    assert all(torch.equal(a, b) for a, b in zip(drawn, wanted, strict=True))
    assert torch.isfinite(drawn.logprobs).all()
    parts = [sample_shard(logits[:, i : i + 20], params(5, temperature=torch.tensor([*COLD, 1.0]), **how), 3, i, 20)
             for i in (0, 20)]  # fmt: skip
    if not filtered:
        assert torch.equal(merge_shards(torch.stack(parts), 40, 3).token_ids, wanted.token_ids)


@pytest.mark.parametrize("top_p", [0.0, 1e-45, 1e-38, 1e-10])
def test_a_top_p_near_0_keeps_the_most_likely_token(top_p: float) -> None:
    """The smallest set that reaches it has one token, never none; of ties all."""
    logits = spread(30).view(2, 15)
    logits[1, 4] = logits[1, 9] = 20.0
    kept = filter_top_k_top_p(logits, filters(2, 15, top_p=top_p)) > OFF
    assert kept.sum(-1).tolist() == [1, 2] and kept[0, logits[0].argmax()] and kept[1, [4, 9]].all()


@pytest.mark.parametrize("count", [1, 33])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("way", ["greedy", "drawn", "filtered", "edited", "guided", "masked", "parts"])
def test_logits_that_are_no_numbers_show(way: str, value: float, count: int) -> None:
    """The logprob of such a row is not finite, whether or not anybody asks for logprobs, or a grammar masks the logit;
    its token is one of the vocabulary, and other rows are as without it."""
    logits, vocab = spread(4 * 33).view(4, 33), 33
    spoilt = logits.clone()
    spoilt[2, 5 : 5 + count] = value
    how: dict[str, Any] = {"seed": None if way == "greedy" else 3, "positions": torch.arange(4)}
    how["temperature"] = 0.0 if way == "greedy" else torch.tensor([0.0, 0.7, 0.7, 1.3])
    if way == "filtered":
        how["top_k_top_p"] = filters(4, vocab, top_k=5, top_p=0.9)
    if way == "edited":
        how["logit_edits"] = LogitEdits(*(torch.tensor([x]) for x in (2, 5, OFF, 0.0, False, 0.0, 0.0, 1.0)))
    if way in ("guided", "masked"):
        how["token_mask"] = torch.full((4, 2), ~(1 << 5) if way == "masked" else -1, dtype=torch.int32)

    def draw(x: Tensor, s: SamplingTensors, top: int | None) -> SamplerOutput:
        if way != "parts":
            return sample(x, s, top)
        x = torch.nn.functional.pad(x, (0, 1))
        found = [sample_shard(x[:, i : i + 17], s, top, i, min(17, vocab - i)) for i in (0, 17)]
        return merge_shards(torch.stack(found), vocab, top)

    for processed, top in itertools.product((False, True), (None, 0, 2)):
        s = params(4, **how, processed_logprobs=processed)
        drawn, wanted = draw(spoilt, s, top), draw(logits, s, top)
        sound = way == "masked" and count == 1 and processed and top is not None  # what is drawn from
        assert bool(drawn.logprobs[2].isfinite()) is sound
        assert ((drawn.token_ids >= 0) & (drawn.token_ids < vocab)).all()
        others = torch.tensor([0, 1, 3])
        assert all(torch.equal(a[others], b[others]) for a, b in zip(drawn, wanted, strict=True))
        assert wanted.logprobs.isfinite().all()
