"""Tests the documentation site: it builds without a warning, its links and anchors exist, and it names everything."""

import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from html import unescape
from pathlib import Path

import pytest

import fastgen.public_api
from fastgen import config

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
    "resume": ("datasets.html", "task.prompts=rest.jsonl"),
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
    groups |= {"sampling": config.SamplingParams, "model": config.LoadConfig, "grpo": config.GrpoConfig}
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


def test_tools_limit_the_spinning_of_idle_threads() -> None:
    program = (
        "import os, sys, fastgen.cli.scripts as s; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    )
    for given, expected in (({}, "1000 False"), ({"OMP_WAIT_POLICY": "active"}, "None False")):
        environment = {"PATH": "", "PYTHONPATH": str(ROOT / "src"), **given}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr
