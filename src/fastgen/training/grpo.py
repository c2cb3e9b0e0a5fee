"""GRPO: learning from rewards, with the engine's own parameters. The optimizer writes what the next step reads.

    engine = fastgen.Engine.from_pretrained(dtype="float32")
    trainer = Trainer(engine, find("addition"), Grpo(steps=40), SamplingParams(n=8, max_tokens=8, stop=("\\n",)))
    while trainer.done < 40:
        print(trainer.step())

A step draws prompts, samples a group of answers to each, compares every answer's reward with its group's, and makes
the better ones likelier. `fgrun +experiment=grpo_smollm2` is this with a log, checkpoints and a plot: `train`.

All chance comes from (seed, step, index of the prompt), so a run that goes on from a checkpoint is the run that was
never interrupted.
"""

import hashlib
import json
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_map_only
from tqdm.auto import tqdm

from fastgen.checkpoint.weights import save
from fastgen.config import GrpoConfig, SamplingParams, unknown_name_message
from fastgen.core.request import Output, raise_on_non_finite_logits
from fastgen.core.tokenizer import Prompt
from fastgen.core.types import Params
from fastgen.engine import Engine
from fastgen.training.logprobs import iter_weights, score

StepMetrics = dict[str, float]  # of the log: what one step was
BOOKKEEPING_SETTINGS = (
    "steps",
    "save_every",
    "folder",
    "resume",
    "export",
)  # settings that leave the numbers as they are

# --- what is learned ------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """Something to learn: a generator of prompts, and what an answer is worth.

    The text of a model without a tokenizer is its token ids, with spaces.
    """

    sample_prompt: Callable[[random.Random], Prompt]
    reward: Callable[[Prompt, str], float]


def sample_sum_prompt(rng: random.Random) -> str:
    """A sum of two digits, after an example of how it is written."""
    return f"2 + 1 = 3\n{rng.randint(0, 9)} + {rng.randint(0, 9)} ="


def reward_sum(prompt: Prompt, text: str) -> float:
    """1 for the sum and nothing else, 0.2 for an answer that has it as its first number, 0 otherwise."""
    a, b = map(int, re.findall(r"\d+", str(prompt))[-2:])
    first = re.search(r"\d+", text)
    return 1.0 if text.strip() == str(a + b) else 0.2 if first and first[0] == str(a + b) else 0.0


def sample_token_prompt(rng: random.Random) -> list[int]:
    """Three token ids."""
    return [rng.randrange(64) for _ in range(3)]


def reward_sevens(prompt: Prompt, text: str) -> float:
    """The share of sevens among the words: for models of random weights."""
    words = text.split()
    return words.count("7") / max(1, len(words))


PROBLEMS = {"addition": Problem(sample_sum_prompt, reward_sum), "sevens": Problem(sample_token_prompt, reward_sevens)}


def load_problem(name: str) -> Problem:
    """A problem by its name here, or "module:attribute". ValueError if there is none."""
    module, colon, attribute = name.partition(":")
    if not colon:
        if name not in PROBLEMS:
            raise ValueError(
                unknown_name_message("grpo.problem", name, PROBLEMS) + "; or module:attribute, of a grpo.Problem"
            )
        return PROBLEMS[name]
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise ValueError(f"grpo.problem={name}: {e}; it is imported from where Python looks (PYTHONPATH)") from e
    if not isinstance(found, Problem):
        raise ValueError(
            f"grpo.problem={name} is a {type(found).__name__}, not a fastgen.training.grpo.Problem(draw, reward)"
        )
    return found


# --- the algorithm --------------------------------------------------------------------------------------------------


def derive_seed(seed: int, *indices: int) -> int:
    """A seed for one place in a run."""
    digest = hashlib.blake2b(repr((seed, *indices)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def compute_advantages(
    rewards: Float[Tensor, "prompts samples"], *, scale_by_std: bool = True
) -> Float[Tensor, "prompts samples"]:
    """How much better than its group each answer is: in standard deviations, or (Dr. GRPO) in rewards."""
    same = (rewards == rewards[:, :1]).all(1, keepdim=True)  # exactly nothing is learned from these
    centred = (rewards - rewards.mean(1, keepdim=True)).masked_fill(same, 0)
    return centred / (rewards.std(1, keepdim=True) + 1e-4) if scale_by_std else centred


def grpo_loss(
    logprobs: Sequence[Float[Tensor, " _"]],
    old_logprobs: Sequence[Float[Tensor, " _"]],
    advantages: Sequence[float],
    *,
    clip_range: float = 0.2,
    normalization_length: int | None = None,
    reference_logprobs: Sequence[Float[Tensor, " _"]] | None = None,
    kl_weight: float = 0.0,
) -> Float[Tensor, ""]:
    """The sum over answers of their clipped surrogate, from the logprobs of their tokens.

    An answer counts as the mean of its tokens, or (Dr. GRPO) as their sum over a constant `length`, so that long
    wrong answers are not cheaper than short ones. `kl` weighs the divergence from a reference's logprobs.
    """
    total = torch.zeros((), device=logprobs[0].device)
    for i, (x, y, a) in enumerate(zip(logprobs, old_logprobs, advantages, strict=True)):
        ratio = (x - y).exp()
        gain = torch.minimum(ratio * a, ratio.clamp(1 - clip_range, 1 + clip_range) * a)
        if reference_logprobs is not None:
            gain = gain - kl_weight * estimate_kl(x, reference_logprobs[i])
        total = total - (gain.mean() if normalization_length is None else gain.sum() / normalization_length)
    return total


def estimate_kl(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """KL of x's distribution from the reference's, estimated at each of its tokens, never negative (k3)."""
    d = reference_logprobs - logprobs
    return d.expm1() - d


def make_trainable(params: Params, num_layers: int | None = None) -> Params:
    """The same memory with gradients: all of it, or the last `layers` blocks alone."""
    if num_layers is None:
        return tree_map_only(Tensor, lambda w: w.detach().requires_grad_(), params)
    if num_layers > len(params.layers):
        raise ValueError(f"grpo.trainable_layers={num_layers}: the model has {len(params.layers)}")
    kept, learned = params.layers[:-num_layers], params.layers[-num_layers:]
    return params._replace(layers=(*kept, *make_trainable(params._replace(layers=learned)).layers))


class Rollout(NamedTuple):
    """A step's answers, group after group."""

    token_ids: list[list[int]]  # prompt and answer
    answer_starts: list[int]  # where the answer begins
    old_logprobs: list[Tensor]  # the sampler's logprobs of the answer
    rewards: Float[Tensor, "prompts samples"]


class Trainer:
    """Raises the rewards of an engine's answers. `step()` is one rollout and its updates; `done` counts them.

    The engine's parameters are written in place; it notices by itself. They should be float32: in bfloat16 updates as
    small as these are rounded away.
    """

    def __init__(
        self,
        engine: Engine,
        problem: Problem,
        settings: GrpoConfig | None = None,
        sampling: SamplingParams | None = None,
        seed: int = 0,
    ) -> None:
        s = settings or GrpoConfig()
        self.engine, self.problem, self.settings, self.seed, self.num_steps_done = engine, problem, s, seed, 0
        self.sampling = _with_logprobs(sampling or SamplingParams(n=8, max_tokens=16))
        if engine.tp_group is not None:
            raise ValueError("grpo: gradients need the whole model in one place; use parallel.tensor_parallel=1")
        self.params = make_trainable(engine.params, s.trainable_layers)
        self.trainable_weights = [w for w in iter_weights(self.params) if w.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable_weights, s.lr, betas=(0.9, 0.95), weight_decay=s.weight_decay)
        self.reference_params = None
        if s.kl_coef:
            self.reference_params = tree_map_only(
                Tensor, lambda w: w.detach().clone() if w.requires_grad else w, self.params
            )

    def rollout(self) -> Rollout:
        """Prompts, a group of answers to each, and what they are worth. A function of the parameters, seed and step."""
        dice = random.Random(derive_seed(self.seed, self.num_steps_done))
        prompts = [self.problem.sample_prompt(dice) for _ in range(self.settings.prompts_per_step)]
        asked = [
            replace(self.sampling, seed=derive_seed(self.seed, self.num_steps_done, i)) for i in range(len(prompts))
        ]
        outputs = self.engine.generate(prompts, asked, progress=False)
        raise_on_non_finite_logits(outputs)
        rewards = [
            [self._compute_reward(p, o, i) for i in range(self.sampling.n)]
            for p, o in zip(prompts, outputs, strict=True)
        ]
        answers = [(o.prompt_token_ids, c) for o in outputs for c in o.completions]
        old = [torch.tensor(c.logprobs, device=self.engine.device) for _, c in answers]
        return Rollout(
            [[*p, *c.token_ids] for p, c in answers], [len(p) for p, _ in answers], old, torch.tensor(rewards)
        )

    def _compute_reward(self, prompt: Prompt, output: Output, index: int) -> float:
        c = output.completions[index]
        return float(self.problem.reward(prompt, c.text if self.engine.tokenizer else " ".join(map(str, c.token_ids))))

    def step(self) -> StepMetrics:
        """One rollout and its updates; what they were."""
        start, s = time.perf_counter(), self.settings
        made = self.rollout()
        sampled = time.perf_counter() - start
        advantage = compute_advantages(made.rewards, scale_by_std=s.loss_type == "grpo").flatten().tolist()
        reference = (
            None
            if self.reference_params is None
            else self._score_rollout(self.reference_params, made, range(len(made.token_ids)))
        )
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * min(1.0, (self.num_steps_done + 1) / max(1, s.warmup_steps))
        seen = [
            x
            for i in range(s.num_minibatches)
            if (x := self._update_params(made, advantage, reference, range(i, len(made.token_ids), s.num_minibatches)))
        ]
        self.num_steps_done += 1
        old = torch.cat(made.old_logprobs)
        row = {
            "step": self.num_steps_done,
            "reward": float(made.rewards.mean()),
            "best": float((made.rewards == made.rewards.max()).float().mean()),
            "length": len(old) / len(made.old_logprobs),
            "entropy": -float(old.mean()),  # an estimate: what was drawn stands for what could have been
        }
        # The first minibatch's scores are by the parameters that sampled, so their difference is rounding.
        row |= {"mismatch": seen[0]["apart"] if seen else 0.0}
        for name in ("loss", "norm", "clipped", "kl"):
            row[name] = sum(x[name] for x in seen) / max(1, len(seen))
        return row | {"sampling_s": round(sampled, 2), "seconds": round(time.perf_counter() - start, 2)}

    def _score_rollout(self, params: Params, rollout: Rollout, indices: Sequence[int]) -> list[Tensor]:
        how: dict[str, Any] = {
            "temperature": self.sampling.temperature,
            "activation_checkpointing": self.settings.gradient_checkpointing,
        }
        how["batch_invariant"] = self.engine.config.compile.batch_invariant
        return score(
            params,
            self.engine.model_config,
            [rollout.token_ids[i] for i in indices],
            first=[rollout.answer_starts[i] for i in indices],
            **how,
        )

    def _update_params(
        self, rollout: Rollout, advantages: list[float], reference_logprobs: list[Tensor] | None, indices: Sequence[int]
    ) -> StepMetrics | None:
        """A step of the optimizer for some of the answers; None where all groups among them are of one reward."""
        s = self.settings
        some = [i for i in indices if advantages[i] or reference_logprobs is not None]  # the others have no gradient
        if not some:
            return None
        new, old = self._score_rollout(self.params, rollout, some), [rollout.old_logprobs[i] for i in some]
        known = None if reference_logprobs is None else [reference_logprobs[i] for i in some]
        length = None if s.loss_type == "grpo" else self.sampling.max_tokens
        weight = [advantages[i] for i in some]
        value = grpo_loss(
            new,
            old,
            weight,
            clip_range=s.clip,
            normalization_length=length,
            reference_logprobs=known,
            kl_weight=s.kl_coef,
        ) / len(indices)
        self.optimizer.zero_grad()
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trainable_weights, s.max_grad_norm, error_if_nonfinite=True)
        self.optimizer.step()
        self.optimizer.zero_grad()  # sampling has the memory
        x, y = torch.cat(new).detach(), torch.cat(old)
        return {
            "loss": float(value.detach()),
            "norm": float(norm),
            "apart": float((x - y).abs().mean()),
            "clipped": float((((x - y).exp() - 1).abs() > s.clip).float().mean()),
            "kl": 0.0 if known is None else float(estimate_kl(x, torch.cat(known)).mean()),
        }

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _reproducibility_settings(self) -> dict[str, Any]:
        """What decides the numbers, besides the parameters."""
        own = {k: v for k, v in asdict(self.settings).items() if k not in BOOKKEEPING_SETTINGS}
        return {f"grpo.{k}": v for k, v in own.items()} | {
            **{f"sampling.{k}": v for k, v in asdict(self.sampling).items()},
            "seed": self.seed,
            "the model": str(self.engine.model_config),
            "model.dtype": str(self.engine.dtype),
        }

    def save(self, path: str | Path) -> None:
        """All that the next step depends on, as one file that is whole or not there."""
        path = Path(path)
        state = {
            "done": self.num_steps_done,
            "curve": self._reproducibility_settings(),
            "optimizer": self.optimizer.state_dict(),
        }
        part = path.with_name(path.name + ".part")
        torch.save(state | {"leaves": [w.detach() for w in self.trainable_weights]}, part)
        os.replace(part, path)

    def load(self, path: str | Path) -> None:
        """Go on from what was saved, with the parameters written in place. ValueError if it was another run."""
        state = torch.load(path, map_location=self.engine.device, weights_only=True)
        mine, theirs = self._reproducibility_settings(), state["curve"]
        if other := [f"{k} was {theirs.get(k)}, is {v}" for k, v in mine.items() if theirs.get(k) != v]:
            raise ValueError(f"{path} is of another run: {'; '.join(other)[:400]}")
        with torch.no_grad():
            for own, saved in zip(self.trainable_weights, state["leaves"], strict=True):
                own.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.num_steps_done = state["done"]


def _with_logprobs(sampling: SamplingParams) -> SamplingParams:
    """With the logprobs that the loss needs. ValueError for what has a group of one, or is not drawn from a softmax."""
    if sampling.n < 2:
        raise ValueError(f"sampling.n={sampling.n}: an answer is compared with others to its prompt, 2 at least")
    if sampling.temperature <= 0 or sampling.max_tokens is None:
        raise ValueError("grpo needs sampling.temperature above 0 and a number as sampling.max_tokens")
    plain = SamplingParams()
    free = {
        "temperature",
        "n",
        "max_tokens",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "seed",
        "logprobs",
        "logprob_mode",
    }
    if odd := [k for k, v in asdict(sampling).items() if k not in free and v != getattr(plain, k)]:
        raise ValueError(
            f"grpo with sampling.{' and sampling.'.join(odd)}: the gradient would be of another distribution than "
            "the one drawn from; leave the default"
        )
    return replace(sampling, logprobs=0, logprob_mode="raw" if sampling.temperature == 1 else "processed", seed=None)


# --- a run ----------------------------------------------------------------------------------------------------------


@contextmanager
def finish_step_on_interrupt() -> Iterator[threading.Event]:
    """The first Ctrl-C sets the event, so that a step can be finished; the second one is a Ctrl-C as ever."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # which has the signals
        yield asked
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(*_: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)
        print("\nfinishing this step; Ctrl-C again ends at once", file=sys.stderr, flush=True)

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def train(
    trainer: Trainer, folder: str | Path = "grpo", *, resume: bool = False, progress: bool = True
) -> list[StepMetrics]:
    """Steps until there are `settings.steps`; the rows of the log.

    `folder` gets log.jsonl, checkpoint.pt, curve.png (with matplotlib) and, at the end, the model. With `resume` it is
    gone on with from its checkpoint; without, ValueError if there is one. A KeyboardInterrupt comes after a
    step and its checkpoint.
    """
    folder, s = Path(folder), trainer.settings
    log, kept = folder / "log.jsonl", folder / "checkpoint.pt"
    rows: list[StepMetrics] = []
    if resume:
        if not kept.is_file():
            raise ValueError(f"grpo.resume: there is no {kept}; leave it out to begin")
        trainer.load(kept)
        rows = [
            row for line in log.read_text().splitlines() if (row := json.loads(line))["step"] <= trainer.num_steps_done
        ]
    elif kept.exists():
        raise ValueError(f"{folder} has a run: go on with it (grpo.resume=true) or name another (grpo.output_dir=…)")
    folder.mkdir(parents=True, exist_ok=True)
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))  # steps after the checkpoint are done again
    bar = tqdm(total=s.steps, initial=trainer.num_steps_done, unit="step", disable=None if progress else True)
    with bar, log.open("a") as file, finish_step_on_interrupt() as asked:
        while trainer.num_steps_done < s.steps and not asked.is_set():
            rows.append(trainer.step())
            print(json.dumps(rows[-1]), file=file, flush=True)
            bar.set_postfix({k: f"{rows[-1][k]:.3g}" for k in ("reward", "best", "length", "entropy", "mismatch")})
            bar.update()
            if trainer.num_steps_done % s.save_every == 0 and trainer.num_steps_done < s.steps:
                trainer.save(kept)
        trainer.save(kept)
    plot_runs({f"seed {trainer.seed}": rows}, folder / "curve.png")
    if trainer.num_steps_done < s.steps:
        print(f"step {trainer.num_steps_done} of {s.steps} is saved; grpo.resume=true goes on", file=sys.stderr)
        raise KeyboardInterrupt
    if s.export:
        save(folder / "model", trainer.engine.model_config, trainer.engine.params)
        if trainer.engine.tokenizer is not None:
            trainer.engine.tokenizer.save_pretrained(folder / "model")  # type: ignore[attr-defined]
    return rows


def plot_runs(runs: dict[str, list[StepMetrics]], path: Path) -> bool:
    """Reward and length over steps, a line for each run; False if there is no matplotlib."""
    if not find_spec("matplotlib"):
        print("no plot: it needs matplotlib, pip install fastgen[notebook]", file=sys.stderr)
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, name, label in ((left, "reward", "mean reward"), (right, "length", "tokens of an answer")):
        for run, rows in runs.items():
            axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=run)
        axes.set(xlabel="step", ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
    left.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return True
