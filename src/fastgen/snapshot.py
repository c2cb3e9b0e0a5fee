"""A request in the middle of its generation, as a value that survives the process."""

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

from fastgen.config import SamplingParams
from fastgen.grammar import Guide
from fastgen.request import Completion, FinishReason, Output, Sample, TopLogprobs
from fastgen.types import Tokenizer

FORMAT = "fastgen snapshot 2"
SEEDS = range(-(2**63), 2**63)
REASONS = get_args(FinishReason)


def _digest(about: str, tensors: Mapping[str, Tensor]) -> str:
    """A checksum of a text and of tensors: names, dtypes, shapes and bytes."""
    digest = hashlib.blake2b(about.encode(), digest_size=16)
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        digest.update(repr((name, x.dtype, tuple(x.shape))).encode())
        digest.update(x.view(-1).view(torch.uint8).numpy().data if x.numel() else b"")
    return digest.hexdigest()


def _check_tokens(where: str, tokens: Any, vocab: int) -> None:
    wrong = [t for t in tokens if not isinstance(t, int) or isinstance(t, bool) or not 0 <= t < vocab]
    if wrong:
        raise ValueError(f"{where}: token {wrong[0]!r} is outside the vocabulary of {vocab}")


def _check_rows(where: str, rows: Any, count: int, *, kinds: tuple[type, ...], values: tuple[type, ...] = ()) -> None:
    """A list of one value for each token, or none; of dicts, with such values."""
    if rows is None:
        return
    if len(rows) != count:
        raise ValueError(f"{where}: {len(rows)} values for {count} tokens")
    for row in rows:
        if not isinstance(row, kinds) or (
            isinstance(row, dict) and not all(isinstance(x, values) for x in row.values())
        ):
            raise ValueError(f"{where}: {row!r} is no such value")


def _tops(rows: list[TopLogprobs] | None) -> list[list[tuple[int, float]]] | None:
    return None if rows is None else [list(row.items()) for row in rows]


def _dicts(rows: list[list[list[Any]]] | None) -> list[TopLogprobs] | None:
    return None if rows is None else [{int(t): x for t, x in row} for row in rows]


def _own(c: Completion) -> Completion:
    """A copy with lists of its own: the request goes on and fills its lists, empty ones too."""
    logprobs, tops = (None if x is None else [*x] for x in (c.logprobs, c.top_logprobs))
    return replace(c, token_ids=[*c.token_ids], logprobs=logprobs, top_logprobs=tops, versions=[*c.versions])


@dataclass(slots=True)
class Snapshot:
    """Tokens, settings and seeds: all that decides which tokens come next. From `Engine.snapshot`.

    `pages` may hold keys and values of completions, by index: [layers, keys and values, tokens, kv heads, head width].
    They are for the tokens, the adapter and the model that they were computed with: `checksum` is of all of these, and
    pages that are not what they were are refused.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    completions: list[Completion]
    seeds: dict[int, int]  # of the completions that have not ended
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[TopLogprobs | None] | None = None
    model: str = ""  # which model's pages these are
    pages: dict[int, Tensor] = field(default_factory=dict)
    checksum: str = ""  # of the pages; empty without them

    @classmethod
    def of(cls, output: Output, samples: Mapping[int, Sample]) -> "Snapshot":
        """Of a request, and those of its completions that go on."""
        o = output
        scored = o.prompt_logprobs is not None and len(o.prompt_logprobs) == len(o.prompt_token_ids)
        return cls(
            tuple(o.prompt_token_ids),
            next(iter(samples.values())).params,
            [_own(c) for c in o.completions],
            {i: s.seed for i, s in samples.items()},
            [*o.prompt_logprobs] if scored and o.prompt_logprobs else None,
            [*o.prompt_top_logprobs] if scored and o.prompt_top_logprobs else None,
        )

    def pages_checksum(self) -> str:
        """What `checksum` must be."""
        if not self.pages:
            return ""
        known = [
            (i, [*self.prompt, *self.completions[i].token_ids][: x.shape[2]]) for i, x in sorted(self.pages.items())
        ]
        about = repr((known, self.params.adapter, self.model))
        return _digest(about, {str(i): x for i, x in self.pages.items()})

    def check(self, vocab: int = 2**63) -> None:
        """Raises ValueError, with the reason, for what no engine of this vocabulary can have saved."""
        try:
            self._check(vocab)
        except (
            TypeError,
            AttributeError,
            LookupError,
            ArithmeticError,
            RuntimeError,
        ) as e:
            raise ValueError(f"snapshot: a part of it is of a wrong type: {e}") from e
        except ValueError as e:
            raise ValueError(f"snapshot: {e}") from e

    def _check(self, vocab: int) -> None:
        if not isinstance(self.params, SamplingParams):
            raise ValueError(f"params are {type(self.params).__name__}, not SamplingParams")
        if not self.prompt or not self.completions:
            raise ValueError("it has no prompt or no completions")
        _check_tokens("prompt", self.prompt, vocab)
        number, p = (int, float), self.params
        for i, c in enumerate(self.completions):
            where, count = f"completion {i}", len(c.token_ids)
            _check_tokens(where, c.token_ids, vocab)
            _check_rows(f"{where}, logprobs", c.logprobs, count, kinds=number)
            _check_rows(f"{where}, top logprobs", c.top_logprobs, count, kinds=(dict,), values=number)
            _check_rows(f"{where}, versions", c.versions, count, kinds=(int,))
            if not isinstance(c.text, str) or c.finish_reason not in (None, *REASONS):
                raise ValueError(f"{where} has the text {c.text!r} and the finish reason {c.finish_reason!r}")
            if c.finish_reason is None and ((c.logprobs is None) != (p.logprobs is None) and count):
                raise ValueError(f"{where} has logprobs where its settings have none, or none where they do")
        count = len(self.prompt)
        _check_rows("prompt logprobs", self.prompt_logprobs, count, kinds=(*number, type(None)))
        kinds = (dict, type(None))
        _check_rows("prompt top logprobs", self.prompt_top_logprobs, count, kinds=kinds, values=number)
        going = [i for i, c in enumerate(self.completions) if c.finish_reason is None]
        if not going or [*self.seeds] != going:
            raise ValueError(f"it has seeds of the completions {[*self.seeds]}, and those that go on are {going}")
        for seed in self.seeds.values():
            if not isinstance(seed, int) or isinstance(seed, bool) or seed not in SEEDS:
                raise ValueError(f"seed {seed!r} is not within -2^63 to 2^63 - 1")
        for i, x in self.pages.items():
            known = count + len(self.completions[i].token_ids)
            if not (isinstance(x, Tensor) and x.ndim == 5 and x.shape[1] == 2 and 0 < x.shape[2] <= known):
                shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"the pages of completion {i} are {shape}, not [layers, 2, {known} tokens at most, …]")
            if not x.is_floating_point() or not bool(x.isfinite().all()):
                raise ValueError(f"the pages of completion {i} hold {x.dtype}, or values that are NaN or infinite")
        if self.checksum != self.pages_checksum():
            raise ValueError("its pages are not those that were saved: their checksum is another")

    def revive(
        self,
        limit: int,
        eos: frozenset[int],
        tokenizer: Tokenizer | None,
        guides: Sequence[Guide | None],
    ) -> tuple[Output, list[Sample]]:
        """The request again, and the completions that go on. `limit` counts prompt and output.

        `guides` are at the beginning of the grammar, one for each of these completions.
        """
        output = Output(-1, [*self.prompt], [_own(c) for c in self.completions])
        p, samples = self.params, []
        if p.prompt_logprobs is not None:
            output.prompt_logprobs = [*self.prompt_logprobs] if self.prompt_logprobs else [None]
            tops: list[TopLogprobs | None] = [*self.prompt_top_logprobs] if self.prompt_top_logprobs else [None]
            output.prompt_top_logprobs = tops if p.prompt_logprobs else None
        for (i, seed), guide in zip(self.seeds.items(), guides, strict=True):
            output.completions[i] = Completion()
            sample = Sample(output, i, p, 0, limit, eos, tokenizer, guide=guide)
            sample.seed = seed
            sample.scores_prompt &= self.prompt_logprobs is None
            sample.resume(_own(self.completions[i]))
            samples.append(sample)
        return output, samples

    def save(self, path: str | Path) -> None:
        """To a .safetensors file: tokens and pages as tensors, the rest as JSON in its header, with checksums."""
        self.check()
        tensors = {"prompt": torch.tensor(self.prompt, device="cpu")}
        completions = []
        for i, c in enumerate(self.completions):
            tensors[f"tokens.{i}"] = torch.tensor(c.token_ids, dtype=torch.int64, device="cpu")
            if c.logprobs is not None:
                tensors[f"logprobs.{i}"] = torch.tensor(c.logprobs, dtype=torch.float64, device="cpu")
            tops = _tops(c.top_logprobs)
            completions.append({"text": c.text, "finish_reason": c.finish_reason, "tops": tops, "versions": c.versions})
        small = dict(tensors)  # the pages have a checksum of their own
        tensors |= {f"pages.{i}": x.contiguous() for i, x in self.pages.items()}
        about = {
            "params": asdict(self.params), "completions": completions, "seeds": list(self.seeds.items()),
            "prompt_logprobs": self.prompt_logprobs, "model": self.model, "checksum": self.checksum,
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
    def _parse(cls, a: dict[str, Any], x: dict[str, Tensor]) -> "Snapshot":
        params = a["params"] | {"logit_bias": {int(t): b for t, b in a["params"]["logit_bias"].items()}}
        tops = a["prompt_tops"]
        completions = [
            Completion(
                x[f"tokens.{i}"].tolist(), c["text"],
                x[f"logprobs.{i}"].tolist() if f"logprobs.{i}" in x else None, _dicts(c["tops"]), c["finish_reason"],
                c["versions"],
            )
            for i, c in enumerate(a["completions"])
        ]  # fmt: skip
        return cls(
            tuple(x["prompt"].tolist()), SamplingParams(**params), completions, {int(i): s for i, s in a["seeds"]},
            a["prompt_logprobs"], tops and [row and {int(t): v for t, v in row} for row in tops], a["model"],
            {int(name[6:]): t for name, t in x.items() if name.startswith("pages.")}, a["checksum"],
        )  # fmt: skip
