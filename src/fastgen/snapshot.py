"""Snapshots: a running request as a value that survives the process, taken from one engine and restored by another."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastgen.config import SamplingParams
from fastgen.core import scheduler
from fastgen.core.engine_core import EngineCore
from fastgen.core.extensions import Matcher
from fastgen.core.prefix_cache import Namespace, make_namespace
from fastgen.core.request import Completion, FinishReason, Output, SequenceState, TopLogprobs
from fastgen.core.types import Tokenizer

FORMAT = "fastgen snapshot 2"
SEED_RANGE = range(-(2**63), 2**63)
FINISH_REASONS = get_args(FinishReason)


def _digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    """A checksum of a text and of tensors: names, dtypes, shapes and bytes."""
    digest = hashlib.blake2b(header.encode(), digest_size=16)
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        digest.update(repr((name, x.dtype, tuple(x.shape))).encode())
        digest.update(x.view(-1).view(torch.uint8).numpy().data if x.numel() else b"")
    return digest.hexdigest()


def _check_tokens(label: str, tokens: Any, vocab_size: int) -> None:
    wrong = [t for t in tokens if not isinstance(t, int) or isinstance(t, bool) or not 0 <= t < vocab_size]
    if wrong:
        raise ValueError(f"{label}: token {wrong[0]!r} is outside the vocabulary of {vocab_size}")


def _check_per_token(
    label: str, entries: Any, num_tokens: int, *, types: tuple[type, ...], dict_value_types: tuple[type, ...] = ()
) -> None:
    """A list of one value for each token, or none; of dicts, with such values."""
    if entries is None:
        return
    if len(entries) != num_tokens:
        raise ValueError(f"{label}: {len(entries)} values for {num_tokens} tokens")
    for row in entries:
        if not isinstance(row, types) or (
            isinstance(row, dict) and not all(isinstance(x, dict_value_types) for x in row.values())
        ):
            raise ValueError(f"{label}: {row!r} is no such value")


def _dicts_to_pairs(rows: list[TopLogprobs] | None) -> list[list[tuple[int, float]]] | None:
    return None if rows is None else [list(row.items()) for row in rows]


def _pairs_to_dicts(rows: list[list[list[Any]]] | None) -> list[TopLogprobs] | None:
    return None if rows is None else [{int(t): x for t, x in row} for row in rows]


def _copy_completion(completion: Completion) -> Completion:
    """A copy with lists of its own: the request goes on and fills its lists, empty ones too."""
    logprobs, tops = (None if x is None else [*x] for x in (completion.logprobs, completion.top_logprobs))
    return replace(
        completion,
        token_ids=[*completion.token_ids],
        logprobs=logprobs,
        top_logprobs=tops,
        weight_versions=[*completion.weight_versions],
    )


@dataclass(slots=True)
class Snapshot:
    """Tokens, settings and seeds: all that decides which tokens come next. From `Engine.snapshot`.

    `pages` may hold keys and values of completions, by index: [layers, keys and values, tokens, kv heads, head width].
    They are for the tokens, the adapter and the model that they were computed with: `checksum` is of all of these, and
    pages that are not what they were are refused.
    """

    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    completions: list[Completion]
    seeds: dict[int, int]  # of the completions that have not ended
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[TopLogprobs | None] | None = None
    model_fingerprint: str = ""  # which model's pages these are
    pages: dict[int, Tensor] = field(default_factory=dict)
    checksum: str = ""  # of the pages; empty without them

    @classmethod
    def from_request(cls, output: Output, sequence_states: Mapping[int, SequenceState]) -> "Snapshot":
        """Of a request, and those of its completions that go on."""
        o = output
        scored = o.prompt_logprobs is not None and len(o.prompt_logprobs) == len(o.prompt_token_ids)
        return cls(
            tuple(o.prompt_token_ids),
            next(iter(sequence_states.values())).params,
            [_copy_completion(c) for c in o.completions],
            {i: s.seed for i, s in sequence_states.items()},
            [*o.prompt_logprobs] if scored and o.prompt_logprobs else None,
            [*o.prompt_top_logprobs] if scored and o.prompt_top_logprobs else None,
        )

    def compute_pages_checksum(self) -> str:
        """What `checksum` must be."""
        if not self.pages:
            return ""
        known = [
            (i, [*self.prompt_token_ids, *self.completions[i].token_ids][: x.shape[2]])
            for i, x in sorted(self.pages.items())
        ]
        about = repr((known, self.sampling.adapter, self.model_fingerprint))
        return _digest(about, {str(i): x for i, x in self.pages.items()})

    def check(self, vocab_size: int = 2**63) -> None:
        """Raises ValueError, with the reason, for what no engine of this vocabulary can have saved."""
        try:
            self._check(vocab_size)
        except (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as e:
            raise ValueError(f"snapshot: a part of it is of a wrong type: {e}") from e
        except ValueError as e:
            raise ValueError(f"snapshot: {e}") from e

    def _check(self, vocab_size: int) -> None:
        if not isinstance(self.sampling, SamplingParams):
            raise ValueError(f"params are {type(self.sampling).__name__}, not SamplingParams")
        if not self.prompt_token_ids or not self.completions:
            raise ValueError("it has no prompt or no completions")
        _check_tokens("prompt", self.prompt_token_ids, vocab_size)
        number, p = (int, float), self.sampling
        for i, c in enumerate(self.completions):
            where, count = f"completion {i}", len(c.token_ids)
            _check_tokens(where, c.token_ids, vocab_size)
            _check_per_token(f"{where}, logprobs", c.logprobs, count, types=number)
            _check_per_token(f"{where}, top logprobs", c.top_logprobs, count, types=(dict,), dict_value_types=number)
            _check_per_token(f"{where}, versions", c.weight_versions, count, types=(int,))
            if not isinstance(c.text, str) or c.finish_reason not in (None, *FINISH_REASONS):
                raise ValueError(f"{where} has the text {c.text!r} and the finish reason {c.finish_reason!r}")
            if c.finish_reason is None and ((c.logprobs is None) != (p.logprobs is None) and count):
                raise ValueError(f"{where} has logprobs where its settings have none, or none where they do")
        count = len(self.prompt_token_ids)
        _check_per_token("prompt logprobs", self.prompt_logprobs, count, types=(*number, type(None)))
        kinds = (dict, type(None))
        _check_per_token("prompt top logprobs", self.prompt_top_logprobs, count, types=kinds, dict_value_types=number)
        going = [i for i, c in enumerate(self.completions) if c.finish_reason is None]
        if not going or [*self.seeds] != going:
            raise ValueError(f"it has seeds of the completions {[*self.seeds]}, and those that go on are {going}")
        for seed in self.seeds.values():
            if not isinstance(seed, int) or isinstance(seed, bool) or seed not in SEED_RANGE:
                raise ValueError(f"seed {seed!r} is not within -2^63 to 2^63 - 1")
        for i, x in self.pages.items():
            known = count + len(self.completions[i].token_ids)
            if not (isinstance(x, Tensor) and x.ndim == 5 and x.shape[1] == 2 and 0 < x.shape[2] <= known):
                shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"the pages of completion {i} are {shape}, not [layers, 2, {known} tokens at most, …]")
            if not x.is_floating_point() or not bool(x.isfinite().all()):
                raise ValueError(f"the pages of completion {i} hold {x.dtype}, or values that are NaN or infinite")
        if self.checksum != self.compute_pages_checksum():
            raise ValueError("its pages are not those that were saved: their checksum is another")

    def rebuild_request(
        self,
        max_length: int,
        eos_token_ids: frozenset[int],
        tokenizer: Tokenizer | None,
        guides: Sequence[Matcher | None],
    ) -> tuple[Output, list[SequenceState]]:
        """The request again, and the completions that go on. `limit` counts prompt and output.

        `guides` are at the beginning of the grammar, one for each of these completions.
        """
        output = Output(-1, [*self.prompt_token_ids], [_copy_completion(c) for c in self.completions])
        p, samples = self.sampling, []
        if p.prompt_logprobs is not None:
            output.prompt_logprobs = [*self.prompt_logprobs] if self.prompt_logprobs else [None]
            tops: list[TopLogprobs | None] = [*self.prompt_top_logprobs] if self.prompt_top_logprobs else [None]
            output.prompt_top_logprobs = tops if p.prompt_logprobs else None
        for (i, seed), guide in zip(self.seeds.items(), guides, strict=True):
            output.completions[i] = Completion()
            sample = SequenceState(output, i, p, 0, max_length, eos_token_ids, tokenizer, matcher=guide)
            sample.seed = seed
            sample.needs_prompt_logprobs &= self.prompt_logprobs is None
            sample.resume(_copy_completion(self.completions[i]))
            samples.append(sample)
        return output, samples

    def save(self, path: str | Path) -> None:
        """To a .safetensors file: tokens and pages as tensors, the rest as JSON in its header, with checksums."""
        self.check()
        tensors = {"prompt": torch.tensor(self.prompt_token_ids, device="cpu")}
        completions = []
        for i, c in enumerate(self.completions):
            tensors[f"tokens.{i}"] = torch.tensor(c.token_ids, dtype=torch.int64, device="cpu")
            if c.logprobs is not None:
                tensors[f"logprobs.{i}"] = torch.tensor(c.logprobs, dtype=torch.float64, device="cpu")
            tops = _dicts_to_pairs(c.top_logprobs)
            completions.append(
                {"text": c.text, "finish_reason": c.finish_reason, "tops": tops, "versions": c.weight_versions}
            )
        small = dict(tensors)  # the pages have a checksum of their own
        tensors |= {f"pages.{i}": x.contiguous() for i, x in self.pages.items()}
        about = {
            "params": asdict(self.sampling), "completions": completions, "seeds": list(self.seeds.items()),
            "prompt_logprobs": self.prompt_logprobs, "model": self.model_fingerprint, "checksum": self.checksum,
            "prompt_tops": self.prompt_top_logprobs and [row and list(row.items()) for row in self.prompt_top_logprobs],
        }  # fmt: skip
        text = json.dumps(about)
        save_file(tensors, path, {"format": FORMAT, "about": text, "digest": _digest(text, small)})

    @classmethod
    def load(cls, path: str | Path) -> "Snapshot":
        """From such a file. ValueError, which names it, for one that is another, damaged or cut short."""
        try:
            with safe_open(path, "pt") as f:
                about = f.metadata() or {}
                if about.get("format") != FORMAT:
                    raise ValueError(f"its format is {about.get('format')!r}, not {FORMAT!r}")
                x = {name: f.get_tensor(name) for name in f.keys()}
            small = {name: t for name, t in x.items() if not name.startswith("pages.")}
            if about.get("digest") != _digest(about["about"], small):
                raise ValueError("its checksum is another")
            found = cls._parse(json.loads(about["about"]), x)
            found.check()
        except FileNotFoundError:
            raise
        except (SafetensorError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, OSError) as e:
            raise ValueError(f"{path} is not a snapshot, or is damaged: {e}") from e
        except (RuntimeError, MemoryError) as e:  # RecursionError is one
            raise ValueError(f"{path} is not a snapshot, or is damaged: {type(e).__name__}") from e
        return found

    @classmethod
    def _parse(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> "Snapshot":
        params = header["params"] | {"logit_bias": {int(t): b for t, b in header["params"]["logit_bias"].items()}}
        tops = header["prompt_tops"]
        completions = [
            Completion(
                tensors[f"tokens.{i}"].tolist(), c["text"],
                tensors[f"logprobs.{i}"].tolist() if f"logprobs.{i}" in tensors else None, _pairs_to_dicts(c["tops"]),
                c["finish_reason"],
                c["versions"],
            )
            for i, c in enumerate(header["completions"])
        ]  # fmt: skip
        return cls(
            tuple(tensors["prompt"].tolist()), SamplingParams(**params), completions,
            {int(i): s for i, s in header["seeds"]},
            header["prompt_logprobs"], tops and [row and {int(t): v for t, v in row} for row in tops], header["model"],
            {int(name[6:]): t for name, t in tensors.items() if name.startswith("pages.")}, header["checksum"],
        )  # fmt: skip


# --- of an engine -----------------------------------------------------------------------------------------------------


def take(core: EngineCore, request_id: int, *, include_pages: bool) -> Snapshot:
    """Returns a running request; see `Engine.snapshot`."""
    running = core.unfinished_sequences(request_id)
    states = {i: core.sequence_states[id] for i, id in running.items()}
    snapshot = Snapshot.from_request(next(iter(states.values())).output, states)
    if include_pages:
        prefix_cache, page_size = core.state.prefix_cache, core.state.page_size
        # Sequences of an older prefix cache have keys and values of older parameters.
        current = {s.id: s for s in core.state.running if s.root is prefix_cache.get_root(s.namespace)}
        snapshot.model_fingerprint = model_fingerprint(core)
        for i, s in ((i, current[id]) for i, id in running.items() if id in current):
            if n := s.num_computed_tokens:
                pages = s.pages[: scheduler.num_pages_for(page_size, n)]
                snapshot.pages[i] = core.page_copier.read_pages(pages, n)
        snapshot.checksum = snapshot.compute_pages_checksum()
    return snapshot


def restore(core: EngineCore, snapshot: Snapshot) -> int:
    """Continues a request on this rank and returns its id; see `Engine.restore`."""
    shard, params = core.runner.model_config, snapshot.sampling
    same_model = bool(snapshot.pages) and snapshot.model_fingerprint == model_fingerprint(core)
    for i, x in snapshot.pages.items() if same_model else ():
        shape, dtype = (
            (shard.num_layers, 2, x.shape[2], shard.num_kv_heads, shard.head_dim),
            core.runner.params.embed.dtype,
        )
        if tuple(x.shape) != shape or x.dtype != dtype:
            raise ValueError(f"snapshot: the pages of completion {i} are {tuple(x.shape)} {x.dtype}, not {shape}")
    matchers = core.grammars.compile(params)[: len(snapshot.seeds)]
    limit, adapter_idx = core.max_length(snapshot.prompt_token_ids, params), core.adapter_index(params)
    output, states = snapshot.rebuild_request(limit, core.eos_token_ids, core.tokenizer, matchers)
    length = max((len(s.token_ids) for s in states), default=0)
    if length >= limit:
        place = f"model's context of {core.model_config.context_length} or cache of {core.cache_capacity}"
        raise ValueError(f"{length} tokens and one more do not fit the {place} tokens")
    if any(s.matcher is not None and s.matcher.failed for s in states):
        raise ValueError("snapshot: its tokens do not follow its grammar")
    if same_model and not adapter_idx and core.state.prefix_cache.enable_prefix_caching:
        for i, values in snapshot.pages.items():
            tokens = (*snapshot.prompt_token_ids, *output.completions[i].token_ids)[: values.shape[2]]
            _insert_pages(core, tokens, values, make_namespace(adapter_idx, params.cache_salt))
    return core.enqueue([states])[0]


def _insert_pages(core: EngineCore, tokens: Sequence[int], values: Tensor, namespace: Namespace) -> None:
    """Puts keys and values into the prefix cache, as if a request had left them, if there is room."""
    pages = core.state.prefix_cache.insert_idle_pages(tokens, namespace)
    if not pages:
        return
    for event in core.page_copier.start_copies(core.state.prefix_cache.pop_page_copies()):
        torch.cuda.current_stream(core.runner.device).wait_event(event)
    core.page_copier.write_pages(pages, values[:, :, : len(pages) * core.state.page_size])


def model_fingerprint(core: EngineCore) -> str:
    """Returns a digest of the model and its present parameters, which differs before and after training."""
    leaves = [x for x in tree_leaves(core.runner.params) if x is not None]
    digest = hashlib.blake2b(repr((core.model_config, core.runner.params.embed.dtype)).encode(), digest_size=16)
    int_dtypes = {2: torch.int16, 4: torch.int32}
    # Sums of the bits of all elements: training may have changed any one. The first rows tell orders apart.
    sums = torch.stack([x.view(int_dtypes[x.itemsize]).sum(dtype=torch.int64) for x in leaves])
    digest.update(sums.cpu().numpy().tobytes())
    for x in leaves:
        digest.update(x[:8].double().cpu().numpy().tobytes())  # of a copy: memory that NumPy has seen stays allocated
    return digest.hexdigest()
