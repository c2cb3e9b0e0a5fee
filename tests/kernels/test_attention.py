"""Compares the attention backends with the formula in float64, over ragged batches of all types of steps."""

import random
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgen
from fastgen import Batch, ModelConfig
from fastgen.core.attention import causal_mask, reference
from fastgen.core.layers import rope_and_cache_kv, rope_cos_sin
from fastgen.core.scheduler import Span
from fastgen.core.types import SharedPrefix
from fastgen.kernels import attention, batch_invariant
from fastgen.kernels.select import ATTENTION_BACKENDS, select_attention_backend

GARBAGE = 1e3  # in every slot that no query may see: a result that uses one is far off
STEP_TYPES = {  # (computed, new) tokens of a sequence
    "prefill": lambda r: (0, r.randint(2, 40)),
    "continuation": lambda r: (r.randint(1, 40), r.randint(2, 20)),
    "decode": lambda r: (r.randint(0, 70), 1),
}
BACKENDS = {name: select_attention_backend(name, torch.get_default_device()) for name in ATTENTION_BACKENDS}
WINDOWS = (None, 1, 6, 20, 1000)
Case = tuple[Batch, Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]


def random_batch(
    seed: int, kind: str, spec: ModelConfig, page: int, device: str, *, sequences: int = 5, pad: int = 0
) -> Case:
    """Returns a random batch, its queries, the two caches, and each sequence's keys and values in order."""
    r, normal = random.Random(seed), torch.Generator(torch.get_default_device()).manual_seed(seed)
    num_tokens = (
        [STEP_TYPES[kind]] * sequences if kind != "mixed" else r.choices(list(STEP_TYPES.values()), k=sequences)
    )
    shapes = [f(r) for f in num_tokens]
    needed = [-(-(cached + new) // page) for cached, new in shapes]
    ids = list(range(1, sum(needed) + 3))
    r.shuffle(ids)
    plan, kv_by_seq = [], []
    k, v = (torch.full(((len(ids) + 1) * page, spec.num_kv_heads, spec.head_dim), GARBAGE) for _ in "kv")
    for i, ((cached, new), n) in enumerate(zip(shapes, needed, strict=True)):
        pages, ids = ids[:n], ids[n:]
        plan.append(Span(i, cached, cached + new, True, tuple(pages)))
        keys, values = (torch.randn(cached + new, spec.num_kv_heads, spec.head_dim, generator=normal) for _ in "kv")
        for position in range(cached + new):
            slot = pages[position // page] * page + position % page
            k[slot], v[slot] = keys[position], values[position]
        kv_by_seq.append((keys, values))
    tokens = {span.id: [0] * span.stop for span in plan}
    count = sum(span.stop - span.start for span in plan)
    batch = fastgen.build_batch(tuple(plan), tokens, page, device, pad_to=count + pad)
    q = torch.randn(count + pad, spec.num_q_heads, spec.head_dim, generator=normal)
    return batch, q.to(device), k.to(device), v.to(device), kv_by_seq


def random_shared_batch(
    seed: int, spec: ModelConfig, page: int, device: str, width: int
) -> tuple[Batch, Tensor, Tensor, Tensor]:
    """Returns a random batch with groups of up to `width` sequences that share a prefix, sequences in no group, and
    unused groups; its queries and the two caches.
    """
    r, normal = random.Random(seed), torch.Generator(torch.get_default_device()).manual_seed(seed)
    unused_pages = iter(r.sample(range(1, 4000), 3999))
    rows: list[tuple[int, list[int], int, int]] = []  # group, its pages, tokens after them, new tokens
    groups = 0
    for _ in range(r.randint(1, 2)):
        shared_pages = [next(unused_pages) for _ in range(r.randint(1, max(1, r.choice([20, 130, 200]) // page)))]
        for size in (width, r.randint(1, width)):
            rows += [(groups, shared_pages, r.choice([1, page, r.randint(1, 90)]), 1) for _ in range(min(size, 3))]
            groups += 1
    rows += [(-1, [], new + r.randint(0, 70), new) for new in (1, 1, r.randint(2, 9))]
    r.shuffle(rows)
    shared = SharedPrefix(torch.full((groups + 2, width), -1), torch.zeros(groups + 2), torch.zeros(len(rows)))
    plan, used_slots = [], []
    for i, (group, shared_pages, num_own_tokens, new) in enumerate(rows):
        pages = shared_pages + [next(unused_pages) for _ in range(-(-num_own_tokens // page))]
        num_shared, total = len(shared_pages) * page, len(shared_pages) * page + num_own_tokens
        plan.append(Span(i, total - new, total, True, tuple(pages)))
        used_slots += [pages[n // page] * page + n % page for n in range(total)]
        if group >= 0:
            shared.num_shared_tokens[group] = shared.num_skipped_tokens[i] = num_shared
            shared.group_rows[group, int((shared.group_rows[group] >= 0).sum())] = i
    k, v = (torch.full((4000 * page, spec.num_kv_heads, spec.head_dim), GARBAGE) for _ in "kv")
    for x in (k, v):
        x[used_slots] = torch.randn(len(used_slots), spec.num_kv_heads, spec.head_dim, generator=normal)
    pad = r.choice([0, 2])
    batch = fastgen.build_batch(
        tuple(plan), {span.id: [0] * span.stop for span in plan}, page, device, pad_to=sum(x[3] for x in rows) + pad
    )
    num_skipped = torch.cat((shared.num_skipped_tokens, torch.zeros(pad)))
    shared = SharedPrefix(
        *(x.to(device=device, dtype=torch.int32) for x in shared._replace(num_skipped_tokens=num_skipped))
    )
    q = torch.randn(len(batch.token_ids), spec.num_q_heads, spec.head_dim, generator=normal)
    return batch._replace(shared_prefix=shared), q.to(device), k.to(device), v.to(device)


def formula(batch: Batch, q: Tensor, kv_by_seq: list[tuple[Tensor, Tensor]], window: int | None) -> Tensor:
    """Returns softmax(q k / sqrt(H)) v in float64, computed token by token."""
    rows = []
    for r, (keys, values) in enumerate(kv_by_seq):
        for t in range(int(batch.query_start_loc[r]), int(batch.query_start_loc[r + 1])):
            last = int(batch.positions[t])
            first = 0 if window is None else max(0, last - window + 1)
            group = q.shape[1] // keys.shape[1]
            k, v = (x[first : last + 1].double().repeat_interleave(group, 1) for x in (keys, values))
            weight = (torch.einsum("qh,sqh->sq", q[t].double(), k) / q.shape[2] ** 0.5).softmax(0)
            rows.append(torch.einsum("sq,sqh->qh", weight, v))
    return torch.stack(rows)


def shape(q_heads: int, kv_heads: int, head: int) -> ModelConfig:
    """Returns a config of which attention reads the heads only."""
    sizes = {
        "architecture": "LlamaForCausalLM",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_layers": 1,
        "vocab_size": 8,
        "context_length": 128,
    }
    return ModelConfig(**sizes, num_q_heads=q_heads, num_kv_heads=kv_heads, head_dim=head, sliding_windows=(None,))


def two_windows(seed: int) -> tuple[int | None, ...]:
    """Returns two of the windows, each in two of five cases: interpreted kernels are slow."""
    return WINDOWS[seed % len(WINDOWS)], WINDOWS[(seed + 2) % len(WINDOWS)]


@pytest.mark.parametrize("kind", [*STEP_TYPES, "mixed"])
@pytest.mark.parametrize("page", [1, 16, 128])
@pytest.mark.parametrize(("ratio", "head"), [(1, 64), (3, 16), (4, 128), (5, 96), (7, 16), (8, 64)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_formula(backend: str, ratio: int, head: int, page: int, kind: str, device: str) -> None:
    """Every type of step agrees with the formula, for all windows, heads, page sizes and orders of pages."""
    spec = shape(2 * ratio, 2, head)
    batch, q, k, v, kv_by_seq = random_batch(ratio * page + head, kind, spec, page, device)
    attend = BACKENDS[backend](batch, spec)
    for window in two_windows(ratio + page + len(kind)) if backend == "triton" and device == "cpu" else WINDOWS:
        actual = attend(q, k, v, window)
        torch.testing.assert_close(actual.double(), formula(batch, q, kv_by_seq, window), atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(12))
def test_backends_agree(seed: int, device: str) -> None:
    """All backends agree with the reference on ragged mixed batches, and leave padding finite.

    Padding tokens attend to the scratch page, which holds GARBAGE here: values near 1000, which are rounded to 6e-5.
    Nothing reads their rows.
    """
    r = random.Random(seed)
    page = r.choice([1, 2, 16, 128])
    spec = shape(*r.choice([(3, 3), (6, 2), (4, 1), (10, 2), (7, 1), (8, 1)]), r.choice([16, 64, 96, 128]))
    num_seqs, pad = r.randint(1, 20), r.choice([0, 1, 9])
    batch, q, k, v, _ = random_batch(seed, "mixed", spec, page, device, sequences=num_seqs, pad=pad)
    reference, *others = (BACKENDS[name](batch, spec) for name in ATTENTION_BACKENDS)
    for window in two_windows(seed) if device == "cpu" else WINDOWS:
        expected = reference(q, k, v, window)
        for other in others:
            assert_close_but_for_padding(other(q, k, v, window), expected, pad)


def assert_close_but_for_padding(out: Tensor, expected: Tensor, pad: int) -> None:
    """Asserts that all rows but the last `pad` are equal up to 1e-5, and that those are finite."""
    num_tokens = len(out) - pad
    torch.testing.assert_close(out[:num_tokens], expected[:num_tokens], atol=1e-5, rtol=0)
    assert torch.isfinite(out).all()


BATCH_INVARIANT = {
    "triton": partial(attention.paged_attention, batch_invariant=True),
    "tiles": batch_invariant.attention,
}


@pytest.mark.parametrize("backend", BATCH_INVARIANT)
@pytest.mark.parametrize("seed", range(6))
def test_batch_invariance(seed: int, backend: str, device: str) -> None:
    """A token's attention has the same bits alone and among other sequences, in a decode step and in a prefill."""
    r = random.Random(seed)
    page = (1, 16, 64)[seed % 3]
    spec = shape(*((3, 3), (6, 2), (5, 1), (8, 1))[seed % 4], (16, 64, 128)[seed % 3])
    batch, q, k, v, kv_by_seq = random_batch(
        seed, "mixed", spec, page, device, sequences=r.randint(3, 9), pad=r.choice([0, 3])
    )
    start = batch.query_start_loc.tolist()
    for window in (None, WINDOWS[seed % 5], 20):
        attend = BATCH_INVARIANT[backend](batch, spec)
        actual = attend(q, k, v, window)
        expected = formula(batch, q, kv_by_seq, window)
        torch.testing.assert_close(actual[: len(expected)].double(), expected, atol=1e-5, rtol=0)
        for i in r.sample(range(len(kv_by_seq)), 2):
            for first in {start[i], start[i + 1] - 1, r.randrange(start[i], start[i + 1])}:
                last = slice(first, start[i + 1])  # the sequence alone, and only its last tokens
                one = Batch(
                    batch.token_ids[last], batch.positions[last], batch.slot_mapping[last],
                    batch.query_start_loc.new_tensor([0, start[i + 1] - first]), batch.seq_lens[i : i + 1],
                    batch.req_idx[i : i + 1], batch.page_table, batch.logits_indices[:1], page,
                )  # fmt: skip
                alone = BATCH_INVARIANT[backend](one, spec)(q[last], k, v, window)
                bitwise = backend == "tiles" or device == "cuda"  # NumPy, in Triton's interpreter, sums in any order
                torch.testing.assert_close(alone, actual[last], atol=0 if bitwise else 1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(12))
def test_shared_prefix(seed: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every backend computes the same with groups that share a prefix as without; padding rows are finite."""
    r = random.Random(seed)
    monkeypatch.setitem(attention.SHARED_PREFIX_TILE, "MIN_TILES", r.choice([1, 8]))  # 1: several splits of few keys
    ratio, kv_heads, head = ((1, 2, 64), (4, 1, 128), (5, 1, 96), (7, 2, 16), (8, 1, 64), (3, 1, 64))[seed % 6]
    page, spec = (1, 16, 64, 128)[seed % 4], shape(ratio * kv_heads, kv_heads, head)
    batch, q, k, v = random_shared_batch(seed, spec, page, device, r.choice([2, max(1, 64 // ratio)]))
    alone, pad = batch._replace(shared_prefix=None), int((batch.req_idx == 0).sum())
    for window in (None, r.choice([1, r.randint(2, 90), 300])):
        exact = reference(alone, spec)(q, k, v, window)
        for backend in BACKENDS.values():
            assert_close_but_for_padding(backend(batch, spec)(q, k, v, window), exact, pad)


def test_unused_groups_are_not_read(device: str) -> None:
    """Sequences in no group never read results of groups, whatever that memory holds."""
    spec = shape(4, 2, 16)
    batch, q, k, v, _ = random_batch(5, "decode", spec, 16, device)
    zero = torch.zeros(len(batch.seq_lens), dtype=torch.int32, device=device)
    shared = SharedPrefix(torch.full((3, 16), -1, dtype=torch.int32, device=device), zero[:3], zero)
    with pytest.MonkeyPatch.context() as patch:
        poison_new_memory(patch)
        patch.setattr(
            attention, "NARROW_HEAD_DECODE_TILE", attention.SUFFIX_DECODE_TILE
        )  # the tile of sequences in groups
        actual, alone = (
            BACKENDS["triton"](b, spec)(q, k, v, None) for b in (batch._replace(shared_prefix=shared), batch)
        )
    assert torch.equal(actual, alone)


ALL = {**BACKENDS, **BATCH_INVARIANT}
POISON = (float("nan"), float("inf"), float("-inf"))
# Padding reads the scratch page, which is poisoned too; NumPy, in Triton's interpreter, warns.
ignore_padding = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")


def poisoned(x: Tensor) -> Tensor:
    """Returns a copy of a cache with NaN and infinities in every slot that no sequence owns: scratch, free pages, and
    the ends of last pages."""
    values = x.new_tensor(POISON).repeat(-(-len(x) // 3))[: len(x), None, None]
    return torch.where((x == GARBAGE).all(-1, keepdim=True).all(-2, keepdim=True), values, x)


def poison_new_memory(patch: pytest.MonkeyPatch) -> None:
    """Fills memory that is allocated without values, such as splits' results, with NaN."""
    empty = torch.Tensor.new_empty

    def new_empty(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        new = empty(x, *args, **kwargs)
        return new.fill_(float("nan")) if new.is_floating_point() else new

    patch.setattr(torch.Tensor, "new_empty", new_empty)


@ignore_padding
@pytest.mark.parametrize("kind", [*STEP_TYPES, "mixed", "shared", "long"])
@pytest.mark.parametrize("backend", ALL)
def test_unowned_memory_is_not_used(backend: str, kind: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN and infinities in every slot that no sequence owns, padding's included, change no bit of any sequence's
    result: they are masked by selection, not multiplied by 0."""
    page, pad, spec = (16, 64)[len(kind) % 2], 2, shape(4, 2, 16)
    if kind == "shared":
        monkeypatch.setitem(attention.SHARED_PREFIX_TILE, "MIN_TILES", 1)  # several splits of few keys
        batch, q, k, v = random_shared_batch(4, spec, page, device, 2)
        pad = int((batch.req_idx == 0).sum())
    elif kind == "long":  # several splits of a sequence's keys
        monkeypatch.setitem(STEP_TYPES, "long", lambda r: (r.randint(258, 300), 1))
        batch, q, k, v, _ = random_batch(0, kind, spec, page, device, sequences=2, pad=pad)
    else:
        batch, q, k, v, _ = random_batch(4, kind, spec, page, device, sequences=3, pad=pad)
    attend, real = ALL[backend](batch, spec), len(q) - pad
    for window in (None, 6) if backend in ("reference", "sdpa") or device == "cuda" else ((None, 6)[len(kind) % 2],):
        clean = attend(q, k, v, window)[:real]
        with monkeypatch.context() as patch:
            poison_new_memory(patch)
            actual = attend(q, poisoned(k), poisoned(v), window)[:real]
        assert torch.isfinite(actual).all() and torch.equal(actual, clean)


@ignore_padding
@pytest.mark.parametrize("window", [None, 5])
def test_unowned_memory_is_not_used_by_fused_rope(
    window: int | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in slots that no sequence owns changes no bit where attention applies RoPE, for one, few and many keys."""
    page, spec, lengths, pad = 16, shape(2, 1, 16), [1, 65, 300], 1
    needed = [-(-n // page) for n in lengths]
    first = [1 + sum(needed[:i]) for i in range(len(needed))]
    plan = [Span(i, n - 1, n, True, tuple(range(f, f + c)))
            for i, (n, f, c) in enumerate(zip(lengths, first, needed, strict=True))]  # fmt: skip
    tokens = {i: [0] * n for i, n in enumerate(lengths)}
    batch = fastgen.build_batch(tuple(plan), tokens, page, device, pad_to=len(plan) + pad)
    k, v = (torch.full(((sum(needed) + 2) * page, 1, 16), GARBAGE) for _ in "kv")
    used = [span.pages[i // page] * page + i % page for span in plan for i in range(span.stop - 1)]
    k[used], v[used] = torch.randn(len(used), 1, 16), torch.randn(len(used), 1, 16)
    qkv, cos_sin = torch.randn(len(plan) + pad, 4, 16), rope_cos_sin(batch.positions, spec)
    attend = attention.paged_attention(batch, spec)
    clean, poisoned_caches = (k.clone(), v.clone()), (poisoned(k), poisoned(v))
    out = attend(attention.UnrotatedQKV(qkv, *cos_sin, batch.slot_mapping), *clean, window)[: len(plan)]
    with monkeypatch.context() as patch:
        poison_new_memory(patch)
        poisoned_out = attend(attention.UnrotatedQKV(qkv, *cos_sin, batch.slot_mapping), *poisoned_caches, window)[
            : len(plan)
        ]
    assert torch.isfinite(poisoned_out).all() and torch.equal(poisoned_out, out)
    owned = [*used, *batch.slot_mapping[: len(plan)].tolist()]
    assert all(torch.equal(x[owned], y[owned]) for x, y in zip(clean, poisoned_caches, strict=True))


@pytest.mark.parametrize("kind", [*STEP_TYPES, "mixed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16(backend: str, kind: str, device: str) -> None:
    """In bf16 the reference rounds its result only; a fused kernel may also round the softmax weights.

    Triton's interpreter computes with numpy, which has no bf16: there it is float16, within the same bound.
    """
    dtype = torch.float16 if (backend, device) == ("triton", "cpu") else torch.bfloat16
    spec = shape(8, 2, 64)
    batch, *arrays, kv_by_seq = random_batch(3, kind, spec, 16, device, sequences=8)
    attend = BACKENDS[backend](batch, spec)
    q, k, v = (x.to(dtype) for x in arrays)
    kv_by_seq = [(keys.to(dtype), values.to(dtype)) for keys, values in kv_by_seq]
    for window in WINDOWS:
        actual = attend(q, k, v, window)
        assert actual.dtype == dtype
        exact = formula(batch, q, kv_by_seq, window)
        rounded = exact.abs()
        if backend != "reference":
            rounded += formula(batch, q, [(keys, values.abs()) for keys, values in kv_by_seq], window)
        error = (actual.double() - exact).abs()
        assert (error <= 2**-8 * rounded + 1e-5).all(), error.max()  # 2^-8: half a unit in bf16's last place


@pytest.mark.parametrize("backend", BACKENDS)
def test_reads_only(backend: str, device: str) -> None:
    """Attention changes neither queries nor caches."""
    spec = shape(4, 2, 16)
    batch, *arrays, _ = random_batch(1, "mixed", spec, 4, device)
    before = [x.clone() for x in arrays]
    BACKENDS[backend](batch, spec)(*arrays, 5)
    assert all(torch.equal(x, y) for x, y in zip(arrays, before, strict=True))


def test_causal_mask() -> None:
    """A window of w covers the query itself and the w - 1 keys before it."""
    query, key = torch.arange(6)[:, None], torch.arange(6)
    for window in (None, 1, 3, 6, 7):
        for i, row in enumerate(causal_mask(query, key, window).tolist()):
            first = 0 if window is None else max(0, i - window + 1)
            assert row == [first <= j <= i for j in range(6)]


@pytest.mark.parametrize("seed", range(8))
def test_fused_rope(seed: int, device: str) -> None:
    """Attention that applies RoPE and writes the cache agrees with two separate functions, for few keys and for several
    splits of many, call after call."""
    dtype = (torch.float32, torch.float16)[seed // 4]
    r, kv_heads = random.Random(seed), (1, 2)[seed % 2]
    ratio, head = ((1, 64), (4, 128), (5, 96), (7, 16))[seed % 4]
    page, spec = (16, 1, 64)[seed % 3], shape(ratio * kv_heads, kv_heads, head)
    lengths = [1, r.choice([64, 65, 128, 129]), *(r.randint(300, 700) for _ in range(3 - kv_heads))]
    needed = [-(-n // page) for n in lengths]
    ids = r.sample(range(1, sum(needed) + 3), sum(needed))
    plan = [Span(i, n - 1, n, True, tuple(ids.pop() for _ in range(count)))
            for i, (n, count) in enumerate(zip(lengths, needed, strict=True))]  # fmt: skip
    pad = len(plan) + r.choice([0, 1])
    batch = fastgen.build_batch(tuple(plan), {i: [0] * n for i, n in enumerate(lengths)}, page, device, pad_to=pad)
    cos, sin = rope_cos_sin(batch.positions, spec)
    k, v = (torch.randn((sum(needed) + 3) * page, kv_heads, head).to(dtype) for _ in "kv")
    for window in (None, r.choice([1, 5, 100, 1000])):
        attend = attention.paged_attention(batch, spec)
        for _ in range(2):  # the second call uses what the first has left
            qkv = torch.randn(pad, (ratio + 2) * kv_heads, head).to(dtype)
            k[batch.slot_mapping], v[batch.slot_mapping] = GARBAGE, GARBAGE
            fused, plain = (k.clone(), v.clone()), (k.clone(), v.clone())
            out = attend(attention.UnrotatedQKV(qkv, cos, sin, batch.slot_mapping), *fused, window)
            q = rope_and_cache_kv(qkv, cos, sin, batch.slot_mapping, *plain)
            exact = reference(batch, spec)(q, *plain, window)
            unit = 1e-5 if dtype == torch.float32 else 2e-3
            torch.testing.assert_close(out, exact, atol=unit, rtol=0)
            for x, y in zip(fused, plain, strict=True):
                torch.testing.assert_close(x, y, atol=unit, rtol=unit)
