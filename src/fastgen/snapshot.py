"""A request in the middle of its generation, as a value that survives the process."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastgen.config import SamplingParams
from fastgen.grammar import Guides
from fastgen.request import Completion, Output, Sample, TopLogprobs
from fastgen.types import Tokenizer

FORMAT = "fastgen snapshot 1"


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
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    completions: list[Completion]
    seeds: dict[int, int]  # of the completions that have not ended
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[TopLogprobs | None] | None = None
    model: str = ""  # which model's pages these are
    pages: dict[int, Tensor] = field(default_factory=dict)

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

    def revive(
        self,
        limit: int,
        eos: frozenset[int],
        tokenizer: Tokenizer | None,
        guides: Guides,
    ) -> tuple[Output, list[Sample]]:
        """The request again, and the completions that go on. `limit` counts prompt and output."""
        output = Output(-1, [*self.prompt], [_own(c) for c in self.completions])
        p, samples = self.params, []
        if p.prompt_logprobs is not None:
            output.prompt_logprobs = [*self.prompt_logprobs] if self.prompt_logprobs else [None]
            tops: list[TopLogprobs | None] = [*self.prompt_top_logprobs] if self.prompt_top_logprobs else [None]
            output.prompt_top_logprobs = tops if p.prompt_logprobs else None
        for i, seed in self.seeds.items():
            output.completions[i] = Completion()
            guide = None if p.grammar is None else guides.guide(p.grammar)
            sample = Sample(output, i, p, 0, limit, eos, tokenizer, guide=guide)
            sample.seed = seed
            sample.scores_prompt &= self.prompt_logprobs is None
            sample.resume(_own(self.completions[i]))
            samples.append(sample)
        return output, samples

    def save(self, path: str | Path) -> None:
        """To a .safetensors file: tokens and pages as tensors, everything else as JSON in its header."""
        tensors = {"prompt": torch.tensor(self.prompt, device="cpu")}
        completions = []
        for i, c in enumerate(self.completions):
            tensors[f"tokens.{i}"] = torch.tensor(c.token_ids, dtype=torch.int64, device="cpu")
            if c.logprobs is not None:
                tensors[f"logprobs.{i}"] = torch.tensor(c.logprobs, dtype=torch.float64, device="cpu")
            tops = _tops(c.top_logprobs)
            completions.append({"text": c.text, "finish_reason": c.finish_reason, "tops": tops, "versions": c.versions})
        tensors |= {f"pages.{i}": x.contiguous() for i, x in self.pages.items()}
        about = {
            "params": asdict(self.params), "completions": completions, "seeds": list(self.seeds.items()),
            "prompt_logprobs": self.prompt_logprobs, "model": self.model,
            "prompt_tops": self.prompt_top_logprobs and [row and list(row.items()) for row in self.prompt_top_logprobs],
        }  # fmt: skip
        save_file(tensors, path, {"format": FORMAT, "about": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> "Snapshot":
        """From such a file. ValueError if it is another."""
        try:
            with safe_open(path, "pt") as f:
                about = f.metadata() or {}
                if about.get("format") != FORMAT:
                    raise ValueError(f"{path} is not a snapshot: its format is {about.get('format')!r}, not {FORMAT!r}")
                x = {name: f.get_tensor(name) for name in f.keys()}
        except SafetensorError as e:
            raise ValueError(f"{path} is not a snapshot: {e}") from e
        a = json.loads(about["about"])
        params = a["params"] | {"logit_bias": {int(t): b for t, b in a["params"]["logit_bias"].items()}}
        tops = a["prompt_tops"]
        completions = [
            Completion(
                x[f"tokens.{i}"].tolist(), c["text"],
                x[f"logprobs.{i}"].tolist() if f"logprobs.{i}" in x else None, _dicts(c["tops"]), c["finish_reason"],
                c.get("versions", []),
            )
            for i, c in enumerate(a["completions"])
        ]  # fmt: skip
        return cls(
            tuple(x["prompt"].tolist()), SamplingParams(**params), completions, {int(i): s for i, s in a["seeds"]},
            a["prompt_logprobs"], tops and [row and {int(t): v for t, v in row} for row in tops], a["model"],
            {int(name[6:]): t for name, t in x.items() if name.startswith("pages.")},
        )  # fmt: skip
