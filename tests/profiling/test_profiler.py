"""The profiler: reports on a synthetic trace of a GPU, and windows around real steps on the CPU."""

import gzip
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from inspect import unwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastgen.core.model_config import ModelConfig
from fastgen.core.scheduler import Plan, Span
from fastgen.profiling import roofline
from fastgen.profiling.profiler import Profiler, ProfileWindow, profile_on_signal
from fastgen.profiling.report import (
    ProfileSummary,
    build_category_track,
    categorize_kernel,
    compute_step_work,
    measure_ceilings,
    read_kernels,
    split_into_layers,
    summarize,
)

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM", hidden_size=64, intermediate_size=96, num_layers=3, num_q_heads=4,
    num_kv_heads=2, head_dim=16, vocab_size=128, context_length=64,
    sliding_windows=(None,) * 3,
)  # fmt: skip
DECODE = (Span(0, 9, 10, True, (1,)), Span(1, 4, 5, True, (2,)))
MIXED = (*DECODE, Span(2, 2, 5, False, (3,)))
NORM, ACTIVATION = "triton_red_fused_add_mm_mean_mul_0", "triton_poi_fused_mm_mul_silu_1"
GEMM = "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT"
LAYER = [
    (NORM, 2), (GEMM, 10), ("_rope_and_cache_kv_kernel", 2), ("_decode_shared_prefix_kernel", 1), ("_decode_kernel", 8),
    (GEMM, 5), (NORM, 2), (GEMM, 12),
    (ACTIVATION, 2), (GEMM, 6),
]  # fmt: skip
PAUSE = ""
STEP = [
    ("Memcpy HtoD (Pinned -> Device)", 1), *3 * LAYER, (NORM, 2), (GEMM, 20), (PAUSE, 4), ("_sample_splits_kernel", 3),
]  # fmt: skip


def event(cat: str, name: str, ts: float, dur: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": 7, "ts": ts, "dur": dur, "args": args}


def gpu_trace(correlated: bool = True) -> list[dict[str, Any]]:
    """Returns two steps that run long after their launches: a CUDA graph at 50 µs, and single kernels at 240 µs."""
    events = []
    for step, (host, start) in enumerate([(0, 50), (100, 240)]):
        events.append(event("user_annotation", f"step {step} (tokens 2, rows 2)", host, 90))
        events.append(event("user_annotation", "forward", host + 5, 30))
        events.append(event("gpu_user_annotation", "forward", start, 180))
        if step == 0:
            events.append(event("cuda_runtime", "cudaGraphLaunch", host + 10, 5, correlation=1))
        for i, (name, us) in enumerate(STEP):
            launch = 1 if step == 0 else 100 + i
            if step and correlated:
                api = "cuda_runtime" if "nvjet" in name else "cuda_driver"
                events.append(event(api, "cuLaunchKernelEx", host + 10 + i, 1, correlation=launch))
            cat = "gpu_memcpy" if name.startswith("Mem") else "kernel"
            if name:
                events.append(event(cat, name, start, us, **{"correlation": launch} if correlated else {}))
            start += us
    return events


@pytest.mark.parametrize("correlated", [True, False])
def test_a_gpu_trace(correlated: bool) -> None:
    """Steps, categories, layers, busy time and gaps are exactly those of the synthetic trace."""
    events = gpu_trace(correlated)
    ks = read_kernels(events)
    first, second = ([k for k in ks if k.step == step] for step in (0, 1))
    assert (len(first), first[0].start, first[-1].end) == (len(second), 50, 230)
    assert (second[0].start, second[-1].end) == (240, 420)
    # From the QKV projection, after the first norm, to the next layer's; the last layer to its down projection.
    assert list(split_into_layers(first, 3)) == [(0, 53, 103), (1, 103, 153), (2, 153, 201)]
    assert list(split_into_layers(second, 3)) == [(0, 243, 293), (1, 293, 343), (2, 343, 391)]

    s = summarize(events, [DECODE, DECODE], CONFIG, 2, (1e12, 1e11), {"params": 2_000_000_000}, "a GPU")
    assert (s.source, s.num_steps, s.tokens_per_step, s.rows_per_step) == ("GPU kernels", 2, 2, 2)
    assert (s.step_ms, s.busy_ms, s.idle_ms, s.between_steps_ms) == pytest.approx((0.185, 0.176, 0.009, 0.005))
    assert s.gaps_per_step == 1.5
    assert [(g.before, g.after, g.count, g.us, g.largest_us) for g in s.largest_gaps] == [
        ("_sample_splits_kernel", "Memcpy HtoD", 1, 10, 10), (GEMM, "_sample_splits_kernel", 2, 8, 4)
    ]  # fmt: skip
    assert {name: (round(p.ms * 1e3), p.num_kernels) for name, p in s.categories.items()} == {
        "linear": (119, 13), "attention": (27, 6), "pointwise": (20, 10), "rope and cache write": (6, 3),
        "sampling": (3, 1), "memcpy and memset": (1, 1),
    }  # fmt: skip
    assert sum(p.time_fraction for p in s.categories.values()) == pytest.approx(352 / 370)
    assert s.host_ms == pytest.approx({"step": 0.09, "forward": 0.03})
    costs = roofline.operation_costs(CONFIG, compute_step_work(DECODE), 2)
    flops, moved = (costs["linear"][i] + costs["head"][i] for i in (0, 1))
    linear, pointwise = s.categories["linear"], s.categories["pointwise"]
    assert (linear.tflops, linear.tbps) == pytest.approx((flops / 119e-6 / 1e12, moved / 119e-6 / 1e12))
    assert linear.fraction_of_ceiling == pytest.approx(max(flops / 1e12, moved / 1e11) / 119e-6)
    assert pointwise.tbps == pytest.approx(costs["pointwise"][1] / 26e-6 / 1e12)  # the time of RoPE counts too
    assert str(s).count("\n") < 40 and "params 2.00" in str(s) and max(map(len, str(s).split("\n"))) <= 120
    assert json.loads(json.dumps(s.to_dict()))["categories"]["attention"]["ms"] == pytest.approx(0.027)


def test_category_track() -> None:
    """Three tracks of ranges that do not overlap: steps, layers, and runs of kernels of one category."""
    events = build_category_track(read_kernels(gpu_trace()), 3)
    tracks: dict[int, list[tuple[str, float, float]]] = {0: [], 1: [], 2: []}
    for e in events:
        if e["ph"] == "X":
            tracks[e["tid"]].append((e["name"], e["ts"], e["ts"] + e["dur"]))
    assert tracks[0] == [("step 0", 50, 230), ("step 1", 240, 420)]
    assert [name for name, *_ in tracks[1]] == ["layer 0", "layer 1", "layer 2"] * 2
    assert tracks[2][:5] == [
        ("memcpy and memset", 50, 51), ("pointwise", 51, 53), ("linear", 53, 63), ("rope and cache write", 63, 65),
        ("attention", 65, 74),
    ]  # fmt: skip
    for spans in tracks.values():
        assert all(a[2] <= b[1] for a, b in zip(spans, spans[1:], strict=False))
    assert {e["args"]["name"] for e in events if e["name"].endswith("_name")} == {
        "GPU parts", "steps", "layers", "parts"
    }  # fmt: skip


def test_overlapping_kernels_and_kernels_without_a_launch() -> None:
    """Time in which two kernels run counts once; a kernel that no step launched belongs to the step before it."""
    events = [
        event("user_annotation", "step 0 (tokens 2, rows 2)", 0, 9),
        event("cuda_runtime", "cudaLaunchKernel", 1, 1, correlation=1),
        event("cuda_runtime", "cudaLaunchKernel", 20, 1, correlation=2),
        event("kernel", "before", 0, 1, correlation=9),
        event("kernel", GEMM, 10, 10, correlation=1),
        event("kernel", "ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 15, 10, correlation=2),
        event("kernel", "whatever", 16, 1, correlation=7),
    ]
    s = summarize(events, [DECODE], CONFIG, 2)
    assert (s.step_ms, s.busy_ms, s.gaps_per_step) == (0.015, 0.015, 0)
    assert {name: p.num_kernels for name, p in s.categories.items()} == {"linear": 1, "collective": 1, "other": 1}
    assert s.categories["linear"].fraction_of_ceiling is None


def test_layers_of_unusual_steps() -> None:
    """Several linear kernels before attention, kernels of split attention, a single layer, none."""
    names = [
        GEMM,
        "splitKreduce",
        "_rope_and_cache_kv_kernel",
        "_prefill",
        "_decode_shared_prefix_kernel",
        "_decode",
        GEMM,
        GEMM,
        "splitKreduce",
        "_decode",
        GEMM,
    ]
    launch = [
        event("user_annotation", "step 0 (tokens 2, rows 2)", 0, 9),
        event("cuda_runtime", "cudaGraphLaunch", 1, 1, correlation=1),
    ]

    def spans(count: int) -> list[tuple[int, float, float]]:
        events = [event("kernel", name, 10 + i, 1, correlation=1) for i, name in enumerate(names[:count])]
        return list(split_into_layers(read_kernels(launch + events), 2))

    assert spans(11) == [(0, 10, 17), (1, 17, 21)]
    assert spans(9) == [(0, 10, 19)]
    assert spans(3) == [] and read_kernels([]) == []
    names = ["_decode", GEMM, "_decode", GEMM]  # the QKV projection has an unknown name
    assert spans(4) == [(0, 10, 11), (1, 11, 14)]


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("_prefill", "attention"),
        ("void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128>>(Params)", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "attention"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_clone_2", "pointwise"),
        ("triton_tem_fused_mm_3", "linear"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>(cublasSplitKParams<float>)", "linear"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "linear"),
        ("_linear_kernel", "linear"),
        ("triton_poi_fused_add_cat_index_put_mul_4", "rope and cache write"),
        ("triton_red_fused_argmax_5", "sampling"),
        (
            "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::ArgMaxOps<float>>>",
            "sampling",
        ),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "pointwise"),
        ("void multimem_all_reduce_kernel<c10::BFloat16, 16>", "collective"),
        ("Memset (Device)", "memcpy and memset"),
        ("aten::scaled_dot_product_attention", "attention"),
        ("aten::linear", "linear"),
        ("aten::mul", "pointwise"),
        ("spin", "other"),
    ],
)
def test_categories_by_name(name: str, category: str) -> None:
    assert categorize_kernel(name) == category


def test_step_work() -> None:
    """A span of one token decodes; longer spans prefill, with one pair for each query and earlier key."""
    assert compute_step_work(MIXED) == roofline.StepWork(
        num_tokens=5, num_sampled=2, num_prefill_pairs=3 + 4 + 5, num_decode_keys=15, num_prefill_keys=5
    )


# --- windows ------------------------------------------------------------------------------------------------------


def profiler() -> Profiler:
    return Profiler(CONFIG, torch.float32, torch.device("cpu"), lambda: {"params": 10, "cache": 20})


def steps(profiler: Profiler, count: int, plan: Plan = MIXED, fail_at: int = -1) -> None:
    """Runs steps as an engine does, with one weight and no cache."""
    w, x = torch.ones(256, 256), torch.ones(5, 256)
    heads = torch.ones(1, 4, 64, 16)
    for i in range(count):
        with profiler.range("plan"):
            time.sleep(0.001)
        with profiler.step(plan):
            with profiler.range("forward"):
                for _ in range(CONFIG.num_layers):
                    F.scaled_dot_product_attention(heads, heads, heads)
                    x = F.linear(x, w).tanh()
                if i == fail_at:
                    raise KeyboardInterrupt
            with profiler.range("wait"):
                x.argmax().item()


def read(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)["traceEvents"]


def is_idle(profiler: Profiler) -> bool:
    return profiler._window is None and not profiler._recording and profiler.range("a") is profiler.step(MIXED)


def wait_until_written(profiler: Profiler) -> None:
    """Waits for the thread that writes the last background window."""
    assert profiler._writer is not None
    profiler._writer.join()


@pytest.mark.parametrize(("name", "skip"), [("a/trace.json.gz", 2), ("trace.json", 0)])
def test_a_window(tmp_path: Path, name: str, skip: int) -> None:
    """The steps after the skipped ones are traced, and later steps run without the profiler."""
    p = profiler()
    with p.window(num_steps=3, skip_first=skip, path=tmp_path / name) as window:
        with pytest.raises(ValueError, match="still open"):
            _ = window.summary
        steps(p, 7)
        assert is_idle(p)
    s = window.summary
    assert isinstance(s, ProfileSummary) and window.trace == tmp_path / name and s is window.summary
    assert (s.num_steps, s.tokens_per_step, s.rows_per_step, s.source) == (3, 5, 3, "CPU operators")
    assert list(s.host_ms) == (["plan"] if skip else []) + ["step", "forward", "wait"] + ([] if skip else ["plan"])
    assert s.host_ms["plan"] >= (1 if skip else 2 / 3) and s.host_ms["forward"] < s.host_ms["step"]
    assert (
        s.categories["linear"].num_kernels == 3
        and s.categories["attention"].num_kernels == 3
        and "sampling" in s.categories
    )
    assert s.step_ms == pytest.approx(s.busy_ms + s.idle_ms) and s.busy_ms > 0
    assert s.memory_bytes == {"params": 10, "cache": 20} and (s.categories["linear"].fraction_of_ceiling or 0) > 0
    events = read(window.trace)
    names = [e["name"] for e in events if e.get("cat") == "user_annotation" and e["name"].startswith("step")]
    assert names == [f"step {i} (tokens 5, rows 3)" for i in range(3)]
    assert not any(e.get("args", {}).get("name") == "GPU parts" for e in events)
    assert "3 steps of 5.0 tokens in 3.0 rows, on cpu" in str(s)


def test_fewer_steps_than_asked_for(tmp_path: Path) -> None:
    """The steps that ran are reported; if all were skipped, nothing is."""
    p = profiler()
    with p.window(num_steps=9, skip_first=1, path=tmp_path / "a.json") as window:
        steps(p, 3)
    assert is_idle(p) and window.summary.num_steps == 2
    with p.window(skip_first=3, path=tmp_path / "b.json") as window:
        steps(p, 2)
    for name in ("summary", "trace"):
        with pytest.raises(ValueError, match=r"no step was recorded \(2 ran, of which the first 3 are skipped\)"):
            getattr(window, name)
    assert is_idle(p) and not (tmp_path / "b.json").exists()


def test_an_interrupt(tmp_path: Path) -> None:
    """Recording ends; the trace has the steps until then; the next window works."""
    p = profiler()
    for skip, recorded in ((1, 2), (5, 0)):
        window = p.window(skip_first=skip, path=tmp_path / f"{skip}.json")
        with pytest.raises(KeyboardInterrupt), window:
            steps(p, 9, fail_at=2)
        assert is_idle(p) and (tmp_path / f"{skip}.json").exists() == bool(recorded)
        if recorded:
            assert window.summary.num_steps == recorded
    with p.window(num_steps=1, skip_first=0, path=tmp_path / "next.json") as window:
        steps(p, 1)
    assert window.summary.num_steps == 1


def test_a_trace_that_cannot_be_written(tmp_path: Path) -> None:
    """Raises an error of its own, unless another error is raised already."""
    p = profiler()
    (tmp_path / "file").touch()
    with pytest.raises(OSError), p.window(skip_first=0, path=tmp_path / "file" / "a.json"):
        steps(p, 1)
    with pytest.raises(KeyboardInterrupt) as caught, p.window(skip_first=0, path=tmp_path / "file" / "a.json"):
        steps(p, 1, fail_at=0)
    assert "could not be written" in caught.value.__notes__[0] and is_idle(p)


def test_refusals(tmp_path: Path) -> None:
    """Refuses a second window, and invalid numbers and paths."""
    p = profiler()
    with p.window(path=tmp_path / "a.json"):
        with pytest.raises(ValueError, match="already"), p.window():
            pass
        with pytest.raises(ValueError, match="already"):
            p.profile_in_background()
    assert is_idle(p)
    for steps, skip, name in ((0, 2, "a.json"), (8, -1, "a.json"), (8, 2, "a.txt")):
        with pytest.raises(ValueError, match="must"):
            p.window(steps, tmp_path / name, skip)


def test_an_engine_in_another_thread(tmp_path: Path) -> None:
    """The engine's next step ends the window that another thread has left."""
    p, resume = profiler(), threading.Event()

    def run() -> None:
        steps(p, 1)
        resume.wait(10)
        steps(p, 1)

    thread = threading.Thread(target=run)
    with p.window(skip_first=0, path=tmp_path / "a.json") as window:
        thread.start()
        while not p._recording or window._num_steps_run < 1:
            time.sleep(0.001)
    resume.set()
    thread.join()
    assert is_idle(p) and window.summary.num_steps == 2


@pytest.fixture
def usr2() -> Iterator[int]:
    before = signal.getsignal(signal.SIGUSR2)
    yield signal.SIGUSR2
    signal.signal(signal.SIGUSR2, before)


def test_a_signal(tmp_path: Path, usr2: int, capfd: pytest.CaptureFixture[str]) -> None:
    """A signal profiles the next steps; a second signal meanwhile is ignored; a failure is logged and ends no step."""
    p = profiler()
    profile_on_signal(p, tmp_path / "new", num_steps=2)
    os.kill(os.getpid(), usr2)
    os.kill(os.getpid(), usr2)
    assert "signal ignored: a profile is being taken already" in capfd.readouterr().err
    steps(p, 5)
    wait_until_written(p)
    trace, summary = sorted((tmp_path / "new").iterdir())
    assert len([e for e in read(trace) if e["name"].startswith("step ")]) == 2
    assert "2 steps of 5.0 tokens" in summary.read_text() and is_idle(p)
    assert f"fastgen: profiled 2 steps: {trace} and {summary}" in capfd.readouterr().err
    (tmp_path / "file").touch()
    profile_on_signal(p, tmp_path / "file" / "in a file")
    os.kill(os.getpid(), usr2)
    steps(p, 11)
    wait_until_written(p)
    assert "the profile failed" in capfd.readouterr().err and is_idle(p)


def test_a_late_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A window ends with the steps so far, or for the next window if no step came; one profile is written at a time."""
    monkeypatch.setattr("fastgen.profiling.profiler.MAX_BACKGROUND_SECONDS", 0.0)
    p = profiler()
    p.profile_in_background(8, tmp_path)
    p.profile_in_background(8, tmp_path, skip_first=0)  # no step has come for the first
    steps(p, 2)
    wait_until_written(p)
    assert "profiled 1 steps" in capfd.readouterr().err and is_idle(p)
    monkeypatch.undo()
    p.profile_in_background(1, tmp_path, skip_first=0)
    resume = threading.Event()
    monkeypatch.setattr(ProfileWindow, "_write", lambda self: resume.wait(10))
    steps(p, 2)
    with pytest.raises(ValueError, match="being written: wait for its end"):
        p.profile_in_background(1, tmp_path)
    resume.set()
    wait_until_written(p)
    p.profile_in_background(1, tmp_path)
    assert not is_idle(p)


def test_an_idle_profiler_costs_little() -> None:
    """Less than a microsecond per range and per step."""
    p = profiler()
    for enter in (unwrap(Profiler.range), unwrap(Profiler.step)):  # without the type checks of tests
        best = 1.0
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(1000):
                with enter(p, "plan"):
                    pass
            best = min(best, time.perf_counter() - start)
        assert best < 1e-3


def test_ceilings() -> None:
    """Measured once for each device and dtype."""
    ceilings = measure_ceilings(torch.device("cpu"), torch.float32)
    assert 1e8 < ceilings[0] < 1e15 and 1e8 < ceilings[1] < 1e13
    assert measure_ceilings(torch.device("cpu"), torch.float32) is ceilings
