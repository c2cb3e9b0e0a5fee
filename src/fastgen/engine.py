"""The engine: parameters, a paged cache and a scheduler's state, advanced a step at a time."""

import hashlib
import itertools
import random
import sys
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from fastgen import launch, schedule, scoring, tokenizer
from fastgen.batch import Stager, edits, places, to_device
from fastgen.cache.host import Mover, page_bytes
from fastgen.cache.prefix import Counts, Tree
from fastgen.compile import Stepper, largest
from fastgen.config import SamplingParams, Settings, unknown
from fastgen.exchange import marks, named
from fastgen.grammar import Guides
from fastgen.lora import Held, Shelf
from fastgen.memory import Region
from fastgen.models import default, weights
from fastgen.models.spec import WHOLE, Place, Spec, from_hf, split
from fastgen.parallel import Group
from fastgen.profiler import OFF, Profiler, Window
from fastgen.request import Completion, Event, Output, Sample, longest, pairs
from fastgen.snapshot import Snapshot
from fastgen.step import Computed, new_cache, score
from fastgen.tokenizer import Prompt
from fastgen.types import Adapter, Batch, Filter, Params, Sampling, Tokenizer

P = ParamSpec("P")
T = TypeVar("T")
CPU_CACHE = 2**30  # bytes at most, where the size is not given


def _load(
    path: Path,
    dtype: torch.dtype | None,
    seed: int | None,
    place: Place,
    device: str,
    *,
    progress: bool = False,
    region: Callable[[int], Region] | None = None,
) -> tuple[Spec, Params, Tokenizer | None]:
    """A model as one rank has it; a `seed` draws its weights."""
    if seed is None:
        spec, params = weights.load(path, device=device, dtype=dtype, progress=progress, place=place, region=region)
    else:
        spec = from_hf(weights.read_config(path))
        kind = dtype or getattr(torch, spec.dtype)
        room = None if region is None else region(weights.size(spec, kind, place))
        params = weights.init(spec, seed, device=device, dtype=dtype, place=place, region=room)
    return spec, params, tokenizer.load(path)


def locate(model: str | Path | None, dtype: str, device: str) -> tuple[Path, str]:
    """Where a model is, and what "auto" is for a device. ValueError for what is none."""
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return default.default_path() if model is None else weights.resolve(model), device


def _one(settings: Settings) -> int:
    """The ranks of an engine. ValueError where several engines are asked for."""
    p = settings.parallel
    if p.replicas > 1:
        raise ValueError(
            f"parallel.replicas={p.replicas} are several engines: use fastgen.Replicas.from_pretrained, fgrun, fgbench "
            "or fgserve, or leave it at 1"
        )
    return p.tensor_parallel


def _whole(call: Callable[Concatenate["Engine", P], T]) -> Callable[Concatenate["Engine", P], T]:
    """A call in whose middle no stream is aborted that the garbage collector finds: that waits until it is done."""

    @wraps(call)
    def whole(self: "Engine", *args: P.args, **named: P.kwargs) -> T:
        if self._busy:
            return call(self, *args, **named)
        self._busy = True
        try:
            return call(self, *args, **named)
        finally:
            self._busy = False
            self._drop()

    return whole


class Launched(NamedTuple):
    """A step that may still be running: what it computes, and where its results will be on the host."""

    plan: schedule.Plan
    results: tuple[Tensor, ...]  # token, logprob, top tokens, top logprobs, a row for each sequence of the plan
    done: torch.cuda.Event | None
    version: int  # of the parameters

    def rows(self) -> Iterator[tuple[int, float, list[tuple[int, float]]]]:
        """Token, logprob and most likely tokens of each sequence; waits for them."""
        if self.done is not None:
            self.done.synchronize()
        token, logprob, top_token, top_logprob = (t.tolist() for t in self.results)
        tops = (list(zip(*pair, strict=True)) for pair in zip(top_token, top_logprob, strict=True))
        return zip(token, logprob, tops if top_token else itertools.repeat([]), strict=False)


class _Tokens(Mapping[int, Sequence[int]]):
    """The tokens of samples, by sequence."""

    def __init__(self, samples: dict[int, Sample]) -> None:
        self._samples = samples

    def __getitem__(self, id: int) -> Sequence[int]:
        return self._samples[id].tokens

    def __iter__(self) -> Iterator[int]:
        return iter(self._samples)

    def __len__(self) -> int:
        return len(self._samples)


class Engine:
    """Generates from a dense transformer; many requests share each step.

    `params` are used as they are, without a copy, on the device and in the dtype they have. Settings are the names
    in `fastgen.config` (`token_budget=512, page_size=32, …`).

    `tensor_parallel=N` spreads `params`, the whole model's, over N ranks (see `fastgen.launch`): this process, and
    others that end with it. With a `group` this is one of several ranks: `params` are this rank's (`init` and `load`
    take its place), `spec` is the whole model's, and every rank makes the same calls in the same order (see
    `fastgen.parallel`).

    Not for several threads at once. `close()` (or `with`) frees the cache.
    """

    def __init__(
        self,
        params: Params,
        spec: Spec,
        tokenizer: Tokenizer | None = None,
        *,
        progress: bool = True,
        group: Group | None = None,
        **settings: Any,
    ) -> None:
        chosen = Settings.of(**settings)
        if (size := _one(chosen)) > 1 and group is None:
            split(spec, size)  # a ValueError before anything is started
            load = launch.spread(params, spec, tokenizer, size)
            group = launch.group(size, params.embed.device.type, load, settings, type(self))
            params = load(group.place, str(params.embed.device))[1]
        self._crew = group if isinstance(group, launch.Crew) else None
        if self._crew is not None:
            weakref.finalize(self, self._crew.close)
        self._busy, self._dropped = False, set[int]()  # whether a call changes the state; requests to abort after it
        with launch.guard(self._crew):
            self.params, self.spec, self.tokenizer, self.group = params, spec, tokenizer, group
            here = spec if group is None else split(spec, group.place.size)
            self.device, self.dtype = params.embed.device, params.embed.dtype
            self.settings = chosen.on(self.device.type)
            page, limits = self.settings.pages.page_size, self.settings.schedule
            context, most = min(spec.context, self.settings.pages.cache_tokens or spec.context), largest(limits)
            widest = -(-max(context, limits.token_budget) // page)  # padding has a row as well
            members = max(1, 64 // (here.q_heads // here.kv_heads))  # whose queries fill a tile of attention
            sizes, lora = (limits.max_requests, *most[:2], widest, page, spec.vocab), self.settings.lora
            if lora.max_adapters and group is not None:
                raise ValueError("lora.max_adapters in a group of ranks: adapters run on one rank only; merge one")
            self._shelf = Shelf(spec, lora, self.device, self.dtype) if lora.max_adapters else None
            self._stager = Stager(*sizes, self.device, members, adapters=self._shelf is not None)
            adapters = None if self._shelf is None else self._shelf.adapters
            self._stepper = Stepper(params, spec, self.settings, self._stager, group, adapters)
            host = self.settings.offload.host_gb * 1e9 if self.settings.offload.offload == "host" else 0
            host_pages = int(host // page_bytes(here, page, self.dtype.itemsize))
            if host and not host_pages:
                raise ValueError(f"offload.host_gb={self.settings.offload.host_gb} holds not even a page: raise it")
            self._mover = Mover(here, page, self.dtype, self.device, host_pages)
            self.version = 0  # of the parameters: how often they have changed
            self._marks = marks(params)
            self._marked = self._mark()
            self._regions: dict[str, Region] = {}  # memory of our own, by what it holds
            self.capacity = self._capacity()  # tokens
            slots = self.capacity + page
            size = Region.bytes([(slots, here.kv_heads, here.head)] * 2 * here.layers, self.dtype)
            self._regions["cache"] = Region(size, self.device)
            self.cache = new_cache(here, slots, dtype=self.dtype, region=self._regions["cache"])
            self._mover.attach(self.cache)
            self._stepper.warm_up(self.cache, progress=progress)
            self.state = schedule.State(self._tree())
            self.batch: Batch | None = None  # of the last step launched, to look at
            self.steps = 0  # launched
            me = weakref.ref(self)  # a reference back would keep the memory until Python looks for cycles
            self.profiler = Profiler(here, self.dtype, self.device, lambda: e._owners() if (e := me()) else {})
            self._running: Launched | None = None
            self._samples: dict[int, Sample] = {}  # by sequence
            self._ids, self._request_ids = itertools.count(), itertools.count()
            self._undelivered: list[Event] = []
            seed = random.SystemRandom().getrandbits(62) if self.settings.seed is None else self.settings.seed
            self._random = random.Random(seed if group is None else group.least(seed))
            self._drawn = 0  # a digest of the tokens of the last step, for the other ranks
            eos: Any = [] if tokenizer is None or tokenizer.eos_token_id is None else tokenizer.eos_token_id
            self._eos = frozenset(spec.eos) | frozenset(eos if isinstance(eos, list) else [eos])
            self._guides = Guides(tokenizer, spec.vocab, self._eos)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        dtype: str = "auto",
        device: str = "auto",
        random: bool = False,
        random_seed: int = 0,
        progress: bool = True,
        **settings: Any,
    ) -> "Engine":
        """An engine for a Hugging Face directory, hub id, `.safetensors` or `.gguf` file; None: the embedded default.

        `dtype` auto is the checkpoint's on a GPU and float32 on a CPU; `device` auto takes a GPU if there is one.
        `random` draws weights instead of reading them: `model` is then a config.json or the folder that holds it.
        """
        size = _one(Settings.of(**settings))  # before anything is loaded
        path, device = locate(model, dtype, device)
        kind = getattr(torch, dtype) if dtype != "auto" else torch.float32 if device == "cpu" else None
        load = partial(_load, path, kind, random_seed if random else None)
        if size > 1:
            split(from_hf(weights.read_config(path)), size)
            group = launch.group(size, device.partition(":")[0], load, settings, cls)
            device = launch.device(device, group.place.rank) if device == "cuda" else device
        else:
            group = None
        with launch.guard(group):
            made: list[Region] = []

            def region(size: int) -> Region:
                made.append(Region(size, torch.device(device)))
                return made[-1]

            place = WHOLE if group is None else group.place
            spec, params, words = load(place, device, progress=progress, region=region)
        engine = cls(params, spec, words, progress=progress, group=group, **settings)
        engine._regions["params"] = made[0]
        if progress and device != "cpu":
            print(engine.table(), file=sys.stderr, flush=True)
        return engine

    def _tree(self, counts: Counts | None = None) -> Tree:
        """A tree in which nothing is cached."""
        s = self.settings
        tree = Tree(
            s.pages.page_size,
            self.capacity // s.pages.page_size + 1,
            self._mover.host_pages,
            prefix=s.pages.prefix_cache,
            only_parked=s.offload.keep == "parked",
        )
        tree.counts = counts or tree.counts
        return tree

    def _known(self) -> schedule.Known:
        """Of each sequence, the tokens whose values are known."""
        return _Tokens(self._samples)

    def _capacity(self) -> int:
        """Tokens the cache holds, in whole pages."""
        p, spec, limits = self.settings.pages, self._stepper.spec, self.settings.schedule
        per_token = 2 * spec.layers * spec.kv_heads * spec.head * self.dtype.itemsize
        tokens = p.cache_tokens
        if tokens is None:
            if cuda := self.device.type == "cuda":
                scratch = new_cache(spec, p.page_size, device=self.device, dtype=self.dtype)
                try:
                    taken = self._stepper.measure(scratch)
                except torch.OutOfMemoryError as e:
                    raise ValueError(self._too_large("the activations of the largest step do not fit")) from e
                left = p.cache_fraction * torch.cuda.mem_get_info(self.device)[1] - taken
            # No more than could ever be in use.
            longest = -(-(spec.context - 1) // p.page_size) * p.page_size
            tokens = min(int(left if cuda else CPU_CACHE) // per_token, limits.max_requests * longest)
        if tokens < p.page_size:
            raise ValueError(self._too_large(f"nothing is left for the cache, of {per_token} bytes for each token"))
        tokens = tokens if self.group is None else self.group.least(tokens)
        return tokens // p.page_size * p.page_size

    def _too_large(self, problem: str) -> str:
        """The message where memory is short, with what would help."""
        p, s, total = self.settings.pages, self.settings.schedule, 0
        if self.device.type == "cuda":
            total = torch.cuda.mem_get_info(self.device)[1]
        weight = sum(w.nbytes for w in tree_leaves(self.params) if w is not None)
        return (
            f"{problem}: {p.cache_fraction:.0%} of {total / 1e9:.1f} GB, {weight / 1e9:.1f} GB of which are weights. "
            f"Lower schedule.token_budget ({s.token_budget}) or schedule.max_requests ({s.max_requests}), "
            "or raise pages.cache_fraction"
        )

    # --- requests, one at a time ----------------------------------------------------------------------------------

    def add(self, prompt: Prompt, sampling: SamplingParams | None = None, *, live: bool = True) -> int:
        """Queue a request; its id. `prompt` is text, token ids, or chat messages.

        `live` false: the text comes with the last event only, which spares the host most of the work for it.

        ValueError, with the numbers, for what can never run; nothing else is disturbed.
        """
        return self._submit([self._new(prompt, sampling or SamplingParams(), live)])[0]

    def _new(self, prompt: Prompt, params: SamplingParams, live: bool) -> list[Sample]:
        """A request's completions, not yet queued. ValueError for what can never run."""
        prompt_ids = tokenizer.encode(self.tokenizer, prompt)
        limit = longest(prompt_ids, params, self.spec, self.capacity, self.tokenizer is not None)
        seed = self._random.getrandbits(63) if params.seed is None else params.seed
        output = Output(-1, prompt_ids, [Completion() for _ in range(params.n)])
        if params.prompt_logprobs is not None:
            output.prompt_logprobs = [None]
            output.prompt_top_logprobs = [None] if params.prompt_logprobs else None
        guides = [None if params.grammar is None else self._guides.guide(params.grammar) for _ in range(params.n)]
        self._adapter(params)
        return [
            Sample(output, index, params, seed, limit, self._eos, self.tokenizer, live=live, guide=guide)
            for index, guide in enumerate(guides)
        ]

    def _tell(self, name: str, *args: Any, **named: Any) -> None:
        """The other ranks that this process started make a call before this one does."""
        if self._crew is not None:
            self._crew.tell(name, *args, **named)

    @_whole
    def _submit(self, requests: Sequence[list[Sample]]) -> list[int]:
        """New requests, on every rank."""
        if self._crew is not None:  # checking hundreds of settings again takes a while
            many = [(s[0].output.prompt_token_ids, replace(s[0].params, seed=s[0].seed)) for s in requests]
            self._crew.tell("_join", many)
        return self._queue(requests)

    def _join(self, requests: Sequence[tuple[list[int], SamplingParams]]) -> None:
        """What rank 0 has submitted; nobody reads along here."""
        self._queue([self._new(prompt, params, False) for prompt, params in requests])

    def _queue(self, requests: Sequence[list[Sample]]) -> list[int]:
        """Requests join the others, all at once: the queue is a value, and a copy of it for each takes seconds."""
        for samples in requests:
            samples[0].output.request_id = next(self._request_ids)
            for s in samples:
                s.adapter = self._adapter(s.params)
        new = {next(self._ids): sample for samples in requests for sample in samples}
        self._samples |= new
        self.state = schedule.add(self.state, *(self._sequence(id, s) for id, s in new.items()))
        return [samples[0].output.request_id for samples in requests]

    def _sequence(self, id: int, s: Sample) -> schedule.Sequence:
        return schedule.Sequence(id, len(s.tokens), s.limit, s.scores_prompt, adapter=s.adapter)

    def abort(self, request_id: int) -> Output | None:
        """End a request now; what it has so far. Its last events come with the next step. None if it is not running."""
        return self._end({request_id}).get(request_id)

    @_whole
    def _end(self, requests: Container[int]) -> dict[int, Output]:
        """Abort those of the requests that run; what each has so far."""
        gone = {id: s for id, s in self._samples.items() if s.output.request_id in requests}
        if gone:
            self._tell("_end", {s.output.request_id for s in gone.values()})
            self.state = schedule.drop(self.state, [*gone], self._known())
        for id, one in gone.items():
            del self._samples[id]
            if not one.completion.finish_reason:
                self._undelivered.append(one.end("abort"))
        return {s.output.request_id: s.output for s in gone.values()}

    @property
    def cause(self) -> str:
        """Why the ranks have ended, if they have: then this engine has, too."""
        return "" if self._crew is None else self._crew.cause

    @property
    def unfinished(self) -> bool:
        """Whether a step has anything left to do or to report."""
        return bool(self._samples or self._undelivered)

    # --- values -----------------------------------------------------------------------------------------------------

    @_whole
    def fork(self, request_id: int, n: int = 1, *, index: int = 0, seeds: Sequence[int] | None = None) -> list[int]:
        """Go on from a request's present token in `n` further requests, each with a seed of its own; their ids.

        They share the pages of what was computed and copy the one that is not full. Events tell what is new; their
        outputs begin with the tokens that were there. `index` says which of several completions. ValueError if that
        has ended, or `seeds` are not n.
        """
        given = [self._random.getrandbits(63) for _ in range(n)] if seeds is None else list(seeds)
        self._tell("fork", request_id, n, index=index, seeds=given)
        going = self._unfinished(request_id)
        if n < 1 or len(given) != n:
            raise ValueError(f"fork of request {request_id}: n={n} copies and {len(given)} seeds")
        if index not in going:
            raise ValueError(f"fork of request {request_id}: completion {index} has ended; {[*going]} go on")
        source, new = going[index], list[int]()
        sample = self._samples[source]
        for seed in given:
            id, copy = next(self._ids), sample.fork(next(self._request_ids), seed)
            self._samples[id] = copy
            self.state = schedule.fork(self.state, source, self._sequence(id, copy), self._known())
            new.append(copy.output.request_id)
        return new

    @_whole
    @torch.no_grad()
    def snapshot(self, request_id: int, *, pages: bool = False) -> Snapshot:
        """A request as it stands, as a value that can be saved and restored, here or by another engine.

        `pages`: with its keys and values, so that nothing has to be computed again. The request goes on.
        ValueError if it has ended.
        """
        if self._crew is not None and pages:
            raise ValueError("snapshot: pages of a model over several ranks cannot be saved; leave pages=False")
        self._tell("_receive")
        going = self._unfinished(request_id)
        samples = {i: self._samples[id] for i, id in going.items()}
        found = Snapshot.of(next(iter(samples.values())).output, samples)
        if pages:
            running = {s.id: s for s in self.state.running}
            cached = {i: running[id] for i, id in going.items() if id in running and running[id].cached}
            found.model = self._fingerprint()
            found.pages = {
                i: self._mover.read(s.pages[: schedule.need(self.state.page, s.cached)], s.cached)
                for i, s in cached.items()
            }
        return found

    @_whole
    @torch.no_grad()
    def restore(self, snapshot: Snapshot | None = None) -> int:
        """Go on with a request that was saved; its id here. It gets the tokens that it would have got.

        Pages are used if they are of this model and this engine keeps a prefix cache. ValueError for what cannot run.
        Without a snapshot: take the memory again that `release` gave back; the bytes. torch.OutOfMemoryError if others
        have it, and nothing is lost.
        """
        if snapshot is None:
            gone = [r for r in self._regions.values() if not r.held]
            if self._mark() != self._marked:
                self.touch()  # a trainer's step while memory was given back
            for region in gone:
                region.restore()
            self._marked = self._mark()
            return sum(r.size for r in gone)
        if self._crew is not None:
            snapshot = replace(snapshot, pages={})
        self._tell("restore", snapshot)
        has_text = self.tokenizer is not None
        limit = longest(snapshot.prompt, snapshot.params, self.spec, self.capacity, has_text)
        adapter = self._adapter(snapshot.params)
        output, samples = snapshot.revive(limit, self._eos, self.tokenizer, self._guides)
        going = [len(s.tokens) for s in samples]
        if max(going, default=0) >= limit:
            place = f"model's context of {self.spec.context} or cache of {self.capacity}"
            raise ValueError(f"{max(going)} tokens and one more do not fit the {place} tokens")
        if snapshot.pages and not adapter and self.state.tree.prefix and snapshot.model == self._fingerprint():
            for i, values in snapshot.pages.items():
                self._adopt((*snapshot.prompt, *output.completions[i].token_ids)[: values.shape[2]], values)
        return self._queue([samples])[0]

    # --- parameters -------------------------------------------------------------------------------------------------

    def touch(self) -> None:
        """Say that the parameters have changed: `version` counts one more, and nothing that is cached is used again.

        What is running goes on with the keys and values it has. Writes in place that torch sees (optimizers, `copy_`)
        are noticed without this before the next step; what goes around it is not (`.data`, other processes, graphs).
        """
        self._tell("touch")
        self.version += 1
        self._marked = self._mark()
        self.state.tree.reset()

    def _mark(self) -> int:
        """Changes when the parameters are written in place."""
        return sum(t._version for t in self._marks)

    def update_params(self, source: Any, *, partial: bool = False, recompute: bool = False) -> int:
        """Copy other parameters into the engine's, in place, so that captured graphs stay valid; the new version.

        `source`: a tree like `params`, a module, a mapping or iterable of (checkpoint name, tensor), or `handles` of
        another process. Tensors are whole ones of any dtype and device; shards of a DTensor are put together, one at a
        time. All weights must be given, unless `partial`. What is running goes on with the keys and values it has, or,
        with `recompute`, computes them again. ValueError names what is missing, unknown or mis-shaped; parameters may
        have changed in part then. Of several ranks each makes this call.
        """
        if self._crew is not None:
            raise ValueError("update_params: the other ranks were started by this engine and would not see the tensors")
        self._receive()
        place = WHOLE if self.group is None else self.group.place
        try:
            if isinstance(source, Params) and place == WHOLE:
                weights.copy(self.params, source)
            else:
                pairs = weights.named(source, self.spec) if isinstance(source, Params) else named(source)
                weights.update(self.params, self.spec, pairs, source="update_params", place=place, partial=partial)
        finally:
            self.touch()
            if recompute:
                self._park()
        return self.version

    def _park(self) -> None:
        """Everybody waits, with nothing computed and nothing cached."""
        self._receive()
        self.state = schedule.park(self.state, self._tree(self.state.tree.counts), self._known())

    def score(self, sequences: Sequence[Sequence[int]], **how: Any) -> list[Tensor]:
        """`fastgen.score` by this engine's parameters and in its mode."""
        fixed: dict[str, Any] = {"deterministic": self.settings.compile.deterministic}
        return scoring.score(self.params, self.spec, sequences, **fixed | how)

    # --- memory -----------------------------------------------------------------------------------------------------

    def release(self, what: str = "all") -> int:
        """Give back the device's memory of the "cache", the "params" or "all"; the bytes. `restore()` takes it again.

        Addresses stay reserved, so that nothing is compiled or captured again. What is running waits, and will be
        computed again; parameters are kept in the host's memory. Only an engine's own can be given back
        (`from_pretrained`): those that were given to it are the caller's, ValueError.
        """
        if what not in ("cache", "params", "all"):
            raise ValueError(unknown("memory", what, ["cache", "params", "all"]))
        if self.group is not None:
            raise ValueError("release: the memory of a model over several ranks cannot be given back")
        if what == "params" and "params" not in self._regions:
            raise ValueError("release: these parameters were given to the engine, and are whose they were")
        self._park()
        chosen = [r for name, r in self._regions.items() if what in (name, "all") and r.held]
        for region in chosen:
            region.release(keep=region is self._regions.get("params"))
        return sum(r.size for r in chosen)

    def _held(self) -> None:
        if gone := [name for name, region in self._regions.items() if not region.held]:
            raise ValueError(f"the memory of {' and '.join(gone)} was given back: call restore() before the next step")

    # --- adapters -----------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> dict[str, Held]:
        """By name, those that requests may choose."""
        return {} if self._shelf is None else dict(self._shelf.held)

    def add_adapter(self, name: str, adapter: Adapter, scale: float | None = None) -> Adapter:
        """Copy a low-rank adapter into the engine, for requests with `SamplingParams(adapter=name)`.

        The tree returned is the engine's own, for an optimizer to change in place: see `update_adapter`. `scale` is
        the adapter's unless given. ValueError if there is no room for it.
        """
        return self._room().add(name, adapter if scale is None else adapter._replace(scale=scale)).params

    def adapter_params(self, name: str) -> Adapter:
        """The tensors that steps read, as a tree of views: they stay where they are until the adapter is removed."""
        return self._room()[name].params

    def update_adapter(self, name: str, adapter: Adapter | None = None) -> None:
        """Say that an adapter's tensors were changed in place, or copy others into them.

        Nothing cached under the adapter is used any more; what is cached of others, and of the model alone, is.
        """
        self.state.tree.reset_adapter(self._room().update(name, adapter).index)

    def remove_adapter(self, name: str) -> None:
        """Make room for another. ValueError while requests use it."""
        index = self._room()[name].index
        if using := sorted({s.output.request_id for s in self._samples.values() if s.adapter == index}):
            raise ValueError(f"adapter {name!r} is used by requests {using[:8]}: abort them or let them end first")
        self._room().remove(name)
        self.state.tree.reset_adapter(index)

    def _room(self) -> Shelf:
        if self._shelf is None:
            raise ValueError("this engine has no room for adapters: start it with max_adapters=N")
        return self._shelf

    def _adapter(self, params: SamplingParams) -> int:
        """The number of a request's adapter. ValueError if there is none of that name."""
        return 0 if params.adapter is None else self._room()[params.adapter].index

    def prepare_grammars(self) -> None:
        """Do now what the first grammar would wait for, a second or two, if grammars can be used at all."""
        self._guides.prepare()

    def _unfinished(self, request_id: int) -> dict[int, int]:
        """A request's completions that go on, with all tokens drawn so far: index -> sequence. ValueError if none."""
        self._receive()
        found = {s.index: id for id, s in self._samples.items() if s.output.request_id == request_id}
        if not found:
            raise ValueError(f"request {request_id} is not running here: it has ended, or never was")
        return found

    def _fingerprint(self) -> str:
        """Tells models apart, and one's parameters before and after training."""
        digest = hashlib.blake2b(repr((self.spec, self.dtype)).encode(), digest_size=16)
        leaves = [x for x in tree_leaves(self.params) if x is not None]
        words = {2: torch.int16, 4: torch.int32}
        # Sums of bits, all of them: training may have changed any one. The first rows tell orders apart.
        sums = torch.stack([x.view(words[x.itemsize]).sum(dtype=torch.int64) for x in leaves])
        digest.update(sums.cpu().numpy().tobytes())
        for x in leaves:
            digest.update(x[:8].float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def _adopt(self, tokens: Sequence[int], values: Tensor) -> None:
        """Put keys and values of some tokens into the tree, as if a request had left them, if there is room."""
        held = schedule.plant(self.state.tree, tokens)
        if not held:
            return
        out, copies, back = self.state.tree.moves()
        for event in self._mover.move(schedule.Moves(out, copies, back)):
            torch.cuda.current_stream(self.device).wait_event(event)
        self._mover.write(held, values[:, :, : len(held) * self.state.page])

    # --- steps ------------------------------------------------------------------------------------------------------

    @_whole
    @torch.no_grad()
    def step(self) -> list[Event]:
        """Launch one step; what was added to each request. An error or interrupt aborts everything that was running.

        With `overlap`, the events are those of the step before: it is waited for while the new one runs.
        ValueError, and nothing is lost, while memory is given back (`release`).
        """
        self._held()
        try:
            if self._crew is None:
                self._step()
            else:
                self._crew.tell("step")
                with self._crew.call():
                    self._step()
        except BaseException:
            if self._crew is None or self._crew.cause:
                self._fail()
            else:  # an interrupt: the step was done as a whole
                self._abort_all()
            raise
        self._drop()
        events, self._undelivered = self._undelivered, []
        return events

    def _step(self) -> None:
        if not self._samples:
            self._receive()
            return
        if self._mark() != self._marked:
            self.touch()
        with self.profiler.range("plan"):
            self.state, plan, moves = schedule.plan(self.state, self.settings.schedule, self._known())
        if self.group is not None:
            paged = moves.out, moves.copies, moves.back, moves.early, moves.parked
            self.group.agree(self.steps, hash((plan, paged, self._drawn)))
        with self.profiler.step(plan) if plan else OFF:
            try:
                launched = self._launch(plan, moves) if plan else None
            finally:
                self._receive()  # of the step before
            self._running = launched
        if not self.settings.schedule.overlap:
            self._receive()

    def _launch(self, plan: schedule.Plan, moves: schedule.Moves) -> Launched:
        """Set a planned step going; the state is then as if it had been done, and nobody had stopped."""
        samples = [self._samples[span.id] for span in plan]
        for s in moves.admitted:
            self._samples[s.id].admitted(s.reused)
        scored = any(s.scores_prompt for s in samples)
        count = sum(span.stop - span.start for span in plan)
        groups = self._groups(plan) if count == len(plan) and not scored else ()
        shape = self._stepper.shape(count, len(plan), scored=scored, shared=bool(groups))
        with self.profiler.range("stage"):
            share = groups if shape.shared else None
            batch, settings = self._stager.stage(plan, self._samples, shape.tokens, shape.rows, self.steps, share)
        with self.profiler.range("move"):
            ready = self._mover.move(moves)
        with self.profiler.range("forward"):
            computed = self._stepper.run(self.cache, batch, settings, shape, scored=scored, ready=ready)
            if computed.hidden is not None:
                self._score_prompts(plan, computed.hidden)
            if any(s.looks_back for s in samples):
                self._receive()  # what is drawn depends on the last tokens; the forward computes meanwhile
            launched = Launched(plan, *self._draw(plan, samples, computed, batch, settings), self.version)
        self.state, self.batch = schedule.commit(self.state, plan, (), self._known()), batch
        self.steps += 1
        return launched

    def _groups(self, plan: schedule.Plan) -> tuple[schedule.Group, ...]:
        """Sequences whose shared pages are read together; none where the attention cannot."""
        p = self.settings.pages
        c = self.settings.compile
        if not (p.prefix_cache and p.shared_attention and c.attention == "triton") or c.deterministic:
            return ()
        return schedule.groups(self.state, plan, self._stager.members, places(len(plan)))

    def _draw(
        self, plan: schedule.Plan, samples: list[Sample], computed: Computed, batch: Batch, settings: Sampling
    ) -> tuple[tuple[Tensor, ...], torch.cuda.Event | None]:
        """Tokens and logprobs of the step, on their way to the host."""
        n, filter = len(plan), settings.filter
        drawing = [s for span, s in zip(plan, samples, strict=True) if span.sample and not s.completion.finish_reason]
        top = max((s.params.logprobs for s in drawing if s.params.logprobs is not None), default=None)
        if computed.token is not None and computed.logprob is not None and not any(s.special for s in drawing):
            none = computed.logprob.new_empty(n, 0)
            results = (computed.token[:n], computed.logprob[:n], none, none)
        else:
            drawn = any(s.params.temperature for s in drawing)
            filtered = filter is not None and any(s.filters for s in drawing)
            general = Sampling(
                temperature=settings.temperature[:n],
                seed=settings.seed[:n] if drawn and settings.seed is not None else None,
                position=settings.position[:n],
                processed=settings.processed[:n].bool(),
                filter=Filter(*(x[:n] for x in filter)) if filtered and filter is not None else None,
                edits=edits(plan, self._samples, self.device),
                allowed=self._allowed(plan),
            )
            results = self._stepper.sample(computed.logits[:n], general, top)
            self._stager.last[batch.seat[:n]] = results.token.int()
        if self.device.type != "cuda":
            return tuple(results), None
        host = tuple(torch.empty_like(t, device="cpu", pin_memory=True).copy_(t, non_blocking=True) for t in results)
        done = torch.cuda.Event()
        done.record()
        return host, done

    def _allowed(self, plan: schedule.Plan) -> Tensor | None:
        """Tokens that grammars allow, as bits; None where nobody has one."""
        rows = [(r, s.guide) for r, x in enumerate(plan) if x.sample and (s := self._samples.get(x.id)) and s.guide]
        return to_device(torch.from_numpy(self._guides.masks(rows, len(plan))), self.device) if rows else None

    def _receive(self) -> None:
        """Wait for the step that runs, and hand out its tokens."""
        launched, self._running = self._running, None
        if launched is None:
            return
        with self.profiler.range("wait"):
            rows = list(launched.rows())
        if self.group is not None:
            self._drawn = hash(tuple(row[0] for row in rows))
        stopped = set()
        with self.profiler.range("commit"):
            for span, row in zip(launched.plan, rows, strict=False):
                sample = self._samples.get(span.id) if span.sample else None
                if sample is not None:  # it may have been aborted, or have stopped a step ago
                    event = sample.push(*row, launched.version)
                    self._undelivered.append(event)
                    if event.finish_reason:
                        stopped.add(span.id)
        self.state = schedule.drop(self.state, stopped, self._known())
        for id in stopped:
            del self._samples[id]

    def _score_prompts(self, plan: schedule.Plan, x: Tensor) -> None:
        """Prompt logprobs of the step's spans, from the hidden states x [T, D]."""
        at = 0
        for span in plan:
            sample = self._samples[span.id]
            out, top = sample.output, sample.params.prompt_logprobs
            if out.prompt_logprobs is not None and top is not None and sample.index == 0:
                first = max(span.start, len(out.prompt_logprobs) - 1)  # a parked request is computed again
                stop = min(span.stop, len(out.prompt_token_ids) - 1)  # the last one predicts no prompt token
                if first >= stop:
                    at += span.stop - span.start
                    continue
                target = out.prompt_token_ids[first + 1 : stop + 1]
                some = x[at + first - span.start : at + stop - span.start]
                value, best = score(self.params, some, target, top, self._stepper.ops)
                out.prompt_logprobs += value
                if out.prompt_top_logprobs is not None:
                    out.prompt_top_logprobs += best
            at += span.stop - span.start

    def profile(self, steps: int = 8, path: str | Path | None = None, *, skip: int = 2) -> Window:
        """`with engine.profile() as p:` traces the first `steps` steps inside, after `skip` others.

        Then `print(p.summary)` says where their time went, and `p.trace` is a file for Perfetto or chrome://tracing,
        written to `path` or the working directory.
        """
        return self.profiler.window(steps, path, skip)

    def table(self) -> str:
        """What the engine made of its settings and the memory, in a few lines."""
        s, page, gb = self.settings.schedule, self.state.page, {k: v / 1e9 for k, v in self._owners().items()}
        shapes = self._stepper.shapes()
        sizes = {
            name: sorted({x.tokens for x in shapes if x.decode is (name == "decode")}) for name in ("decode", "mixed")
        }
        graphs = " ".join(f"{name} {x[0]}-{x[-1]} ({len(x)})" for name, x in sizes.items() if x)
        rows = {
            "weights": f"{gb['params']:.1f} GB {str(self.dtype).removeprefix('torch.')} on {self.device}",
            "cache": f"{gb['cache']:.1f} GB: {self.capacity} tokens, {self.capacity // page} pages of {page}",
            "host": self._hosted(),
            "steps": f"up to {s.token_budget} tokens, {s.max_requests} sequences; {self.settings.compile.compile}, "
            f"{self.settings.compile.attention}{', overlapped' if s.overlap else ''}",
            "graphs": f"{gb['graphs']:.1f} GB: {graphs}" if graphs else "none",
        }
        return "\n".join(f"{name:8s} {text}" for name, text in rows.items() if text)

    def _hosted(self) -> str:
        mover = self._mover
        size = mover.host_pages * page_bytes(mover.spec, mover.page, self.dtype.itemsize) / 1e9
        return f"{size:.1f} GB: {mover.host_pages} pages, taken in {mover.seconds:.1f} s" if mover.host_pages else ""

    @property
    def counts(self) -> Counts:
        """What prefix reuse, host pages and preemption did so far."""
        return self.state.tree.counts

    def _owners(self) -> dict[str, int]:
        """Bytes of the device's memory by what they hold."""
        params = {w.data_ptr(): w.nbytes for w in tree_leaves(self.params) if w is not None}
        cache = sum(w.nbytes for w in tree_leaves(self.cache))
        found = {"params": sum(params.values()), "cache": cache, "tables": self._stager.bytes}
        found |= {} if self._shelf is None else {"adapters": self._shelf.bytes}
        return found | {"staging": self._mover.bytes} | self._stepper.bytes()

    # --- many at once -----------------------------------------------------------------------------------------------

    def stream(
        self, prompts: Prompt | Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[Event]:
        """Events of one or many prompts as they come; `request_id` counts the prompts from the first one's id.

        Leaving the loop early, or an interrupt, aborts what is not finished.
        """
        ids = self._add_all(prompts, sampling, live=True)
        events = self._events(ids)
        weakref.finalize(events, self._abort, ids).atexit = False  # dropped unread, it would never run its `finally`
        return events

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[Output]:
        """Outputs of one or many prompts, in their order. `sampling` is one for all, or one for each.

        `progress` None shows a bar when it takes longer than two seconds.
        """
        ids = self._add_all(prompts, sampling, live=False)
        done: dict[int, Output] = {}
        with tqdm(total=len(ids), unit="request", delay=2, leave=False, disable=progress is False) as bar:
            for event in self._events(ids):
                if event.output is not None:
                    done[event.request_id] = event.output
                    bar.update()
        return [done[id] for id in ids]

    def _add_all(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        *,
        live: bool,
    ) -> list[int]:
        many = pairs(prompts, sampling)
        new: list[list[Sample]] = []
        try:
            for prompt, params in many:
                new.append(self._new(prompt, params, live))
        except ValueError as e:
            if len(many) > 1:
                raise ValueError(f"prompt {len(new)}: {e}") from e
            raise
        return self._submit(new)

    def _events(self, ids: list[int]) -> Iterator[Event]:
        """Steps until the requests `ids` have ended; what others receive meanwhile waits for their next step."""
        left = set(ids)
        try:
            while left:
                events = self.step()
                self._undelivered += [e for e in events if e.request_id not in left]
                for event in [e for e in events if e.request_id in left]:
                    left -= {event.request_id} if event.output is not None else set()
                    yield event
        finally:
            self._abort(left)

    def _fail(self) -> None:
        """After an error anywhere in a step: end everything. What was cached may never have been computed."""
        self._running = None
        self._undelivered += [s.end("abort") for s in self._samples.values() if not s.completion.finish_reason]
        self._samples.clear()
        self.state = schedule.State(self._tree(self.state.tree.counts))

    def _abort_all(self) -> None:
        """Abort everything; whoever waits for it hears of it."""
        self._end({s.output.request_id for s in self._samples.values()})

    def _abort(self, ids: Iterable[int]) -> None:
        """Abort requests whose events nobody waits for; after the call in whose middle that is found, if any."""
        self._dropped.update(ids)
        if not self._busy:
            self._drop()

    def _drop(self) -> None:
        """Abort them now."""
        while self._dropped:
            gone, self._dropped = self._dropped, set()
            self._end(gone)
            self._undelivered = [e for e in self._undelivered if e.request_id not in gone]

    # --- the end ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Abort everything and let go of cache, parameters and other ranks."""
        crew, self._crew = self._crew, None
        self._abort_all()
        self._running = None
        if "_mover" in self.__dict__:
            self._mover.close()
        for name in ("_stepper", "_mover", "cache", "_shelf", "params", "_marks"):  # graphs before what they read
            self.__dict__.pop(name, None)
        self._regions = {}
        if crew is not None:
            crew.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
