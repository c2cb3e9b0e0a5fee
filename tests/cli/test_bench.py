"""Tests `fgbench` with a model of random weights, and the roofline limits."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastgen
from fastgen import Engine, from_hf_config
from fastgen.cli.bench import benchmark, hardware
from fastgen.cli.bench.workload import Workload
from fastgen.config import ParallelConfig
from fastgen.core.model_config import ModelConfig
from fastgen.profiling.roofline import (
    KNOWN_MACHINES,
    Machine,
    StepWork,
    count_attended_keys,
    min_seconds,
    operation_costs,
)

H200 = KNOWN_MACHINES["H200"]
ROOT = Path(__file__).parents[2]
MISTRAL, LLAMA, QWEN = "mistral-7b-instruct-v0.3", "llama-3.1-8b-instruct", "qwen2.5-7b-instruct"
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 10,
    "max_position_embeddings": 64,
    "torch_dtype": "float32",
}
PEER = """# start-up 56.1s
vllm tiny tp1 2x6x4 rep0: 0.10s 80 out tok/s 120 prompt tok/s
vllm tiny tp1 2x6x4 rep1: 0.20s 40 out tok/s 60 prompt tok/s
vllm tiny tp1 2x6x4 rep2: 0.16s 50 out tok/s 75 prompt tok/s
BEST vllm tiny tp1 2x6x4: 0.10s 80 tok/s
vllm tiny tp1 2x6x4x3 rep0: 0.24s 100 out tok/s 50 prompt tok/s
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fgbench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Returns a function that runs fgbench beside tiny.json and returns exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))

    def call(*arguments: str) -> tuple[int, str, str]:
        try:
            code = benchmark.main(list(arguments))
        except SystemExit as e:
            code = int(e.code or 0)
        return code, *capsys.readouterr()

    return call


def rows() -> list[dict]:
    return json.loads(Path("rows.json").read_text())


def model_config(name: str) -> ModelConfig:
    return from_hf_config(json.loads((ROOT / "benchmarks" / "configs" / f"{name}.json").read_text()))


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "workload", "devices", "expected"),
    [
        (MISTRAL, "512x1024x16", 1, 719),
        (MISTRAL, "512x1024x128", 1, 4900),
        (MISTRAL, "512x1024x512", 1, 12690),
        ("qwen2.5-14b-instruct", "512x1024x128", 1, 2600),
        (LLAMA, "512x1024x128", 1, 4870),
        ("ministral-8b-instruct-2410", "512x1024x128", 1, 4850),
        (QWEN, "512x1024x128", 1, 5365),
        ("llama-3.2-1b-instruct", "512x1024x128", 1, 32400),
        ("deepseek-r1-distill-llama-70b", "512x1024x128", 2, 1043),
        (MISTRAL, "1x128x256", 1, 299),
        (LLAMA, "1x128x256", 1, 284),
        (QWEN, "1x128x256", 1, 303),
        ("qwen2.5-14b-instruct", "1x128x256", 1, 153),
        ("llama-3.2-1b-instruct", "1x128x256", 1, 1717),
    ],
)
def test_known_limits(model: str, workload: str, devices: int, expected: float) -> None:
    """The limits in output tokens/s on H200s equal those of an independent calculation."""
    assert Workload.parse(workload).max_tokens_per_second(
        model_config(model), H200.scaled(devices), 2
    ) == pytest.approx(expected, rel=0.01)


def test_operation_costs_by_hand() -> None:
    """Costs of a model small enough to count: D 8, F 16, 2 layers, q 8, k and v 4 each, vocabulary 10."""
    matrices = 2 * (8 * 16 + 8 * 8 + 3 * 8 * 16)
    kv = 2 * 2 * 4
    costs = operation_costs(
        from_hf_config(TINY),
        StepWork(num_tokens=5, num_sampled=2, num_prefill_pairs=6, num_decode_keys=7, num_prefill_keys=3),
        bytes_per_element=4,
    )
    assert costs == {
        "linear": (2 * 5 * matrices, 4 * matrices),
        "head": (2 * 2 * 80, 4 * 80),
        "prefill attention": (6 * 2 * 4 * 8, 4 * 3 * kv),
        "decode attention": (7 * 2 * 4 * 8, 4 * 7 * kv),
        # embedding and first norm; in each layer two residual adds with norms, RoPE with the cache write, SwiGLU
        "pointwise": (0, 4 * 5 * (2 * 8 + 2 * 8 + 2 * (2 * 4 * 8 + 2 * 16 + 3 * 16))),
    }
    assert operation_costs(from_hf_config(TINY), StepWork(5))["head"] == (0, 0)
    work = StepWork(5, num_decode_keys=7, num_prefill_keys=3)
    quantized = operation_costs(from_hf_config(TINY), work, 4, cache_bytes_per_element=1.5)
    assert quantized["decode attention"][1] == 1.5 * 7 * kv and quantized["prefill attention"][1] == 1.5 * 3 * kv
    assert quantized["linear"] == costs["linear"]


def test_limit_by_hand() -> None:
    """Two prompts of 6 tokens, whose first 2 are shared, with 3 samples of 4 tokens; and the same without sharing."""
    config, machine = (
        from_hf_config(TINY),
        Machine("one", flops_per_second=1.0, bytes_per_second=1e30, memory_bytes=1e9),
    )
    matrices, pair = 2 * (8 * 16 + 8 * 8 + 3 * 8 * 16), 2 * 4 * 8
    decode = 6 * (7 + 8 + 9)
    flops = 2 * matrices * (6 * (6 + 3)) + 2 * 80 * 24 + pair * (6 * 21 + decode)
    assert min_seconds(config, 2, 6, 4, 3, machine=machine) == pytest.approx(flops)
    flops = 2 * matrices * (2 + 2 * 4 + 6 * 3) + 2 * 80 * 24 + pair * (3 + 2 * (3 + 4 + 5 + 6) + decode)
    assert min_seconds(config, 2, 6, 4, 3, machine=machine, prefix_shared=True, num_shared_tokens=2) == pytest.approx(
        flops
    )
    slow, kv = Machine("two", flops_per_second=1e30, bytes_per_second=1.0, memory_bytes=1e9), 2 * 2 * 4
    unique_keys = 6 * (1 + 2 + 3)
    traffic = 4 * (matrices + 80) + kv * (unique_keys + 3 * (2 * 4 + 2) + 2 + 2 * 4 + 6 * 3)
    assert min_seconds(
        config, 2, 6, 4, 3, machine=slow, bytes_per_element=1, prefix_shared=True, num_shared_tokens=2
    ) == pytest.approx(traffic)
    small = slow._replace(memory_bytes=(matrices + 160 + kv * 12) / 0.9)  # 12 tokens fit, so 144 reads take 12 steps
    traffic = 12 * (matrices + 80) + kv * (decode + 6 * 9)
    assert min_seconds(config, 2, 6, 4, 3, machine=small, bytes_per_element=1) == pytest.approx(traffic)
    sizes = {"bytes_per_element": 2, "cache_bytes_per_element": 1.5}
    less = slow._replace(memory_bytes=(2 * (matrices + 160) + 1.5 * kv * 12) / 0.9)
    traffic = 12 * 2 * (matrices + 80) + 1.5 * kv * (decode + 6 * 9)
    assert min_seconds(config, 2, 6, 4, 3, machine=less, **sizes) == pytest.approx(traffic)
    with pytest.raises(ValueError, match="9 tokens do not fit the memory of two: room for 0"):
        min_seconds(config, 2, 6, 4, machine=slow._replace(memory_bytes=1))


def test_sliding_windows_limit_attended_keys() -> None:
    config = TINY | {"architectures": ["MistralForCausalLM"], "sliding_window": 3}
    assert count_attended_keys(from_hf_config(config), 1, 5) == 1 + 2 + 3 + 3 + 3
    assert count_attended_keys(from_hf_config(config), 5, 6) == 6
    assert (
        count_attended_keys(from_hf_config(config | {"layer_types": ["full_attention", "sliding_attention"]}), 4, 5)
        == (9 + 6) / 2
    )


# --- the command ------------------------------------------------------------------------------------------------------


def test_rows(fgbench: Run) -> None:
    """Two workloads, settings with and without their group, and the fields of a row."""
    code, out, err = fgbench(
        "tiny.json", "--workload", "2x6x4", "2x6x4x3", "token_budget=99", "schedule.max_num_seqs=9",
        "--out", "rows.json", "--repeats", "2", "--latency", "--start-up", "--warm-up", "0.1",
    )  # fmt: skip
    assert code == 0, err
    start, first, second = rows()
    assert start["workload"] == "start-up" and start["seconds"] == sum(start["start_up"].values())
    assert {"load", "engine", "first_token"} <= start["start_up"].keys()
    for row, samples in ((first, 1), (second, 3)):
        assert (row["engine"], row["model"], row["tp"], row["dtype"]) == ("fastgen", "tiny", 1, "float32")
        assert [row[k] for k in ("requests", "prompt_len", "output_len", "samples")] == [2, 6, 4, samples]
        a, b = row["seconds_all"]
        assert row["seconds"] == pytest.approx((a + b) / 2)
        assert row["output_tok_s"] == pytest.approx(8 * samples / row["seconds"])
        assert row["total_tok_s"] == pytest.approx((8 * samples + 12) / row["seconds"])
        assert row["settings"]["schedule"]["token_budget"] == 99 and row["settings"]["schedule"]["max_num_seqs"] == 9
        assert row["gemm_tflops"] > 0 and row["copy_tb_s"] > 0 and row["peak_memory_gb"] > 0
        assert row["limit_measured_fraction"] == pytest.approx(row["output_tok_s"] / row["limit_measured_tok_s"])
        assert row["first_token_ms"].keys() == row["inter_token_ms"].keys() == {"p50", "p90", "p99"}
        assert row["torch"] == torch.__version__ and row["temperature"] == 0.7
    lines = out.splitlines()
    assert lines[0].split()[:3] == ["hardware", "model", "tp"] and len(lines) == 4
    assert "2x6x4x3" in lines[3]


def test_replicas(fgbench: Run) -> None:
    """Rows have the number of replicas, and do not replace those of one engine."""
    settings = ("cache_tokens=640", "max_num_seqs=4", "token_budget=64")
    common = ("--workload", "6x6x4", "--repeats", "1", "--out", "rows.json", *settings)
    assert fgbench("tiny.json", *common)[0] == 0
    code, out, _ = fgbench("tiny.json", *common, "parallel=replicas")
    single, replicas = rows()
    assert code == 0 and (single["tp"], single["replicas"], replicas["tp"], replicas["replicas"]) == (1, 1, 1, 2)
    assert replicas["settings"]["parallel"]["replicas"] == 2 and replicas["output_tok_s"] > 0
    assert " 2 x 1 " in out.splitlines()[2] and " x 1 " not in out.splitlines()[1]
    machine = KNOWN_MACHINES["H200"]
    work, half = Workload.parse("512x1024x128"), Workload.parse("256x1024x128")
    layout = ParallelConfig(replicas=2, tensor_parallel=2)
    both = work.max_tokens_per_second(model_config(MISTRAL), machine, 2, layout)
    assert both == pytest.approx(2 * half.max_tokens_per_second(model_config(MISTRAL), machine.scaled(2), 2))
    assert both < work.max_tokens_per_second(
        model_config(MISTRAL), machine.scaled(4), 2
    )  # each replica reads the weights


def test_merge_and_sweep(fgbench: Run) -> None:
    """A second run replaces equal rows and keeps the others. A failure keeps all."""
    quick = ("--repeats", "1", "--out", "rows.json")
    assert fgbench("tiny.json", "--workload", "2x6x4", "--outputs", "1,2,8", *quick)[0] == 0
    before = rows()
    assert [row["workload"] for row in before] == ["2x6x1", "2x6x2", "2x6x8"]
    assert fgbench("tiny.json", "--workload", "2x6x8", "1x6x2", "sampling.temperature=0", *quick)[0] == 0
    after = rows()
    assert after[:2] == before[:2] and after[2] != before[2] and after[3]["workload"] == "1x6x2"
    assert after[3]["temperature"] == 0
    small = ("cache_tokens=16", "page_size=16")  # 18 tokens do not fit
    assert fgbench("tiny.json", "--workload", "9x9x9", *quick, *small)[0] == 1
    assert rows() == after


def test_interrupt(fgbench: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are complete are saved and shown."""
    measure, calls = benchmark.measure_throughput, []

    def twice(*args: Any) -> dict:
        calls.append(args)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(benchmark, "measure_throughput", twice)
    code, out, _ = fgbench("tiny.json", "--workload", "2x6x4", "2x6x5", "--out", "rows.json", "--repeats", "1")
    assert code == 130 and len(rows()) == 1 and "2x6x4" in out


def test_prompts(fgbench: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are distinct, and new for each repeat, except for the shared prefix."""
    generator = torch.Generator().manual_seed(0)
    first, second = (Workload(4, 16, 1).make_prompts(1000, generator) for _ in range(2))
    assert len({tuple(p[:8]) for p in first + second}) == 8
    runs, generate = [], Engine.generate

    def record(self: Engine, prompts: list[list[int]], *args: Any, **kwargs: Any) -> list[fastgen.Output]:
        runs.append(prompts)
        return generate(self, prompts, *args, **kwargs)

    monkeypatch.setattr(Engine, "generate", record)
    code, *_ = fgbench(
        "tiny.json", "--workload", "4x24x2", "--shared-prefix", "12", "--out", "rows.json", "--repeats", "2"
    )
    assert code == 0 and rows()[0]["workload"] == "4x24x2 shared 12"
    assert [len(prompts) for prompts in runs] == [1, 4, 4]
    assert all(len({tuple(p[:12]) for p in prompts}) == 1 for prompts in runs)
    assert len({tuple(p[12:]) for prompts in runs[1:] for p in prompts}) == 8
    assert runs[1][0][:12] != runs[2][0][:12]


def test_peer_log_and_plot(fgbench: Run) -> None:
    """Lines of another engine's log become rows on the same hardware, in the same table and plot."""
    Path("log.txt").write_text(PEER)
    fgbench("tiny.json", "--workload", "2x6x4", "--outputs", "2,4", "--repeats", "1", "--out", "rows.json")
    ours = rows()[1]
    peer = ("--peer-log", "log.txt", "--peer-version", "0.23.0")
    code, out, err = fgbench("--out", "rows.json", *peer, "--plot", "plot.png")
    assert code == 0, err
    _, _, first, second = rows()
    assert (first["engine"], first["engine_version"], first["model"], first["tp"]) == ("vllm", "0.23.0", "tiny", 1)
    assert first["hardware"] == ours["hardware"] and first["seconds_all"] == [0.10, 0.20, 0.16]
    assert (first["seconds"], first["output_tok_s"], first["total_tok_s"]) == (0.16, 50, pytest.approx(125))
    assert second["samples"] == 3 and second["total_tok_s"] == pytest.approx(150)
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][-2:] == ["/", "vllm"]
    ratio = next(line[-1] for line in lines if "fastgen" in line and "2x6x4" in line)
    assert float(ratio) == pytest.approx(ours["output_tok_s"] / 50, abs=0.006)
    peer_line = next(line for line in lines if "vllm" in line and "2x6x4" in line)
    assert peer_line[-1] == f"{50 / ours['limit_measured_tok_s']:.1%}"
    assert Path("plot.png").stat().st_size > 5000
    code, shown, _ = fgbench("--peer", "rows.json")  # shows the table only
    assert code == 0 and shown == out


def test_the_limit_of_a_known_machine(fgbench: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows have limits from constants, which hold for 16-bit dtypes, and from the measured rate."""
    monkeypatch.setattr(hardware, "hardware_name", lambda _: "NVIDIA H200")
    run = ("tiny.json", "--workload", "2x6x4", "--repeats", "1", "--out", "rows.json")
    assert fgbench(*run, "model.dtype=bfloat16")[0] == 0
    assert rows()[0]["limit_tok_s"] == pytest.approx(
        Workload(2, 6, 4).max_tokens_per_second(from_hf_config(TINY), H200, 2)
    )
    machine = H200._replace(flops_per_second=rows()[0]["gemm_tflops"] * 1e12)
    assert rows()[0]["limit_measured_tok_s"] == pytest.approx(
        Workload(2, 6, 4).max_tokens_per_second(from_hf_config(TINY), machine, 2)
    )
    assert fgbench(*run)[0] == 0 and rows()[0]["limit_tok_s"] is None


@pytest.mark.parametrize(
    ("nvidia_smi_output", "expected"),
    [
        ("1400, 650.5\n1500, 690.5\n1600, 700.5\n16", {"sm_mhz": 1500, "power_w": 690.5}),
        ("No devices were found", {}),
        ("1500, [N/A]\n1500, [N/A]\n", {}),
    ],
)
def test_clocks(nvidia_smi_output: str, expected: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks are the medians of nvidia-smi's lines, without a cut last line; none if nvidia-smi reports none."""
    monkeypatch.setattr(hardware.shutil, "which", lambda _: "nvidia-smi")
    monkeypatch.setattr(hardware, "_nvidia_smi_command", lambda *_: ["printf", "%s", nvidia_smi_output])
    with hardware.measure_clocks(torch.device("cuda")) as clocks:
        time.sleep(0.2)
    assert clocks == expected


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--workload", "2x6"], 2, "workload '2x6' is not NxPROMPTxOUTPUT[xSAMPLES]"),
        (["--workload", "2x6x0"], 2, "in positive numbers"),
        (["--workload", "2x6x4", "--outputs", "4,x"], 2, "--outputs '4,x' is not a list of positive numbers"),
        (["--workload", "2x6x4", "--shared-prefix", "6"], 2, "must be less than the prompt of 6"),
        (["--workload", "2x6x4", "--repeats", "0"], 2, "--repeats must be at least 1"),
        (["--workload", "2x6x4", "token_bugdet=5"], 2, "did you mean schedule.token_budget?"),
        (["--workload", "2x6x4", "schedule.token_budget=0"], 2, "must be at least 1, got 0"),
        (["--workload", "2x6x4", "prompt=hello"], 2, "fgbench makes its own prompts"),
        (["--workload", "2x6x4", "--out", "nowhere/rows.json"], 2, "folder nowhere does not exist"),
        (["--workload", "2x6x4", "--out", "tiny.json"], 2, "does not hold fgbench's rows"),
        (["--workload", "2x60x5"], 1, "longer than the context of 64"),
        ([], 2, "expected a model and a workload"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_mistakes(arguments: list[str], code: int, message: str, fgbench: Run) -> None:
    """An error prints one line to stderr and nothing to stdout, without a traceback."""
    status, out, err = fgbench("tiny.json", *arguments)
    assert (status, out) == (code, "")
    assert err.startswith("fgbench: ") and message in err and err.count("\n") == 1


def test_weights(fgbench: Run) -> None:
    """--weights loads the checkpoint's weights; rows have the name of its folder."""
    run = ("--workload", "2x6x4", "--repeats", "1", "--out", "rows.json", "--weights")
    code, _, err = fgbench("tiny.json", *run)
    assert code == 1 and "no .safetensors file" in err
    fastgen.save("Tiny-v0.1", from_hf_config(TINY), fastgen.init(from_hf_config(TINY), 1))
    assert fgbench("Tiny-v0.1", *run)[0] == 0 and rows()[0]["model"] == "tiny-v0.1"


def test_mistakes_without_a_model(fgbench: Run) -> None:
    Path("log.txt").write_text("nothing of interest")
    Path("rows.json").write_text("[]")
    assert fgbench("--workload", "2x6x4")[0] == 2
    assert fgbench("--out", "rows.json", "--peer-log", "log.txt")[2].startswith("fgbench: which hardware")
    missing = fgbench("--out", "rows.json", "--peer-log", "log.txt", "--hardware", "NVIDIA H200")
    assert missing[0] == 1 and "log.txt: no line like 'vllm " in missing[2]
    assert "unknown model 'tiny'" in fgbench("tiny", "--workload", "2x6x4")[2]


def test_help(fgbench: Run) -> None:
    code, out, _ = fgbench("--help")
    assert code == 0 and "examples:" in out and "--workload 512x1024x128" in out
