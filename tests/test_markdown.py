"""Tests that the code blocks of README.md and docs run in order, as a reader pastes them, and print what is said."""

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from markdown_pages import ROOT, Reader, count_fences, link_checkout, matches, read_blocks
from test_imports import MAX_CORE_LINES  # the test there counts them

import fastgen
from fastgen import lora
from fastgen.checkpoint.hub import default_model_path

PAGES = [p for p in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if read_blocks(p)]


@pytest.fixture(scope="module")
def reader(request: pytest.FixtureRequest) -> Iterator[Reader]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    have = ("gpu",) if request.config.getoption("--device") == "cuda" and torch.cuda.is_available() else ()
    with Reader(environment, have) as reader:
        yield reader


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder of PEFT's files, for the default model."""
    folder = tmp_path_factory.mktemp("adapter")
    config = fastgen.from_hf_config(json.loads((default_model_path() / "config.json").read_text()))
    lora.save(folder, config, lora.init(config, rank=4))
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page: Path, reader: Reader, adapter: Path, tmp_path: Path) -> None:
    """Every block that does not need more than this machine has runs, and prints what the page says.

    The folder looks like a checkout in which the placeholders path/to/checkpoint and path/to/adapter exist.
    """
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/checkpoint").symlink_to(default_model_path())
    (tmp_path / "path/to/adapter").symlink_to(adapter)
    with FileLock("/tmp/fastgen-markdown.lock"):  # servers listen at their default port
        for block, printed, seconds in reader.run(page, link_checkout(tmp_path)):
            print(f"{block.line}: {'skipped' if printed is None else f'{seconds:.1f} s'}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_block_is_missed(page: Path) -> None:
    """A fence that an indentation turns into something else for the parser would never run."""
    assert len([b for b in read_blocks(page)]) == count_fences(page)


def test_links_of_the_readme() -> None:
    """Every file that the README links or shows exists, and every anchor is a heading of its page."""
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", (ROOT / "README.md").read_text())
    assert len(links) > 30
    for link in links:
        name, _, anchor = link.partition("#")
        assert (ROOT / name).exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (ROOT / name).read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, link


def test_figures_of_the_readme() -> None:
    """Rates and ratios that the README names are those of the files that it links; core/ is as short as it says."""

    def rate(file: str, engine: str, workload: str, tp: int = 1, model: str = "mistral-7b-instruct-v0.3") -> float:
        rows = json.loads((ROOT / "benchmarks/results" / file).read_text())
        return next(
            row["output_tok_s"]
            for row in rows
            if (row["engine"], row["model"], row["workload"], row.get("tp", 1)) == (engine, model, workload, tp)
        )

    text = (ROOT / "README.md").read_text()
    ratios = {
        workload: rate("mistral_gpu.json", "fastgen", workload) / rate("mistral_gpu.json", "vllm", workload)
        for workload in ("512x1024x16", "512x1024x128", "1x128x256")
    }
    cpu = json.loads((ROOT / "benchmarks/results/cpu_throughput.json").read_text())
    for claim in (
        "{512x1024x16:.2f} and {512x1024x128:.2f} times as fast".format_map(ratios),
        "{1x128x256:.2f} times for a single".format_map(ratios),
        f"{rate('models_gpu.json', 'fastgen', '512x1024x128', tp=2):,.0f} tokens/s on two H200s",
        f"{rate('models_gpu.json', 'fastgen', '512x1024x128'):,.0f} on one",
        f"{rate('serve_gpu.json', 'fastgen', '512x1024x128'):,.0f} tokens/s on an H200",
        f"{cpu['ratio_to_batched']:.2f} times the rate of `transformers` {cpu['transformers'].rpartition('.')[0]}",
        f"at most {MAX_CORE_LINES:,} lines",
    ):
        assert claim in text, claim


def test_outputs_are_compared() -> None:
    """Numbers are compared loosely, and everything else exactly but for whitespace and ellipses."""
    assert matches("a  1.00 b\n", "a 1.01 b") and not matches("a 1.00 b", "a 1.10 b")
    assert matches("took … s\ndone 3", "took 12.5 s\ndone 3") and not matches("took … s\ndone 3", "took 12.5 s\ndone 4")
    assert not matches("Paris", "Paris is in France") and matches("Paris…", "Paris is in France")


def test_a_block_that_fails_is_reported(reader: Reader, tmp_path: Path) -> None:
    """Failing commands, exceptions and other outputs are errors that name the block; sessions go on between blocks."""
    page = tmp_path / "page.md"
    good = "```sh\nx=1; cd /\n```\n\n```sh\necho $x $PWD\n```\n\n<!-- output -->\n```\n1 /\n```\n"
    python = "```python\na = 2.0\n```\n\n```python\nprint(a)\n```\n\n<!-- output -->\n```text\n2.01\n```\n"
    skipped = "<!-- needs: a million GPUs -->\n```sh\nexit 7\n```\n"
    page.write_text(good + skipped + python)
    assert [printed for _, printed, _ in reader.run(page, tmp_path)] == ["", "1 /\n", None, "", "2.0\n"]
    for text, message in (
        ("```sh\nfalse\ntrue\n```\n", "page.md:1: the session ended with status 1"),
        ("# Title\n\n```python\n1 / 0\n```\n", "(?s)page.md:3: failed.*ZeroDivisionError"),
        ("```python\nprint(a)\n```\n", "(?s)page.md:1: failed.*NameError"),
        ("```sh\necho 1\n```\n\n<!-- output -->\n```\n2\n```\n", "(?s)page.md:1.*printed\n1\n\nexpected\n2"),
    ):
        page.write_text(text)
        with pytest.raises(AssertionError, match=message):
            list(reader.run(page, tmp_path))
