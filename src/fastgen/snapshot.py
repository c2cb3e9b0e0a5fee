"""Snapshots: running requests as values that outlive the process, taken from one engine and restored in another."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastgen.core import scheduler
from fastgen.core.engine_core import EngineCore
from fastgen.core.prefix_cache import Namespace, make_namespace
from fastgen.core.request import Completion, FinishReason, Output, SequenceState, TopLogprobs
from fastgen.sampling_params import SamplingParams

FORMAT = "fastgen snapshot 4"  # 4: pages of quantized caches
FINISH_REASONS = (None, *get_args(FinishReason))
NUMBER = (int, float)
NONE = type(None)


def _digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    """Returns a checksum of a text and of tensors: names, dtypes, shapes and bytes."""
    digest = hashlib.blake2b(header.encode(), digest_size=16)
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        digest.update(repr((name, x.dtype, tuple(x.shape))).encode())
        digest.update(x.view(-1).view(torch.uint8).numpy().data if x.numel() else b"")
    return digest.hexdigest()


def _is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < high


def _check_tokens(label: str, token_ids: Iterable[Any], vocab_size: int) -> None:
    for token in token_ids:
        if not _is_int(token, 0, vocab_size):
            raise ValueError(f"{label}: token {token!r} is outside the vocabulary of {vocab_size}")


def _check_per_token(label: str, entries: Any, num_tokens: int, *types: type) -> None:
    """Checks a list, unless it is None, of one entry per token; entries that are dicts must have numbers as values."""
    if entries is None:
        return
    if len(entries) != num_tokens:
        raise ValueError(f"{label}: {len(entries)} values for {num_tokens} tokens")
    for entry in entries:
        values = entry.values() if isinstance(entry, dict) else ()
        if not isinstance(entry, types) or not all(isinstance(x, NUMBER) for x in values):
            raise ValueError(f"{label}: {entry!r} is not a valid value")


def _to_pairs(rows: Sequence[TopLogprobs | None] | None) -> list[list[tuple[int, float]] | None] | None:
    return None if rows is None else [None if row is None else [*row.items()] for row in rows]


def _from_pairs(rows: Any) -> Any:
    return None if rows is None else [None if row is None else {int(t): x for t, x in row} for row in rows]


def _copy_completion(completion: Completion) -> Completion:
    """Returns a copy that shares no lists with the original, to which a running request appends."""
    return replace(completion, **{f.name: copy(getattr(completion, f.name)) for f in fields(completion)})


@dataclass(slots=True)
class Snapshot:
    """Tokens, settings and seeds of a running request: all that decides its next tokens. Made by `Engine.snapshot`.

    `pages` may hold keys and values of completions, by index: [layers, keys and values, tokens, kv heads, head_dim];
    of an fp8 cache, its rows: [layers, keys and values, tokens, 1, bytes]. They are valid for the tokens, the adapter,
    the model and the cache's dtype that they were computed with; `checksum` covers all of these, and pages that do not
    match it are rejected.
    """

    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    completions: list[Completion]
    seeds: dict[int, int]  # of the unfinished completions, by index
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[TopLogprobs | None] | None = None
    model_fingerprint: str = ""  # of the model that computed the pages
    pages: dict[int, Tensor] = field(default_factory=dict)
    checksum: str = ""  # of the pages; empty without them
    prompt: str | None = None  # the prompt's text, as in the output

    def compute_pages_checksum(self) -> str:
        """Returns the checksum that valid pages must have."""
        if not self.pages:
            return ""
        token_ids = [[*self.prompt_token_ids, *c.token_ids] for c in self.completions]
        prefixes = [(i, token_ids[i][: x.shape[2]]) for i, x in sorted(self.pages.items())]
        header = repr((prefixes, self.sampling.adapter, self.model_fingerprint))
        return _digest(header, {str(i): x for i, x in self.pages.items()})

    def check(self, vocab_size: int = 2**63) -> None:
        """Raises ValueError, with the reason, if no engine with this vocabulary can have made the snapshot."""
        try:
            self._check(vocab_size)
        except (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as e:
            raise ValueError(f"snapshot: a field has the wrong type: {e}") from e
        except ValueError as e:
            raise ValueError(f"snapshot: {e}") from e

    def _check(self, vocab_size: int) -> None:
        if not isinstance(self.sampling, SamplingParams):
            raise ValueError(f"sampling is {type(self.sampling).__name__}, not SamplingParams")
        if not isinstance(self.prompt, str | None):
            raise ValueError(f"the prompt's text is {type(self.prompt).__name__}")
        if not self.prompt_token_ids or not self.completions:
            raise ValueError("it has no prompt or no completions")
        _check_tokens("prompt", self.prompt_token_ids, vocab_size)
        num_prompt, has_logprobs = len(self.prompt_token_ids), self.sampling.logprobs is not None
        for i, c in enumerate(self.completions):
            label, num_tokens = f"completion {i}", len(c.token_ids)
            _check_tokens(label, c.token_ids, vocab_size)
            _check_per_token(f"{label}, logprobs", c.logprobs, num_tokens, *NUMBER)
            _check_per_token(f"{label}, top logprobs", c.top_logprobs, num_tokens, dict)
            _check_per_token(f"{label}, weight versions", c.weight_versions, num_tokens, int)
            if not isinstance(c.text, str) or c.finish_reason not in FINISH_REASONS:
                raise ValueError(f"{label} has the text {c.text!r} and the finish reason {c.finish_reason!r}")
            if not isinstance(c.stop_reason, str | int | None):
                raise ValueError(f"{label} has the stop reason {c.stop_reason!r}")
            if c.finish_reason is None and num_tokens and (c.logprobs is not None) != has_logprobs:
                raise ValueError(f"{label} has logprobs where its settings have none, or none where they do")
        _check_per_token("prompt logprobs", self.prompt_logprobs, num_prompt, *NUMBER, NONE)
        _check_per_token("prompt top logprobs", self.prompt_top_logprobs, num_prompt, dict, NONE)
        unfinished = [i for i, c in enumerate(self.completions) if c.finish_reason is None]
        if not unfinished or [*self.seeds] != unfinished:
            raise ValueError(f"it has seeds of completions {[*self.seeds]}; the unfinished ones are {unfinished}")
        for seed in self.seeds.values():
            if not _is_int(seed, -(2**63), 2**63):
                raise ValueError(f"seed {seed!r} is not within -2^63 to 2^63 - 1")
        for i, x in self.pages.items():
            num_tokens = num_prompt + len(self.completions[i].token_ids)
            if not (isinstance(x, Tensor) and x.ndim == 5 and x.shape[1] == 2 and 0 < x.shape[2] <= num_tokens):
                shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                expected = f"[layers, 2, {num_tokens} tokens at most, …]"
                raise ValueError(f"the pages of completion {i} are {shape}, not {expected}")
            if x.dtype != torch.uint8 and not (x.is_floating_point() and bool(x.isfinite().all())):
                raise ValueError(f"the pages of completion {i} hold {x.dtype}, or values that are NaN or infinite")
        if self.checksum != self.compute_pages_checksum():
            raise ValueError("its pages are not those that were saved: the checksum differs")

    def rebuild_request(self, core: EngineCore, max_length: int) -> tuple[Output, list[SequenceState]]:
        """Returns the request and its unfinished completions. `max_length` counts the tokens of prompt and output."""
        matchers = core.grammars.compile(self.sampling)[: len(self.seeds)]
        common = (self.sampling, 0, max_length, core.eos_token_ids)
        completions = [_copy_completion(c) for c in self.completions]
        output = Output(-1, [*self.prompt_token_ids], completions, prompt=self.prompt)
        if (num_top := self.sampling.prompt_logprobs) is not None:
            output.prompt_logprobs = copy(self.prompt_logprobs) or [None]
            output.prompt_top_logprobs = (copy(self.prompt_top_logprobs) or [None]) if num_top else None
        states = []
        for (i, seed), matcher in zip(self.seeds.items(), matchers, strict=True):
            output.completions[i] = Completion()
            detokenizer = core.text.new_detokenizer(output.prompt_token_ids, self.sampling, stream_text=True)
            state = SequenceState(output, i, *common, detokenizer, matcher)
            state.seed = seed
            state.needs_prompt_logprobs &= self.prompt_logprobs is None
            state.resume(_copy_completion(self.completions[i]))
            states.append(state)
        return output, states

    def save(self, path: str | Path) -> None:
        """Writes a .safetensors file: tokens and pages as tensors, the rest as JSON in its header, with checksums."""
        self.check()
        if self.sampling.logits_processors:
            problem = "functions cannot be saved to a file; replace them: logits_processors=()"
            raise ValueError(f"snapshot: sampling.logits_processors: {problem}")
        tensors = {"prompt": torch.tensor(self.prompt_token_ids, device="cpu")}
        completions = []
        for i, c in enumerate(self.completions):
            tensors[f"tokens.{i}"] = torch.tensor(c.token_ids, dtype=torch.int64, device="cpu")
            if c.logprobs is not None:
                tensors[f"logprobs.{i}"] = torch.tensor(c.logprobs, dtype=torch.float64, device="cpu")
            entry = {
                "text": c.text,
                "finish_reason": c.finish_reason,
                "versions": c.weight_versions,
                "stop_reason": c.stop_reason,
            }
            completions.append(entry | {"tops": _to_pairs(c.top_logprobs)})
        header = json.dumps({
            "params": asdict(self.sampling), "completions": completions, "seeds": list(self.seeds.items()),
            "prompt_logprobs": self.prompt_logprobs, "prompt_tops": _to_pairs(self.prompt_top_logprobs),
            "model": self.model_fingerprint, "checksum": self.checksum, "prompt": self.prompt,
        })  # fmt: skip
        metadata = {"format": FORMAT, "about": header, "digest": _digest(header, tensors)}  # the pages have a checksum
        save_file(tensors | {f"pages.{i}": x.contiguous() for i, x in self.pages.items()}, path, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "Snapshot":
        """Reads a file of `save`. Raises ValueError, which names the file, if it is damaged or no snapshot."""
        try:
            with safe_open(path, "pt") as f:
                metadata = f.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
                tensors = {name: f.get_tensor(name) for name in f.keys()}
            pages = {int(name[6:]): tensors.pop(name) for name in [*tensors] if name.startswith("pages.")}
            if metadata.get("digest") != _digest(metadata["about"], tensors):
                raise ValueError("its checksum differs")
            header, values = json.loads(metadata["about"]), {name: x.tolist() for name, x in tensors.items()}
            params = header["params"] | {"logit_bias": {int(t): b for t, b in header["params"]["logit_bias"].items()}}
            completions = [
                Completion(
                    values[f"tokens.{i}"], c["text"], values.get(f"logprobs.{i}"), _from_pairs(c["tops"]),
                    c["finish_reason"], c["versions"], stop_reason=c["stop_reason"],
                )
                for i, c in enumerate(header["completions"])
            ]  # fmt: skip
            seeds, tops = {int(i): s for i, s in header["seeds"]}, _from_pairs(header["prompt_tops"])
            snapshot = cls(
                tuple(values["prompt"]), SamplingParams(**params), completions, seeds,
                header["prompt_logprobs"], tops, header["model"], pages, header["checksum"],
                header["prompt"],
            )  # fmt: skip
            snapshot.check()
        except FileNotFoundError:
            raise
        except (SafetensorError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, OSError) as e:
            raise ValueError(f"{path} is not a snapshot, or is damaged: {e}") from e
        except (RuntimeError, MemoryError) as e:  # RecursionError is one
            raise ValueError(f"{path} is not a snapshot, or is damaged: {type(e).__name__}") from e
        return snapshot


# --- engines ----------------------------------------------------------------------------------------------------------


def take(core: EngineCore, request_id: int, *, include_pages: bool) -> Snapshot:
    """Returns a snapshot of a running request; see `Engine.snapshot`."""
    running = core.unfinished_sequences(request_id)
    states = {i: core.sequence_states[id] for i, id in running.items()}
    state = next(iter(states.values()))
    o = state.output
    scored = o.prompt_logprobs is not None and len(o.prompt_logprobs) == len(o.prompt_token_ids)
    snapshot = Snapshot(
        tuple(o.prompt_token_ids), state.params, [_copy_completion(c) for c in o.completions],
        {i: s.seed for i, s in states.items()}, copy(o.prompt_logprobs) if scored else None,
        (copy(o.prompt_top_logprobs) or None) if scored else None, prompt=o.prompt,
    )  # fmt: skip
    if include_pages:
        prefix_cache, page_size = core.state.prefix_cache, core.state.page_size
        # Sequences of an older prefix cache have keys and values of older parameters.
        current = {s.id: s for s in core.state.running if s.root is prefix_cache.get_root(s.namespace)}
        snapshot.model_fingerprint = model_fingerprint(core)
        for i, s in ((i, current[id]) for i, id in running.items() if id in current):
            if n := s.num_computed_tokens:
                snapshot.pages[i] = core.page_copier.read_pages(s.pages[: scheduler.num_pages_for(page_size, n)], n)
        snapshot.checksum = snapshot.compute_pages_checksum()
    return snapshot


def restore(core: EngineCore, snapshot: Snapshot) -> int:
    """Continues a snapshot's request on this rank and returns its id; see `Engine.restore`."""
    cache, params = core.runner.cache.k, snapshot.sampling
    same_model = bool(snapshot.pages) and snapshot.model_fingerprint == model_fingerprint(core)
    for i, x in snapshot.pages.items() if same_model else ():
        shape = (len(cache), 2, x.shape[2], *cache[0].shape[1:])
        if tuple(x.shape) != shape or x.dtype != cache[0].dtype:
            raise ValueError(f"snapshot: the pages of completion {i} are {tuple(x.shape)} {x.dtype}, not {shape}")
    limit, adapter_idx = core.max_length(snapshot.prompt_token_ids, params), core.adapter_index(params)
    output, states = snapshot.rebuild_request(core, limit)
    length = max((len(s.token_ids) for s in states), default=0)
    if length >= limit:
        limits = f"model's context of {core.model_config.context_length} or cache of {core.cache_capacity}"
        raise ValueError(f"{length} tokens and one more do not fit the {limits} tokens")
    if any(s.matcher is not None and s.matcher.failed for s in states):
        raise ValueError("snapshot: its tokens do not follow its grammar")
    if same_model and not adapter_idx and core.state.prefix_cache.enable_prefix_caching:
        for i, values in snapshot.pages.items():
            token_ids = (*snapshot.prompt_token_ids, *output.completions[i].token_ids)[: values.shape[2]]
            _insert_pages(core, token_ids, values, make_namespace(adapter_idx, params.cache_salt))
    return core.enqueue([states])[0]


def _insert_pages(core: EngineCore, token_ids: Sequence[int], values: Tensor, namespace: Namespace) -> None:
    """Adds keys and values to the prefix cache as idle pages, as far as pages are available."""
    pages = core.state.prefix_cache.insert_idle_pages(token_ids, namespace)
    if not pages:
        return
    for event in core.page_copier.start_copies(core.state.prefix_cache.pop_page_copies()):
        torch.cuda.current_stream(core.runner.device).wait_event(event)
    core.page_copier.write_pages(pages, values[:, :, : len(pages) * core.state.page_size])


def model_fingerprint(core: EngineCore) -> str:
    """Returns a digest of the model, its present parameters and its cache's dtype; training changes it."""
    leaves = [x for x in tree_leaves(core.runner.params) if x is not None]
    dtypes = core.runner.params.embed.dtype, core.runner.cache.k[0].dtype
    digest = hashlib.blake2b(repr((core.model_config, *dtypes)).encode(), digest_size=16)
    int_dtypes = {1: torch.int8, 2: torch.int16, 4: torch.int32}
    # The sum of all elements' bits changes with any element; the first rows distinguish permutations.
    sums = torch.stack([x.view(int_dtypes[x.itemsize]).sum(dtype=torch.int64) for x in leaves])
    digest.update(sums.cpu().numpy().tobytes())
    for x in leaves:
        digest.update(
            x[:8].double().cpu().numpy().tobytes()
        )  # of a copy: a NumPy array keeps the memory that it shares
    return digest.hexdigest()
