"""Imports go one way, and what can do without torch or hydra does."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastgen

ROOT = Path(fastgen.__file__).parent
LAYERS = [  # each may import from its own line and those above
    ["types", "config", "memory", "ownership", "cache.pages", "cache.prefix", "models.spec", "models.files"]
    + ["template", "control_tokens"],
    ["models.gguf", "limits", "models.layers", "ops.attention", "ops.paged", "ops.backends", "schedule", "sampling"]
    + ["ops.hopper", "ops.skinny", "ops.fused", "ops.moves", "ops.lowrank", "ops.peers"],
    ["models.transformer", "models.weights", "tokenizer"],
    ["models.default", "models.invariant", "grammar_trial", "grammar", "request", "step"],
    ["batch", "trace", "profiler", "cache.host", "snapshot"],
    ["parallel", "scoring", "exchange"],
    ["lora"],
    ["launch", "compile"],
    ["loop"],
    ["engine"],
    ["chat", "replicas", "aio", "trl", "grpo"],
    ["api"],
    ["__init__"],
    ["serve.protocol", "serve.core", "serve.metrics", "serve.log", "serve.reasoning"],
    ["serve.client", "serve.tools"],
    ["serve.answer"],
    ["serve.service"],
    ["serve.gate"],
    ["serve.app"],
    ["serve.worker"],
    [
        "cli.config",
        "cli.machine",
        "cli.files",
        "cli.scripts",
        "cli.rows",
        "cli.run",
        "cli.bench",
        "cli.chat",
        "cli.serve",
    ],
]
EMPTY = {"cache.__init__", "cli.__init__", "models.__init__", "ops.__init__", "serve.__init__"}


def imports(file: Path) -> set[str]:
    """Modules named by a file's import statements; `from a import b` counts as a.b where that is a module of ours."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            inner = {f"{module}.{a.name}" for a in node.names}
            ours = {
                name for name in inner if (ROOT / (name.removeprefix("fastgen.").replace(".", "/") + ".py")).is_file()
            }
            found |= ours or {module}
    return found


def test_imports_go_one_way() -> None:
    """A module imports only from the layers at or above its own line; every file has its place."""
    rank = {name: i for i, names in enumerate(LAYERS) for name in names}
    files = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in ROOT.rglob("*.py")}
    files = {name: f for name, f in files.items() if name not in EMPTY and not name.startswith("conf.")}
    assert files.keys() == rank.keys()
    assert all(not (ROOT / (name.replace(".", "/") + ".py")).read_text() for name in EMPTY)
    for name, file in files.items():
        for module in imports(file):
            if module == "fastgen" or module.startswith("fastgen."):
                other = module.removeprefix("fastgen").lstrip(".") or "__init__"
                assert rank[other] <= rank[name], f"{name} imports {other}"


def test_the_scheduler_needs_no_torch() -> None:
    """Scheduling can be simulated without torch."""
    for name in ("schedule", "cache/pages", "cache/prefix", "config", "limits", "models/spec"):
        roots = {module.split(".")[0] for module in imports(ROOT / f"{name}.py")}
        assert not roots & {"torch", "numpy", "transformers", "hydra"}, name


def test_what_takes_long_to_import_waits() -> None:
    """Hydra is for the command line, transformers for who has text, the hub for who downloads, and torch's compiler for
    who compiles; torch itself for the first who takes a name of fastgen's."""
    late = {
        "hydra",
        "omegaconf",
        "transformers",
        "torch._dynamo",
        "torch._inductor",
        "sklearn",
        "huggingface_hub.hf_api",
    }
    code = f"import fastgen, sys; assert 'torch' not in sys.modules; fastgen.Engine; print({late} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_public_names() -> None:
    """They are there without their modules having been imported, for completion and star imports too."""
    assert {"Engine", "AsyncEngine", "score"} <= set(dir(fastgen))
    names: dict[str, object] = {}
    exec("from fastgen import *", names)
    assert names["Engine"] is fastgen.Engine and fastgen.distributed.tensor_parallel.Ranks.__module__ == "fastgen.distributed.tensor_parallel"
    with pytest.raises(AttributeError, match="module 'fastgen' has no attribute 'nothing'"):
        fastgen.nothing  # noqa: B018
