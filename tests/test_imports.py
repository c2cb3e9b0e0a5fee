"""Imports go one way, and what can do without torch or hydra does."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastgen

ROOT = Path(fastgen.__file__).parent
# Folders and modules in the order of imports: each may import from its own line and those above. A folder that serves
# two levels has a line for some of its modules, and one for the others.
ORDER = [
    ["argument_hints", "config", "extras", "sampling_params"],
    ["core"],
    ["quantization"],
    ["checkpoint", "kernels", "structured_output", "profiling", "text", "thread_safety"],
    ["distributed.tensor_parallel", "distributed.peer_memory"],  # collectives and sharded ops, which a runner calls
    ["compiled", "offload", "lora"],
    ["training"],
    ["distributed"],  # worker processes, which run engines
    ["snapshot", "event_stream"],
    ["engine"],
    # What calls an engine.
    [
        "distributed.data_parallel",
        "distributed.replica",
        "training.grpo",
        "training.trl",
        "datasets",
        "async_engine",
        "conversation",
    ],
    ["public_api"],
    ["__init__"],
    ["server"],
    ["cli", "__main__"],
]
MAX_CORE_LINES = 3300


def module_name(dotted: str) -> str | None:
    """Returns the name below `fastgen` of a module or package of ours, None for anything else."""
    name = dotted.removeprefix("fastgen.")
    path = ROOT / name.replace(".", "/")
    return name if path.with_suffix(".py").is_file() else f"{name}.__init__" if path.is_dir() else None


def imports(file: Path) -> set[str]:
    """Modules named by a file's import statements; `from a import b` counts as a.b where that is a module of ours."""
    names = set[str]()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            ours = {f"{module}.{a.name}" for a in node.names if module.split(".")[0] == "fastgen"}
            names |= {name for name in ours if module_name(name)} or {module}
    return names


RANK = {name: i for i, names in enumerate(ORDER) for name in names}


def rank(module: str) -> int:
    """Returns the line of a module in ORDER: its own, or its folder's."""
    return RANK[module if module in RANK else module.partition(".")[0]]


def test_imports_go_one_way() -> None:
    """A module imports only from folders at or above its own line; core from config, sampling_params and core alone."""
    files = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in ROOT.rglob("*.py")}
    files = {name: f for name, f in files.items() if not name.startswith("conf.")}
    assert {name if name in RANK else name.partition(".")[0] for name in files} == RANK.keys()
    for name, file in files.items():
        for module in imports(file):
            if module == "fastgen" or module.startswith("fastgen."):
                other = "__init__" if module == "fastgen" else module_name(module)
                assert other is not None, f"{name} imports {module}"
                assert rank(other) <= rank(name), f"{name} imports {other}"


def test_the_architecture_names_every_module() -> None:
    text = (ROOT.parents[1] / "docs/architecture.md").read_text()
    modules = {f.name for f in ROOT.glob("[!_]*.py")} | {f.name for f in ROOT.glob("*/[!_]*.py")} - {"__init__.py"}
    assert modules - set(re.findall(r"`(\w+\.py)`", text)) == set()
    assert {name for name in re.findall(r"`(\w+\.py)`", text) if not [*ROOT.rglob(name)]} == set()


def test_core_is_short() -> None:
    """core/ is what one reads to understand the engine, in an afternoon."""
    assert sum(len(f.read_text().splitlines()) for f in (ROOT / "core").glob("*.py")) <= MAX_CORE_LINES


def test_the_scheduler_needs_no_torch() -> None:
    """Scheduling can be simulated without torch."""
    for name in (
        "core/scheduler",
        "core/scheduling_policy",
        "core/page_pool",
        "core/prefix_cache",
        "config",
        "profiling/roofline",
        "core/model_config",
        "checkpoint/model_families",
    ):
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
    assert (
        names["Engine"] is fastgen.Engine
        and fastgen.distributed.tensor_parallel.TPProcessGroup.__module__ == "fastgen.distributed.tensor_parallel"
    )
    with pytest.raises(AttributeError, match="module 'fastgen' has no attribute 'nothing'"):
        fastgen.nothing  # noqa: B018
