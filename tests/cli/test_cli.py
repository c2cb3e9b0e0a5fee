"""Tests `fgrun`, from its arguments to its output, with a model of random weights."""

import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

import fastgen
from fastgen import ChatPrompt, Completion, Engine, Output
from fastgen.cli import chat, prompt_files, run, serve
from fastgen.cli import fgrun as script
from fastgen.cli.bench import benchmark
from fastgen.cli.hydra_config import to_hydra_arguments
from fastgen.cli.prompt_files import read_chat_template, read_prompts, read_tools
from fastgen.sampling_params import SamplingParams

Run = Callable[..., tuple[int, str, str]]
TINY = ("model=debug", "kv_cache=small", "sampling=default", "seed=0", "sampling.max_tokens=4")


@pytest.fixture
def fgrun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Returns a function that runs fgrun in an empty folder and returns exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fgrun", *arguments])
        try:
            code = script.main()
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()

    return call


def test_generate(fgrun: Run, tmp_path: Path) -> None:
    """A prompt of token ids prints token ids and a line of statistics, and leaves no file behind."""
    code, out, err = fgrun(*TINY, "prompt=[1,2,3]")
    assert code == 0
    assert len(json.loads(out)) == 4
    assert err.startswith("3 prompt tokens, 4 output tokens, ") and err.endswith(" tokens/s\n")
    assert list(tmp_path.iterdir()) == []
    assert fgrun(*TINY, "prompt=[1,2,3]")[1] == out


def test_replicas(fgrun: Run) -> None:
    """Replicas generate the same tokens as one engine, and cannot be profiled."""
    arguments = (*TINY, "prompt=[[1,2,3],[4,5]]", "seed=3")
    expected = fgrun(*arguments)
    assert expected[0] == 0 and fgrun(*arguments, "parallel=replicas")[:2] == expected[:2]
    code, _, err = fgrun(*arguments, "parallel=replicas", "task=profile")
    assert code == 1 and "parallel.replicas must be 1" in err


def test_the_first_command_of_the_readme(fgrun: Run) -> None:
    """Without a model argument, the default model answers."""
    code, out, _ = fgrun("prompt=What is the capital of France?")
    assert code == 0 and "Paris" in out


def test_several_prompts_and_samples(fgrun: Run) -> None:
    _, out, _ = fgrun(*TINY, "prompt=[[1,2,3],[4,5]]", "sampling.n=2")
    assert [line.split()[0] for line in out.splitlines()] == ["[0.0]", "[0.1]", "[1.0]", "[1.1]"]


def test_stream_prints_what_generate_prints(fgrun: Run) -> None:
    _, expected, _ = fgrun(*TINY, "prompt=[1,2,3]")
    code, out, err = fgrun(*TINY, "prompt=[1,2,3]", "task=stream")
    assert code == 0 and "4 output tokens" in err
    assert [int(t) for t in out.split()] == json.loads(expected)


def test_stream_of_several_prompts(fgrun: Run) -> None:
    """Every line begins with the label of its completion."""
    _, generated, _ = fgrun(*TINY, "prompt=[[1,2,3],[4,5]]")
    _, streamed, _ = fgrun(*TINY, "prompt=[[1,2,3],[4,5]]", "task=stream")
    for line in generated.splitlines():
        label, tokens = line.split(maxsplit=1)
        words = [word for line in streamed.splitlines() if line.startswith(label) for word in line.split()[1:]]
        assert [int(word) for word in words] == json.loads(tokens)


def test_out(fgrun: Run, tmp_path: Path) -> None:
    """The file has a line of JSON for each prompt, with completions and logprobs."""
    code, out, _ = fgrun("+experiment=rollout_smoke", "out=rollouts.jsonl")
    assert code == 0
    rows = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [[1, 2, 3], [4, 5, 6, 7]]
    printed = [json.loads(line.split(maxsplit=1)[1]) for line in out.splitlines()]
    assert [c["token_ids"] for row in rows for c in row["completions"]] == printed
    assert all(len(c["logprobs"]) == len(c["token_ids"]) == 16 for row in rows for c in row["completions"])


def test_multirun(fgrun: Run, tmp_path: Path) -> None:
    """A line with the job's overrides precedes its results. Each job writes to its own folder."""
    code, out, err = fgrun(
        "--multirun", *TINY, "prompt=[1,2]", "out=r.jsonl", "schedule=latency,throughput", "hydra.sweep.dir=sweep"
    )
    assert code == 0
    heads, tokens = out.splitlines()[::2], out.splitlines()[1::2]
    assert ["schedule=latency" in h for h in heads] == [True, False]
    assert all(h.startswith("# ") for h in heads) and "schedule=throughput" in heads[1]
    assert tokens[0] == tokens[1] and err.count("tokens/s") == 2
    assert (tmp_path / "sweep/0/r.jsonl").read_text() == (tmp_path / "sweep/1/r.jsonl").read_text()


CHAT = [{"role": "user", "content": "Hi é"}]
ROWS = ["Hi é, you", [1, 2], CHAT]


def compress(content: bytes) -> bytes:
    """Compresses with gzip, without a time stamp: test processes must agree on the names of tests."""
    return gzip.compress(content, mtime=0)


def parquet(**columns: list) -> bytes:
    """Returns the content of a Parquet file with the columns."""
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("p.txt", "one\n\n two, three \n", ["one", "two, three"]),
        ("p", "one\u2028still one\r\ntwo", ["one\u2028still one", "two"]),
        ("bom.txt", "\ufeffone\n", ["one"]),
        ("p.txt.gz", compress("é\ntwo".encode()), ["é", "two"]),
        ("p.JSONL", "".join(json.dumps(row) + "\n\n" for row in ROWS), ROWS),
        ("p.jsonl", '{"prompt": "b", "id": 5}\n' + json.dumps({"messages": CHAT, "prompt": "x"}), ["b", CHAT]),
        ("p.jsonl.gz", compress('\ufeff{"prompt_token_ids": [0, 7], "prompt": "x"}'.encode()), [[0, 7]]),
        ("p.json", json.dumps([*ROWS, {"prompt": "b"}], indent=1), [*ROWS, "b"]),
        ("q.csv", 'id,prompt\n1,"a ""b"",\nc"\n2,[1]\n', ['a "b",\nc', "[1]"]),
        ("q.tsv", "prompt\tx\na, b\t1\n", ["a, b"]),
        ("long.csv", f"prompt,id\n{'a' * 200_000},1\n", ["a" * 200_000]),
        ("gzipped", compress(b"one\ntwo"), ["one", "two"]),
        ("q.csv", '\ufeffmessages\n"[{""role"": ""user"", ""content"": ""Hi é""}]"\n', [CHAT]),
        ("q.parquet", parquet(prompt=["a", "b"], id=[1, 2]), ["a", "b"]),
        ("q.parquet", parquet(messages=[CHAT]), [CHAT]),
        ("q.parquet", parquet(prompt_token_ids=[[1, 2], [3]]), [[1, 2], [3]]),
    ],
)
def test_prompt_files(name: str, content: str | bytes, prompts: list, tmp_path: Path) -> None:
    """The suffix selects the format, and `task.format` overrides it."""
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert run._collect_prompts(run.compose(f"task.prompts={tmp_path / name}")) == prompts
    suffix = name.lower().removesuffix(".gz").partition(".")[2] or "text"
    other = tmp_path / ("x.gz" if name.endswith(".gz") else "x")
    other.write_bytes((tmp_path / name).read_bytes())
    assert (
        run._collect_prompts(run.compose(f"task.prompts={other}", f"task.format={suffix.replace('txt', 'text')}"))
        == prompts
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "fine\nh\xe9\n".encode("latin1"), "p.txt, line 2: byte 0xe9 is not UTF-8"),
        ("p.txt", b"a\n\x1f\x8b\0", "p.txt, line 2: byte 0x8b is not UTF-8"),
        ("p", b"a\nb\0", "p, line 2: has a NUL character"),
        ("p.txt.gz", b"plain", "p.txt.gz: cannot be read: Not a gzipped file"),
        ("p.txt.gz", compress(b"long enough to be cut" * 9)[:-9], "p.txt.gz: cannot be read: Compressed file ended"),
        ("p.pdf", "text", "p.pdf: unknown suffix '.pdf'"),
        ("p.jsonl", '"fine"\n{"text": "no prompt"}', "p.jsonl, line 2: must be a text"),
        ("p.jsonl", '{"prompt": 5}', "p.jsonl, line 1: must be a text, a list of token ids"),
        ("p.jsonl", "5", "line 1: must be"),
        ("p.jsonl", "null", "line 1: must be"),
        ("p.jsonl", '"ok"\n""', "line 2: must be"),
        ("p.jsonl", "[]", "line 1: must be"),
        ("p.jsonl", "[1, true]", "line 1: must be"),
        ("p.jsonl", "[1, -1]", "line 1: must be"),
        ("p.jsonl", '["two", "texts"]', "line 1: must be"),
        ("p.jsonl", '[{"content": "no role"}]', "line 1: must be"),
        ("p.jsonl", '{"messages": "text"', "line 1: must be"),
        ("p.jsonl", "[" * 10**5, "line 1: must be"),
        ("p.json", '{"prompt": "a"}', "p.json: must be an array"),
        ("p.json", '["a", 5]', "p.json, element 1: must be"),
        ("p.json", '["a"', "p.json: must be"),
        ("q.csv", "text,id\na,1\n", "q.csv: needs a column 'prompt' or 'messages', has 'text', 'id'"),
        ("q.csv", "prompt,id\na,1\n,2\n", "q.csv, line 3: must be"),
        ("q.csv", 'prompt\n"a\n', "q.csv, line "),
        ("q.csv", "prompt\na, and b\n", "q.csv, line 2: has 2 fields for 1 columns"),
        ("q.csv", "prompt,id,prompt\na,1,b\n", "q.csv: has 2 columns 'prompt'"),
        ("p.txt", "a\nb".encode("utf-16"), "iconv -f utf-16 -t utf-8"),
        ("p.jsonl", "1" * 5000, "p.jsonl, line 1: must be"),
        ("p.jsonl", '"fine"\n"\\ud800"', "p.jsonl, line 2: contains half of a surrogate pair"),
        ("p.jsonl", '[{"role": "user", "content": "\\ud800"}]', "p.jsonl, line 1: contains half of a surrogate pair"),
        ("q.csv", "messages\nhello\n", "q.csv, line 2: must be"),
        ("q.parquet", parquet(text=["a"]), "q.parquet: needs a column 'prompt' or 'messages', has 'text'"),
        ("q.parquet", parquet(prompt=["a", None]), "q.parquet, row 1: must be"),
        ("q.parquet", parquet(prompt=[5]), "q.parquet, row 0: must be"),
        ("q.parquet", b"PAR1 no", "q.parquet: cannot be read as Parquet"),
        ("empty.txt", "\n\n", "empty.txt is empty"),
        ("empty.json", "[]", "empty.json is empty"),
    ],
)
def test_bad_prompt_files(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    """Errors name the file, the line, and what is expected."""
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(message)):
        read_prompts(str(tmp_path / name))
    with pytest.raises(ValueError, match="is a folder"):
        read_prompts(str(tmp_path), "text")


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_prompts_from_standard_input(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for format, prompts in ((None, ['"a"', "[1]"]), ("jsonl", ["a", [1]])):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'"a"\n[1]\n')))
        assert read_prompts(name, format) == prompts


@pytest.mark.parametrize(
    ("argument", "override"),
    [
        ("stop=END", 'sampling.stop=["END"]'),
        ("stop=a,b", 'sampling.stop=["a,b"]'),
        ("sampling.stop=[a,b]", "sampling.stop=[a,b]"),
        ("sampling.stop=[/INST]", "sampling.stop=[/INST]"),
        ("stop=[END", 'sampling.stop=["[END"]'),
        ("stop=[<|im_end|>, </s>]", 'sampling.stop=["<|im_end|>","</s>"]'),
        ("stop='a,b'", "sampling.stop=['a,b']"),
        ("stop='", """sampling.stop=["'"]"""),
        ("stop=null", "sampling.stop=null"),
        ("stop_token_ids=5", "sampling.stop_token_ids=[5]"),
        ("stop_token_ids=5,6", "sampling.stop_token_ids=[5,6]"),
        ("grammar=regex:[0-9]+", 'sampling.grammar="regex:[0-9]+"'),
        ('grammar=json:{"type": "object"}', r'sampling.grammar="json:{\"type\": \"object\"}"'),
        ("out=a=b (c).jsonl", 'out="a=b (c).jsonl"'),
        ("model.adapters.x=/a b/{c}", 'model.adapters.x="/a b/{c}"'),
        ("temperature=0,0.7", "sampling.temperature=0,0.7"),
        ("+experiment=capitals", "+experiment=capitals"),
        ("What is 2+2=?", 'prompt="What is 2+2=?"'),
        ("~foo", "~foo"),
        ("~/notes", 'prompt="~/notes"'),
        ("-5 + 3 = ?", 'prompt="-5 + 3 = ?"'),
        ("-help me", 'prompt="-help me"'),
        ("--config-dir=a b", "--config-dir=a b"),
        ("model=owner/name", 'model.path="owner/name"'),
        ("model=debug", "model=debug"),
        ("Hello, you", 'prompt="Hello, you"'),
    ],
)
def test_arguments(argument: str, override: str) -> None:
    """Arguments as typed are converted to Hydra's grammar."""
    assert to_hydra_arguments([argument]) == [override]


def test_values_of_arguments() -> None:
    config = run.compose("stop=END", "stop_token_ids=5", "grammar=regex:[0-9]+", "out=a=b.jsonl")
    assert (config.sampling.stop, config.sampling.stop_token_ids) == (("END",), (5,))
    assert (config.sampling.grammar, config.out) == ("regex:[0-9]+", "a=b.jsonl")
    assert to_hydra_arguments(["seed=1", "--", "--help"]) == ["seed=1", 'prompt="--help"']
    assert to_hydra_arguments(["--cfg", "job", "Hi"]) == ["--cfg", "job", 'prompt="Hi"']


@pytest.mark.parametrize("chat", [True, False])
def test_chat(chat: bool, fgrun: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `chat` and a chat template, a text becomes a user message. Other prompts are unchanged."""
    received = []

    class Echo(Engine):
        tokenizer = SimpleNamespace(chat_template="{{ messages }}")
        profiler = None

        def __init__(self) -> None: ...

        def close(self) -> None: ...

        def as_completed(self, prompts: list, *_: Any, **__: Any) -> Iterator[tuple[int, Output]]:
            received.extend(prompts)
            outputs = [(i, Output(i, [1], [Completion([2], f"answer {i}")])) for i in range(len(prompts))]
            return reversed(outputs)

    monkeypatch.setattr(run, "build_engine", lambda _, progress=True: Echo())
    monkeypatch.setattr(run, "profile_on_signal", lambda *_: None)
    code, out, _ = fgrun(f"chat={chat}", "prompt=[Hello,[1,2]]")
    assert (code, out) == (0, "[0.0] answer 0\n[1.0] answer 1\n")
    hello = ChatPrompt([{"role": "user", "content": "Hello"}])
    assert received == [hello if chat else "Hello", [1, 2]]
    assert fgrun(f"chat={chat}", "prompt=What's this, and that?")[:2] == (0, "answer 0\n")
    received.clear()
    tools = [{"type": "function", "function": {"name": "now", "parameters": {}}}]
    Path("tools.json").write_text(json.dumps(tools))
    Path("own.jinja").write_text("{{ messages }} {{ city }}")
    options = ["chat_template=own.jinja", "tools=tools.json", "chat_template_kwargs={enable_thinking:false}"]
    options += ["chat_template_kwargs.city=Rome", "add_generation_prompt=false", "continue_final_message=true"]
    code, _, err = fgrun(f"chat={chat}", "Hello", *options)
    variables = {"enable_thinking": False, "city": "Rome"}
    expected = ChatPrompt(hello.messages, tools, "{{ messages }} {{ city }}", variables, False, True)
    assert (code, received) == ((0, [expected]) if chat else (1, []))
    assert chat or err == "fgrun: tools: no prompt is a chat; texts are with chat=true and a chat template\n"


@pytest.mark.parametrize("content, message", [
    (None, "cannot be read: No such file"), ("{", "is not JSON"), ('{"type": "function"}', "must have a list"),
    ("[]", "must have a list"), ('[{"type": "function"}]', "must have a list"), ("\xff", "is not UTF-8"),
])  # fmt: skip
def test_files_of_the_chat_template(content: str | None, message: str, tmp_path: Path) -> None:
    """A file that is missing, or holds something else, is an error that names the key and the file."""
    file = tmp_path / "tools.json"
    if content is not None:
        file.write_bytes(content.encode("latin1"))
    with pytest.raises(ValueError, match=f"{file}.*{message}"):
        read_tools(str(file))
    if content is None or content == "\xff":
        with pytest.raises(ValueError, match=f"{file}.*{message}"):
            read_chat_template(str(file))
    (tmp_path / "empty").write_text(" ")
    with pytest.raises(ValueError, match="chat_template: .*empty is empty"):
        read_chat_template(str(tmp_path / "empty"))


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
        (["task.prompts=nowhere.txt"], 1, "file nowhere.txt does not exist"),
        (["prompt=[1]", "out=nowhere/out.jsonl"], 1, "nowhere does not exist"),
        (["prompt=[1]", "out=."], 1, "is a folder"),
        (["prompt=[1]", "task=profile", "task.trace=nowhere/t.json"], 1, "task.trace: folder nowhere does not exist"),
        (["one", "two"], 1, 'expected one prompt, got 2: put the text in quotes, "one two"'),
        (["model.path=/nowhere", "prompt=[1]"], 1, "/nowhere"),
        ([*TINY, "prompt=[1,999]"], 1, "token 999 is outside the vocabulary of 256"),
        ([*TINY, "prompt=Hello"], 1, "without a tokenizer"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_mistakes(arguments: list[str], code: int, message: str, fgrun: Run, tmp_path: Path) -> None:
    """An error prints one line to stderr and nothing to stdout, without a traceback."""
    status, out, err = fgrun(*arguments)
    assert status == code
    assert err.startswith("fgrun: ") and message in err and err.count("\n") == 1
    assert [line for line in out.splitlines() if not line.startswith("#")] == []


def test_full_error(fgrun: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """HYDRA_FULL_ERROR=1 raises the exception, and fgrun restores the variable."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="outside the vocabulary"):
        fgrun(*TINY, "prompt=[1,999]")
    monkeypatch.delenv("HYDRA_FULL_ERROR")
    assert fgrun(*TINY, "prompt=[1,999]")[0] == 1


@pytest.mark.parametrize(
    ("task", "error", "status"),
    [
        ("generate", KeyboardInterrupt, 130),
        ("generate", script.Terminated, 143),
        ("generate", BrokenPipeError, 141),
        ("stream", KeyboardInterrupt, 130),
    ],
)
def test_interrupts(
    task: str, error: type[BaseException], status: int, fgrun: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Finished outputs are printed and saved. One line counts them, or none if nobody reads the output any more."""
    original, dup2 = getattr(Engine, method := {"generate": "as_completed"}.get(task, task)), list[tuple[int, int]]()

    def interrupted(self: Engine, prompts: list, sampling: SamplingParams, **_: Any) -> Iterator[Any]:
        settings = [replace(sampling, max_tokens=4 if i == 1 else 9) for i in range(len(prompts))]
        for item in original(self, prompts, settings):
            yield item
            if isinstance(item, tuple) or item.output:
                raise error

    monkeypatch.setattr(Engine, method, interrupted)
    monkeypatch.setattr(os, "dup2", lambda *files: dup2.append(files))
    monkeypatch.setattr(sys.stdout, "fileno", lambda: 1, raising=False)
    code, out, err = fgrun(*TINY, "prompt=[[1,2,3],[4,5],[6]]", f"task={task}", "out=o.jsonl")
    assert code == status and "[1.0] " in out
    how = {130: "interrupted", 143: "terminated"}.get(status)
    message = f"fgrun: {how}: 1 of 3 requests had finished; they are in {tmp_path}/o.jsonl\n"
    assert err == (message if how else "")
    assert [json.loads(line)["prompt"] for line in (tmp_path / "o.jsonl").read_text().splitlines()] == [[4, 5]]
    assert bool(dup2) == (error is BrokenPipeError)


def test_out_cannot_be_written(fgrun: Run, tmp_path: Path) -> None:
    """An unwritable file is rejected before the model is loaded. The check leaves no file behind."""
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("no/file")
    (tmp_path / "later").symlink_to("target")
    for out in ("loop", "nowhere", "x" * 300, "no/file"):
        code, _, err = fgrun("model.path=/nowhere", "prompt=a", f"out={out}")
        assert code == 1 and err.startswith("fgrun: out: ") and "/nowhere'" not in err
    prompt_files.check_output("out", tmp_path / "later", [])
    prompt_files.check_output("out", tmp_path / "new", [])
    assert {f.name for f in tmp_path.iterdir()} == {"loop", "nowhere", "later"}
    (tmp_path / "old").write_text("kept")
    prompt_files.check_output("out", tmp_path / "old", [])
    assert (tmp_path / "old").read_text() == "kept"


@pytest.mark.parametrize("out", ["-", "/dev/stdout"])
def test_out_is_standard_output(out: str, fgrun: Run, tmp_path: Path) -> None:
    """JSON lines replace the texts, and no file is written."""
    code, printed, _ = fgrun(*TINY, "prompt=[[1,2,3],[4,5]]", f"out={out}")
    assert code == 0 and [json.loads(line)["prompt"] for line in printed.splitlines()] == [[1, 2, 3], [4, 5]]
    assert list(tmp_path.iterdir()) == []


def test_outputs_are_printed_if_the_disk_is_full(fgrun: Run) -> None:
    """Outputs are not lost if the file cannot be written."""
    code, printed, err = fgrun(*TINY, "prompt=[1,2,3]", "out=/dev/full")
    assert code == 1 and len(json.loads(printed)) == 4 and "No space left on device" in err


def test_out_is_not_the_input(fgrun: Run, tmp_path: Path) -> None:
    """An output file that is the input, by any name, is rejected before the model is loaded, and not changed."""
    (tmp_path / "p.jsonl").write_text("[1]")
    (tmp_path / "link").symlink_to("p.jsonl")
    for out in ("p.jsonl", "./p.jsonl", "link"):
        code, _, err = fgrun("model.path=/nowhere", "task.prompts=p.jsonl", f"out={out}")
        assert code == 1 and "is the input file" in err
    assert (tmp_path / "p.jsonl").read_text() == "[1]"


def test_version(fgrun: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert fgrun("--version") == (0, f"fgrun {fastgen.__version__}\n", "")
    for name, tool in (("fgbench", benchmark), ("fgchat", chat), ("fgserve", serve)):
        with pytest.raises(SystemExit, match="^0$"):
            tool.main(["--version"])
        assert capsys.readouterr().out == f"{name} {fastgen.__version__}\n"


def test_scripts_start_quietly() -> None:
    """Ctrl-C while torch is imported ends a tool with one line."""
    script = "import sys, fastgen.cli.scripts as s; print(flush=True); s.fgchat()"
    tool = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert tool.stdout and tool.stdout.readline()
    while b"torch" not in Path(f"/proc/{tool.pid}/maps").read_bytes():  # until torch's libraries are being loaded
        assert tool.poll() is None
    tool.send_signal(signal.SIGINT)
    assert tool.communicate() == (b"", b"fgchat: interrupted\n") and tool.returncode == 130


def test_help(fgrun: Run) -> None:
    """The help has examples, every option of every group, and the complete configuration."""
    code, out, _ = fgrun("--help")
    assert code == 0
    for part in ('fgrun "What is the capital of France?"', "+experiment=capitals", "--multirun", "llama31_8b"):
        assert part in out
    assert "token_budget: 8192" in out


def test_cfg_shows_what_would_run(fgrun: Run) -> None:
    code, out, _ = fgrun("--cfg", "job", "sampling=nucleus")
    assert code == 0 and "top_p: 0.9" in out


def test_profile(fgrun: Run, tmp_path: Path) -> None:
    """fgrun prints the summary and the path of the trace, which exists."""
    trace = tmp_path / "trace.json"
    code, out, _ = fgrun("task=profile", "task.steps=2", f"task.trace={trace}", "prompt=Hello", "sampling.max_tokens=6")
    assert code == 0 and "2 steps" in out and "linear" in out and f"trace: {trace}" in out
    assert trace.stat().st_size > 1000
