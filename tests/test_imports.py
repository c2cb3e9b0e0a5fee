"""Imports go one way, and what can do without torch or hydra does."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastgen

ROOT = Path(fastgen.__file__).parent
LAYERS = [  # each may import from its own line and those above
    ["config", "core.types", "core.page_pool", "core.prefix_cache", "core.model_config", "core.chat_template"]
    + ["core.model_families", "core.control_tokens", "thread_safety", "training.sleep"],
    ["distributed.processes", "distributed.router"],
    ["checkpoint.files", "checkpoint.gguf", "checkpoint.hub"]
    + ["profiling.roofline", "core.layers", "core.attention", "core.scheduler", "core.sampling"]
    + ["core.scheduling_policy", "core.kv_cache"]
    + ["kernels.attention", "kernels.sample", "kernels.pdl", "kernels.small_batch", "kernels.rope_cache"]
    + ["kernels.page_copy", "kernels.lora", "kernels.all_reduce_norm"],
    ["core.transformer", "checkpoint.weights", "core.tokenizer", "core.detokenizer", "checkpoint.tokenizer"],
    [
        "kernels.batch_invariant",
        "structured_output.trial",
        "structured_output.trial_process",
        "structured_output.backend",
        "core.request",
        "core.step",
    ],
    ["kernels.select", "compiled.cuda_graphs", "compiled.compiled_ops"],
    ["core.batch", "profiling.report", "profiling.profiler", "offload.host_cache", "snapshot"],
    [
        "distributed.peer_memory",
        "distributed.tensor_parallel",
        "training.weight_sync",
        "training.shared_params",
        "training.differentiable_ops",
    ]
    + ["training.logprobs"],
    ["lora.adapter", "lora.peft_files", "lora.manager", "lora.__init__"],
    ["distributed.rendezvous", "distributed.workers", "compiled.runner", "compiled.warm_up"],
    ["core.engine_core", "event_stream"],
    ["engine"],
    ["conversation", "distributed.replica", "distributed.data_parallel", "async_engine", "training.problems"]
    + ["training.plot", "training.trl", "training.grpo"],
    ["api"],
    ["__init__"],
    ["server.errors", "server.metrics", "server.log", "server.reasoning", "server.tokenizer_thread"],
    ["server.messages", "server.requests"],
    ["server.engine_process", "server.tool_calls"],
    ["server.engine_client", "server.responses"],
    ["server.sse"],
    ["server.app_state"],
    ["server.middleware"],
    ["server.endpoints"],
    ["server.http_worker", "server.supervisor"],
    ["cli.hydra_config", "cli.prompt_files", "cli.scripts", "cli.run", "cli.chat", "cli.serve"]
    + ["cli.bench.hardware", "cli.bench.workload", "cli.bench.results", "cli.bench.benchmark", "cli.bench.__main__"],
]
EMPTY = {
    f"{folder}.__init__"
    for folder in (
        "core",
        "checkpoint",
        "kernels",
        "compiled",
        "offload",
        "distributed",
        "training",
        "server",
        "profiling",
        "structured_output",
    )
} | {"cli.__init__", "cli.bench.__init__"}


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
                other = "__init__" if module == "fastgen" else module_name(module)
                assert other is not None, f"{name} imports {module}"
                assert rank[other] <= rank[name], f"{name} imports {other}"


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
        "core/model_families",
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
