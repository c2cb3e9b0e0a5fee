"""`fgrun`, from its arguments to what it prints, with a model of random weights."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastgen import Completion, Engine, Output
from fastgen.cli import run
from fastgen.config import SamplingParams

Run = Callable[..., tuple[int, str, str]]
TINY = ("model=debug", "pages=small", "sampling=default", "seed=0", "sampling.max_tokens=4")


@pytest.fixture
def fgrun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs it in an empty folder; exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fgrun", *arguments])
        try:
            code = run.main()
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()

    return call


def test_generate(fgrun: Run, tmp_path: Path) -> None:
    """Token ids in, token ids out, a line of timing, and no file left behind."""
    code, out, err = fgrun(*TINY, "prompt=[1,2,3]")
    assert code == 0
    assert len(json.loads(out)) == 4
    assert err.startswith("3 prompt tokens, 4 output tokens, ") and err.endswith(" tokens/s\n")
    assert list(tmp_path.iterdir()) == []
    assert fgrun(*TINY, "prompt=[1,2,3]")[1] == out


def test_replicas(fgrun: Run) -> None:
    """The same tokens; there is no trace of several engines."""
    given = (*TINY, "prompt=[[1,2,3],[4,5]]", "seed=3")
    want = fgrun(*given)
    assert want[0] == 0 and fgrun(*given, "parallel=replicas")[:2] == want[:2]
    code, _, err = fgrun(*given, "parallel=replicas", "task=profile")
    assert code == 1 and "parallel.replicas must be 1" in err


def test_the_first_command_of_the_readme(fgrun: Run) -> None:
    """With nothing but a question, the default model answers it."""
    code, out, _ = fgrun("prompt=What is the capital of France?")
    assert code == 0 and "Paris" in out


def test_several_prompts_and_samples(fgrun: Run) -> None:
    _, out, _ = fgrun(*TINY, "prompt=[[1,2,3],[4,5]]", "sampling.n=2")
    assert [line.split()[0] for line in out.splitlines()] == ["[0.0]", "[0.1]", "[1.0]", "[1.1]"]


def test_stream_prints_what_generate_prints(fgrun: Run) -> None:
    _, whole, _ = fgrun(*TINY, "prompt=[1,2,3]")
    code, out, err = fgrun(*TINY, "prompt=[1,2,3]", "task=stream")
    assert code == 0 and "4 output tokens" in err
    assert [int(t) for t in out.split()] == json.loads(whole)


def test_stream_of_several(fgrun: Run) -> None:
    """Every line says whose tokens it has."""
    _, whole, _ = fgrun(*TINY, "prompt=[[1,2,3],[4,5]]")
    _, out, _ = fgrun(*TINY, "prompt=[[1,2,3],[4,5]]", "task=stream")
    for line in whole.splitlines():
        who, tokens = line.split(maxsplit=1)
        mine = [t for turn in out.splitlines() if turn.startswith(who) for t in turn.split()[1:]]
        assert [int(t) for t in mine] == json.loads(tokens)


def test_out(fgrun: Run, tmp_path: Path) -> None:
    """A line of JSON for each prompt, with all that was asked for."""
    code, out, _ = fgrun("+experiment=rollout_smoke", "out=rollouts.jsonl")
    assert code == 0
    rows = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [[1, 2, 3], [4, 5, 6, 7]]
    printed = [json.loads(line.split(maxsplit=1)[1]) for line in out.splitlines()]
    assert [c["token_ids"] for row in rows for c in row["completions"]] == printed
    assert all(len(c["logprobs"]) == len(c["token_ids"]) == 16 for row in rows for c in row["completions"])


def test_multirun(fgrun: Run, tmp_path: Path) -> None:
    """Each job's results follow the line that says which it is, and go to a folder of their own."""
    code, out, err = fgrun(
        "--multirun", *TINY, "prompt=[1,2]", "out=r.jsonl", "schedule=latency,throughput", "hydra.sweep.dir=sweep"
    )
    assert code == 0
    heads, tokens = out.splitlines()[::2], out.splitlines()[1::2]
    assert ["schedule=latency" in h for h in heads] == [True, False]
    assert all(h.startswith("# ") for h in heads) and "schedule=throughput" in heads[1]
    assert tokens[0] == tokens[1] and err.count("tokens/s") == 2
    assert (tmp_path / "sweep/0/r.jsonl").read_text() == (tmp_path / "sweep/1/r.jsonl").read_text()


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("p.txt", "one\n\n two, three \n", ["one", "two, three"]),
        ("p.jsonl", '"a"\n[1, 2]\n{"prompt": "b"}\n{"messages": [{"a": 1}]}', ["a", [1, 2], "b", [{"a": 1}]]),
    ],
)
def test_prompt_files(name: str, text: str, prompts: list, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert run._prompts(run.compose(f"task.prompts={tmp_path / name}")) == prompts


@pytest.mark.parametrize("chat", [True, False])
def test_chat(chat: bool, fgrun: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text becomes a user's message if it should and there is a template; everything else goes in as it is."""
    asked = []

    class Echo(Engine):
        tokenizer = SimpleNamespace(chat_template="{{ messages }}")
        profiler = None

        def __init__(self) -> None: ...

        def close(self) -> None: ...

        def generate(self, prompts: list, sampling: SamplingParams) -> list[Output]:
            asked.extend(prompts)
            return [Output(i, [1], [Completion([2], f"answer {i}")]) for i in range(len(prompts))]

    monkeypatch.setattr(run, "engine", lambda _, progress=True: Echo())
    monkeypatch.setattr(run, "listen", lambda *_: None)
    code, out, _ = fgrun(f"chat={chat}", "prompt=[Hello,[1,2]]")
    assert (code, out) == (0, "[0.0] answer 0\n[1.0] answer 1\n")
    assert asked == [[{"role": "user", "content": "Hello"}] if chat else "Hello", [1, 2]]
    assert fgrun(f"chat={chat}", "prompt=What's this, and that?")[:2] == (0, "answer 0\n")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["schedule.token_bugdet=5"], 2, "unknown key 'schedule.token_bugdet'; did you mean schedule.token_budget?"),
        (["model=llama31_8"], 2, "unknown model 'llama31_8'; did you mean llama31_8b"),
        (["schedule.token_budget=x"], 2, "schedule.token_budget: Value 'x'"),
        (["--multirun", "schedule.token_bugdet=5,6"], 2, "did you mean schedule.token_budget?"),
        (["schedule.token_budget=0"], 1, "schedule.token_budget must be at least 1, got 0"),
        (["+schedule.foo=0"], 1, "unknown key 'schedule.foo'"),
        ([], 1, 'no prompt: give prompt="a text"'),
        (["prompt="], 1, 'no prompt: give prompt="a text"'),
        (["prompt=a", "task.prompts=b"], 1, "both prompt and task.prompts"),
        (["task.prompts=nowhere.txt"], 1, "there is no file nowhere.txt"),
        (["prompt=[1]", "out=nowhere/out.jsonl"], 1, "out: there is no folder"),
        (["model.path=/nowhere", "prompt=[1]"], 1, "/nowhere"),
        ([*TINY, "prompt=[1,999]"], 1, "token 999 is outside the vocabulary of 256"),
        ([*TINY, "prompt=Hello"], 1, "without a tokenizer"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_mistakes(arguments: list[str], code: int, message: str, fgrun: Run, tmp_path: Path) -> None:
    """One line on stderr, nothing on stdout, no traceback."""
    status, out, err = fgrun(*arguments)
    assert status == code
    assert err.startswith("fgrun: ") and message in err and err.count("\n") == 1
    assert [line for line in out.splitlines() if not line.startswith("#")] == []


def test_bad_prompt_files(fgrun: Run, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('"fine"\n{"text": "no prompt"}\n')
    assert "p.jsonl, line 2: must be a JSON text" in fgrun("task.prompts=p.jsonl")[2]
    (tmp_path / "empty.txt").write_text("\n\n")
    assert "empty.txt is empty" in fgrun("task.prompts=empty.txt")[2]


def test_full_error(fgrun: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """HYDRA_FULL_ERROR=1 gives the exception itself, and is left as it was."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="outside the vocabulary"):
        fgrun(*TINY, "prompt=[1,999]")
    monkeypatch.delenv("HYDRA_FULL_ERROR")
    assert fgrun(*TINY, "prompt=[1,999]")[0] == 1


def test_interrupt(fgrun: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "generate", interrupted)
    assert fgrun(*TINY, "prompt=[1]") == (130, "", "")


def test_help(fgrun: Run) -> None:
    """Examples, every option of every group, and the whole configuration."""
    code, out, _ = fgrun("--help")
    assert code == 0
    for part in ('fgrun prompt="What is the capital of France?"', "+experiment=capitals", "--multirun", "llama31_8b"):
        assert part in out
    assert "token_budget: 8192" in out


def test_cfg_shows_what_would_run(fgrun: Run) -> None:
    code, out, _ = fgrun("--cfg", "job", "sampling=nucleus")
    assert code == 0 and "top_p: 0.9" in out


def test_profile(fgrun: Run, tmp_path: Path) -> None:
    """The summary and the place of the trace are printed; there is a trace."""
    trace = tmp_path / "trace.json"
    code, out, _ = fgrun("task=profile", "task.steps=2", f"task.trace={trace}", "prompt=Hello", "sampling.max_tokens=6")
    assert code == 0 and "2 steps" in out and "linear" in out and f"trace: {trace}" in out
    assert trace.stat().st_size > 1000
