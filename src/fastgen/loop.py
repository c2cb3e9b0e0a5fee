"""The loop of an engine: parameters, a paged cache and a scheduler's state, advanced a step at a time."""

import itertools
import os
import random
import threading
import weakref
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastgen import launch, schedule, tokenizer
from fastgen.batch import Stager, edits, places, to_device
from fastgen.cache.host import Mover, page_bytes
from fastgen.cache.prefix import Counts, Tree, namespace
from fastgen.compile import Stepper, largest
from fastgen.config import SamplingParams, Settings, check_int
from fastgen.exchange import adoptions, marks
from fastgen.grammar import Guide, Guides
from fastgen.lora import Shelf
from fastgen.memory import Region
from fastgen.models.spec import Spec, split
from fastgen.ownership import Owner, check_fork, exclusive, plain_modes
from fastgen.parallel import Group
from fastgen.profiler import OFF, Profiler
from fastgen.request import Completion, Event, Output, Sample, longest, refusal, refused
from fastgen.step import Computed, new_cache, score
from fastgen.tokenizer import Prompt
from fastgen.types import Batch, Cache, Filter, Params, Sampling, Tokenizer

IDS = -(2**63), 2**63 - 1  # what numbers of requests may be asked for; seeds, too
CPU_CACHE = 2**30  # bytes at most, where the size is not given


def ranks(settings: Settings) -> int:
    """The ranks of an engine. ValueError where several engines are asked for."""
    p = settings.parallel
    if p.replicas > 1:
        raise ValueError(
            f"parallel.replicas={p.replicas} are several engines: use fastgen.Replicas.from_pretrained, fgrun, fgbench "
            "or fgserve, or leave it at 1"
        )
    return p.tensor_parallel


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


class Loop:
    """Requests that share steps: queued, planned, launched, handed out. `Engine` is what one calls."""

    @plain_modes
    def __init__(
        self,
        params: Params | Any,
        spec: Spec | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        progress: bool = True,
        group: Group | None = None,
        **settings: Any,
    ) -> None:
        check_fork("Engine")
        if not isinstance(params, Params) or not isinstance(spec, Spec):
            what = repr(params) if isinstance(params, str) else f"{type(params).__name__} and {type(spec).__name__}"
            raise ValueError(
                f"Engine takes Params and their Spec, not {what}: Engine.from_pretrained(…) takes a folder or hub id, "
                "and fastgen.adopt(…) makes both of a transformers model"
            )
        self._owner = Owner("this engine", "fastgen.AsyncEngine serves any number of threads and coroutines")
        self._dropped = deque[frozenset[int]]()  # requests that nobody waits for any more, to abort with the next call
        chosen = Settings.of(**settings)
        if (size := ranks(chosen)) > 1 and group is None:
            split(spec, size)  # a ValueError before anything is started
            load = launch.spread(params, spec, tokenizer, size)
            group = launch.group(size, params.embed.device.type, load, settings, type(self))
            params = load(group.place, str(params.embed.device))[1]
        self._crew = group if isinstance(group, launch.Crew) else None
        if self._crew is not None:
            weakref.finalize(self, self._crew.close)
        self._failed = set[int]()  # requests of which a completion failed, to abort after the call
        with launch.guard(self._crew):
            self._params, self.spec, self.tokenizer, self.group = params, spec, tokenizer, group
            here = spec if group is None else split(spec, group.place.size)
            self.device, self.dtype = params.embed.device, params.embed.dtype
            self.settings = chosen.on(self.device.type)
            page, limits = self.settings.pages.page_size, self.settings.schedule
            context, most = min(spec.context, self.settings.pages.cache_tokens or spec.context), largest(limits)
            widest = -(-max(context, limits.token_budget) // page)  # padding has a row as well
            members = max(1, 64 // (here.q_heads // here.kv_heads))  # whose queries fill a tile of attention
            sizes, lora = (limits.max_requests, *most[:2], widest, page, spec.vocab), self.settings.lora
            self._shelf = Shelf(spec, lora, self.device, self.dtype, group) if lora.max_adapters else None
            kernels = self.device.type == "cuda" and self.settings.compile.compile != "eager"
            self._stager = Stager(*sizes, self.device, members, adapters=self._shelf is not None, kernels=kernels)
            adapters = None if self._shelf is None else self._shelf.adapters
            self._stepper = Stepper(params, spec, self.settings, self._stager, group, adapters)
            host = self.settings.offload.host_gb * 1e9 if self.settings.offload.offload == "host" else 0
            host_pages = int(host // page_bytes(here, page, self.dtype.itemsize))
            if host and not host_pages:
                raise ValueError(f"offload.host_gb={self.settings.offload.host_gb} holds not even a page: raise it")
            self._mover = Mover(here, page, self.dtype, self.device, host_pages)
            self.version = 0  # of the parameters: how often they have changed
            self._marks, self._adoptions = marks(params), adoptions(params)
            self._marked = self._mark()
            self._regions: dict[str, Region] = {}  # memory of our own, by what it holds
            self.capacity = self._capacity()  # tokens
            slots = self.capacity + page
            size = Region.bytes([(slots, here.kv_heads, here.head)] * 2 * here.layers, self.dtype)
            self._regions["cache"] = Region(size, self.device)
            self._cache = new_cache(here, slots, dtype=self.dtype, region=self._regions["cache"])
            self._mover.attach(self._cache)
            self._stepper.warm_up(self._cache, progress=progress)
            self.state = schedule.State(self._tree())
            self._batch: tuple[schedule.Plan, list[Sample], Batch] | None = None  # of the last step launched
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
            self._guides = Guides(tokenizer, spec.vocab, self._eos, timed=group is None)

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
        weight = sum(w.nbytes for w in tree_leaves(self._params) if w is not None)
        return (
            f"{problem}: {p.cache_fraction:.0%} of {total / 1e9:.1f} GB, {weight / 1e9:.1f} GB of which are weights. "
            f"Lower schedule.token_budget ({s.token_budget}) or schedule.max_requests ({s.max_requests}), "
            "or raise pages.cache_fraction"
        )

    # --- requests -----------------------------------------------------------------------------------------------------

    @exclusive()
    def add(self, prompt: Prompt, sampling: SamplingParams | None = None, *, live: bool = True) -> int:
        """Queue a request; its id. `prompt` is text, token ids, or chat messages.

        `live` false: the text comes with the last event only, which spares the host most of the work for it.

        ValueError, with the numbers, for what can never run; nothing else is disturbed.
        """
        return self._add(prompt, SamplingParams() if sampling is None else sampling, live=live)

    @exclusive()
    def _add(
        self, prompt: Prompt, params: SamplingParams, *, live: bool, guides: Sequence[Guide | None] | None = None
    ) -> int:
        """As `add`; `guides` are what `_compile` made for this request."""
        return self._submit([self._new(prompt, params, live, guides)])[0]

    def _compile(self, params: SamplingParams, stop: threading.Event | None = None) -> list[Guide | None]:
        """Guides for a request's completions. ValueError for a grammar that cannot be used.

        Changes nothing else, so that any thread may call this while another one steps. Cancelled soon after `stop`.
        """
        if params.grammar is None:
            return [None] * params.n
        guides, problem = list[Guide | None](), None
        try:
            if self._crew is not None and not self._guides.stocked(params.grammar, params.n):
                self._guides.check(params.grammar, stop)
                self._crew.tell("_compile_early", params.grammar, params.n)
            guides += self._guides.make(params.grammar, params.n, stop)
        except ValueError as e:
            problem = e
        if self.group is not None and self._crew is None and not self._guides.trusted:  # in step with other callers
            if not self.group.least(int(problem is None)):
                problem = problem or ValueError("another rank refuses the grammar")
        if problem is not None:
            raise problem
        return guides

    def _compile_ahead(self, params: SamplingParams, stop: threading.Event) -> None:
        """As `_compile`, for the next request with these settings."""
        guides = [guide for guide in self._compile(params, stop) if guide is not None]
        if params.grammar is not None and not stop.is_set():  # nobody would take them
            self._guides.put(params.grammar, guides)

    def _compile_early(self, grammar: str, count: int) -> None:
        """Of a rank: compiles beside the steps what rank 0 compiles now."""
        self._guides.make_early(grammar, count)

    def _new(
        self, prompt: Prompt, params: SamplingParams, live: bool, guides: Sequence[Guide | None] | None = None
    ) -> list[Sample]:
        """A request's completions, not yet queued. ValueError for what can never run."""
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling must be SamplingParams, got {params!r:.100}")
        content = self.settings.special_tokens_in_content
        prompt_ids = tokenizer.encode(self.tokenizer, prompt, special_tokens_in_content=content)
        limit = longest(prompt_ids, params, self.spec, self.capacity, self.tokenizer is not None)
        seed = self._random.getrandbits(63) if params.seed is None else params.seed
        output = Output(-1, prompt_ids, [Completion() for _ in range(params.n)])
        if params.prompt_logprobs is not None:
            output.prompt_logprobs = [None]
            output.prompt_top_logprobs = [None] if params.prompt_logprobs else None
        self._adapter(params)
        return [
            Sample(output, index, params, seed, limit, self._eos, self.tokenizer, live=live, guide=guide)
            for index, guide in enumerate(self._compile(params) if guides is None else guides)
        ]

    def _tell(self, name: str, *args: Any, **named: Any) -> None:
        """The other ranks that this process started make a call before this one does."""
        if self._crew is not None:
            self._crew.tell(name, *args, **named)

    def _submit(self, requests: Sequence[list[Sample] | Output]) -> list[int]:
        """New requests, on every rank; an Output in the place of one that cannot run."""
        if self._crew is not None:  # checking hundreds of settings again takes a while
            many = [
                None if isinstance(s, Output) else (s[0].output.prompt_token_ids, replace(s[0].params, seed=s[0].seed))
                for s in requests
            ]
            self._crew.tell("_join", many)
        return self._queue(requests)

    def _join(self, requests: Sequence[tuple[list[int], SamplingParams] | None]) -> None:
        """What rank 0 has submitted; nobody reads along here."""
        self._queue([refused("", 1) if one is None else self._new(*one, False) for one in requests])

    def _queue(self, requests: Sequence[list[Sample] | Output]) -> list[int]:
        """Requests join the others, all at once: the queue is a value, and a copy of it for each takes seconds."""
        outputs = [one if isinstance(one, Output) else one[0].output for one in requests]
        for output in outputs:
            output.request_id = next(self._request_ids)
            self._undelivered += refusal(output) if output.error is not None else ()
        going = [one for one in requests if not isinstance(one, Output)]
        for samples in going:
            for s in samples:
                s.adapter = self._adapter(s.params)
        new = {next(self._ids): sample for samples in going for sample in samples}
        self._samples |= new
        self.state = schedule.add(self.state, *(self._sequence(id, s) for id, s in new.items()))
        return [output.request_id for output in outputs]

    def _sequence(self, id: int, s: Sample) -> schedule.Sequence:
        space = namespace(s.adapter, s.params.cache_salt)
        return schedule.Sequence(id, len(s.tokens), s.limit, s.scores_prompt, namespace=space)

    @exclusive()
    def abort(self, request_id: int) -> Output | None:
        """End a request now; what it has so far. Its last events come with the next step. None if it is not running."""
        check_int("request_id", request_id, *IDS)
        return self._end({request_id}).get(request_id)

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
        if not self._dropped:
            return bool(self._samples or self._undelivered)
        left = {s.output.request_id for s in self._samples.values()} | {e.request_id for e in self._undelivered}
        return not left <= frozenset[int]().union(*self._dropped)

    def _runs(self, requests: Container[int]) -> bool:
        """Whether there will be events of any of these requests."""
        running = (s.output.request_id for s in self._samples.values())
        return any(id in requests for id in itertools.chain(running, (e.request_id for e in self._undelivered)))

    def _unfinished(self, request_id: int) -> dict[int, int]:
        """A request's completions that go on, with all tokens drawn so far: index -> sequence. ValueError if none."""
        check_int("request_id", request_id, *IDS)
        self._receive()
        found = {s.index: id for id, s in self._samples.items() if s.output.request_id == request_id}
        if not found:
            raise ValueError(f"request {request_id} is not running here: it has ended, or never was")
        return found

    @property
    def batch(self) -> Batch | None:
        """The last step's Batch, to look at, or for `fastgen.forward`. None before the first step.

        The staged batch lacks a token that the step before it drew (see `Batch.token`): here that is filled in. On a
        GPU the other tensors change with the next step.
        """
        self._owner.check()
        if self._batch is None:
            return None
        plan, samples, batch = self._batch
        first = [
            s.tokens[span.start] if span.start < len(s.tokens) else 0 for span, s in zip(plan, samples, strict=True)
        ]
        token = batch.token.clone()
        token[batch.start[: len(plan)].long()] = torch.tensor(first, dtype=token.dtype, device=token.device)
        return batch._replace(token=token)

    # --- parameters and memory ----------------------------------------------------------------------------------------

    @exclusive()
    def touch(self) -> None:
        """Say that the parameters have changed: `version` counts one more, and nothing that is cached is used again.

        What is running goes on with the keys and values it has. Writes in place that torch sees (optimizers, `copy_`)
        are noticed without this before the next step; what goes around it is not (`.data`, other processes, graphs).
        """
        self._tell("touch")
        self._touched()

    def _touched(self) -> None:
        """On this rank."""
        self.version += 1
        self._marked = self._mark()
        self.state.tree.reset()

    def _mark(self) -> int:
        """Changes when the parameters are written in place."""
        with torch._C.DisableTorchFunction():  # a default device takes part in each look, and makes it 40 times slower
            return sum(map(attrgetter("_version"), self._marks))

    @property
    def params(self) -> Params:
        """The parameters that steps read. ValueError while their memory is given back (`release`).

        Tensors that were taken from here before must not be read meanwhile: their memory is gone.
        """
        self._owner.check()
        self._require("params")
        return self._params

    @property
    def cache(self) -> Cache:
        """The paged keys and values. ValueError while their memory is given back, as for `params`."""
        self._owner.check()
        self._require("cache")
        return self._cache

    def _require(self, *memory: str) -> None:
        """ValueError if one of these parts of the memory is given back."""
        gone = [name for name in memory if (region := self._regions.get(name)) is not None and not region.held]
        if gone:
            raise ValueError(f"the memory of {' and '.join(gone)} was given back: call restore() first")

    def _park(self) -> None:
        """Everybody waits, with nothing computed and nothing cached."""
        self._receive()
        self.state = schedule.park(self.state, self._tree(self.state.tree.counts), self._known())

    def _room(self) -> Shelf:
        if self._shelf is None:
            raise ValueError("this engine has no room for adapters: start it with max_adapters=N")
        return self._shelf

    def _adapter(self, params: SamplingParams) -> int:
        """The number of a request's adapter. ValueError if there is none of that name."""
        return 0 if params.adapter is None else self._room()[params.adapter].index

    def _owners(self) -> dict[str, int]:
        """Bytes of the device's memory by what they hold."""
        params = {w.data_ptr(): w.nbytes for w in tree_leaves(self._params) if w is not None}
        cache = sum(w.nbytes for w in tree_leaves(self._cache))
        found = {"params": sum(params.values()), "cache": cache, "tables": self._stager.bytes}
        found |= {} if self._shelf is None else {"adapters": self._shelf.bytes}
        return found | {"staging": self._mover.bytes} | self._stepper.bytes()

    # --- steps --------------------------------------------------------------------------------------------------------

    @exclusive("params", "cache")
    @torch.no_grad()
    def step(self) -> list[Event]:
        """Launch one step; what was added to each request. An error or interrupt aborts everything that was running.

        With `overlap`, the events are those of the step before: it is waited for while the new one runs.
        ValueError, and nothing is lost, while memory is given back (`release`), or if an adopted model has other
        parameters now.
        """
        for adoption in self._adoptions:
            adoption.check()
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
        if self._failed:  # by a call of its own: the other ranks know nothing of the error
            failed, self._failed = self._failed, set()
            self._end(failed)
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
            computed = self._stepper.run(self._cache, batch, settings, shape, scored=scored, ready=ready)
            if computed.hidden is not None:
                self._score_prompts(plan, computed.hidden)
            if any(s.looks_back for s in samples):
                self._receive()  # what is drawn depends on the last tokens; the forward computes meanwhile
            launched = Launched(plan, *self._draw(plan, samples, computed, batch, settings), self.version)
        self.state, self._batch = schedule.commit(self.state, plan, (), self._known()), (plan, samples, batch)
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
            none = torch.empty(n, 0, device="cpu")
            results = (*self._stager.drawn(computed.token[:n], computed.logprob[:n], self.steps), none, none)
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
            there = (torch.empty_like(t, device="cpu", pin_memory=True) for t in results)
            results = tuple(a.copy_(b, non_blocking=True) for a, b in zip(there, results, strict=True))
        done = torch.cuda.Event()
        done.record()
        return results, done

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
        stopped, changes = set(), None if self._shelf is None else self._shelf.versions
        with self.profiler.range("commit"):
            for span, row in zip(launched.plan, rows, strict=False):
                sample = self._samples.get(span.id) if span.sample else None
                if sample is None or sample.completion.finish_reason:  # aborted, or it has stopped a step ago
                    continue
                version = launched.version if changes is None else launched.version + changes[sample.adapter]
                try:
                    event = sample.push(*row, version)
                except Exception as e:  # a tokenizer's or grammar's, which concerns this request alone
                    event = sample.fail(f"{type(e).__name__}: {e}")
                    self._failed.add(sample.output.request_id)
                self._undelivered.append(event)
                if event.finish_reason and sample.output.request_id not in self._failed:
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
                value, best = score(self._params, some, target, top, self._stepper.ops)
                sample.invalid |= any(x != x for x in value)
                out.prompt_logprobs += value
                if out.prompt_top_logprobs is not None:
                    out.prompt_top_logprobs += best
            at += span.stop - span.start

    # --- the end ------------------------------------------------------------------------------------------------------

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
        """Abort requests whose events nobody waits for."""
        self._dropped.append(frozenset(ids))
        self._drop()

    def _drop(self) -> None:
        """Abort what was dropped, unless other ranks have ended and all requests with them."""
        if self.cause:
            self._dropped.clear()
        while self._dropped:
            gone = self._dropped.popleft()
            self._end(gone)
            self._undelivered = [e for e in self._undelivered if e.request_id not in gone]

    def close(self) -> None:
        """Abort everything and let go of cache, parameters and other ranks. Nothing is done the second time.

        In a fork of the process nothing is done either: all that is the first process's.
        """
        if self._owner.process == os.getpid() and not self._owner.closed:
            self._close()

    @exclusive()
    def _close(self) -> None:
        self._owner.closed = True
        crew, self._crew = self._crew, None
        self._abort_all()
        self._running = None
        if "_guides" in self.__dict__:
            self._guides.close()
        if "_mover" in self.__dict__:
            self._mover.close()
        for name in ("_stepper", "_mover", "_cache", "_shelf", "_params", "_marks", "_adoptions"):  # graphs first
            self.__dict__.pop(name, None)
        self._batch, self._regions = None, {}
        if crew is not None:
            crew.close()
