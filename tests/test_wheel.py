"""Tests the wheel and sdist: built, installed, and run outside of the checkout."""

import os
import subprocess
import sys
from pathlib import Path
from tarfile import TarFile
from zipfile import ZipFile

import pytest

import fastgen

ROOT = Path(__file__).parents[1]


def call(*command: str | Path, **environment: str) -> str:
    """Runs a command that must succeed and returns its stdout."""
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of the sdist and the wheel built from it."""
    folder = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return folder


@pytest.fixture(scope="module")
def site(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with the installed wheel. Its dependencies come from the test environment."""
    folder = tmp_path_factory.mktemp("site")
    options = ("--no-deps", "--no-compile", "--no-index", "--quiet")
    call(sys.executable, "-m", "pip", "install", *options, "--target", folder, next(dist.glob("*.whl")))
    return folder


def test_contents(dist: Path) -> None:
    with ZipFile(next(dist.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    conf = {f"fastgen/{f.relative_to(ROOT)}" for f in (ROOT / "conf").rglob("*") if f.suffix in (".yaml", ".json")}
    assert (
        conf | {"fastgen/py.typed", "fastgen/conf/__init__.py", "fastgen/cli/run.py", "fastgen/server/page.html"}
        <= names
    )
    assert {name.split("/")[0] for name in names} == {"fastgen", f"fastgen_llm-{fastgen.__version__}.dist-info"}
    assert not [name for name in names if "__pycache__" in name]
    with TarFile.open(next(dist.glob("*.tar.gz"))) as sdist:
        top = {name.split("/")[1] for name in sdist.getnames() if "/" in name}
    assert {"src", "conf", "tests", "pyproject.toml", "README.md", "LICENSE"} <= top


def test_fgrun(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The console script runs in another folder, with the wheel's code and configuration."""
    monkeypatch.chdir(tmp_path)
    arguments = ("model=debug", "kv_cache=small", "sampling.max_tokens=3", "chat=false", "prompt=[1,2,3]")
    out = call(site / "bin" / "fgrun", *arguments, PYTHONPATH=str(site))
    assert out.count(",") == 2
    shown = call(site / "bin" / "fgrun", "--info", "searchpath", PYTHONPATH=str(site))
    assert str(site / "fastgen" / "conf") in shown and str(ROOT) not in shown
    assert list(tmp_path.iterdir()) == []


def test_config_module(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra finds the configuration and the schema as a package."""
    monkeypatch.chdir(tmp_path)
    code = """
import hydra
with hydra.initialize_config_module("fastgen.conf", version_base="1.3"):
    cfg = hydra.compose("config", ["model=debug", "schedule=latency"])
print(cfg.schedule.token_budget, cfg.model.path)
"""
    out = call(sys.executable, "-c", code, PYTHONPATH=str(site))
    assert out == f"512 {site / 'fastgen/conf/model/debug/config.json'}\n"
