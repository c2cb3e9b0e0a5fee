"""The report on a trace: the time of a step by category of kernel, its layers and gaps, and the rates reached.

Kernels that a CUDA graph replays carry no ranges of the host. A kernel's step is the one whose range contains the
launch with the kernel's correlation id, its category follows from its name (CATEGORY_REGEXES), and its layer from
counting attention kernels (`split_into_layers`).
"""

import re
import textwrap
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import groupby, pairwise, zip_longest
from typing import Any, NamedTuple

import torch

from fastgen.core.model_config import ModelConfig
from fastgen.core.scheduler import Plan
from fastgen.profiling.roofline import StepWork, operation_costs

STEP_LABEL = re.compile(r"step (\d+) \(tokens \d+, rows \d+\)")
CATEGORY_TRACK_PID = 1_000_000  # of the row added to the trace
# Excludes inductor's fused pointwise kernels, which are named after all ops that they fuse.
NOT_INDUCTOR_FUSED = r"^(?!triton_(?!tem))(?:.*?)"
CATEGORY_REGEXES = {  # category -> names of its GPU kernels and CPU operators; the first match counts
    "memcpy and memset": r"^_?mem(cpy|set)",
    "collective": NOT_INDUCTOR_FUSED + r"(nccl|symm|all_?reduce|all_?gather|reduce_?scatter|multimem)",
    "attention": NOT_INDUCTOR_FUSED + r"(^_(prefill|decode)|paged|flash|fmha|sdpa|attention)",
    "sampling": r"argmax|top_?k|sampl|softmax|logsumexp|sort|cumsum|exponential",
    "linear": NOT_INDUCTOR_FUSED + r"(gemm|gemv|cutlass|nvjet|cublas|xmma|split_?k|_linear|triton_tem|dot_kernel"
    r"|aten::(linear|addmm|baddbmm|mm|bmm|matmul|einsum)$)",
    "rope and cache write": r"rope|rotary|index_put",
    "pointwise": r"^triton_|elementwise|reduce|norm|copy|gather|index|cat|aten::",
}
CATEGORY_PATTERNS = {category: re.compile(regex, re.IGNORECASE) for category, regex in CATEGORY_REGEXES.items()}
ROOFLINE_OPS = {  # category -> operations of `roofline.operation_costs` that its kernels compute
    "linear": ("linear", "head"),
    "attention": ("prefill attention", "decode attention"),
    "pointwise": ("pointwise",),
}
MERGED_CATEGORIES = {"pointwise": "rope and cache write"}  # their work is one operation of the roofline


# --- the work of a step, and the rates of the device ----------------------------------------------------------------


def compute_step_work(plan: Plan) -> StepWork:
    """Returns the work of a step. A span of one token decodes and reads `stop` keys; sliding windows are ignored."""
    prefill, decode = ([s for s in plan if (s.stop - s.start > 1) == is_prefill] for is_prefill in (True, False))
    return StepWork(
        num_tokens=sum(s.stop - s.start for s in plan),
        num_sampled=sum(s.needs_sampling for s in plan),
        num_prefill_pairs=sum(s.stop * (s.stop + 1) // 2 - s.start * (s.start + 1) // 2 for s in prefill),
        num_decode_keys=sum(s.stop for s in decode),
        num_prefill_keys=sum(s.stop for s in prefill),
    )


def measure_peak_rates(
    device: torch.device, dtype: torch.dtype, gemm_size: int, copy_bytes: int, seconds: float
) -> tuple[float, float]:
    """Measures the sustained FLOP/s of a square GEMM of random numbers, and the bytes/s read plus written by a copy.

    The GEMM runs for `seconds` and the copy for a third of it; the first third of each is warm-up and does not count.
    """
    cuda = device.type == "cuda"
    calls_per_sync = 10 if cuda else 1

    def calls_per_second(run: Callable[[], object], seconds: float) -> float:
        begin = start = time.perf_counter()
        num_calls, is_timed = 0, False
        while (now := time.perf_counter()) < begin + seconds:
            if not is_timed and now > begin + seconds / 3:
                start, num_calls, is_timed = now, 0, True
            for _ in range(calls_per_sync):
                run()
            num_calls += calls_per_sync
            if cuda:
                torch.cuda.synchronize(device)
        return num_calls / (time.perf_counter() - start)

    a, b, out = (torch.randn(gemm_size, gemm_size, device=device, dtype=dtype) for _ in "abc")
    source, target = (torch.ones(copy_bytes, device=device, dtype=torch.uint8) for _ in "ab")
    flops = 2 * gemm_size**3 * calls_per_second(lambda: torch.mm(a, b, out=out), seconds)
    return flops, 2 * copy_bytes * calls_per_second(lambda: target.copy_(source), seconds / 3)


@cache
def measure_ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Returns the (FLOP/s, bytes/s) that a device reaches. Takes a second and up to 2.5 GB on a GPU, once per dtype."""
    if device.type == "cpu":
        return measure_peak_rates(device, dtype, gemm_size=512, copy_bytes=2**26, seconds=0.2)
    free = torch.cuda.mem_get_info(device)[0]
    try:
        return measure_peak_rates(device, dtype, 8192 if free > 2**31 else 2048, min(2**30, free // 4), seconds=0.75)
    finally:
        torch.cuda.empty_cache()  # other processes may need the memory


# --- reading a trace ----------------------------------------------------------------------------------------------


class KernelEvent(NamedTuple):
    """A kernel or copy on the device, or on a CPU an operator that no other operator contains; times in µs."""

    start: float
    end: float
    name: str
    category: str
    step: int


@cache
def categorize_kernel(name: str) -> str:
    """Returns the category of a kernel or operator, by its name."""
    return next((category for category, pattern in CATEGORY_PATTERNS.items() if pattern.search(name)), "other")


def short_kernel_name(name: str) -> str:
    """Returns a kernel's name without return type, namespaces, template and arguments."""
    name = re.split(r"[<(]", name.replace("(anonymous namespace)::", ""), maxsplit=1)[0].strip()
    return (name if name.startswith(("Mem", "aten")) else re.split(r"[ :]", name)[-1])[:44]


def read_kernels(events: Sequence[dict[str, Any]]) -> list[KernelEvent]:
    """Returns the device's kernels by start time, with their steps; a GPU kernel's step is the one that launched it.

    A kernel that no step launched belongs to the step before it. If no launch was recorded at all, the longest pauses
    separate the steps.
    """
    named = [(e, STEP_LABEL.fullmatch(e["name"])) for e in events if e.get("cat") == "user_annotation"]
    ranges = sorted((e["ts"], e["ts"] + e["dur"], int(m[1])) for e, m in named if m)
    if not ranges:
        return []

    def step_at(time: float) -> int | None:
        i = bisect_right(ranges, time, key=lambda r: r[0]) - 1
        return ranges[i][2] if i >= 0 and time <= ranges[i][1] else None

    gpu = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") and "dur" in e]
    calls = [e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver")]
    launched = {e["args"]["correlation"]: step_at(e["ts"]) for e in calls if "correlation" in e.get("args", {})}
    pairs = [(e, launched.get(e["args"].get("correlation"))) for e in sorted(gpu, key=lambda e: e["ts"])]
    if not gpu:
        pairs = [(e, step_at(e["ts"])) for e in _outermost_cpu_ops(events)]
    elif all(step is None for _, step in pairs):
        pauses = [b["ts"] - a["ts"] - a["dur"] for (a, _), (b, _) in pairwise(pairs)]
        longest = sorted(range(len(pauses)), key=lambda i: pauses[i])[len(pauses) - (len(ranges) - 1) :]
        pairs = [(e, ranges[sum(j < i for j in longest)][2]) for i, (e, _) in enumerate(pairs)]
    step: int | None = None
    kernels = []
    for e, launched_by in pairs:
        step = step if launched_by is None else launched_by
        if step is not None:
            kernels.append(KernelEvent(e["ts"], e["ts"] + e["dur"], e["name"], categorize_kernel(e["name"]), step))
    return kernels


def _outermost_cpu_ops(events: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields a CPU's operators that no other operator contains; regions that only group operators do not count."""
    end: dict[Any, float] = defaultdict(float)  # by thread
    for e in sorted((e for e in events if e.get("cat") == "cpu_op"), key=lambda e: (e["ts"], -e["dur"])):
        if e["ts"] >= end[e["tid"]] and (e["name"].startswith("aten::") or categorize_kernel(e["name"]) != "other"):
            end[e["tid"]] = e["ts"] + e["dur"]
            yield e


def split_into_layers(kernels: Sequence[KernelEvent], num_layers: int) -> Iterator[tuple[int, float, float]]:
    """Yields (layer, start, end) of one step's layers, in µs.

    Attention kernels without a linear kernel between them belong to one layer. A layer starts at its QKV projection: as
    many linear kernels before its attention as precede the step's first attention. It ends where the next layer starts,
    so a norm fused with the residual belongs to the layer before. The last layer has as many linear kernels as the
    first.
    """
    linear = [i for i, k in enumerate(kernels) if k.category == "linear"]
    # Number of linear kernels before a layer's attention -> index of its last attention kernel.
    last_attention = {bisect_right(linear, i): i for i, k in enumerate(kernels) if k.category == "attention"}
    counts = list(last_attention)
    num_before = counts[0] if counts else 0
    num_after = counts[1] - 2 * num_before if len(counts) > 1 else len(linear) - num_before
    firsts = [max(n - num_before, m) if num_before else m for m, n in zip([0, *counts], counts, strict=False)]
    starts = [linear[first] if first < n else 0 for first, n in zip(firsts, counts, strict=True)]
    for i, n in enumerate(counts):
        last = max([last_attention[n], *linear[n : n + max(0, num_after)]])
        end = starts[i + 1] if i + 1 < len(counts) else last + 1
        yield i % num_layers, kernels[starts[i]].start, max(k.end for k in kernels[starts[i] : end])


def find_gaps(kernels: Sequence[KernelEvent]) -> tuple[float, list[tuple[float, KernelEvent, KernelEvent]]]:
    """Returns the µs in which any kernel ran, and the gaps: (µs, last kernel to end before it, next kernel)."""
    busy, last = 0.0, kernels[0]._replace(end=kernels[0].start)
    gaps = []
    for k in kernels:
        if k.start > last.end:
            gaps.append((k.start - last.end, last, k))
        busy += max(0.0, k.end - max(k.start, last.end))
        last = max(last, k, key=lambda k: k.end)
    return busy, gaps


def build_category_track(kernels: Sequence[KernelEvent], num_layers: int) -> list[dict[str, Any]]:
    """Returns the events of the row "GPU parts": ranges for steps, layers, and runs of kernels of one category."""
    tracks: dict[str, list[tuple[str, float, float]]] = {"steps": [], "layers": [], "parts": []}
    for step in dict.fromkeys(k.step for k in kernels):
        step_kernels = [k for k in kernels if k.step == step]
        tracks["steps"].append((f"step {step}", step_kernels[0].start, max(k.end for k in step_kernels)))
        tracks["layers"] += [
            (f"layer {n}", start, end) for n, start, end in split_into_layers(step_kernels, num_layers)
        ]
    for _, run in groupby(kernels, key=lambda k: (k.step, k.category)):
        first, *others = run
        tracks["parts"].append((first.category, first.start, max(k.end for k in (first, *others))))
    metadata = [(0, "process_name", {"name": "GPU parts"}), (0, "process_sort_index", {"sort_index": -1})]
    events: list[dict[str, Any]] = []
    for tid, (name, ranges) in enumerate(tracks.items()):
        metadata += [(tid, "thread_name", {"name": name}), (tid, "thread_sort_index", {"sort_index": tid})]
        for (label, start, end), following in zip_longest(ranges, ranges[1:]):
            end = min(end, following[1]) if following else end  # ranges of a track may not overlap
            events.append({"ph": "X", "cat": "gpu_parts", "tid": tid, "name": label, "ts": start, "dur": end - start})
    events += [{"ph": "M", "name": name, "tid": tid, "args": args} for tid, name, args in metadata]
    return [{"pid": CATEGORY_TRACK_PID} | e for e in events]


# --- the summary --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CategoryStats:
    """Time of a category's kernels. Rates are None if the category's work or the ceilings are unknown."""

    ms: float  # per step
    time_fraction: float  # of the step's time; kernels that overlap count each
    num_kernels: float  # per step
    tflops: float | None = None
    tbps: float | None = None
    fraction_of_ceiling: float | None = None  # time of the same work at the ceilings / actual time


@dataclass(frozen=True)
class KernelGap:
    """All pauses of the device between two kernels of these names."""

    before: str
    after: str
    count: int
    us: float
    largest_us: float


@dataclass(frozen=True)
class ProfileSummary:
    """Results of a profile window; times are means per step. str() is a page of text, to_dict() is for JSON.

    step_ms = busy_ms + idle_ms is measured from the first kernel to the last, so it includes pauses between steps.
    """

    device: str
    source: str  # the events that were timed: "GPU kernels" or "CPU operators"
    num_steps: int
    tokens_per_step: float
    rows_per_step: float
    step_ms: float
    busy_ms: float
    idle_ms: float
    between_steps_ms: float  # of idle_ms: between the last kernel of a step and the first of the next
    gaps_per_step: float
    largest_gaps: tuple[KernelGap, ...]
    categories: dict[str, CategoryStats]  # by descending time
    host_ms: dict[str, float]  # by range; "step" includes the others
    ceiling_tflops: float | None
    ceiling_tbps: float | None
    memory_bytes: dict[str, int]  # bytes by owner

    def to_dict(self) -> dict[str, Any]:
        """Returns the summary as dictionaries, lists and numbers."""
        return asdict(self)

    def __str__(self) -> str:
        def number(value: float | None, form: str = ".3g") -> str:
            return format(value, form) if value else ""

        def listed(name: str, values: Iterable[str]) -> str:
            return textwrap.fill(f"{name}: {', '.join(values)}", 118, subsequent_indent=" " * (len(name) + 2))

        lines = [
            f"{self.num_steps} steps of {self.tokens_per_step:.1f} tokens in {self.rows_per_step:.1f} rows"
            f", on {self.device}",
            f"a step takes {self.step_ms:.3f} ms by {self.source}: busy {self.busy_ms:.3f}, idle {self.idle_ms:.3f}"
            f" in {self.gaps_per_step:.1f} gaps ({self.between_steps_ms:.3f} between steps)",
            listed("host ms", (f"{name} {ms:.3f}" for name, ms in list(self.host_ms.items())[:12])),
            "",
            f"{'part':22}{'ms':>10}{'share':>8}{'kernels':>9}{'TFLOP/s':>11}{'TB/s':>11}{'of ceiling':>12}",
        ]
        for name, p in self.categories.items():
            rates = f"{number(p.tflops):>11}{number(p.tbps):>11}{number(p.fraction_of_ceiling, '.0%'):>12}"
            lines.append(f"{name:22}{p.ms:10.3f}{p.time_fraction:8.1%}{p.num_kernels:9.1f}{rates}".rstrip())
        lines.append(f"{'idle':22}{self.idle_ms:10.3f}{self.idle_ms / self.step_ms if self.step_ms else 0:8.1%}")
        if self.ceiling_tflops is not None and self.ceiling_tbps is not None:
            lines.append(f"ceilings measured here: {self.ceiling_tflops:.3g} TFLOP/s, {self.ceiling_tbps:.3g} TB/s")
        if self.largest_gaps:
            lines += ["", f"{'gaps between':92}{'count':>6}{'µs':>9}{'largest':>9}"]
        for g in self.largest_gaps:
            lines.append(f"{g.before + ' -> ' + g.after:92}{g.count:6}{g.us:9.1f}{g.largest_us:9.1f}")
        if self.memory_bytes:
            lines += ["", listed("memory GB", (f"{name} {n / 1e9:.2f}" for name, n in self.memory_bytes.items()))]
        return "\n".join(lines)


def summarize(
    events: Sequence[dict[str, Any]],
    plans: Sequence[Plan],
    model_config: ModelConfig,
    bytes_per_element: int,
    ceilings: tuple[float, float] | None = None,
    memory: dict[str, int] | None = None,
    device: str = "cpu",
    cache_bytes_per_element: float | None = None,
) -> ProfileSummary:
    """Summarizes a trace's events; step i computed plans[i], with elements of `bytes_per_element` bytes; those of the
    KV cache have `cache_bytes_per_element` unless that is None.

    `ceilings` are the device's FLOP/s and bytes/s.
    """
    steps, kernels = len(plans), read_kernels(events)
    busy, gaps = find_gaps(kernels) if kernels else (0.0, [])
    total = max(k.end for k in kernels) - kernels[0].start if kernels else 0.0  # µs
    spent: dict[str, float] = defaultdict(float)  # µs
    counts = Counter(k.category for k in kernels)
    for k in kernels:
        spent[k.category] += k.end - k.start
    sizes = bytes_per_element, cache_bytes_per_element
    costs = [operation_costs(model_config, compute_step_work(plan), *sizes) for plan in plans]
    categories = {}
    for name, us in sorted(spent.items(), key=lambda item: -item[1]):
        rates: tuple[float, ...] = ()
        if ceilings and name in ROOFLINE_OPS and us:
            flops, moved = (sum(cost[op][i] for cost in costs for op in ROOFLINE_OPS[name]) for i in (0, 1))
            s = (us + spent[MERGED_CATEGORIES.get(name, "")]) / 1e6
            rates = (flops / s / 1e12, moved / s / 1e12, max(flops / ceilings[0], moved / ceilings[1]) / s)
        categories[name] = CategoryStats(us / 1e3 / steps, us / total if total else 0.0, counts[name] / steps, *rates)
    by_kernels: dict[tuple[str, str], list[float]] = defaultdict(list)
    for us, before, after in gaps:
        by_kernels[short_kernel_name(before.name), short_kernel_name(after.name)].append(us)
    gap_stats = [KernelGap(*names, len(us), sum(us), max(us)) for names, us in by_kernels.items()]
    host: dict[str, float] = defaultdict(float)  # ms
    for e in sorted((e for e in events if e.get("cat") == "user_annotation"), key=lambda e: e["ts"]):
        host["step" if STEP_LABEL.fullmatch(e["name"]) else re.sub(r" \d+$", "", e["name"])] += e["dur"] / 1e3 / steps
    return ProfileSummary(
        device=device, source="GPU kernels" if any(e.get("cat") == "kernel" for e in events) else "CPU operators",
        num_steps=steps, tokens_per_step=sum(span.stop - span.start for plan in plans for span in plan) / steps,
        rows_per_step=sum(len(plan) for plan in plans) / steps,
        step_ms=total / 1e3 / steps, busy_ms=busy / 1e3 / steps, idle_ms=(total - busy) / 1e3 / steps,
        between_steps_ms=sum(us for us, a, b in gaps if a.step != b.step) / 1e3 / steps,
        gaps_per_step=len(gaps) / steps, largest_gaps=tuple(sorted(gap_stats, key=lambda g: -g.us)[:6]),
        categories=categories, host_ms=dict(host), memory_bytes=memory or {},
        ceiling_tflops=ceilings[0] / 1e12 if ceilings else None, ceiling_tbps=ceilings[1] / 1e12 if ceilings else None,
    )  # fmt: skip
