"""Tests of scripts in vLLM's calls, ported to fastgen: how few lines change, and what the ported scripts print.

`vllm_examples/NAME_vllm.py` is the script for vLLM, which does not run here, and `NAME.py` its port.
"""

import ast
import json
import re
import runpy
import sys
from collections.abc import Iterator
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import fastgen
from fastgen import SamplingParams, lora
from fastgen.checkpoint.hub import default_model_path

FOLDER = Path(__file__).parent / "vllm_examples"
PAGE = FOLDER.parents[1] / "docs/vllm.md"
# Three lines always change: the import, the engine, and `outputs`, which is `completions`.
NUM_CHANGED_LINES = {
    "basic": 3,
    "chat": 3,
    "prefix_caching": 3,  # the option stands in the engine's line
    "logprobs": 4,  # a logprob is a number, not an object in a mapping
    "async_engine": 4,  # `generate` yields the prompt's index, too
    "structured_output": 5,  # `grammar` takes the schema; the import of a class for it goes
    "lora": 5,  # SamplingParams name the adapter; the import of a class for it goes
}


def num_changed_lines(old: Path, new: Path) -> int:
    """Returns the number of lines that are replaced, removed or added between two files."""
    a, b = old.read_text().splitlines(), new.read_text().splitlines()
    opcodes = SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    return sum(
        max(a_end - a_start, b_end - b_start) for tag, a_start, a_end, b_start, b_end in opcodes if tag != "equal"
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a small model with random weights and the default model's tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    vocab = json.loads((default_model_path() / "config.json").read_text())["vocab_size"]
    config = fastgen.from_hf_config(tiny.config(vocab=vocab, context=512, tie_word_embeddings=True))
    fastgen.save(folder, config, tiny.weights(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).symlink_to(default_model_path() / name)
    return folder


@pytest.fixture(scope="module")
def library(model: Path) -> Iterator[fastgen.Engine]:
    with fastgen.Engine.from_pretrained(model) as engine:
        yield engine


class Script:
    """Runs ported scripts in this process."""

    def __init__(self, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, self.capsys, self.monkeypatch = model, capsys, monkeypatch

    def run(self, name: str, *arguments: object) -> list[str]:
        """Returns the lines that a script prints."""
        self.monkeypatch.setattr(sys, "argv", [name, str(self.model), *map(str, arguments)])
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        return self.capsys.readouterr().out.splitlines()


@pytest.fixture
def script(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Script:
    return Script(model, capsys, monkeypatch)


def texts(engine: fastgen.Engine, prompts: Any, **settings: Any) -> list[str]:
    outputs = engine.generate(prompts, SamplingParams(**{"temperature": 0, "max_tokens": 8} | settings))
    return [output.completions[0].text for output in outputs]


def test_numbers_of_changed_lines() -> None:
    """They are as few as listed above and in the page about vLLM, and no script is missing there."""
    assert {path.stem for path in FOLDER.glob("*.py")} == {n + end for n in NUM_CHANGED_LINES for end in ("", "_vllm")}
    listed = re.findall(r"^\| \[\w[^|]*\]\(\.\./tests/vllm_examples/(\w+)\.py\) \| (\d+) \|", PAGE.read_text(), re.M)
    assert {name: int(number) for name, number in listed} == NUM_CHANGED_LINES
    for name, number in NUM_CHANGED_LINES.items():
        original = FOLDER / f"{name}_vllm.py"
        assert num_changed_lines(original, FOLDER / f"{name}.py") == number, name
        compile(original.read_text(), original, "exec")
        assert "vllm" not in (FOLDER / f"{name}.py").read_text()


@pytest.mark.parametrize(("name", "prompts"), [
    ("basic", ["The capital of France is", "The largest ocean on Earth is", "Water boils at"]),
    ("async_engine", ["The capital of France is", "The largest ocean on Earth is"]),
])  # fmt: skip
def test_texts(script: Script, library: fastgen.Engine, name: str, prompts: list[str]) -> None:
    """The lines have each prompt and its text, in order."""
    expected = texts(library, prompts)
    assert script.run(name) == [f"{p!r} -> {text!r}" for p, text in zip(prompts, expected, strict=True)]
    assert len(set(expected)) == len(expected)


def test_chat(script: Script, library: fastgen.Engine) -> None:
    """One conversation, two, and one with another template."""
    france = [{"role": "system", "content": "You answer in one sentence."}]
    france += [{"role": "user", "content": "What is the capital of France?"}]
    japan = [{"role": "user", "content": "What is the capital of Japan?"}]
    expected = texts(library, [france, france, japan, "user: What is the capital of Japan?\nassistant:"])
    lines = script.run("chat")
    assert [line.split(" -> ")[1] for line in lines] == [*map(repr, expected)]
    assert all("<|im_start|>assistant\\n'" in line for line in lines[:3]) and "<|im_start|>" not in lines[3]


def test_structured_output(script: Script) -> None:
    """The default model's answers have the schema's keys; random weights would write blanks without end."""
    script.model = default_model_path()
    answers = [ast.literal_eval(line) for line in script.run("structured_output")]
    assert len(answers) == 2 and all(sorted(answer) == ["city", "country", "population"] for answer in answers)
    assert all(answer["country"] in ("France", "Italy", "Japan") for answer in answers)


def test_lora(script: Script, library: fastgen.Engine, tmp_path: Path) -> None:
    """The adapter's texts differ from the model's own, and are those of the merged weights."""
    prompts, config = ["Once upon a time", "The sea is"], library.model_config
    adapter = tree_map_only(Tensor, torch.ones_like, lora.init(config, rank=4))
    lora.save(tmp_path, config, adapter)
    with fastgen.Engine(lora.merge(library.params, config, adapter), config, library.tokenizer) as merged:
        expected = texts(library, prompts) + texts(merged, prompts)
    assert script.run("lora", tmp_path) == [*map(repr, expected)]
    assert expected[0] != expected[2] and expected[1] != expected[3]


def test_logprobs(script: Script, library: fastgen.Engine) -> None:
    """The prompt's tokens after the first, and those of the output."""
    settings = SamplingParams(temperature=0, max_tokens=4, logprobs=0, prompt_logprobs=0)
    output = library.generate("The capital of France is", settings)[0]
    completion = output.completions[0]
    ids = [*output.prompt_token_ids[1:], *completion.token_ids]
    logprobs = [*(output.prompt_logprobs or ())[1:], *(completion.logprobs or ())]
    *tokens, total = script.run("logprobs")
    assert tokens == [f"token {id}: {logprob:.4f}" for id, logprob in zip(ids, logprobs, strict=True)]
    assert total == f"sum of the output's logprobs: {sum(logprobs[-4:]):.4f}"


def test_prefix_caching(script: Script) -> None:
    """Both prompts reuse the full pages of the part that they have in common."""
    lines = script.run("prefix_caching")
    numbers = [[*map(int, re.findall(r"\d+", line.split(" cached")[0]))] for line in lines]
    assert len(numbers) == 2 and all(64 <= num_cached < num_prompt for num_cached, num_prompt in numbers)
