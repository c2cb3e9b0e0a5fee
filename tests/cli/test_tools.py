"""Tests what all tools have in common: how they choose a model, their help, their ends, and shell completion."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pexpect
import pytest
from tqdm.auto import tqdm

import fastgen
from fastgen.cli import console, parsers, scripts
from fastgen.cli import fgrun as script
from fastgen.cli.completion import completion_script
from fastgen.cli.hydra_config import RunConfig, parse_arguments, to_hydra_arguments
from fastgen.cli.settings_help import describe_values
from fastgen.sampling_params import SamplingParams

PARSERS = (parsers.bench_parser, parsers.chat_parser, parsers.serve_parser)
TINY = ["model=debug", "kv_cache=small", "prompt=[[1,2],[3]]", "chat=false"]


@pytest.mark.parametrize("model", ["owner/name", "./folder", "x.gguf", "debug"])
def test_a_model_is_chosen_alike(model: str) -> None:
    """MODEL, --model MODEL, --model=MODEL and model=MODEL mean the same in each tool that takes one."""
    for make_parser in PARSERS:
        for words in ([model], ["--model", model], [f"--model={model}"], [f"model={model}"]):
            args = parse_arguments(make_parser(), [*words, "token_budget=64", "sampling=greedy"])
            assert (args.model, args.overrides) == (model, ["token_budget=64", "sampling=greedy"])
    expected = to_hydra_arguments([f"model={model}", "Hi"])
    assert expected[0] == ("model=debug" if model == "debug" else f'model.path="{model}"')
    for words in (["--model", model, "Hi"], ["Hi", f"--model={model}"]):
        assert sorted(to_hydra_arguments(words)) == sorted(expected)


def test_two_models(capsys: pytest.CaptureFixture[str]) -> None:
    """More than one model is an error that names them; fgrun's says how to choose one besides a prompt."""
    for words in (["a/b", "c/d"], ["a/b", "model=c/d"], ["--model", "a/b", "c/d"]):
        with pytest.raises(SystemExit, match="2"):
            parse_arguments(parsers.chat_parser(), words)
        err = capsys.readouterr().err
        assert "expected one model, got " in err and "a/b" in err and "c/d" in err
    with pytest.raises(ValueError, match="expected one prompt, got 2; to choose the model, write model=a/b"):
        to_hydra_arguments(["a/b", "Hello there"])
    with pytest.raises(ValueError, match="--model: which model"):
        to_hydra_arguments(["Hello", "--model"])


def test_an_existing_file_is_no_setting(tmp_path: Path) -> None:
    (tmp_path / "a=b").mkdir()
    assert parse_arguments(parsers.chat_parser(), [str(tmp_path / "a=b")]).model == str(tmp_path / "a=b")
    assert parse_arguments(parsers.chat_parser(), ["~lora"]).overrides == ["~lora"]


def test_help_of_the_tools(capsys: pytest.CaptureFixture[str]) -> None:
    """Every argument's help is a sentence."""
    for make_parser in PARSERS:
        for action in make_parser()._actions:
            if action.help not in ("==SUPPRESS==", "show this help message and exit"):
                assert action.help and action.help[0].isupper() and action.help.endswith("."), action


def test_help_has_every_setting(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`fgrun --help` shows each setting with the value it would have, its sentence, and its range."""
    monkeypatch.setattr(sys, "argv", ["fgrun", "--help", "temperature=0.25", "out=a$b"])
    with pytest.raises(SystemExit, match="0"):  # Hydra's
        script.main()
    out = capsys.readouterr().out
    assert "temperature: 0.25" in out and "out: a$b" in out and "None" not in out
    text = " ".join(out.split())
    for group in fields(RunConfig):
        for field in fields(group.type) if is_dataclass(group.type) else [group]:
            sentence = re.sub(r"\bNone\b", "null", field.metadata["help"])
            values = describe_values(field)
            assert (f"{sentence} ({values})" if values else sentence) in text, field.name
    ranges = {f.name: describe_values(f) for f in fields(SamplingParams)}
    assert (
        ranges["temperature"] == "a number from 0 to 100"
        and ranges["max_tokens"] == "a whole number, at least 1, or null"
    )
    assert ranges["logprob_mode"] == "one of raw, processed" and ranges["stop"] == "a list"


def test_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m fastgen` names the tools and runs one of them."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastgen", *arguments])
        try:
            code = scripts.main()
        except SystemExit as e:
            code = int(str(e.code))
        return code, *capsys.readouterr()

    code, out, _ = run()
    assert code == 0 and all(f"  {name} " in out and tool in out for name, (tool, *_) in scripts.TOOLS.items())
    assert run("--version") == (0, f"fastgen {fastgen.__version__}\n", "")
    for name, (tool, *_) in scripts.TOOLS.items():
        assert run(name, "--version") == (0, f"{tool} {fastgen.__version__}\n", "")
    code, _, err = run("rum")
    assert code == 2 and "invalid choice: 'rum' (choose from" in err
    code, out, _ = run("run", *TINY, "max_tokens=2")
    assert code == 0 and out.startswith("[0.0] [")


@pytest.mark.parametrize(("word", "expected"), [
    ("qwen3", "qwen3_8b"), ("--tensor", "--tensor-parallel"), ("token_b", "token_budget="), ("fold", "folder/"),
])  # fmt: skip
def test_bash_completes(word: str, expected: str, tmp_path: Path) -> None:
    """The script completes options, models, settings and paths."""
    (tmp_path / "folder").mkdir()
    source = completion_script(parsers.chat_parser(), "bash")
    source += f"\nCOMP_WORDS=(fgchat {word}); COMP_CWORD=1; _shtab_fgchat; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", source], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == [expected], done.stderr


def test_help_needs_no_torch() -> None:
    """--help and completion scripts of the tools that use argparse are printed before torch is imported."""
    code = "import sys; from fastgen.cli import scripts\n"
    code += "for i, tool in enumerate(('fgchat', 'fgserve', 'fgbench', 'fgchat')):\n"
    code += "    sys.argv = [tool, *(['--print-completion', 'bash'] if i == 3 else ['debug', 'seed=1', '--help'])]\n"
    code += "    try: getattr(scripts, tool)()\n"
    code += "    except SystemExit as e: print('status', e.code, 'torch' in sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert re.findall(r"^status.*$", done.stdout, re.MULTILINE) == ["status 0 False"] * 4, done.stderr
    assert all(f"usage: {tool}" in done.stdout for tool in ("fgchat", "fgserve", "fgbench"))
    assert "complete -F _fastgen_fgchat fgchat" in done.stdout


@pytest.mark.parametrize("tool, words, expected", [
    ("fgserve", "--tensor-p", "--tensor-parallel"), ("fgserve", "debug token_b", "token_budget="),
    ("fgbench", "--start", "--start-up"), ("fgserve", "temper", ""), ("fgbench", "temper", "temperature="),
    ("fgserve", "sampling=gr", ""), ("fgserve", "chat_t", "chat_template="),
    ("fgchat", "sampling=gr", "sampling=greedy"),
])  # fmt: skip
def test_bash_calls_the_completion_of_a_tool(tool: str, words: str, expected: str, tmp_path: Path) -> None:
    """As bash does at a Tab: with the function that `complete` has registered. fgserve takes no sampling settings."""
    parser = next(p for make in PARSERS if (p := make()).prog == tool)
    source = completion_script(parser, "bash").replace("compopt", ": compopt")  # only within a completion
    source += f"\nCOMP_WORDS=({tool} {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))"
    source += f"\nset -- $(complete -p {tool}); while [ $1 != -F ]; do shift; done"
    source += "\n$2; echo ${COMPREPLY[@]}"
    done = subprocess.run(["bash", "-c", source], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == expected, done.stderr


def test_completion_in_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tab completes options, settings and their values in an interactive bash, whose words end at "="."""
    (tmp_path / "own.jinja").touch()
    (tmp_path / "fgrun").write_text(f'#!/bin/sh\nexec {sys.executable} -m fastgen run "$@"\n')
    (tmp_path / "fgrun").chmod(0o755)
    (tmp_path / "fgchat.bash").write_text(completion_script(parsers.chat_parser(), "bash"))
    with (tmp_path / "fgrun.bash").open("w") as file, monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["fgrun", "--print-completion", "bash"])
        patch.setattr(sys, "stdout", file)
        assert script.main() == 0
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TERM": "dumb"}
    options: Any = {"encoding": "utf-8", "env": environment, "cwd": str(tmp_path), "timeout": 30}
    with pexpect.spawn("bash", ["--norc", "--noprofile", "-i"], **options) as shell:
        shell.sendline("bind 'set enable-bracketed-paste off'; PS1='>'; . ./fgchat.bash; echo re''ady")
        shell.expect("ready")
        lines = [("fgchat --tens", "--tensor-parallel "), ("fgchat debug token_b", "token_budget="),
                 ("fgchat sampling=gre", "sampling=greedy "), ("fgchat chat_template=ow", "chat_template=own.jinja"),
                 ("fgrun schedule=la", "schedule=latency"), ("fgrun sampling.tempe", "sampling.temperature="),
                 ("fgchat sampling=gre", "sampling=greedy ")]  # fmt: skip
        for typed, expected in lines:
            if typed == "fgrun schedule=la":  # Hydra's script takes "=" out of the characters that end a word
                shell.sendline(". ./fgrun.bash; echo re''ady")
                shell.expect("ready")
            shell.send(f"{typed}\t")
            shell.expect_exact(f"{typed.rpartition(' ')[0]} {expected}")
            shell.send("\x15")  # Ctrl-U removes the line


def test_completion_scripts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every tool prints a script for each shell. zsh and fish check theirs, where they are installed."""
    for make_parser in PARSERS:
        for shell in console.SHELLS:
            with pytest.raises(SystemExit, match="0"):
                parse_arguments(make_parser(), ["--print-completion", shell])
            out = capsys.readouterr().out
            assert "token_budget=" in out and "version" in out
            if shutil.which(shell):
                done = subprocess.run([shell, "-n"], input=out, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
    for shell in console.SHELLS:
        monkeypatch.setattr(sys, "argv", ["fgrun", "--print-completion", shell])
        assert script.main() == 0 and "fgrun" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["fgrun", "--print-completion", "csh"])
    assert script.main() == 1 and "unknown --print-completion 'csh'" in capsys.readouterr().err


def test_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar has tokens and tokens/s while an answer is not finished. A log that is no terminal gets no bar."""
    screen = io.StringIO()
    init = tqdm.__init__
    monkeypatch.setattr(tqdm, "__init__", lambda *a, **k: init(*a, **k | {"delay": 0, "mininterval": 0}))
    with fastgen.Engine(*tiny_model(), cache_tokens=256) as engine:
        monkeypatch.setattr(sys, "stderr", screen)
        sampling = SamplingParams(max_tokens=20, ignore_eos=True)
        engine.generate([1, 2], sampling)
        assert screen.getvalue() == ""
        monkeypatch.setattr(screen, "isatty", lambda: True)
        engine.generate([1, 2], sampling, progress=True)
        lines = screen.getvalue().split("\r")
        assert any(re.search(r"0/1 requests \[00:00, (\d|1\d) tokens, [\d,.]+ tokens/s\]", line) for line in lines)
        assert len(dict(engine.as_completed([[1], [2]], sampling))) == 2 and screen.getvalue().split("\r") == lines


def tiny_model() -> tuple:
    """Returns random parameters and their configuration."""
    import tiny

    config = fastgen.from_hf_config(tiny.config())
    return tiny.weights(config), config


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Starts, at once because imports take long, two tools with a reader that exits early, and one to interrupt."""
    folder = tmp_path_factory.mktemp("tools")
    long_run = [*TINY, "max_tokens=1000", "ignore_eos=true", "task=stream"]
    pipe = " ".join(["run", *[f"'{word}'" for word in long_run]])
    commands = {
        "pipe": f"{sys.executable} -m fastgen {pipe} | head -c 20",
        "help": f"{sys.executable} -m fastgen bench --help | head -c 20",
        "interrupt": f"exec {sys.executable} -m fastgen {pipe}",
    }
    started = {
        name: subprocess.Popen(
            command, shell=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        for name, command in commands.items()
    }  # fmt: skip
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("name", ["pipe", "help"])
def test_a_closed_pipe_is_silent(name: str, processes: dict[str, subprocess.Popen[str]]) -> None:
    out, err = processes[name].communicate(timeout=120)
    assert len(out) == 20 and err == ""


def test_ctrl_c_prints_one_line(processes: dict[str, subprocess.Popen[str]]) -> None:
    process = processes["interrupt"]
    assert process.stdout and process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, "fgrun: interrupted: 0 of 2 requests had finished\n")


def test_main_ends_quietly(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt's own text is part of the line."""

    def main(error: BaseException) -> int:
        raise error

    tool = console.ends_quietly("tool")(main)
    assert tool(KeyboardInterrupt()) == 130 and capsys.readouterr().err == "tool: interrupted\n"
    assert (
        tool(console.Terminated("1 of 2 done")) == 143 and capsys.readouterr().err == "tool: terminated: 1 of 2 done\n"
    )
    closed = list[tuple[int, int]]()
    monkeypatch.setattr(os, "dup2", lambda *files: closed.append(files))
    monkeypatch.setattr(sys.stdout, "fileno", lambda: 1, raising=False)
    assert tool(BrokenPipeError()) == 141 and capsys.readouterr() == ("", "") and closed[0][1] == 1
    with pytest.raises(SystemExit, match="7"):
        tool(SystemExit(7))
