"""The engine: parameters, a paged cache and a scheduler's state, advanced a step at a time."""

import itertools
import random
import weakref
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from fastgen import batch as batches
from fastgen import schedule, tokenizer
from fastgen.cache import pages
from fastgen.config import SamplingParams, Settings
from fastgen.models import default, weights
from fastgen.models.spec import Spec, from_hf
from fastgen.ops.backends import choose
from fastgen.request import Completion, Event, Output, Sample, longest
from fastgen.step import compute, new_cache, score
from fastgen.tokenizer import Prompt
from fastgen.types import Batch, Params

CPU_CACHE = 2**30  # bytes at most, where the size is not given


class Engine:
    """Generates from a dense transformer; many requests share each step.

    `params` are used as they are, without a copy, on the device and in the dtype they have. Settings are the names
    in `fastgen.config` (`token_budget=512, page_size=32, …`).

    Not for several threads at once. `close()` (or `with`) frees the cache.
    """

    def __init__(
        self,
        params: Params,
        spec: Spec,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **settings: Any,
    ) -> None:
        self.params, self.spec, self.tokenizer = params, spec, tokenizer
        self.settings = Settings.of(**settings)
        self.device, self.dtype = params.embed.device, params.embed.dtype
        page = self.settings.pages.page_size
        self.capacity = self._capacity()  # tokens
        self.cache = new_cache(spec, self.capacity + page, device=self.device, dtype=self.dtype)
        self.state = schedule.State(page=page, free=pages.pool(self.capacity // page + 1))
        self.batch: Batch | None = None  # of the last step, to look at
        self.steps = 0
        self._backend = partial(choose(self.settings.compile.attention, self.device), page=page)
        self._samples: dict[int, Sample] = {}  # by sequence
        self._ids, self._request_ids = itertools.count(), itertools.count()
        self._undelivered: list[Event] = []
        self._random = random.Random(self.settings.seed)
        eos: Any = [] if tokenizer is None or tokenizer.eos_token_id is None else tokenizer.eos_token_id
        self._eos = frozenset(spec.eos) | frozenset(eos if isinstance(eos, list) else [eos])

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
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
        kind = getattr(torch, dtype) if dtype != "auto" else torch.float32 if device == "cpu" else None
        Settings.of(**settings)  # a mistyped setting should not cost the time of loading
        path = default.default_path() if model is None else weights.resolve(model)
        if random:
            spec = from_hf(weights.read_config(path))
            params = weights.init(spec, random_seed, device=device, dtype=kind)
        else:
            spec, params = weights.load(path, device=device, dtype=kind, progress=progress)
        return cls(params, spec, tokenizer.load(path), **settings)

    def _capacity(self) -> int:
        """Tokens the cache holds, in whole pages."""
        p, spec = self.settings.pages, self.spec
        per_token = 2 * spec.layers * spec.kv_heads * spec.head * self.dtype.itemsize
        tokens = p.cache_tokens
        if tokens is None:
            cuda = self.device.type == "cuda"
            free = torch.cuda.mem_get_info(self.device)[0] * p.cache_fraction if cuda else CPU_CACHE
            # No more than could ever be in use.
            longest = -(-(spec.context - 1) // p.page_size) * p.page_size
            tokens = min(int(free) // per_token, self.settings.schedule.max_requests * longest)
        if tokens < p.page_size:
            raise ValueError(f"no memory is left for the cache: {tokens} tokens of {per_token} bytes each")
        return tokens // p.page_size * p.page_size

    # --- requests, one at a time ----------------------------------------------------------------------------------

    def add(self, prompt: Prompt, sampling: SamplingParams | None = None) -> int:
        """Queue a request; its id. `prompt` is text, token ids, or chat messages.

        ValueError, with the numbers, for what can never run; nothing else is disturbed.
        """
        params = sampling or SamplingParams()
        prompt_ids = tokenizer.encode(self.tokenizer, prompt)
        limit = longest(prompt_ids, params, self.spec, self.capacity, self.tokenizer is not None)
        seed = self._random.getrandbits(63) if params.seed is None else params.seed
        output = Output(next(self._request_ids), prompt_ids, [Completion() for _ in range(params.n)])
        if params.prompt_logprobs is not None:
            output.prompt_logprobs = [None]
            output.prompt_top_logprobs = [None] if params.prompt_logprobs else None
        try:
            for index in range(params.n):
                id = next(self._ids)
                self._samples[id] = Sample(output, index, params, seed, limit, self._eos, self.tokenizer)
                self.state = schedule.add(self.state, schedule.Sequence(id, len(prompt_ids), limit))
        except BaseException:
            self._abort([output.request_id])  # not a part of it stays
            raise
        return output.request_id

    def abort(self, request_id: int) -> Output | None:
        """End a request now; what it has so far. Its last events come with the next step. None if it is not running."""
        ids = [id for id, s in self._samples.items() if s.output.request_id == request_id]
        if not ids:
            return None
        self.state = schedule.drop(self.state, ids)
        samples = [self._samples.pop(id) for id in ids]
        self._undelivered += [s.end("abort") for s in samples if not s.completion.finish_reason]
        return samples[0].output

    @property
    def unfinished(self) -> bool:
        """Whether a step has anything left to do or to report."""
        return bool(self._samples or self._undelivered)

    # --- steps ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Compute one step; what it added to each request. An error or interrupt aborts everything that was running."""
        try:
            self._step()
        except BaseException:
            self._abort_all()
            raise
        events, self._undelivered = self._undelivered, []
        return events

    def _step(self) -> None:
        state, plan = schedule.plan(self.state, self.settings.schedule)
        if not plan:
            return
        drawing = [self._samples[span.id] for span in plan if span.sample]
        tokens = {span.id: self._samples[span.id].tokens for span in plan}
        self.batch = batches.stage(plan, tokens, state.page, self.device)
        settings = batches.stage_sampling(drawing, self.spec.vocab, self.device)
        top = max((s.params.logprobs for s in drawing if s.params.logprobs is not None), default=None)
        x, drawn = compute(self.params, self.cache, self.batch, settings, self.spec, self._backend, top)
        self._score_prompts(plan, x)
        rows = zip(*(t.tolist() for t in drawn), strict=True)
        stopped = set()
        for span in plan:
            if span.sample:
                token, logprob, top_token, top_logprob = next(rows)
                sample = self._samples[span.id]
                event = sample.push(token, logprob, list(zip(top_token, top_logprob, strict=True)))
                self._undelivered.append(event)
                if event.finish_reason:
                    stopped.add(span.id)
        self.state = schedule.commit(state, plan, stopped)
        for id in stopped:
            del self._samples[id]
        self.steps += 1

    def _score_prompts(self, plan: schedule.Plan, x: Tensor) -> None:
        """Prompt logprobs of the step's spans, from the hidden states x [T, D]."""
        at = 0
        for span in plan:
            sample = self._samples[span.id]
            out, top = sample.output, sample.params.prompt_logprobs
            n = min(span.stop, len(out.prompt_token_ids) - 1) - span.start  # the last one predicts no prompt token
            if out.prompt_logprobs is not None and top is not None and sample.index == 0 and n > 0:
                target = out.prompt_token_ids[span.start + 1 : span.start + 1 + n]
                value, best = score(self.params, x[at : at + n], target, top)
                out.prompt_logprobs += value
                if out.prompt_top_logprobs is not None:
                    out.prompt_top_logprobs += best
            at += span.stop - span.start

    # --- many at once -----------------------------------------------------------------------------------------------

    def stream(
        self, prompts: Prompt | Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[Event]:
        """Events of one or many prompts as they come; `request_id` counts the prompts from the first one's id.

        Leaving the loop early, or an interrupt, aborts what is not finished.
        """
        ids = self._add_all(prompts, sampling)
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
        ids = self._add_all(prompts, sampling)
        done: dict[int, Output] = {}
        with tqdm(total=len(ids), unit="request", delay=2, leave=False, disable=progress is False) as bar:
            for event in self._events(ids):
                if event.output is not None:
                    done[event.request_id] = event.output
                    bar.update()
        return [done[id] for id in ids]

    def _add_all(
        self, prompts: Prompt | Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[int]:
        many: Sequence[Any] = [prompts] if tokenizer.is_one(prompts) else list(prompts)
        each = [sampling] * len(many) if sampling is None or isinstance(sampling, SamplingParams) else list(sampling)
        if len(each) != len(many):
            raise ValueError(f"{len(each)} sampling settings for {len(many)} prompts")
        ids: list[int] = []
        try:
            for prompt, params in zip(many, each, strict=True):
                ids.append(self.add(prompt, params))
        except BaseException as e:
            self._abort(ids)
            if isinstance(e, ValueError) and len(many) > 1:
                raise ValueError(f"prompt {len(ids)}: {e}") from e
            raise
        return ids

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

    def _abort_all(self) -> None:
        """Abort everything; whoever waits for it hears of it."""
        for id in {s.output.request_id for s in self._samples.values()}:
            self.abort(id)

    def _abort(self, ids: Iterable[int]) -> None:
        """Abort requests whose events nobody waits for."""
        for id in ids:
            self.abort(id)
            self._undelivered = [e for e in self._undelivered if e.request_id != id]

    # --- the end ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Abort everything and let go of cache and parameters."""
        self._abort_all()
        for name in ("cache", "params"):
            self.__dict__.pop(name, None)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
