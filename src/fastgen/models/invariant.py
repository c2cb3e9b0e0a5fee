"""The forward in which a row's result depends on that row alone, bit for bit: on no batch, chunk or bucket around it.

Libraries choose how they add up by the number of rows: matrix products and reductions of few rows are cut in other
ways than those of many. Here each sum has one order. Products are the library's where it does not share a sum out
(`exact`), which leaves every size of tile the same order, and in fp32 a kernel's, a few rows at a time, which is slow;
attention has one tile and one share of the keys; norms, activations and logprobs are kernels with a program for each
row.

On a CPU, products have ROWS rows, padded, and a function with a transcendental has one: vector units compute another
last bit than what is left over at an end.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fastgen import sampling
from fastgen.models import layers, transformer
from fastgen.models.layers import rms_norm
from fastgen.models.spec import Spec
from fastgen.models.transformer import Ops, table
from fastgen.ops.attention import Attend, live
from fastgen.types import Batch, Params

ROWS = 16  # of a product on a CPU, and of a general draw on a GPU
SIZES = (1, 2, 8, 15, 16, 17, 24, 40, 64, 72, 128, 200, 256, 384, 512, 768, 1023)  # that are verified
TOKENS, KEYS = 8, 64  # of a tile of attention on a CPU


@contextmanager
def exact() -> Iterator[None]:
    """Products of half precision by cuBLASLt, without sums that are shared out and added up afterwards."""
    if not torch.cuda.is_available():
        yield
        return
    cuda: Any = torch.backends.cuda
    library, m = cuda.preferred_blas_library(), cuda.matmul
    names = [f"allow_{kind}_reduced_precision_reduction" for kind in ("bf16", "fp16")]
    before = [(getattr(m, name), getattr(m, f"{name}_split_k")) for name in names]
    cuda.preferred_blas_library("cublaslt")
    for name in names:
        setattr(m, name, (False, False))
    try:
        yield
    finally:
        cuda.preferred_blas_library(library)
        for name, value in zip(names, before, strict=True):
            setattr(m, name, value)


def ops(device: torch.device | str) -> Ops:
    """The functions of such a forward on a kind of device.

    On a GPU they are to be called within `exact()`, and `verify` says whether they do what they say.
    """
    if torch.device(device).type != "cuda":
        return CPU
    from fastgen.ops import fused, hopper, skinny  # Triton comes with the GPU builds of torch, and not with others
    from fastgen.ops.paged import paged

    def product(x: Tensor, w: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """x @ w.T + bias, the sum rounded before the bias: whether it is, must not depend on the size."""
        if x.dtype == torch.float32 and w.is_contiguous():  # libraries always choose by the size
            y = x.new_empty(len(x), len(w)) if out is None else out
            for a, b in zip(x.split(hopper.FEW), y.split(hopper.FEW), strict=True):
                skinny.linear(a, w, None, b)
        elif 0 < len(x) <= hopper.FEW and w.is_contiguous():
            y = skinny.linear(x, w, None, out)
        else:
            y = torch.mm(x, w.T, out=out)
        return y if bias is None else y + bias

    def project(
        x: Tensor, y: Tensor, norm: Tensor, eps: float, w: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, h = skinny.add_norm(x, y, norm, eps)
        return x, product(h, w, bias)

    def project_swiglu(x: Tensor, y: Tensor, norm: Tensor, eps: float, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        x, h = skinny.add_norm(x, y, norm, eps)
        return x, skinny.swiglu(product(h, gate_up))

    def norm_heads(qkv: Tensor, q_norm: Tensor, k_norm: Tensor, spec: Spec) -> Tensor:
        q, k, v = qkv.split((spec.q_heads, spec.kv_heads, spec.kv_heads), 1)
        both = (skinny.norm(x.flatten(0, 1), w, spec.eps).view(x.shape) for x, w in ((q, q_norm), (k, k_norm)))
        return torch.cat((*both, v), 1)

    return transformer.PLAIN._replace(
        attention=partial(paged, fixed=True),
        project=project,
        project_swiglu=project_swiglu,
        norm_heads=norm_heads,
        store=fused.store,
        linear=product,
        leave=lambda *args: skinny.add_norm(*args)[1],
        head=lambda h, w, out=None: product(h, w, None, None if out is None else out[: len(h)]),
        logprobs=fused.logprobs,
    )


@torch.no_grad()
def verify(params: Params) -> None:
    """RuntimeError if products of these weights have other bits in another number of rows, on this device."""
    layer, f = params.layers[0], ops(params.embed.device)
    kinds = {"qkv": layer.qkv, "out": layer.out, "gate_up": layer.gate_up, "down": layer.down, "head": table(params)}
    for name, w in kinds.items():
        x = torch.rand(1024, w.shape[1], device=w.device, dtype=torch.float32).sub_(0.5).to(w.dtype)
        with exact():
            whole = f.linear(x, w)
            for n in SIZES:
                if not torch.equal(f.linear(x[-n:], w), whole[-n:]):
                    raise RuntimeError(
                        f"compile.deterministic=true cannot be kept here: products of {name} {tuple(w.shape)} in "
                        f"{w.dtype} have other bits for {n} rows than for {len(x)}, on {device_name(w.device)}"
                    )


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"


def sample(logits: Tensor, s: Any, top: int | None = None, measure: Callable[..., Any] = sampling.logprobs) -> Any:
    """As `sampling.sample`: a row alone on a CPU, and so many at once on a GPU."""
    return sampling.sample(logits, s, top, measure, rows=ROWS if logits.is_cuda else 1)


# --- on a CPU -------------------------------------------------------------------------------------------------------


def _each(f: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
    return torch.cat([f(row, *rest) for row in x.split(1)])


def linear(x: Float[Tensor, "T D"], w: Float[Tensor, "N D"], bias: Float[Tensor, " N"] | None = None) -> Tensor:
    """x @ w.T + bias, ROWS rows at a time."""
    parts = F.pad(x, (0, 0, 0, -len(x) % ROWS)).split(ROWS)
    return torch.cat([F.linear(part, w, bias) for part in parts])[: len(x)]


def _enter(embed: Tensor, token: Tensor, position: Tensor, spec: Spec) -> tuple[Tensor, ...]:
    x = F.embedding(token, embed)
    turns = [layers.rotations(p, spec) for p in position.split(1)]
    cos, sin = (torch.cat(part) for part in zip(*turns, strict=True))
    return x, torch.zeros_like(x), cos, sin


def _project(x: Tensor, y: Tensor, norm: Tensor, eps: float, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    x = x + y
    return x, linear(rms_norm(x, norm, eps), w, bias)


def _project_swiglu(x: Tensor, y: Tensor, norm: Tensor, eps: float, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    x = x + y
    return x, _each(layers.swiglu, linear(rms_norm(x, norm, eps), gate_up))


def _head(h: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    found = linear(h, w)
    return found if out is None else out[: len(h)].copy_(found)


def _logprobs(logits: Tensor, token: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = zip(logits.split(1), token.split(1), strict=True)
    value, index, best = zip(*(sampling.logprobs(row, t, top) for row, t in rows), strict=True)
    return torch.cat(value), torch.cat(index), torch.cat(best)


def attention(batch: Batch, spec: Spec) -> Attend:
    """Attention over pages in tiles that are the same for every token: KEYS keys, from the first one on."""
    page, row = batch.page_size, torch.searchsorted(batch.start[1:], torch.arange(len(batch.token)), right=True)
    seat, offset = batch.seat[row], torch.arange(KEYS)

    def tile(
        q: Float[Tensor, "t K G H"], at: int, seat: Tensor, position: Tensor, caches: tuple[Tensor, Tensor],
        window: int | None, m: Tensor, total: Tensor, acc: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Maxima, sums and outputs after the keys from `at` on."""
        key = at + offset
        pages = batch.pages[seat[:, None], (key // page).clamp_max(batch.pages.shape[1] - 1)].long()
        seen = live(position[:, None], key, window)
        slot = torch.where(seen, pages * page + key % page, 0)
        k, v = (c[slot].transpose(1, 2).float() for c in caches)  # [t, K, KEYS, H]
        v = v.masked_fill(~seen[:, None, :, None], 0)  # scratch may hold NaN, which a weight of 0 does not silence
        score = (q @ k.transpose(-1, -2)) * spec.head**-0.5
        score = score.masked_fill(~seen[:, None, None], float("-inf"))
        top = torch.maximum(m, score.amax(-1, keepdim=True).clamp_min(-1e30))  # a tile may hold no key that is seen
        shrink, p = (m - top).exp(), (score - top).exp()
        return top, total * shrink + p.sum(-1, keepdim=True), acc * shrink + p @ v

    def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, window: int | None) -> Tensor:
        out = []
        for i in range(0, len(q), TOKENS):
            index = torch.arange(i, i + TOKENS).clamp_max(len(q) - 1)
            position = batch.position[index]
            x = q[index].unflatten(1, (spec.kv_heads, -1)).float()
            m, total, acc = torch.full_like(x[..., :1], -1e30), torch.zeros_like(x[..., :1]), torch.zeros_like(x)
            first = 0 if window is None else max(0, int(position.min()) - window + 1) // KEYS * KEYS
            for at in range(first, int(position.max()) + 1, KEYS):
                m, total, acc = tile(x, at, seat[index], position, (k_cache, v_cache), window, m, total, acc)
            out.append((acc / total).flatten(1, 2).to(q.dtype))
        return torch.cat(out)[: len(q)]

    return attend


CPU = transformer.PLAIN._replace(
    attention=attention,
    enter=_enter,
    project=_project,
    project_swiglu=_project_swiglu,
    linear=linear,
    head=_head,
    logprobs=_logprobs,
)
