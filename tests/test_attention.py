"""The attention backends against a plain formula in float64, over ragged batches of every kind."""

import random
from functools import partial

import pytest
import torch
from torch import Tensor

import fastgen
from fastgen import Batch, Spec
from fastgen.ops.attention import PAGE, live
from fastgen.ops.backends import NAMES, choose
from fastgen.schedule import Span

GARBAGE = 1e3  # in every slot that no query may see: one that leaks in shows
KINDS = {  # (cached, new) tokens of a sequence
    "prefill": lambda r: (0, r.randint(2, 40)),
    "continuation": lambda r: (r.randint(1, 40), r.randint(2, 20)),
    "decode": lambda r: (r.randint(0, 70), 1),
}
BACKENDS = {name: choose(name, torch.get_default_device()) for name in NAMES}
WINDOWS = (None, 1, 6, 20, 1000)
Case = tuple[Batch, Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]


def make(seed: int, kind: str, spec: Spec, page: int, device: str, *, sequences: int = 5, pad: int = 0) -> Case:
    """A random batch, its queries, the cache, and each sequence's own keys and values in order."""
    r, normal = random.Random(seed), torch.Generator(torch.get_default_device()).manual_seed(seed)
    kinds = [KINDS[kind]] * sequences if kind != "mixed" else r.choices(list(KINDS.values()), k=sequences)
    shapes = [draw(r) for draw in kinds]
    needed = [-(-(cached + new) // page) for cached, new in shapes]
    ids = list(range(1, sum(needed) + 3))
    r.shuffle(ids)
    plan, own = [], []
    k, v = (torch.full(((len(ids) + 1) * page, spec.kv_heads, spec.head), GARBAGE) for _ in "kv")
    for i, ((cached, new), n) in enumerate(zip(shapes, needed, strict=True)):
        held, ids = ids[:n], ids[n:]
        plan.append(Span(i, cached, cached + new, True, tuple(held)))
        keys, values = (torch.randn(cached + new, spec.kv_heads, spec.head, generator=normal) for _ in "kv")
        for position in range(cached + new):
            slot = held[position // page] * page + position % page
            k[slot], v[slot] = keys[position], values[position]
        own.append((keys, values))
    tokens = {span.id: [0] * span.stop for span in plan}
    count = sum(span.stop - span.start for span in plan)
    batch = fastgen.stage(tuple(plan), tokens, page, device, pad=count + pad)
    q = torch.randn(count + pad, spec.q_heads, spec.head, generator=normal)
    return batch, q.to(device), k.to(device), v.to(device), own


def formula(batch: Batch, q: Tensor, own: list[tuple[Tensor, Tensor]], window: int | None) -> Tensor:
    """softmax(q k / sqrt(H)) v in float64, a token and a head at a time."""
    rows = []
    for r, (keys, values) in enumerate(own):
        for t in range(int(batch.start[r]), int(batch.start[r + 1])):
            last = int(batch.position[t])
            first = 0 if window is None else max(0, last - window + 1)
            group = q.shape[1] // keys.shape[1]
            k, v = (x[first : last + 1].double().repeat_interleave(group, 1) for x in (keys, values))
            weight = (torch.einsum("qh,sqh->sq", q[t].double(), k) / q.shape[2] ** 0.5).softmax(0)
            rows.append(torch.einsum("sq,sqh->qh", weight, v))
    return torch.stack(rows)


def shape(q_heads: int, kv_heads: int, head: int) -> Spec:
    """A spec of which attention reads the heads only."""
    sizes = {"architecture": "LlamaForCausalLM", "dim": 8, "ffn": 8, "layers": 1, "vocab": 8, "context": 128}
    return Spec(**sizes, q_heads=q_heads, kv_heads=kv_heads, head=head, windows=(None,))


@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
@pytest.mark.parametrize("page", [1, 16, 128])
@pytest.mark.parametrize(("ratio", "head"), [(1, 64), (3, 16), (4, 128), (5, 96), (7, 16), (8, 64)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_formula(backend: str, ratio: int, head: int, page: int, kind: str, device: str) -> None:
    """Every kind of step, with and without windows, whatever heads, pages and order of pages."""
    spec = shape(2 * ratio, 2, head)
    batch, q, k, v, own = make(ratio * page + head, kind, spec, page, device)
    attend = BACKENDS[backend](batch, spec, page)
    for window in WINDOWS:
        ours = attend(q, k, v, window)
        torch.testing.assert_close(ours.double(), formula(batch, q, own, window), atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(12))
def test_backends_agree(seed: int, device: str) -> None:
    """Ragged mixed batches with padding: all give what the reference gives, padding included."""
    r = random.Random(seed)
    page = r.choice([1, 2, 16, 128])
    spec = shape(*r.choice([(3, 3), (6, 2), (4, 1), (10, 2), (7, 1), (8, 1)]), r.choice([16, 64, 96, 128]))
    batch, q, k, v, _ = make(seed, "mixed", spec, page, device, sequences=r.randint(1, 20), pad=r.choice([0, 1, 9]))
    reference, *others = (BACKENDS[name](batch, spec, page) for name in NAMES)
    for window in WINDOWS:
        for other in others:
            torch.testing.assert_close(other(q, k, v, window), reference(q, k, v, window), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16(backend: str, kind: str, device: str) -> None:
    """Of bf16 inputs: the reference rounds its result only; a fused kernel may round its weights before.

    Triton's interpreter computes with numpy, which has no bf16: there it is float16, within the same bound.
    """
    dtype = torch.float16 if (backend, device) == ("triton", "cpu") else torch.bfloat16
    spec = shape(8, 2, 64)
    batch, *arrays, own = make(3, kind, spec, 16, device, sequences=8)
    attend = BACKENDS[backend](batch, spec, 16)
    q, k, v = (x.to(dtype) for x in arrays)
    own = [(keys.to(dtype), values.to(dtype)) for keys, values in own]
    for window in WINDOWS:
        ours = attend(q, k, v, window)
        assert ours.dtype == dtype
        exact = formula(batch, q, own, window)
        rounded = exact.abs()
        if backend != "reference":
            rounded += formula(batch, q, [(keys, values.abs()) for keys, values in own], window)
        error = (ours.double() - exact).abs()
        assert (error <= 2**-8 * rounded + 1e-5).all(), error.max()  # 2^-8: half a unit in bf16's last place


@pytest.mark.parametrize("backend", BACKENDS)
def test_page_size_of_the_signature(backend: str, device: str) -> None:
    """Without a page size it is the module's; bound to another, it is that."""
    spec = shape(4, 2, 16)
    batch, q, k, v, own = make(0, "mixed", spec, PAGE, device)
    plain, bound = BACKENDS[backend](batch, spec), partial(BACKENDS[backend], page=PAGE)(batch, spec)
    assert torch.equal(plain(q, k, v, None), bound(q, k, v, None))
    torch.testing.assert_close(plain(q, k, v, None).double(), formula(batch, q, own, None), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reads_only(backend: str, device: str) -> None:
    """Queries and cache are the same after as before."""
    spec = shape(4, 2, 16)
    batch, *arrays, _ = make(1, "mixed", spec, 4, device)
    before = [x.clone() for x in arrays]
    BACKENDS[backend](batch, spec, 4)(*arrays, 5)
    assert all(torch.equal(x, y) for x, y in zip(arrays, before, strict=True))


def test_live() -> None:
    """A window of w is the query itself and the w - 1 keys before it."""
    query, key = torch.arange(6)[:, None], torch.arange(6)
    for window in (None, 1, 3, 6, 7):
        for i, row in enumerate(live(query, key, window).tolist()):
            first = 0 if window is None else max(0, i - window + 1)
            assert row == [first <= j <= i for j in range(6)]
