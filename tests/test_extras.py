"""Tests that what we tell people to install is this project."""

import re
import tomllib
from pathlib import Path

import fastgen
from fastgen.extras import DISTRIBUTION, install_command

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "conf", "docs", "notebooks", "benchmarks")


def test_the_commands_install_this_project() -> None:
    """Each extra that a message names exists, and the distribution is pyproject's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == DISTRIBUTION and fastgen.__version__
    extras = {
        extra
        for f in (ROOT / "src").rglob("*.py")
        for extra in re.findall(r"install_command\([\"'](\w+)", f.read_text())
    }
    assert {"guide", "notebook", "serve"} <= extras <= project["optional-dependencies"].keys()
    command = install_command("serve")
    assert 'pip install "fastgen-llm[serve]"' in command and 'pip install ".[serve]"' in command


def test_no_text_names_the_other_project() -> None:
    """`fastgen` on PyPI is another project: no text tells anyone to install it."""
    texts = [
        f for folder in FOLDERS for f in (ROOT / folder).rglob("*") if f.suffix in (".py", ".md", ".ipynb", ".yaml")
    ]
    texts += [*ROOT.glob("*.md"), ROOT / "pyproject.toml"]
    assert len(texts) > 100
    other = re.compile(r"(?<![\w/])fastgen\[|pip install (-\S+ )*\\?\"?fastgen(?![-\w])")
    assert not [f"{f}: {m[0]}" for f in texts for m in other.finditer(f.read_text(encoding="utf-8"))]
