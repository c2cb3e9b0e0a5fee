"""Tests the documentation site: it builds without a warning, its links and anchors exist, and it names everything."""

import json
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch

import fastgen.public_api
from fastgen import config
from fastgen.checkpoint.weights import param_bytes
from fastgen.quantization.kv_cache import row_format

ROOT = Path(__file__).parents[1]
TASKS = {  # what a newcomer looks for -> the page that shows it, and a line of it
    "stream": ("generation.html", "engine.stream("),
    "JSON output": ("generation.html", "json.dumps(schema)"),
    "logprobs of a prompt": ("generation.html", "prompt_logprobs=0"),
    "LoRA by request": ("lora.html", "SamplingParams(adapter=name)"),
    "update weights": ("training.html", "engine.update_params("),
    "profile": ("profiling.html", "engine.profile("),
    "benchmark": ("profiling.html", "fgbench debug"),
    "serve with a key": ("serving.html", "--api-key"),
    "cache on the host": ("cache.html", "offload=host"),
    "resume": ("datasets.html", "the same command goes on"),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of the site, built with --strict: a warning, a dead link or a missing anchor is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def page_text(page: Path) -> str:
    return unescape(re.sub(r"<[^>]+>", "", page.read_text()))


def test_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in site.glob("*.html"):
        loaded = re.findall(r"<(?:script|img|iframe)[^>]+src=\"?(https?:[^\" >]+)", page.read_text())
        loaded += re.findall(
            r"<link[^>]+rel=\"?(?:stylesheet|preconnect|preload)[^>]+href=\"?(https?:[^\" >]+)", page.read_text()
        )
        assert not loaded, f"{page.name} loads {loaded}"


def test_public_names_are_in_the_reference(site: Path) -> None:
    reference = (site / "api.html").read_text()
    for name in fastgen.public_api.__all__:
        value = getattr(fastgen.public_api, name)
        path = value.__name__ if name == "lora" else f"{value.__module__}.{value.__qualname__}"
        assert f'id="{path}"' in reference, f"docs/api.md has no {path}"
    for method in ("generate", "stream", "step", "update_params", "sleep"):
        assert f'id="fastgen.engine.Engine.{method}"' in reference


def test_settings_are_in_the_reference(site: Path) -> None:
    reference = (site / "configuration.html").read_text()
    groups = {f.name: f.type for f in fields(config.EngineConfig) if is_dataclass(f.default)}
    groups |= {
        "sampling": fastgen.SamplingParams,
        "model": config.LoadConfig,
        "grpo": config.GrpoConfig,
        "dataset": config.DatasetConfig,
    }
    for group, config_class in groups.items():
        for f in fields(config_class):
            assert f'id="{group}.{f.name}"' in reference, f"{group}.{f.name}"
            assert re.match(r"[A-Z].*\.$", f.metadata["help"]), f"{group}.{f.name}: help is no sentence"


@pytest.mark.parametrize("task", TASKS)
def test_tasks_are_one_page_from_the_index(site: Path, task: str) -> None:
    page, line = TASKS[task]
    article = re.search(r"<article.*?</article>", (site / "index.html").read_text(), re.DOTALL)
    assert article and re.search(rf'href="{page}(#[^"]*)?"', article[0]), f"the index does not link to {page}"
    assert line in page_text(site / page)


def test_figures_of_the_performance_page() -> None:
    """Rates and start-up times of all models are those of their file; no page has figures without a file."""
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        assert not re.search(r"from (a|the same) log|from logs", page.read_text()), page
    names = {"Mistral 7B": "mistral-7b-instruct-v0.3", "R1-Qwen 14B, the same shapes": "deepseek-r1-distill-qwen-14b",
             "R1-Llama 8B": "deepseek-r1-distill-llama-8b", "Ministral 8B": "ministral-8b-instruct-2410"}  # fmt: skip
    values = dict[tuple[str, str, int], dict[str, Any]]()
    for row in reversed(json.loads((ROOT / "benchmarks/results/models_gpu.json").read_text())):
        values[row["model"], row["workload"], row["tp"]] = row

    def figures(text: str) -> list[tuple[str, list[float]]]:
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
        return [(cells[0], [float(x.replace(",", "")) for x in cells[1:]]) for cells in rows[2:]]

    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^#|\Z)", (ROOT / "docs/performance.md").read_text(), re.M | re.S))
    rates, start_up = figures(sections["All models"]), figures(sections["Start-up"])
    assert len(rates) == 8 and len(start_up) == 7
    for name, row in rates:
        model = names.get(name, f"{name.lower().replace(' ', '-')}-instruct")
        for workload, rate in zip(("512x1024x128", "1x128x256"), row, strict=True):
            assert abs(values[model, workload, 1]["output_tok_s"] - rate) < 0.6, (name, workload)
    for name, row in start_up[:-1]:
        model = names.get(name, f"{name.lower().replace(' ', '-')}-instruct")
        seconds = values[model, "start-up", 1]["start_up"]
        expected = seconds["load"] + seconds["process"], seconds["engine"], sum(seconds.values())
        assert all(abs(a - b) < 0.06 for a, b in zip(row, expected, strict=True)), name
    for workload, (_, row) in zip(("512x1024x128", "1x128x256"), figures(sections["Several GPUs"]), strict=True):
        assert abs(values["mistral-7b-instruct-v0.3", workload, 2]["output_tok_s"] - row[0]) < 0.6


def test_figures_of_the_quantization_page() -> None:
    """Tables of quality are those of their file, and sizes of models and caches those of their shapes."""
    page = (ROOT / "docs/quantization.md").read_text()
    variants = json.loads((ROOT / "benchmarks/results/quality.json").read_text())["variants"]
    for name, variant in variants.items():
        cells = [f"{variant['text']['perplexity']:.2f}", "", "", "", ""]
        if name != "fp32":
            cells[1:] = ["{nll_increase:.4f} ± {nll_increase_stderr:.4f}", "{kl_mean:.4f}", "{kl_p99_9:.3f}"]
            cells[4:] = ["{top1_agreement:.1%}"]
            row = " | ".join(cells).format_map(variant["text"]).replace("%", " %")
            means = [f"{x['kl_mean']:.4f}" for x in [*variant["positions"], variant["copy"]]]
            assert f"| {name} | {' | '.join(means)} |" in page, name
        else:
            row = " |".join(cells)
        assert f"| {name} | {row} |" in page, row
    copies = "{fp32:.2f} in fp32, {fp8 cache:.2f} with an fp8 cache and {fp8 weights:.2f} with fp8"
    assert copies.format_map({name: variant["copy"]["perplexity"] for name, variant in variants.items()}) in page
    read_once = [x["perplexity"] for x in variants["fp32"]["positions"]]
    assert f"{min(read_once):.1f} to {max(read_once):.1f} for text that is read for the first time" in page
    assert f"at {1 - variants['fp8 weights']['text']['top1_agreement']:.0%}".replace("%", " %") in page
    llama = "{fp8} GB instead of {none}", "{fp8} kB for each token of Llama 3.1 8B instead of {auto}"
    models = {"llama-3.1-8b-instruct": llama, "deepseek-r1-distill-llama-70b": ("{fp8} instead of {none}", "")}
    for name, (text, cache) in models.items():
        model_config = fastgen.from_hf_config(json.loads((ROOT / f"benchmarks/configs/{name}.json").read_text()))
        sizes = {q: param_bytes(model_config, torch.bfloat16, quantization=q) / 1e9 for q in ("none", "fp8")}
        assert text.format_map({q: f"{size:.1f}" for q, size in sizes.items()}) in page, name
        rows = {dtype: row_format(model_config, dtype, torch.bfloat16).num_bytes for dtype in ("auto", "fp8")}
        kilobytes = {dtype: f"{2 * model_config.num_layers * n / 1e3:.0f}" for dtype, n in rows.items()}
        assert cache.format_map(kilobytes) in page, kilobytes


def test_tools_limit_the_spinning_of_idle_threads() -> None:
    program = (
        "import os, sys, fastgen.cli.scripts as s; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    )
    for given, expected in (({}, "1000 False"), ({"OMP_WAIT_POLICY": "active"}, "None False")):
        environment = {"PATH": "", "PYTHONPATH": str(ROOT / "src"), **given}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr
