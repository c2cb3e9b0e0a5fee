"""The loop that learns: its loss, its curve, and that an interruption leaves no trace in it."""

import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import fastgen
from fastgen import SamplingParams
from fastgen.cli import run
from fastgen.config import GrpoConfig
from fastgen.training import grpo
from fastgen.training.grpo import PROBLEMS, Problem, StepMetrics, Trainer, load_problem, train

SPEC = fastgen.from_hf_config(tiny.config(vocab=64, tie_word_embeddings=True))
QUICK = {"lr": 0.01, "prompts_per_step": 4, "warmup_steps": 0, "export": False}
SAMPLING = SamplingParams(n=4, max_tokens=6, ignore_eos=True)


def trainer(seed: int = 0, sampling: SamplingParams = SAMPLING, **settings: Any) -> Trainer:
    engine = fastgen.Engine(tiny.weights(SPEC, times=1), SPEC, progress=False, page_size=16, cache_tokens=1024)
    return Trainer(engine, PROBLEMS["sevens"], GrpoConfig(**QUICK | settings), sampling, seed)


def curve(rows: list[StepMetrics]) -> list[StepMetrics]:
    """Without what the clock says."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "sampling_s")} for row in rows]


def values(params: fastgen.Params) -> list[Tensor]:
    return [w.detach().clone() for w in tree_leaves(params) if w is not None]


# --- learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"loss_type": "dr_grpo"}, {"kl_coef": 0.001}], ids=["", "dr", "kl"])
def test_rewards_rise(settings: dict[str, Any]) -> None:
    """From chance to nearly always, in one memory: the engine samples with what the optimizer wrote."""
    one = trainer(**settings)
    addresses = [w.data_ptr() for w in tree_leaves(one.engine.params) if w is not None]
    rows = [one.step() for _ in range(25)]
    assert rows[0]["reward"] < 0.1 and sum(row["reward"] for row in rows[-3:]) / 3 > 0.8
    assert [w.data_ptr() for w in tree_leaves(one.engine.params) if w is not None] == addresses
    assert one.engine.weight_version > 5, "the engine has seen the updates by itself"
    assert max(row["mismatch"] for row in rows) < 1e-5, "the scorer has the sampler's parameters"
    assert rows[-1]["entropy"] < rows[0]["entropy"] / 2
    assert bool(rows[-1]["kl"] > 0.1) == ("kl_coef" in settings)


def test_the_last_layers_alone() -> None:
    one = trainer(trainable_layers=1, num_minibatches=1)
    before = values(one.engine.params)
    for _ in range(3):
        one.step()
    changed = [not torch.equal(a, b) for a, b in zip(before, values(one.engine.params), strict=True)]
    last = {id(w) for w in tree_leaves(one.engine.params.layers[-1]) if w is not None}
    assert changed == [id(w) in last for w in tree_leaves(one.engine.params) if w is not None]


def test_a_strong_pull_to_the_start_keeps_it_there() -> None:
    """The same steps with a large weight of the divergence end nearer to the reference."""
    free, held = trainer(kl_coef=1e-6), trainer(kl_coef=50.0)
    far = [[one.step() for _ in range(12)][-1]["kl"] for one in (free, held)]
    assert far[1] < far[0] / 5


def test_nothing_to_learn_from() -> None:
    """Groups of one reward have no gradient: nothing is written, and the prefix cache stays."""
    one = trainer()
    one.problem = Problem(one.problem.sample_prompt, lambda prompt, text: 1.0)
    before = values(one.engine.params)
    row = one.step()
    assert row["norm"] == 0 and one.engine.weight_version == 0
    assert all(map(torch.equal, before, values(one.engine.params)))


# --- the loss -------------------------------------------------------------------------------------------------------


def test_advantages() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]])
    wanted = torch.tensor([[0.5, -0.5, -0.5, 0.5], [0.0] * 4])
    torch.testing.assert_close(grpo.compute_advantages(rewards, scale_by_std=False), wanted)
    torch.testing.assert_close(grpo.compute_advantages(rewards), wanted / (0.5 * (4 / 3) ** 0.5), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("length", [None, 5])
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_gradient_by_hand(length: int | None, kl: float) -> None:
    """d loss / d logprob: -A * ratio where it is not clipped, 0 where it is; and kl * (1 - reference / new)."""
    old = [torch.log(torch.tensor([0.5, 0.2, 0.4])), torch.log(torch.tensor([0.5, 0.3]))]
    ratios = [torch.tensor([1.0, 1.5, 0.5]), torch.tensor([1.5, 0.5])]  # clip=0.2: the second and third leave the range
    new = [(o + r.log()).requires_grad_() for o, r in zip(old, ratios, strict=True)]
    reference = [x.detach() + 0.1 for x in new]
    grpo.grpo_loss(
        new,
        old,
        [2.0, -1.0],
        clip_range=0.2,
        normalization_length=length,
        reference_logprobs=reference if kl else None,
        kl_weight=kl,
    ).backward()
    surrogate = [torch.tensor([-2.0, 0.0, -1.0]), torch.tensor([1.5, 0.0])]
    for x, s in zip(new, surrogate, strict=True):
        wanted = (s + kl * (1 - torch.tensor(0.1).exp())) / (length or len(x))
        torch.testing.assert_close(x.grad, wanted)


def test_the_step_is_the_gradient_of_the_policy() -> None:
    """One minibatch from the sampler's own parameters: the policy's gradient, by advantages."""
    one = trainer(num_minibatches=1, max_grad_norm=1e9)
    made = one.rollout()
    advantage = grpo.compute_advantages(made.rewards).flatten()
    own = grpo.make_trainable(tree_map_only(Tensor, lambda w: w.detach().clone(), one.engine.params))
    scores = fastgen.score(own, SPEC, made.token_ids, first=made.answer_starts)
    (-sum(a * x.mean() for a, x in zip(advantage, scores, strict=True)) / len(scores)).backward()
    seen: list[Tensor | None] = []
    one.optimizer.register_step_pre_hook(lambda *_: seen.extend(w.grad for w in one.trainable_weights))
    one.step()
    assert seen and len(seen) == len(one.trainable_weights)
    for found, wanted in zip(seen, fastgen.training.logprobs.iter_weights(own), strict=True):
        torch.testing.assert_close(found, wanted.grad, atol=1e-6, rtol=1e-4)


# --- interruption ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"kl_coef": 0.01, "trainable_layers": 1}], ids=["", "kl"])
def test_resumed_is_uninterrupted(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Bit for bit, though steps after the checkpoint were already in the log."""
    whole = trainer(steps=9, **settings)
    wanted = train(whole, tmp_path / "whole", progress=False)
    assert len({row["reward"] for row in wanted}) > 2
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "log.jsonl").write_text("{}\n")  # of a run that was killed before its first checkpoint
    train(trainer(steps=4, **settings), tmp_path / "parts", progress=False)
    with (tmp_path / "parts" / "log.jsonl").open("a") as log:  # killed before the next checkpoint
        log.write(json.dumps(wanted[4] | {"reward": -1}) + "\n")
    other = trainer(steps=9, **settings)
    rows = train(other, tmp_path / "parts", resume=True, progress=False)
    assert curve(rows) == curve(wanted)
    written = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert curve(written) == curve(wanted)
    assert all(map(torch.equal, values(other.engine.params), values(whole.engine.params)))


def test_ctrl_c_ends_after_the_step(tmp_path: Path) -> None:
    wanted = train(trainer(steps=6), tmp_path / "whole", progress=False)
    one, draws = trainer(steps=6), PROBLEMS["sevens"].sample_prompt

    def draw(dice: random.Random) -> list[int]:
        if one.num_steps_done == 2 and one.engine.weight_version:
            one.problem = PROBLEMS["sevens"]
            os.kill(os.getpid(), signal.SIGINT)
        return draws(dice)

    one.problem = Problem(draw, PROBLEMS["sevens"].reward)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(one, tmp_path / "parts", progress=False)
    assert signal.getsignal(signal.SIGINT) == before
    assert len((tmp_path / "parts" / "log.jsonl").read_text().splitlines()) == 3
    assert not list((tmp_path / "parts").glob("*.part"))
    assert curve(train(trainer(steps=6), tmp_path / "parts", resume=True, progress=False)) == curve(wanted)


def test_another_runs_checkpoint(tmp_path: Path) -> None:
    train(trainer(steps=1), tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"another run: grpo.clip was 0.2, is 0.3; seed was 0, is 1"):
        train(trainer(seed=1, clip=0.3), tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"has a run: go on with it \(grpo.resume=true\)"):
        train(trainer(), tmp_path)
    with pytest.raises(ValueError, match=r"there is no .*checkpoint.pt"):
        train(trainer(), tmp_path / "empty", resume=True)


def test_seeds_differ() -> None:
    assert len({grpo.derive_seed(*x) for x in ((0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 10), (0, 1, 0))}) == 6
    assert curve([trainer(0).step()]) == curve([trainer(0).step()]) != curve([trainer(1).step()])


# --- problems and settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "worth"), [(" 12", 1), ("12", 1), (" 12, so", 0.2), (" 1", 0), ("", 0), (" it is 12", 0.2), (" 2 12", 0)]
)
def test_sums(text: str, worth: float) -> None:
    assert grpo.reward_sum("2 + 1 = 3\n4 + 8 =", text) == worth


def test_problems() -> None:
    assert load_problem("addition") is PROBLEMS["addition"]
    with pytest.raises(ValueError, match="unknown grpo.problem 'adition'; did you mean addition"):
        load_problem("adition")
    with pytest.raises(ValueError, match="No module named 'nowhere'.*PYTHONPATH"):
        load_problem("nowhere:problem")
    with pytest.raises(ValueError, match="no attribute 'nothing'"):
        load_problem("fastgen.training.grpo:nothing")
    with pytest.raises(ValueError, match=r"is a function, not a fastgen.training.grpo.Problem"):
        load_problem("fastgen.training.grpo:sample_sum_prompt")


def test_a_problem_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from fastgen.training.grpo import Problem\nmine = Problem(lambda dice: [1, 2], lambda prompt, text: len(text))\n"
    (tmp_path / "of_ones_own.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert load_problem("of_ones_own:mine").reward([1], "abc") == 3


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"n": 1}, "n=1: an answer is compared with others"),
        ({"temperature": 0}, "temperature above 0"),
        ({"max_tokens": None}, "a number as sampling.max_tokens"),
        ({"top_p": 0.9, "presence_penalty": 1}, "sampling.top_p and sampling.presence_penalty: the gradient"),
    ],
)
def test_what_cannot_be_scored(sampling: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(sampling=SamplingParams(**{"n": 4} | sampling))


def test_too_many_layers() -> None:
    with pytest.raises(ValueError, match="grpo.trainable_layers=3: the model has 2"):
        trainer(trainable_layers=3)


def test_temperature() -> None:
    """Probabilities are of the distribution that was drawn from, on both sides."""
    one = trainer(sampling=SamplingParams(n=4, max_tokens=6, temperature=0.5, ignore_eos=True))
    rows = [one.step() for _ in range(4)]
    assert max(row["mismatch"] for row in rows) < 1e-5


# --- the command ----------------------------------------------------------------------------------------------------

TINY = (
    "+experiment=grpo_smollm2",
    "model=debug",
    "grpo.problem=sevens",
    "grpo.lr=0.01",
    "grpo.trainable_layers=null",
    "sampling.stop=[]",
)


def test_fgrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps, then two more; the log, the plot, and a model that loads."""
    monkeypatch.chdir(tmp_path)

    def fgrun(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fgrun", *TINY, *arguments])
        try:
            code = run.main()
        except SystemExit as e:
            code = int(str(e.code))
        return code, *capsys.readouterr()

    code, out, _ = fgrun("grpo.steps=2")
    assert code == 0 and out.startswith("reward 0.") and out.endswith("at step 2\n")
    assert {f.name for f in Path("grpo").iterdir()} == {"log.jsonl", "checkpoint.pt", "curve.png", "model"}
    assert fgrun("grpo.steps=4")[0] == 1
    code, out, _ = fgrun("grpo.steps=4", "grpo.resume=true")
    assert code == 0 and out.endswith("at step 4\n")
    assert [json.loads(line)["step"] for line in Path("grpo/log.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    with fastgen.Engine.from_pretrained("grpo/model", progress=False, cache_tokens=256) as engine:
        assert engine.generate([1, 2, 3], SamplingParams(max_tokens=2))
    for wrong, message in (
        (("grpo.output_dir=a", "prompt=Hello"), "draws its own prompts"),
        (("grpo.output_dir=a", "seed=null"), "needs a seed"),
        (("grpo.output_dir=a", "grpo.problem=sevns"), "did you mean sevens"),
        (("grpo.output_dir=a", "grpo.stepz=3"), "did you mean steps|did you mean grpo.steps"),
        (("grpo.output_dir=a", "grpo.clip=3"), "between 0 and 1"),
    ):
        code, _, err = fgrun(*wrong)
        assert code in (1, 2) and any(part in err for part in message.split("|")), err
    assert not Path("a").exists()


def test_parameters_that_have_diverged() -> None:
    """Answers that have ended with an error are none to learn from."""
    one = trainer()
    with torch.no_grad():
        one.params.final_norm[0] = float("nan")
    with pytest.raises(RuntimeError, match="the parameters have diverged"):
        one.step()
