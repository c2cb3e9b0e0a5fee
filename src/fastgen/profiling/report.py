"""What a trace of some steps says: parts, layers, gaps and rates, read kernel by kernel.

Kernels that a CUDA graph replays carry no ranges of the host. Their step is the one whose range holds the launch with
their correlation id, their part is told by their name (PARTS), and their layer by counting attention (`layers`).
"""

import re
import textwrap
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen.core.model_config import ModelConfig
from fastgen.core.scheduler import Plan
from fastgen.profiling.roofline import StepWork, operation_costs

STEP_LABEL = re.compile(r"step (\d+) \(tokens \d+, rows \d+\)")
CATEGORY_TRACK_PID = 1_000_000  # pid of the row added to the trace
NOT_INDUCTOR_FUSED = (
    r"^(?!triton_(?!tem))(?:.*?)"  # not inductor's fused pointwise kernels, named after all they came from
)
CATEGORY_REGEXES = {  # part -> names of its GPU kernels and CPU operators; the first that fits
    "memcpy and memset": r"^_?mem(cpy|set)",
    "collective": NOT_INDUCTOR_FUSED + r"(nccl|symm|all_?reduce|all_?gather|reduce_?scatter|multimem)",
    "attention": NOT_INDUCTOR_FUSED + r"(^_(prefill|decode)|paged|flash|fmha|sdpa|attention)",
    "sampling": r"argmax|top_?k|sampl|softmax|logsumexp|sort|cumsum|exponential",
    "linear": NOT_INDUCTOR_FUSED + r"(gemm|gemv|cutlass|nvjet|cublas|xmma|split_?k|_linear|triton_tem|dot_kernel"
    r"|aten::(linear|addmm|baddbmm|mm|bmm|matmul|einsum)$)",
    "rope and cache write": r"rope|rotary|index_put",
    "pointwise": r"^triton_|elementwise|reduce|norm|copy|gather|index|cat|aten::",
}
CATEGORY_PATTERNS = {part: re.compile(pattern, re.IGNORECASE) for part, pattern in CATEGORY_REGEXES.items()}
ROOFLINE_OPS = {  # part of the summary -> parts of fastgen.profiling.roofline that it does
    "linear": ("linear", "head"),
    "attention": ("prefill attention", "decode attention"),
    "pointwise": ("pointwise",),
}
MERGED_CATEGORIES = {"rope and cache write": "pointwise"}  # one row of the limits for both


# --- what a step has to do, and what the device can do ------------------------------------------------------------


def compute_step_work(plan: Plan) -> StepWork:
    """The work of a step. A span of one token is decoding: it reads `stop` keys, windows ignored."""
    prefill = [span for span in plan if span.stop - span.start > 1]
    return StepWork(
        num_tokens=sum(span.stop - span.start for span in plan),
        num_sampled=sum(span.needs_sampling for span in plan),
        num_prefill_pairs=sum(
            span.stop * (span.stop + 1) // 2 - span.start * (span.start + 1) // 2 for span in prefill
        ),
        num_decode_keys=sum(span.stop for span in plan if span.stop - span.start == 1),
        num_prefill_keys=sum(span.stop for span in prefill),
    )


def measure_ceilings(device: torch.device | str, dtype: torch.dtype | None = None) -> tuple[float, float]:
    """(flop/s, bytes/s) that a device reaches: large matrix products of random numbers, and copies. Measured once.

    It takes a second and up to 2.5 GB on a GPU. `dtype` None is bfloat16 there and float32 on a CPU.
    """
    device = torch.device(device)
    try:
        return _measure_ceilings(device, dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16))
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # others may want what this held


@cache
def _measure_ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    cuda = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if cuda else 2**28
    n = 512 if not cuda else 8192 if free > 2**31 else 2048

    def rate(call: Callable[..., object], *args: Tensor) -> float:
        """Calls a second."""
        for seconds in (0.0, 0.5 if cuda else 0.1):  # the first ones warm up
            calls, start = 0, time.perf_counter()
            while not calls or time.perf_counter() - start < seconds:
                for _ in range(10):
                    call(*args)
                if cuda:
                    torch.cuda.synchronize(device)
                calls += 10
        return calls / (time.perf_counter() - start)

    a, b, out = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(3))
    flops = 2 * n**3 * rate(lambda a, b, out: torch.mm(a, b, out=out), a, b, out)
    source, target = (torch.zeros(min(2**30, free // 4), device=device, dtype=torch.uint8) for _ in range(2))
    return flops, 2 * len(source) * rate(Tensor.copy_, target, source)


# --- reading a trace ----------------------------------------------------------------------------------------------


class KernelEvent(NamedTuple):
    """What ran on the device (on a CPU: an operator that no other one contains), in µs."""

    start: float
    end: float
    name: str
    category: str
    step: int


@cache
def categorize_kernel(name: str) -> str:
    """Part of the step that a kernel or operator belongs to, by its name."""
    return next((part for part, pattern in CATEGORY_PATTERNS.items() if pattern.search(name)), "other")


def short_kernel_name(name: str) -> str:
    """A kernel's own name, without return type, namespaces, template and arguments."""
    name = re.split(r"[<(]", name.replace("(anonymous namespace)::", ""), maxsplit=1)[0].strip()
    return (name if name.startswith(("Mem", "aten")) else re.split(r"[ :]", name)[-1])[:44]


def read_kernels(events: Sequence[dict[str, Any]]) -> list[KernelEvent]:
    """The device's work by start, each with its step; on a GPU what was launched in the step's range on the host.

    What no step launched belongs to the step before it. Where no launch is known at all, the longest pauses part the
    steps.
    """
    ranges = sorted((e["ts"], e["ts"] + e["dur"], int(m[1])) for e, m in _find_step_ranges(events))
    if not ranges:
        return []

    def inside(at: float) -> int | None:
        i = bisect_right(ranges, at, key=lambda r: r[0]) - 1
        return ranges[i][2] if i >= 0 and at <= ranges[i][1] else None

    gpu = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") and "dur" in e]
    if gpu:
        launched = {
            e["args"]["correlation"]: inside(e["ts"])
            for e in events
            if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
        }
        found = [(e, launched.get(e["args"].get("correlation"))) for e in sorted(gpu, key=lambda e: e["ts"])]
        if all(step is None for _, step in found):
            pause = [b["ts"] - a["ts"] - a["dur"] for (a, _), (b, _) in zip(found, found[1:], strict=False)]
            longest = sorted(range(len(pause)), key=lambda i: pause[i])[len(pause) - (len(ranges) - 1) :]
            found = [(e, ranges[sum(j < i for j in longest)][2]) for i, (e, _) in enumerate(found)]
    else:
        found = [(e, inside(e["ts"])) for e in _outermost_cpu_ops(events)]
    step: int | None = None
    result = []
    for e, own in found:
        step = step if own is None else own
        if step is not None:
            result.append(KernelEvent(e["ts"], e["ts"] + e["dur"], e["name"], categorize_kernel(e["name"]), step))
    return result


def _find_step_ranges(events: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], re.Match[str]]]:
    named = [(e, STEP_LABEL.fullmatch(e["name"])) for e in events if e.get("cat") == "user_annotation"]
    return [(e, m) for e, m in named if m]


def _outermost_cpu_ops(events: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Operators of a CPU that no other contains; regions that only group operators are looked into."""
    until: dict[Any, float] = defaultdict(float)  # by thread
    for e in sorted((e for e in events if e.get("cat") == "cpu_op"), key=lambda e: (e["ts"], -e["dur"])):
        if e["ts"] >= until[e["tid"]] and (e["name"].startswith("aten::") or categorize_kernel(e["name"]) != "other"):
            until[e["tid"]] = e["ts"] + e["dur"]
            yield e


def split_into_layers(ks: Sequence[KernelEvent], num_layers: int) -> Iterator[tuple[int, float, float]]:
    """(layer, start, end) of one step's kernels.

    Attention kernels with no linear one between them are a layer's. It starts at its qkv product: as many linear
    kernels before its attention as there are before the step's first. It ends where the next one starts, so that a
    norm fused with the residual counts to the layer before; the last ends after as many linear kernels as the first.
    """
    linear = [i for i, k in enumerate(ks) if k.category == "linear"]
    last = {
        bisect_right(linear, i): i for i, k in enumerate(ks) if k.category == "attention"
    }  # by linear ones before it
    before = list(last)
    front = before[0] if before else 0
    back = before[1] - 2 * front if len(before) > 1 else len(linear) - front
    firsts = [max(n - front, m) if front else m for m, n in zip([0, *before], before, strict=False)]
    starts = [linear[first] if first < n else 0 for first, n in zip(firsts, before, strict=True)]
    for i, n in enumerate(before):
        end = starts[i + 1] if i + 1 < len(before) else max([last[n], *linear[n : n + max(0, back)]]) + 1
        yield i % num_layers, ks[starts[i]].start, max(k.end for k in ks[starts[i] : end])


def find_gaps(ks: Sequence[KernelEvent]) -> tuple[float, list[tuple[float, KernelEvent, KernelEvent]]]:
    """µs in which anything ran, and the pauses: (µs, the kernel that ended last before it, the one after it)."""
    busy, last = 0.0, ks[0]._replace(end=ks[0].start)
    found = []
    for k in ks:
        if k.start > last.end:
            found.append((k.start - last.end, last, k))
        busy += max(0.0, k.end - max(k.start, last.end))
        last = max(last, k, key=lambda k: k.end)
    return busy, found


def build_category_track(ks: Sequence[KernelEvent], num_layers: int) -> list[dict[str, Any]]:
    """Events of the row "GPU parts": a range for each step, for each layer, and for kernels of one part in a row."""
    spans: dict[str, list[tuple[str, float, float]]] = {"steps": [], "layers": [], "parts": []}
    for step in dict.fromkeys(k.step for k in ks):
        own = [k for k in ks if k.step == step]
        spans["steps"].append((f"step {step}", own[0].start, max(k.end for k in own)))
        spans["layers"] += [(f"layer {n}", start, end) for n, start, end in split_into_layers(own, num_layers)]
    previous = None
    for k in ks:
        if previous and (previous.step, previous.category) == (k.step, k.category):
            name, start, end = spans["parts"].pop()
            spans["parts"].append((name, start, max(end, k.end)))
        else:
            spans["parts"].append((k.category, k.start, k.end))
        previous = k
    events = [
        _metadata_event("process_name", 0, name="GPU parts"),
        _metadata_event("process_sort_index", 0, sort_index=-1),
    ]
    for tid, (name, ranges) in enumerate(spans.items()):
        events += [
            _metadata_event("thread_name", tid, name=name),
            _metadata_event("thread_sort_index", tid, sort_index=tid),
        ]
        for i, (label, start, end) in enumerate(ranges):
            end = min(end, ranges[i + 1][1]) if i + 1 < len(ranges) else end  # ranges of a track may not overlap
            common = {"ph": "X", "cat": "gpu_parts", "pid": CATEGORY_TRACK_PID, "tid": tid}
            events.append({**common, "name": label, "ts": start, "dur": end - start})
    return events


def _metadata_event(event: str, tid: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": event, "pid": CATEGORY_TRACK_PID, "tid": tid, "args": args}


# --- the summary --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CategoryStats:
    """A part of the step. What it achieved is None where its work or the ceilings are not known."""

    ms: float  # a step
    time_fraction: float  # of the step's time; kernels that run at once count each
    num_kernels: float  # a step
    tflops: float | None = None
    tbps: float | None = None
    fraction_of_ceiling: float | None = None  # time that its work takes at the ceilings / its time


@dataclass(frozen=True)
class KernelGap:
    """Pauses of the device between two kernels of these names, together."""

    before: str
    after: str
    count: int
    us: float
    largest_us: float


@dataclass(frozen=True)
class ProfileSummary:
    """What a window found; times are means of a step. str() is a page of text, to_dict() is for JSON.

    The device's time runs from its first kernel to its last, and step_ms = busy_ms + idle_ms: pauses between steps are
    part of it.
    """

    device: str
    source: str  # what was timed: GPU kernels or CPU operators
    num_steps: int
    tokens_per_step: float
    rows_per_step: float
    step_ms: float
    busy_ms: float
    idle_ms: float
    between_steps_ms: float  # of idle_ms: between the last kernel of a step and the first of the next
    gaps_per_step: float
    largest_gaps: tuple[KernelGap, ...]
    categories: dict[str, CategoryStats]  # the most time first
    host_ms: dict[str, float]  # by range, "step" for the whole
    ceiling_tflops: float | None
    ceiling_tbps: float | None
    memory_bytes: dict[str, int]  # bytes by owner

    def to_dict(self) -> dict[str, Any]:
        """The same as dictionaries, lists and numbers."""
        return asdict(self)

    def __str__(self) -> str:
        def number(value: float | None, form: str = ".3g") -> str:
            return format(value, form) if value else ""

        def listed(name: str, values: Iterable[str]) -> str:
            return textwrap.fill(f"{name}: {', '.join(values)}", 118, subsequent_indent=" " * (len(name) + 2))

        lines = [
            f"{self.num_steps} steps of {self.tokens_per_step:.1f} tokens in {self.rows_per_step:.1f} rows, on {self.device}",
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
    ceiling: tuple[float, float] | None = None,
    memory: dict[str, int] | None = None,
    device: str = "cpu",
) -> ProfileSummary:
    """The summary of a trace's events; step i computed plans[i] with numbers of `width` bytes."""
    steps, ks = len(plans), read_kernels(events)
    busy, found = find_gaps(ks) if ks else (0.0, [])
    total = max(k.end for k in ks) - ks[0].start if ks else 0.0  # µs
    spent: dict[str, float] = defaultdict(float)  # µs
    count = Counter(k.category for k in ks)
    for k in ks:
        spent[k.category] += k.end - k.start
    todo: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # flops and bytes by part of the limits
    for plan in plans:
        for name, amounts in operation_costs(model_config, compute_step_work(plan), bytes_per_element).items():
            todo[name] = [a + b for a, b in zip(todo[name], amounts, strict=True)]
    result = {}
    for name, us in sorted(spent.items(), key=lambda item: -item[1]):
        done: tuple[float | None, ...] = (None, None, None)
        if ceiling and name in ROOFLINE_OPS and us:
            flops, moved = (sum(todo[inner][i] for inner in ROOFLINE_OPS[name]) for i in (0, 1))
            s = (us + sum(spent.get(other, 0.0) for other, whole in MERGED_CATEGORIES.items() if whole == name)) / 1e6
            done = (flops / s / 1e12, moved / s / 1e12, max(flops / ceiling[0], moved / ceiling[1]) / s)
        result[name] = CategoryStats(us / 1e3 / steps, us / total if total else 0.0, count[name] / steps, *done)
    pairs: dict[tuple[str, str], list[float]] = defaultdict(list)
    for us, before, after in found:
        pairs[short_kernel_name(before.name), short_kernel_name(after.name)].append(us)
    largest = [KernelGap(*names, len(us), sum(us), max(us)) for names, us in pairs.items()]
    host: dict[str, float] = defaultdict(float)
    for e in sorted((e for e in events if e.get("cat") == "user_annotation"), key=lambda e: e["ts"]):
        host["step" if STEP_LABEL.fullmatch(e["name"]) else re.sub(r" \d+$", "", e["name"])] += e["dur"] / 1e3 / steps
    return ProfileSummary(
        device=device,
        source="GPU kernels" if any(e.get("cat") == "kernel" for e in events) else "CPU operators",
        num_steps=steps,
        tokens_per_step=sum(span.stop - span.start for plan in plans for span in plan) / steps,
        rows_per_step=sum(len(plan) for plan in plans) / steps,
        step_ms=total / 1e3 / steps,
        busy_ms=busy / 1e3 / steps,
        idle_ms=(total - busy) / 1e3 / steps,
        between_steps_ms=sum(us for us, a, b in found if a.step != b.step) / 1e3 / steps,
        gaps_per_step=len(found) / steps,
        largest_gaps=tuple(sorted(largest, key=lambda g: -g.us)[:6]),
        categories=result,
        host_ms=dict(host),
        ceiling_tflops=ceiling[0] / 1e12 if ceiling else None,
        ceiling_tbps=ceiling[1] / 1e12 if ceiling else None,
        memory_bytes=memory or {},
    )


# --- windows ------------------------------------------------------------------------------------------------------
