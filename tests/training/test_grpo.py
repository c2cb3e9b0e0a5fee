"""GRPO: its loss, its learning curve, and runs that are interrupted and resumed."""

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
from fastgen.cli import fgrun as script
from fastgen.config import GrpoConfig
from fastgen.training import grpo
from fastgen.training.grpo import StepMetrics, Trainer, train
from fastgen.training.problems import PROBLEMS, Problem, load_problem, reward_sum

SPEC = fastgen.from_hf_config(tiny.config(vocab=64, tie_word_embeddings=True))
QUICK = {"lr": 0.01, "prompts_per_step": 4, "warmup_steps": 0, "export": False}
SAMPLING = SamplingParams(n=4, max_tokens=6, ignore_eos=True)


def trainer(seed: int = 0, sampling: SamplingParams = SAMPLING, **settings: Any) -> Trainer:
    engine = fastgen.Engine(tiny.weights(SPEC, times=1), SPEC, progress=False, page_size=16, cache_tokens=1024)
    return Trainer(engine, PROBLEMS["sevens"], GrpoConfig(**QUICK | settings), sampling, seed)


def without_times(rows: list[StepMetrics]) -> list[StepMetrics]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "sampling_s")} for row in rows]


def values(params: fastgen.Params) -> list[Tensor]:
    return [w.detach().clone() for w in tree_leaves(params) if w is not None]


# --- learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"loss_type": "dr_grpo"}, {"kl_coef": 0.001}], ids=["", "dr", "kl"])
def test_rewards_rise(settings: dict[str, Any]) -> None:
    """Rewards rise from chance to nearly 1: the engine samples with the parameters that the optimizer wrote."""
    t = trainer(**settings)
    addresses = [w.data_ptr() for w in tree_leaves(t.engine.params) if w is not None]
    rows = [t.step() for _ in range(25)]
    assert rows[0]["reward"] < 0.1 and sum(row["reward"] for row in rows[-3:]) / 3 > 0.8
    assert [w.data_ptr() for w in tree_leaves(t.engine.params) if w is not None] == addresses
    assert t.engine.weight_version > 5, "the engine has seen the updates by itself"
    assert max(row["mismatch"] for row in rows) < 1e-5, "the scorer has the sampler's parameters"
    assert rows[-1]["entropy"] < rows[0]["entropy"] / 2
    assert bool(rows[-1]["kl"] > 0.1) == ("kl_coef" in settings)


def test_only_the_last_layers_are_trained() -> None:
    t = trainer(trainable_layers=1, num_minibatches=1)
    before = values(t.engine.params)
    for _ in range(3):
        t.step()
    changed = [not torch.equal(a, b) for a, b in zip(before, values(t.engine.params), strict=True)]
    last = {id(w) for w in tree_leaves(t.engine.params.layers[-1]) if w is not None}
    assert changed == [id(w) in last for w in tree_leaves(t.engine.params) if w is not None]


def test_a_large_kl_weight_keeps_the_policy_near_the_reference() -> None:
    """The same steps with a larger KL weight end at a smaller KL divergence."""
    free, bound = ([t.step() for _ in range(12)][-1]["kl"] for t in (trainer(kl_coef=1e-6), trainer(kl_coef=50.0)))
    assert bound < free / 5


def test_equal_rewards_change_nothing() -> None:
    """Groups of equal rewards have no gradient: nothing is written, and the prefix cache stays valid."""
    t = trainer()
    t.problem = Problem(t.problem.sample_prompt, lambda prompt, text: 1.0)
    before = values(t.engine.params)
    row = t.step()
    assert row["norm"] == 0 and t.engine.weight_version == 0
    assert all(map(torch.equal, before, values(t.engine.params)))


# --- the loss -------------------------------------------------------------------------------------------------------


def test_advantages() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]])
    expected = torch.tensor([[0.5, -0.5, -0.5, 0.5], [0.0] * 4])
    torch.testing.assert_close(grpo.compute_advantages(rewards, scale_by_std=False), expected)
    torch.testing.assert_close(
        grpo.compute_advantages(rewards), expected / (0.5 * (4 / 3) ** 0.5), atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("length", [None, 5])
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_gradient_by_hand(length: int | None, kl: float) -> None:
    """d loss / d logprob is -A * ratio if the ratio is not clipped and 0 if it is, plus kl * (1 - reference / new)."""
    old = [torch.log(torch.tensor([0.5, 0.2, 0.4])), torch.log(torch.tensor([0.5, 0.3]))]
    # The second and third are outside the clip range.
    ratios = [torch.tensor([1.0, 1.5, 0.5]), torch.tensor([1.5, 0.5])]
    new = [(o + r.log()).requires_grad_() for o, r in zip(old, ratios, strict=True)]
    reference = [x.detach() + 0.1 for x in new]
    options: Any = {"reference_logprobs": reference if kl else None, "kl_weight": kl}
    grpo.grpo_loss(new, old, [2.0, -1.0], clip_range=0.2, normalization_length=length, **options).backward()
    surrogate = [torch.tensor([-2.0, 0.0, -1.0]), torch.tensor([1.5, 0.0])]
    for x, s in zip(new, surrogate, strict=True):
        expected = (s + kl * (1 - torch.tensor(0.1).exp())) / (length or len(x))
        torch.testing.assert_close(x.grad, expected)


def test_the_first_update_is_the_policy_gradient() -> None:
    """One minibatch on the sampler's own parameters has the policy gradient, weighted by advantages."""
    t = trainer(num_minibatches=1, max_grad_norm=1e9)
    rollout = t.rollout()
    advantages = grpo.compute_advantages(rollout.rewards).flatten()
    copies = grpo.make_trainable(tree_map_only(Tensor, lambda w: w.detach().clone(), t.engine.params))
    scores = fastgen.score(copies, SPEC, rollout.token_ids, first=rollout.completion_starts)
    (-sum(a * x.mean() for a, x in zip(advantages, scores, strict=True)) / len(scores)).backward()
    grads: list[Tensor | None] = []
    t.optimizer.register_step_pre_hook(lambda *_: grads.extend(w.grad for w in t.trainable_weights))
    t.step()
    assert grads and len(grads) == len(t.trainable_weights)
    for grad, expected in zip(grads, fastgen.training.logprobs.iter_weights(copies), strict=True):
        torch.testing.assert_close(grad, expected.grad, atol=1e-6, rtol=1e-4)


# --- interruption ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"kl_coef": 0.01, "trainable_layers": 1}], ids=["", "kl"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, settings: dict[str, Any]) -> None:
    """The rows and parameters are equal bit for bit, even where the log has steps after the checkpoint."""
    uninterrupted = trainer(steps=9, **settings)
    expected = train(uninterrupted, tmp_path / "uninterrupted", progress=False)
    assert len({row["reward"] for row in expected}) > 2
    (tmp_path / "interrupted").mkdir()
    (tmp_path / "interrupted" / "log.jsonl").write_text("{}\n")  # of a run that was killed before its first checkpoint
    train(trainer(steps=4, **settings), tmp_path / "interrupted", progress=False)
    with (tmp_path / "interrupted" / "log.jsonl").open("a") as log:  # killed before the next checkpoint
        log.write(json.dumps(expected[4] | {"reward": -1}) + "\n")
    resumed = trainer(steps=9, **settings)
    rows = train(resumed, tmp_path / "interrupted", resume=True, progress=False)
    assert without_times(rows) == without_times(expected)
    written = [json.loads(line) for line in (tmp_path / "interrupted" / "log.jsonl").read_text().splitlines()]
    assert without_times(written) == without_times(expected)
    assert all(map(torch.equal, values(resumed.engine.params), values(uninterrupted.engine.params)))


def test_ctrl_c_finishes_the_step(tmp_path: Path) -> None:
    expected = train(trainer(steps=6), tmp_path / "uninterrupted", progress=False)
    t, sample_prompt = trainer(steps=6), PROBLEMS["sevens"].sample_prompt

    def interrupt(rng: random.Random) -> list[int]:
        if t.num_steps_done == 2 and t.engine.weight_version:
            t.problem = PROBLEMS["sevens"]
            os.kill(os.getpid(), signal.SIGINT)
        return sample_prompt(rng)

    t.problem = Problem(interrupt, PROBLEMS["sevens"].reward)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(t, tmp_path / "interrupted", progress=False)
    assert signal.getsignal(signal.SIGINT) == before
    assert len((tmp_path / "interrupted" / "log.jsonl").read_text().splitlines()) == 3
    assert not list((tmp_path / "interrupted").glob("*.part"))
    rows = train(trainer(steps=6), tmp_path / "interrupted", resume=True, progress=False)
    assert without_times(rows) == without_times(expected)


def test_checkpoints_of_other_runs_are_refused(tmp_path: Path) -> None:
    train(trainer(steps=1), tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"another run: grpo.clip was 0.2, is 0.3; seed was 0, is 1"):
        train(trainer(seed=1, clip=0.3), tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"has a run: resume it \(grpo.resume=true\)"):
        train(trainer(), tmp_path)
    with pytest.raises(ValueError, match=r"there is no .*checkpoint.pt"):
        train(trainer(), tmp_path / "empty", resume=True)


def test_seeds_are_distinct_and_reproducible() -> None:
    assert len({grpo.derive_seed(*x) for x in ((0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 10), (0, 1, 0))}) == 6
    first, again, other = (without_times([trainer(seed).step()]) for seed in (0, 0, 1))
    assert first == again != other


# --- problems and settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reward"), [(" 12", 1), ("12", 1), (" 12, so", 0.2), (" 1", 0), ("", 0), (" it is 12", 0.2), (" 2 12", 0)]
)
def test_reward_of_sums(text: str, reward: float) -> None:
    assert reward_sum("2 + 1 = 3\n4 + 8 =", text) == reward


def test_load_problem() -> None:
    assert load_problem("addition") is PROBLEMS["addition"]
    with pytest.raises(ValueError, match="unknown grpo.problem 'adition'; did you mean addition"):
        load_problem("adition")
    with pytest.raises(ValueError, match="No module named 'nowhere'.*PYTHONPATH"):
        load_problem("nowhere:problem")
    with pytest.raises(ValueError, match="no attribute 'nothing'"):
        load_problem("fastgen.training.problems:nothing")
    with pytest.raises(ValueError, match=r"is a function, not a fastgen.training.problems.Problem"):
        load_problem("fastgen.training.problems:sample_sum_prompt")


def test_a_problem_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "from fastgen.training.problems import Problem\nmine = Problem(lambda rng: [1, 2], lambda _, text: len(text))"
    )
    (tmp_path / "user_problem.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert load_problem("user_problem:mine").reward([1], "abc") == 3


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"n": 1}, "n=1: a completion is compared with others"),
        ({"temperature": 0}, "temperature above 0"),
        ({"max_tokens": None}, "a number as sampling.max_tokens"),
        ({"top_p": 0.9, "presence_penalty": 1}, "sampling.top_p and sampling.presence_penalty: the gradient"),
    ],
)
def test_sampling_settings_that_are_refused(sampling: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(sampling=SamplingParams(**{"n": 4} | sampling))


def test_more_trainable_layers_than_the_model_has() -> None:
    with pytest.raises(ValueError, match="grpo.trainable_layers=3: the model has 2"):
        trainer(trainable_layers=3)


def test_logprobs_at_a_temperature() -> None:
    """Sampler and scorer both use the distribution that was sampled from."""
    t = trainer(sampling=SamplingParams(n=4, max_tokens=6, temperature=0.5, ignore_eos=True))
    rows = [t.step() for _ in range(4)]
    assert max(row["mismatch"] for row in rows) < 1e-5


# --- the command ----------------------------------------------------------------------------------------------------

TINY = (
    "+experiment=grpo_smollm2", "model=debug", "grpo.problem=sevens", "grpo.lr=0.01", "grpo.trainable_layers=null",
    "sampling.stop=[]",
)  # fmt: skip


def test_fgrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """fgrun makes two steps and resumes with two more: it writes the log, the plot, and a model that loads."""
    monkeypatch.chdir(tmp_path)

    def fgrun(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fgrun", *TINY, *arguments])
        try:
            code = script.main()
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
        (("grpo.output_dir=a", "prompt=Hello"), "samples prompts from grpo.problem"),
        (("grpo.output_dir=a", "seed=null"), "needs a seed"),
        (("grpo.output_dir=a", "grpo.problem=sevns"), "did you mean sevens"),
        (("grpo.output_dir=a", "grpo.stepz=3"), "did you mean steps|did you mean grpo.steps"),
        (("grpo.output_dir=a", "grpo.clip=3"), "between 0 and 1"),
    ):
        code, _, err = fgrun(*wrong)
        assert code in (1, 2) and any(part in err for part in message.split("|")), err
    assert not Path("a").exists()


def test_nan_parameters_end_the_run() -> None:
    """Completions that ended with an error are not trained on."""
    t = trainer()
    with torch.no_grad():
        t.params.final_norm[0] = float("nan")
    with pytest.raises(RuntimeError, match="the parameters have diverged"):
        t.step()
