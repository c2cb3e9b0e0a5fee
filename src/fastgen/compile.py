"""How a step is run: the only file that says torch.compile or CUDA graph.

    eager      the plain functions one after the other, and the attention backend
    inductor   what lies between two matrix products or attentions is one compiled kernel (a *region*)
    graphs     the same, and steps of few tokens are captured in CUDA graphs, one for each bucket: replaying one costs
               the host nothing, while launching its kernels would take longer than running them

Regions see activations and weights only, never the cache, and are compiled once with a free number of tokens. So
nothing about a cache can make them copy it or compile again, and start-up costs the compilation of one block.
"""

import inspect
import itertools
import os
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastgen import parallel
from fastgen.batch import Stager
from fastgen.config import Schedule, Settings
from fastgen.models import invariant, transformer
from fastgen.models.layers import swiglu
from fastgen.models.spec import Spec, share_of, split
from fastgen.models.transformer import PLAIN, Ops, table
from fastgen.ops.attention import Backend, Fresh
from fastgen.ops.backends import choose
from fastgen.parallel import Group, Peers, Ranks, sharded
from fastgen.sampling import sample
from fastgen.step import Computed, Draw, compute, feed
from fastgen.types import Adapters, Batch, Cache, Params, Sampled, Sampling

MIXED = (64, 128, 192, 256, 320, 384, 512, 640, 768, 1024)  # captured sizes of steps that prefill,
SEQUENCES = 32  # with so many sequences, padding included
SPARE = 1.03  # a step so much larger than needed costs no more than launching its kernels one by one
# The arguments of each region whose first dimension is the step's tokens.
REGIONS: dict[Callable[..., Any], tuple[int, ...]] = {
    feed: (0,),
    transformer.enter: (1, 2),
    transformer.project: (0, 1),
    transformer.project_swiglu: (0, 1),
    transformer.add_norm: (0, 1),
    swiglu: (0,),
    transformer.norm_heads: (0,),
    transformer.leave: (0, 1),
}


class Shape(NamedTuple):
    """Of a step: tokens and sequences, padding included. `decode`: one token each; `shared`: in groups that share."""

    tokens: int
    rows: int
    decode: bool
    shared: bool = False


def buckets(most: int) -> tuple[int, ...]:
    """Numbers of decoding sequences that have a graph: close together, since each padded row costs its share."""
    steps = [*range(2, 8, 2), *range(8, 64, 8), *range(64, 256, 16), *range(256, most, 32)]
    return (*(n for n in steps if n < most), max(2, most))


def shared_buckets(most: int) -> tuple[int, ...]:
    """The same for steps in which sequences share pages: fewer, since a padded row costs them little."""
    return tuple(n for n in buckets(most) if n >= 16 and (n % 64 == 0 or n in (16, 32, most)))


def largest(limits: Schedule) -> Shape:
    """The most tokens and sequences a step may have, padding included."""
    rows = max(limits.max_requests + 1, SEQUENCES)
    return Shape(max(-(-limits.token_budget // 64) * 64 + 8, 2 * rows + 16), rows, False)


def full(limits: Schedule) -> Shape:
    """A step that spends its whole budget, as almost all do while many prompts wait."""
    most = largest(limits)
    return Shape(most.tokens - most.tokens % 64, most.rows, False)


def _one_cache() -> None:
    """Say where Triton keeps its kernels. Torch's compiler says so itself, but only once it has something to compile:
    the next process, which has not, would look for them elsewhere and compile all of them again.
    """
    from triton import knobs  # it comes with the GPU builds of torch, and not with others

    os.environ.setdefault("TRITON_CACHE_DIR", knobs.cache.dir)


@contextmanager
def _blas(name: str) -> Iterator[None]:
    """Matrix products by this library: see docs/performance.md for why cuBLASLt."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(name)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


class Regions:
    """Compiled versions of functions, with any number of tokens. Each shape of weights has a compilation of its own."""

    def __init__(self) -> None:
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __call__(self, f: Callable[..., Any]) -> Callable[..., Any]:
        dynamic = REGIONS[f]

        def call(*args: Any) -> Any:
            fixed = tuple(a.shape if isinstance(a, Tensor) else a for i, a in enumerate(args) if i not in dynamic)
            g = self._compiled.get((f, *fixed))
            if g is None:
                # A code object of its own, or the engines of a process would share one limit of recompilations.
                inner = inspect.unwrap(f)
                code = inner.__code__.replace(co_name=f"{f.__name__}_{len(self._compiled)}")
                fresh = types.FunctionType(code, inner.__globals__, code.co_name, inner.__defaults__, inner.__closure__)
                g = torch.compile(fresh, fullgraph=True)
                self._compiled[(f, *fixed)] = g
                for i in dynamic:
                    torch._dynamo.mark_dynamic(args[i], 0)
            return g(*args)

        return call


def compilations() -> int:
    """Graphs compiled in this process so far."""
    from torch._dynamo.utils import counters  # takes more than a second to import

    return counters["stats"]["unique_graphs"]


class Stepper:
    """Runs the steps of one engine."""

    def __init__(
        self,
        params: Params,
        spec: Spec,
        settings: Settings,
        stager: Stager,
        group: Group | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        self.params, self.settings, self.stager, self.adapters = params, settings, stager, adapters
        self.spec = spec if group is None else split(spec, group.place.size)  # what runs here
        self.device, self.how = params.embed.device, settings.compile.compile
        self.graphs: dict[Shape, tuple[torch.cuda.CUDAGraph, Computed]] = {}
        self.pool: Any = None
        self.captures = 0  # so far
        self.held = 0  # bytes of the graphs
        self.regions = Regions()
        self._measured = False
        cuda = self.device.type == "cuda"
        if cuda:
            _one_cache()
        self.draw: Draw | None = None
        # One buffer for all graphs' logits: they would each keep theirs.
        rows = largest(settings.schedule).rows
        self.logits = None if self.how != "graphs" else params.embed.new_empty(rows, len(table(params)))
        fixed = settings.compile.deterministic
        backend = choose(settings.compile.attention, self.device)
        if fixed:
            if group is not None and group.place.size > 1:
                raise ValueError("compile.deterministic=true holds for one device: sums over ranks have no fixed order")
            invariant.verify(params)
            self.ops = invariant.ops(self.device)
        else:
            self.ops = self._ops(backend, cuda) if self.how != "eager" else PLAIN._replace(attention=backend)
        self.fresh = 0  # tokens of a step that only decodes, up to which attention rotates and stores what is new
        if settings.compile.attention == "triton" and self.how != "eager" and not fixed:
            from fastgen.ops.hopper import FEW

            self.fresh = FEW
        self._sample = partial(invariant.sample, measure=self.ops.logprobs) if fixed else sample
        self.group, self.vocab, self.head = group, spec.vocab, self.ops.head  # a step's: each rank keeps its logits
        self.peers: Peers | None = None
        if group is not None:
            if isinstance(group, Ranks) and self.how != "eager" and settings.parallel.peer_memory:
                most = largest(settings.schedule).tokens
                self.peers = group.peers(spec.dim, most, params.embed.dtype, self.device)
            self.ops = sharded(self.ops, group, spec, self.peers)
        if self.how != "eager" and cuda:
            from fastgen.ops.fused import draw  # Triton comes with the GPU builds of torch, and not with others

            self.draw = partial(draw, fixed=True) if fixed else draw
            if group is not None:
                share = share_of(spec.vocab, group.place)
                self.draw = partial(draw, vocab=spec.vocab, part=share, gather=group.all_gather)

    def _ops(self, attention: Backend, cuda: bool) -> Ops:
        region = self.regions
        parts: dict[str, Any] = {name: region(f) if f in REGIONS else f for name, f in PLAIN._asdict().items()}
        parts["attention"] = attention
        ops = Ops(**parts)
        if not cuda:
            return ops
        from fastgen.ops import fused, hopper, lowrank, skinny

        def few(fast: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
            return lambda x, *rest: (fast if len(x) <= hopper.FEW else plain)(x, *rest)

        return ops._replace(
            project=few(skinny.project, ops.project),
            project_swiglu=few(skinny.project_swiglu, ops.project_swiglu),
            linear=few(skinny.linear, ops.linear),
            add_norm=few(skinny.add_norm, ops.add_norm),
            swiglu=few(skinny.swiglu, ops.swiglu),
            adapt=lowrank.adapt,
            leave=few(lambda *args: skinny.add_norm(*args)[1], ops.leave),
            head=few(lambda h, w, out=None: skinny.linear(h, w, None, out if out is None else out[: len(h)]), ops.head),
            store=fused.store,
        )

    # --- shapes -----------------------------------------------------------------------------------------------------

    def shapes(self) -> tuple[Shape, ...]:
        """Those that are captured, largest first: the others then fit into the memory of the first."""
        if self.how != "graphs":
            return ()
        s = self.settings.schedule
        decode = [Shape(n, n, True) for n in buckets(s.max_requests)]
        mixed = [Shape(n, SEQUENCES, False) for n in MIXED if n <= s.token_budget]
        p = self.settings.pages
        together = p.prefix_cache and p.shared_attention and not self.settings.compile.deterministic
        groups = shared_buckets(s.max_requests) if together else ()
        shared = [Shape(n, n, True, True) for n in groups]
        return tuple(sorted({*decode, *shared, *mixed, full(s)}, reverse=True))

    def shape(self, tokens: int, rows: int, *, scored: bool, shared: bool = False) -> Shape:
        """The shape in which a step of so many tokens and sequences is run."""
        decode, limits = tokens == rows, self.settings.schedule
        if self.how == "eager":
            return Shape(tokens, rows, decode, shared)
        if decode:
            fits = [s for s in self.graphs if s.decode and s.shared == shared and s.rows >= rows]
            n = max(2, rows)
            return min(fits, default=Shape(n, n, True, shared))
        fits = [s for s in self.graphs if not (s.decode or scored) and s.tokens >= tokens and s.rows > rows]
        fits = [s for s in fits if s != full(limits) or s.tokens <= tokens * SPARE]
        # Few different sizes, each with kernels of its own in the libraries.
        grain, wide = 64 if tokens > 512 else 8, 1 + min(n for n in buckets(limits.max_requests) if n >= rows)
        size = -(-tokens // grain) * grain
        size += 8 * (size == wide)  # as many sequences as tokens would be taken to decode
        return min(fits, default=Shape(size, wide, False))

    # --- steps ------------------------------------------------------------------------------------------------------

    def run(
        self,
        cache: Cache,
        batch: Batch,
        sampling: Sampling,
        shape: Shape,
        *,
        scored: bool = False,
        ready: Sequence[torch.cuda.Event] = (),
    ) -> Computed:
        """Compute a staged step; the result lives until the next one. `scored` steps want all hidden states.

        `ready`: what each group of as many layers waits for before it touches the cache, if anything.
        """
        if shape in self.graphs and not scored and (shape.decode or not ready):
            if ready:
                torch.cuda.current_stream(self.device).wait_event(ready[-1])
            graph, computed = self.graphs[shape]
            graph.replay()
            return computed
        return self._compute(cache, batch, sampling, ready, decode=shape.decode, scored=scored)

    def _compute(self, *args: Any, **how: bool) -> Computed:
        with invariant.exact() if self.settings.compile.deterministic else _blas("cublaslt"):
            return self._forward(*args, **how)

    def _forward(
        self, cache: Cache, batch: Batch, sampling: Sampling, ready: Sequence[torch.cuda.Event] = (), **how: bool
    ) -> Computed:
        ops = self.ops._replace(head=self.head)
        if how["decode"] and batch.share is None and len(batch.token) <= self.fresh:
            ops = ops._replace(store=Fresh)
        if ready:
            layers, stream = itertools.count(), torch.cuda.current_stream(self.device)

            def store(*args: Any) -> Any:
                stream.wait_event(ready[next(layers) * len(ready) // self.spec.layers])
                return now(*args)

            now, ops = ops.store, ops._replace(store=store)
        feed_ = feed if self.how == "eager" else self.regions(feed)
        batch = batch._replace(token=feed_(batch.token, self.stager.last))
        last, out = self.stager.last, self.logits
        inputs = self.params, cache, last, batch, sampling, self.spec
        return compute(*inputs, ops, self.draw, out, self.adapters, **how)

    def sample(self, logits: Tensor, sampling: Sampling, top: int | None) -> Sampled:
        """`sampling.sample` of a step's logits."""
        if self.group is None:
            return self._sample(logits.float(), sampling, top)
        return parallel.sample(logits, sampling, top, self.group, self.vocab)

    def _kinds(self) -> list[Shape]:
        """Shapes that together run every kernel: a library's are loaded when first run, which waits for the device."""
        most = largest(self.settings.schedule)
        rows = [n + 1 for n in buckets(self.settings.schedule.max_requests)] if self.draw is not None else []
        tokens = [2**i for i in range(11, 17) if 2**i <= self.settings.schedule.token_budget] if rows else []
        # The first is compiled for: sizes that are no other's, so that nothing is compiled for equal ones.
        mixed = [Shape(40, 3, False), *(Shape(2 * r // 8 * 8 + 16, r, False) for r in rows)]
        return [*mixed, *(Shape(n, min(65, most.rows), False) for n in tokens), Shape(24, 24, True)]

    def _padding(self, shape: Shape) -> tuple[Batch, Sampling]:
        return self.stager.stage((), {}, shape.tokens, shape.rows, 0, () if shape.shared else None)

    @torch.no_grad()
    def measure(self, cache: Cache) -> int:
        """Compile, and run the largest step and capture the largest graphs on a cache of one page of scratch.

        The bytes of device memory that are taken when all of that is there.
        """
        for shape in (*self._kinds(), largest(self.settings.schedule)):
            self._compute(cache, *self._padding(shape), decode=shape.decode)
        largest_graphs = {(shape.decode, shape.shared): shape for shape in reversed(self.shapes())}
        for shape in largest_graphs.values():
            self._capture(cache, shape)
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info(self.device)
        self._measured = True
        self.free()
        return total - free

    @torch.no_grad()
    def warm_up(self, cache: Cache, *, progress: bool = True) -> None:
        """Compile and capture everything that steps will need."""
        if self.how == "eager":
            return
        shapes = self.shapes()
        with tqdm(
            total=len(shapes) + 1,
            desc="warm-up",
            unit="graph",
            delay=1,
            leave=False,
            disable=None if progress else True,
        ) as bar:
            for shape in () if self._measured else self._kinds():
                self._compute(cache, *self._padding(shape), decode=shape.decode)
            bar.update()
            for shape in shapes:
                self._capture(cache, shape)
                bar.update()
        if shapes:
            segments = torch.cuda.memory_snapshot()
            self.held = sum(x["total_size"] for x in segments if x.get("segment_pool_id") == self.pool)

    def _capture(self, cache: Cache, shape: Shape) -> None:
        batch, sampling = self._padding(shape)
        self._compute(cache, batch, sampling, decode=shape.decode)  # whatever is done once only is done before
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            computed = self._compute(cache, batch, sampling, decode=shape.decode)
        self.pool = self.pool or graph.pool()
        self.graphs[shape] = graph, computed
        self.captures += 1

    def bytes(self) -> dict[str, int]:
        """Of the device's memory: buffers, and what the graphs hold."""
        shared = 0 if self.peers is None else self.peers.buffer.nbytes
        return {"logits": 0 if self.logits is None else self.logits.nbytes, "graphs": self.held, "peers": shared}

    def free(self) -> None:
        """Let go of the graphs and their memory."""
        self.graphs.clear()
        self.pool, self.held = None, 0
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
