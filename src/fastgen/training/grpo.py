"""GRPO (arXiv 2402.03300) on an engine's own parameters: the optimizer writes what the next rollout reads.

    engine = fastgen.Engine.from_pretrained(dtype="float32")
    sampling = SamplingParams(n=8, max_tokens=8, stop=("\\n",))
    trainer = Trainer(engine, load_problem("addition"), GrpoConfig(steps=40), sampling)
    while trainer.num_steps_done < 40:
        print(trainer.step())

A step samples prompts and a group of completions for each, compares each completion's reward with its group's, and
raises the probability of the better ones. `fgrun +experiment=grpo_smollm2` runs `train`: steps with a log, checkpoints
and a plot. All randomness derives from (seed, step, index of the prompt), so a resumed run equals an uninterrupted one.
"""

import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_map_only
from tqdm.auto import tqdm

from fastgen.checkpoint.weights import save
from fastgen.config import GrpoConfig
from fastgen.core.request import Completion
from fastgen.core.types import Params
from fastgen.engine import Engine
from fastgen.extras import install_command
from fastgen.quantization.fp8 import is_quantized
from fastgen.sampling_params import SamplingParams
from fastgen.text.tokenizer import Prompt
from fastgen.training.logprobs import iter_weights, raise_on_non_finite_logits, score
from fastgen.training.problems import Problem

StepMetrics = dict[str, float]  # one row of the log
Rewards = Float[Tensor, "prompts samples"]
Logprobs = Sequence[Float[Tensor, " _"]]  # of each completion's tokens
BOOKKEEPING_SETTINGS = ("steps", "save_every", "output_dir", "resume", "export")  # they do not change the numbers
SAMPLING_SETTINGS = (  # that GRPO's gradient allows for
    "temperature", "n", "max_tokens", "stop", "stop_token_ids", "ignore_eos", "seed", "logprobs", "logprob_mode",
)  # fmt: skip

# --- the algorithm --------------------------------------------------------------------------------------------------


def derive_seed(seed: int, *indices: int) -> int:
    """Returns a 64-bit seed that depends on a run's seed and on indices within the run."""
    digest = hashlib.blake2b(repr((seed, *indices)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def compute_advantages(rewards: Rewards, *, scale_by_std: bool = True) -> Rewards:
    """Returns rewards minus their group's mean, divided by the group's standard deviation if `scale_by_std` (Dr. GRPO
    does not divide). Groups of equal rewards have advantages of exactly 0."""
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)
    centered = (rewards - rewards.mean(1, keepdim=True)).masked_fill(equal, 0)
    return centered / (rewards.std(1, keepdim=True) + 1e-4) if scale_by_std else centered


def grpo_loss(
    logprobs: Logprobs, old_logprobs: Logprobs, advantages: Sequence[float], *, clip_range: float = 0.2,
    normalization_length: int | None = None, reference_logprobs: Logprobs | None = None, kl_weight: float = 0.0,
) -> Float[Tensor, ""]:  # fmt: skip
    """Returns the sum over completions of the clipped surrogate loss, from the logprobs of each completion's tokens.

    A completion contributes the mean over its tokens, or with `normalization_length` their sum divided by that constant
    (Dr. GRPO, arXiv 2503.20783), so that long wrong completions are not penalized less than short ones.
    `kl_weight` times the estimated KL divergence from the reference's logprobs is added.
    """
    loss = torch.zeros((), device=logprobs[0].device)
    for i, (new, old, advantage) in enumerate(zip(logprobs, old_logprobs, advantages, strict=True)):
        ratio = (new - old).exp()
        gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)
        if reference_logprobs is not None:
            gain = gain - kl_weight * estimate_kl(new, reference_logprobs[i])
        loss = loss - (gain.mean() if normalization_length is None else gain.sum() / normalization_length)
    return loss


def estimate_kl(logprobs: Float[Tensor, " n"], reference_logprobs: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Estimates KL(policy || reference) at each token by J. Schulman's k3, which is never negative."""
    d = reference_logprobs - logprobs
    return d.expm1() - d


def make_trainable(params: Params, num_layers: int | None = None) -> Params:
    """Returns parameters in the same memory that require gradients: all, or those of the last `num_layers` layers."""
    if num_layers is None:
        return tree_map_only(Tensor, lambda w: w.detach().requires_grad_(), params)
    if num_layers > len(params.layers):
        raise ValueError(f"grpo.trainable_layers={num_layers}: the model has {len(params.layers)}")
    frozen, trainable = params.layers[:-num_layers], params.layers[-num_layers:]
    return params._replace(layers=(*frozen, *make_trainable(params._replace(layers=trainable)).layers))


class Rollout(NamedTuple):
    """Completions of one step, group after group."""

    token_ids: list[list[int]]  # prompt and completion
    completion_starts: list[int]  # the prompts' lengths
    old_logprobs: list[Tensor]  # the sampler's, of the completion's tokens
    rewards: Rewards


class Trainer:
    """Trains an engine's parameters in place to raise the rewards of its completions; `step()` is one GRPO step.

    The engine notices the updates by itself. Its parameters should be float32: bfloat16 rounds such small updates away.
    """

    def __init__(
        self, engine: Engine, problem: Problem, settings: GrpoConfig | None = None,
        sampling: SamplingParams | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        s = settings or GrpoConfig()
        self.engine, self.problem, self.settings, self.seed, self.num_steps_done = engine, problem, s, seed, 0
        self.sampling = _with_logprobs(sampling or SamplingParams(n=8, max_tokens=16))
        if engine.tp_group is not None:
            raise ValueError("grpo: gradients need all of the model on one device; use parallel.tensor_parallel=1")
        if is_quantized(engine.source_params):
            raise ValueError(
                "grpo: gradients do not pass through fp8 weights: load the model with quantization=none. To sample in "
                'fp8, make the engine of parameters in full precision: Engine(params, config, quantization="fp8")'
            )
        self.params = make_trainable(engine.source_params, s.trainable_layers)
        self.trainable_weights = [w for w in iter_weights(self.params) if w.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable_weights, s.lr, betas=(0.9, 0.95), weight_decay=s.weight_decay)

        def clone_trainable(w: Tensor) -> Tensor:
            return w.detach().clone() if w.requires_grad else w

        self.reference_params = tree_map_only(Tensor, clone_trainable, self.params) if s.kl_coef else None

    def rollout(self) -> Rollout:
        """Samples prompts and a group of completions for each. A function of the parameters, the seed and the step."""
        step, rng = self.num_steps_done, random.Random(derive_seed(self.seed, self.num_steps_done))
        prompts = [self.problem.sample_prompt(rng) for _ in range(self.settings.prompts_per_step)]
        sampling = [replace(self.sampling, seed=derive_seed(self.seed, step, i)) for i in range(len(prompts))]
        outputs = self.engine.generate(prompts, sampling, progress=False)
        raise_on_non_finite_logits(outputs)
        rewards = [[self._reward(p, c) for c in o.completions] for p, o in zip(prompts, outputs, strict=True)]
        pairs = [(o.prompt_token_ids, c) for o in outputs for c in o.completions]
        logprobs = [torch.tensor(c.logprobs, device=self.engine.device) for _, c in pairs]
        token_ids, starts = [[*p, *c.token_ids] for p, c in pairs], [len(p) for p, _ in pairs]
        return Rollout(token_ids, starts, logprobs, torch.tensor(rewards))

    def _reward(self, prompt: Prompt, completion: Completion) -> float:
        text = completion.text if self.engine.tokenizer else " ".join(map(str, completion.token_ids))
        return float(self.problem.reward(prompt, text))

    def step(self) -> StepMetrics:
        """Runs one rollout and its updates. Returns the step's metrics."""
        start, s = time.perf_counter(), self.settings
        rollout = self.rollout()
        sampling_s, num_completions = time.perf_counter() - start, len(rollout.token_ids)
        advantages = compute_advantages(rollout.rewards, scale_by_std=s.loss_type == "grpo").flatten().tolist()
        reference = None
        if self.reference_params is not None:
            reference = self._score_rollout(self.reference_params, rollout, range(num_completions))
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * min(1.0, (self.num_steps_done + 1) / max(1, s.warmup_steps))
        minibatches = (range(i, num_completions, s.num_minibatches) for i in range(s.num_minibatches))
        updates = [u for m in minibatches if (u := self._update_params(rollout, advantages, reference, m))]
        self.num_steps_done += 1
        old = torch.cat(rollout.old_logprobs)
        metrics = {
            "step": self.num_steps_done,
            "reward": float(rollout.rewards.mean()),
            "best": float((rollout.rewards == rollout.rewards.max()).float().mean()),
            "length": len(old) / num_completions,
            "entropy": -float(old.mean()),  # an estimate, from the sampled tokens alone
            # Before the first update the scorer has the sampler's parameters: the difference is rounding.
            "mismatch": updates[0]["apart"] if updates else 0.0,
        }
        for name in ("loss", "norm", "clipped", "kl"):
            metrics[name] = sum(u[name] for u in updates) / max(1, len(updates))
        return metrics | {"sampling_s": round(sampling_s, 2), "seconds": round(time.perf_counter() - start, 2)}

    def _score_rollout(self, params: Params, rollout: Rollout, indices: Sequence[int]) -> list[Tensor]:
        return score(
            params, self.engine.model_config, [rollout.token_ids[i] for i in indices],
            first=[rollout.completion_starts[i] for i in indices], temperature=self.sampling.temperature,
            batch_invariant=self.engine.config.compile.batch_invariant,
            activation_checkpointing=self.settings.gradient_checkpointing,
        )  # fmt: skip

    def _update_params(
        self, rollout: Rollout, advantages: list[float], reference_logprobs: list[Tensor] | None, indices: Sequence[int]
    ) -> StepMetrics | None:
        """Runs an optimizer step for a minibatch of completions; returns None if all their gradients are zero."""
        s, scores = self.settings, reference_logprobs
        with_gradient = [i for i in indices if advantages[i] or scores is not None]
        if not with_gradient:
            return None
        new, old = self._score_rollout(self.params, rollout, with_gradient), rollout.old_logprobs
        old, reference = [old[i] for i in with_gradient], scores and [scores[i] for i in with_gradient]
        length = None if s.loss_type == "grpo" else self.sampling.max_tokens
        loss = grpo_loss(
            new, old, [advantages[i] for i in with_gradient], clip_range=s.clip, normalization_length=length,
            reference_logprobs=reference, kl_weight=s.kl_coef,
        ) / len(indices)  # fmt: skip
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trainable_weights, s.max_grad_norm, error_if_nonfinite=True)
        self.optimizer.step()
        self.optimizer.zero_grad()  # frees the gradients' memory for sampling
        new_logprobs, old_logprobs = torch.cat(new).detach(), torch.cat(old)
        log_ratio = new_logprobs - old_logprobs
        return {
            "loss": float(loss.detach()),
            "norm": float(norm),
            "apart": float(log_ratio.abs().mean()),
            "clipped": float(((log_ratio.exp() - 1).abs() > s.clip).float().mean()),
            "kl": float(estimate_kl(new_logprobs, torch.cat(reference)).mean()) if reference else 0.0,
        }

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _reproducibility_settings(self) -> dict[str, Any]:
        """Returns everything besides the parameters that determines the numbers of a run."""
        settings = {f"grpo.{k}": v for k, v in asdict(self.settings).items() if k not in BOOKKEEPING_SETTINGS}
        settings |= {f"sampling.{k}": v for k, v in asdict(self.sampling).items()}
        model = {"the model": str(self.engine.model_config), "model.dtype": str(self.engine.dtype)}
        return settings | {"seed": self.seed} | model

    def save(self, path: str | Path) -> None:
        """Saves everything that the next step depends on, as one file that is replaced atomically."""
        path = Path(path)
        state = {"done": self.num_steps_done, "curve": self._reproducibility_settings()}
        state |= {"optimizer": self.optimizer.state_dict(), "leaves": [w.detach() for w in self.trainable_weights]}
        temporary = path.with_name(path.name + ".part")
        torch.save(state, temporary)
        os.replace(temporary, path)

    def load(self, path: str | Path) -> None:
        """Restores what `save` wrote, writing the parameters in place. Raises ValueError for another run's file."""
        state = torch.load(path, map_location=self.engine.device, weights_only=True)
        saved, current = state["curve"], self._reproducibility_settings()
        if changes := [f"{k} was {saved.get(k)}, is {v}" for k, v in current.items() if saved.get(k) != v]:
            raise ValueError(f"{path} is of another run: {'; '.join(changes)[:400]}")
        with torch.no_grad():
            for w, values in zip(self.trainable_weights, state["leaves"], strict=True):
                w.copy_(values)
        self.optimizer.load_state_dict(state["optimizer"])
        self.num_steps_done = state["done"]


def _with_logprobs(sampling: SamplingParams) -> SamplingParams:
    """Returns the settings with the logprobs that the loss needs. Raises ValueError for groups of one, and for settings
    that sample from another distribution than the softmax."""
    if sampling.n < 2:
        raise ValueError(f"sampling.n={sampling.n}: a completion is compared with others of its prompt, 2 at least")
    if sampling.temperature <= 0 or sampling.max_tokens is None:
        raise ValueError("grpo needs sampling.temperature above 0 and a number as sampling.max_tokens")
    default = SamplingParams()
    if changed := [k for k, v in asdict(sampling).items() if k not in SAMPLING_SETTINGS and v != getattr(default, k)]:
        problem = "the gradient would be of another distribution than the one sampled from; leave the default"
        raise ValueError(f"grpo with sampling.{' and sampling.'.join(changed)}: {problem}")
    return replace(sampling, logprobs=0, logprob_mode="raw" if sampling.temperature == 1 else "processed", seed=None)


# --- a run ----------------------------------------------------------------------------------------------------------


@contextmanager
def finish_step_on_interrupt() -> Iterator[threading.Event]:
    """Yields an event that the first Ctrl-C sets, so that a step can finish; the second Ctrl-C interrupts as usual."""
    interrupted, default_handler = threading.Event(), signal.getsignal(signal.SIGINT)
    is_main_thread = threading.current_thread() is threading.main_thread()  # no other thread handles signals

    def on_interrupt(*_: Any) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, default_handler)
        print("\nfinishing this step; Ctrl-C again ends at once", file=sys.stderr, flush=True)

    if is_main_thread:
        signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield interrupted
    finally:
        if is_main_thread:
            signal.signal(signal.SIGINT, default_handler)


def train(
    trainer: Trainer, folder: str | Path = "grpo", *, resume: bool = False, progress: bool = True
) -> list[StepMetrics]:
    """Runs steps until there are `settings.steps`. Returns the log's rows, also those of a resumed run's first part.

    Writes log.jsonl, checkpoint.pt, curve.png (with matplotlib) and, at the end, the model to `folder`. `resume`
    continues from the folder's checkpoint; without it a checkpoint there is a ValueError. After Ctrl-C the step is
    finished and saved, then KeyboardInterrupt is raised.
    """
    folder, s, rows = Path(folder), trainer.settings, list[StepMetrics]()
    log, checkpoint = folder / "log.jsonl", folder / "checkpoint.pt"
    if resume:
        if not checkpoint.is_file():
            raise ValueError(f"grpo.resume: there is no {checkpoint}; leave it out to begin")
        trainer.load(checkpoint)
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        rows = [row for row in rows if row["step"] <= trainer.num_steps_done]  # later steps are computed again
    elif checkpoint.exists():
        raise ValueError(f"{folder} has a run: resume it (grpo.resume=true) or name another (grpo.output_dir=…)")
    folder.mkdir(parents=True, exist_ok=True)
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bar = tqdm(total=s.steps, initial=trainer.num_steps_done, unit="step", disable=None if progress else True)
    with bar, log.open("a") as file, finish_step_on_interrupt() as interrupted:
        while trainer.num_steps_done < s.steps and not interrupted.is_set():
            rows.append(trainer.step())
            print(json.dumps(rows[-1]), file=file, flush=True)
            bar.set_postfix({k: f"{rows[-1][k]:.3g}" for k in ("reward", "best", "length", "entropy", "mismatch")})
            bar.update()
            if trainer.num_steps_done % s.save_every == 0 and trainer.num_steps_done < s.steps:
                trainer.save(checkpoint)
        trainer.save(checkpoint)
    plot_runs({f"seed {trainer.seed}": rows}, folder / "curve.png")
    if trainer.num_steps_done < s.steps:
        raise KeyboardInterrupt(f"step {trainer.num_steps_done} of {s.steps} is saved; grpo.resume=true continues")
    if s.export:
        save(folder / "model", trainer.engine.model_config, trainer.engine.source_params)
        if trainer.engine.tokenizer is not None:
            trainer.engine.tokenizer.save_pretrained(folder / "model")  # type: ignore[attr-defined]
    return rows


def plot_runs(runs: Mapping[str, Sequence[StepMetrics]], path: Path) -> None:
    """Plots reward and completion length over steps to an image, one line per run; nothing without matplotlib."""
    if not find_spec("matplotlib"):
        print(f"no plot: it needs matplotlib: {install_command('notebook')}", file=sys.stderr)
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, name, label in ((left, "reward", "mean reward"), (right, "length", "tokens per completion")):
        for run, rows in runs.items():
            axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=run)
        axes.set(xlabel="step", ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
    left.legend(fontsize="small")
    figure.savefig(path, dpi=120)
