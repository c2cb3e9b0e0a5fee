"""Benefit and cost of the prefix cache and host pages: samples of a prompt, conversations, distinct prompts.

    python benchmarks/reuse_gpu.py mistral-7b-instruct-v0.3 --out reuse.json --trace chat.json.gz
    python benchmarks/reuse_gpu.py mistral-7b-instruct-v0.3 --out reuse.json --peer-log vllm.txt --peer-version 0.23.0
    python benchmarks/reuse_gpu.py mistral-7b-instruct-v0.3 --trace chat.json.gz --plot paging.svg    # measures nothing

Samples: 32 prompts of 1,024 tokens, 16 samples of 256 tokens each, with and without shared-prefix attention. Cost: 256
distinct prompts of 1,024 tokens, 128 tokens each, with and without the prefix cache, alternately, since a warm GPU
slows down more than the prefix cache could cost. Conversations: 64 of 8 turns, each with its own system prompt of 1,024
tokens; a turn adds 256 tokens and is answered with 32. The conversations take turns, so that before a conversation's
next turn the others have used the cache, which fits a quarter of all their tokens. Random weights. The second form adds
the rows of another engine that ran on the same machine, the third plots a trace.
"""

import argparse
import gzip
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import fastgen
from fastgen.cli.bench.results import parse_peer_log
from fastgen.core.prefix_cache import PageCopies
from fastgen.offload.host_offload import page_bytes

HERE = Path(__file__).parent
MODES: dict[str, dict[str, Any]] = {
    "no reuse": {"prefix_cache": False},
    "device": {},
    "device + host": {"offload": "host"},
}


def copy_rates(size: int = 2**30) -> dict[str, float]:
    """Returns the GB/s of plain copies between pinned memory and the device."""
    host, device = torch.empty(size, dtype=torch.uint8, pin_memory=True), torch.empty(size, dtype=torch.uint8, device=0)
    rates = {}
    for name, to, source in (("host to device", device, host), ("device to host", host, device)):
        to.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(4):
            to.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        rates[name] = 4 * size / (time.perf_counter() - start) / 1e9
    return rates


def page_in_rate(engine: fastgen.Engine) -> float:
    """Returns the GB/s of HostOffload alone, copying pages back to the device."""
    offload, page = engine.page_copier, engine.state.page_size
    n = min(offload.num_host_pages, engine.cache_capacity // page, 256)
    pairs = tuple((i + 1, i + 1) for i in range(n))
    offload.start_copies(PageCopies(to_host=pairs))
    torch.cuda.synchronize()
    times = []
    for _ in range(4):
        start = time.perf_counter()
        offload.start_copies(PageCopies(to_device=pairs))
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return n * page_bytes(engine.model_config.num_layers, page, engine.cache_rows) / statistics.median(times) / 1e9


def replay(
    engine: fastgen.Engine, args: argparse.Namespace, watch: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Runs all turns of all conversations, at most `args.together` at once. `watch` is called before each step."""
    generator = torch.Generator().manual_seed(0)

    def random_tokens(n: int) -> list[int]:
        return torch.randint(100, engine.model_config.vocab_size, (n,), generator=generator).tolist()

    sampling = fastgen.SamplingParams(temperature=0.7, max_tokens=args.answer, ignore_eos=True, seed=1)
    conversations = [random_tokens(args.system) for _ in range(args.conversations)]
    pending = [(turn, i) for turn in range(args.turns) for i in range(args.conversations)]
    added: dict[int, tuple[int, int, float]] = {}
    first_seconds: dict[int, float] = {}
    first_token_seconds: list[list[float]] = [[] for _ in range(args.turns)]
    start, num_generated, num_prompt, num_cached = time.perf_counter(), 0, 0, 0
    while pending or engine.has_unfinished_requests:
        while pending and len(added) < args.together:
            turn, i = pending.pop(0)
            conversations[i] += random_tokens(args.turn)
            added[engine.add(conversations[i], sampling, stream_text=False)] = turn, i, time.perf_counter()
            num_prompt += len(conversations[i])
        watch()
        for event in engine.step():
            turn, i, added_at = added[event.request_id]
            if event.request_id not in first_seconds:
                first_seconds[event.request_id] = time.perf_counter() - added_at
                first_token_seconds[turn].append(first_seconds[event.request_id])
            if event.output is not None:
                conversations[i] += event.output.completions[0].token_ids
                num_generated += len(event.output.completions[0].token_ids)
                num_cached += event.output.num_cached_tokens
                del added[event.request_id]
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds, "output_tok_s": num_generated / seconds, "prompt_tokens": num_prompt, "reused": num_cached,
        "total_tok_s": (num_generated + num_prompt) / seconds,
        "first_token_ms": [1e3 * statistics.median(x) for x in first_token_seconds],
    }  # fmt: skip


def intervals(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Returns the (start, end) times in µs at which a trace's kernels ran and pages were copied."""
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    rows = {"pages come back": [], "pages go": [], "kernels": []}
    for e in events:
        span = e.get("ts", 0), e.get("ts", 0) + e.get("dur", 0)
        if e.get("cat") == "gpu_memcpy" and e["args"].get("bytes", 0) > 2**18:
            rows["pages come back" if "HtoD" in e["name"] else "pages go"].append(span)
        elif e.get("cat") == "kernel" and e["name"] != "_move":
            rows["kernels"].append(span)
    return {name: sorted(spans) for name, spans in rows.items()}


def draw(trace: Path, path: Path, milliseconds: float = 100) -> None:
    """Plots the first `milliseconds` of a trace as bars."""
    from matplotlib.figure import Figure

    rows = intervals(trace)
    start = rows["kernels"][0][0]
    figure = Figure(figsize=(9, 2.2), layout="constrained")
    axes = figure.subplots()
    for y, (name, spans) in enumerate(reversed(rows.items())):
        bars = [((a - start) / 1e3, (b - a) / 1e3) for a, b in spans]
        axes.broken_barh([x for x in bars if x[0] < milliseconds], (y - 0.35, 0.7), color=f"C{y}", label=name)
    axes.set(yticks=range(len(rows)), yticklabels=[*reversed(rows)], xlabel="ms", xlim=(0, milliseconds))
    figure.savefig(path)


def trace(engine: fastgen.Engine, args: argparse.Namespace) -> dict[str, Any]:
    """Traces steps while pages are loaded from the host. Returns the fraction of the copies that kernels overlap."""
    before, windows = engine.cache_stats.num_loaded_pages, list[Any]()
    engine.params_changed()  # the same conversations again, from nothing
    with ExitStack() as stack:

        def watch() -> None:
            if not windows and engine.cache_stats.num_loaded_pages > before + 256:
                windows.append(stack.enter_context(engine.profile(num_steps=32, path=args.trace, skip_first=0)))

        replay(engine, argparse.Namespace(**vars(args) | {"turns": 4}), watch)
    summary = windows[0].summary
    rows = intervals(args.trace)
    copies, kernels = rows["pages come back"], rows["kernels"]
    overlap, first_kernel = 0.0, 0
    for begin, end in copies:
        while first_kernel < len(kernels) and kernels[first_kernel][1] <= begin:
            first_kernel += 1
        covered, i = begin, first_kernel
        while i < len(kernels) and kernels[i][0] < end:
            overlap += max(0.0, min(end, kernels[i][1]) - max(covered, kernels[i][0]))
            covered, i = max(covered, kernels[i][1]), i + 1
    total = sum(end - begin for begin, end in copies)
    print(summary)
    return {"summary": str(summary), "copies_ms": total / 1e3, "copies_beside_kernels": overlap / total}


def measure_rates(engine: fastgen.Engine, prompts: int, output: int, samples: int, repeats: int) -> list[float]:
    """Returns output tokens/s of each repeat, with new random prompts of 1,024 tokens."""
    rates = []
    sampling = fastgen.SamplingParams(temperature=0.7, max_tokens=output, n=samples, ignore_eos=True)
    for _ in range(repeats):
        batch = torch.randint(100, engine.model_config.vocab_size, (prompts, 1024)).tolist()
        torch.cuda.synchronize()
        start = time.perf_counter()
        engine.generate(batch, sampling, progress=False)
        rates.append(prompts * samples * output / (time.perf_counter() - start))
    return rates


def measure_sharing(engine: fastgen.Engine) -> dict[str, Any]:
    """Measures several samples per prompt, and distinct prompts."""
    settings, results = engine.config, {}
    measure_rates(engine, 32, 256, 16, 1)  # warm
    for name, enabled in (("shared attention", True), ("each by itself", False)):
        engine.core.config = replace(settings, kv_cache=replace(settings.kv_cache, shared_prefix_attention=enabled))
        results[name] = measure_rates(engine, 32, 256, 16, 4 if enabled else 2)
        print("32 x 1024, 16 samples -> 256,", name, results[name], flush=True)
    engine.core.config = settings
    prefix_cache, rates = engine.state.prefix_cache, {"without": [], "with": []}
    for name in ("without", "with", "with", "without") * 2:
        engine.core.state = engine.state._replace(
            prefix_cache=type(prefix_cache)(
                prefix_cache.page_size, prefix_cache.num_device_pages, enable_prefix_caching=name == "with"
            )
        )
        rates[name] += measure_rates(engine, 256, 128, 1, 1)
    print("256 x 1024 -> 128, without and with the tree of prefixes", rates, flush=True)
    return results | {f"distinct prompts, {name} the tree": x for name, x in rates.items()}


def measure_conversations(
    params: fastgen.Params, model_config: fastgen.ModelConfig, args: argparse.Namespace
) -> dict[str, Any]:
    """Runs the conversations in each mode."""
    tokens = args.conversations * (args.system + args.turns * (args.turn + args.answer)) // 4
    per_token = 2 * model_config.num_layers * model_config.num_kv_heads * model_config.head_dim * 2
    results: dict[str, Any] = {"copies": copy_rates(), "cache_tokens": tokens}
    results["settings"] = {k: v for k, v in vars(args).items() if isinstance(v, int)}
    for name in args.modes:
        host = {"host_gb": 5 * tokens * per_token / 1e9} if "offload" in MODES[name] else {}
        with fastgen.Engine(
            params,
            model_config,
            progress=False,
            max_num_seqs=64,
            token_budget=4096,
            cache_tokens=tokens,
            **MODES[name],
            **host,
        ) as engine:
            if host:
                results["host"] = {"gb": host["host_gb"], "seconds": engine.page_copier.alloc_seconds}
                results["page_in_gb_s"] = page_in_rate(engine)
            results[name] = replay(engine, args)
            c = engine.cache_stats
            results[name]["counts"] = {k: getattr(c, k) for k in c.__slots__}
            print(name, json.dumps(results[name]), flush=True)
            if host and args.trace:
                results["trace"] = trace(engine, args)
                print({k: v for k, v in results["trace"].items() if k != "summary"}, flush=True)
    results["speedup"] = {name: results[args.modes[0]]["seconds"] / results[name]["seconds"] for name in args.modes}
    print(json.dumps({k: results.get(k) for k in ("speedup", "copies", "page_in_gb_s", "host")}, indent=1), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--system", type=int, default=1024)
    parser.add_argument("--turn", type=int, default=256)
    parser.add_argument("--answer", type=int, default=32)
    parser.add_argument("--together", type=int, default=64, help="conversations that wait for an answer at once")
    parser.add_argument("--modes", nargs="+", default=[*MODES], choices=[*MODES], help="the first is what others beat")
    parser.add_argument("--trace", type=Path, help="of steps in which pages come back")
    parser.add_argument("--plot", type=Path, help="draw --trace, and do nothing else")
    parser.add_argument("--peer-log", type=Path, help="another engine's lines, to be added to --out")
    parser.add_argument("--peer-version", default="unknown")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "reuse_gpu.json")
    args = parser.parse_args()
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {}

    def save() -> None:
        args.out.write_text(json.dumps(results, indent=1) + "\n")

    if args.plot:
        return draw(args.trace, args.plot)
    if args.peer_log:
        results["peer"] = parse_peer_log(args.peer_log, args.peer_version, results["gpu"])
        save()
        return
    model_config = fastgen.from_hf_config(json.loads((HERE / "configs" / f"{args.model}.json").read_text()))
    with torch.no_grad():
        params = fastgen.init(model_config, 0, device="cuda", dtype=torch.bfloat16)
    results = {"model": args.model, "gpu": torch.cuda.get_device_name()}
    with fastgen.Engine(params, model_config, progress=False) as engine:
        results["share"] = measure_sharing(engine)
    save()
    results["conversations"] = measure_conversations(params, model_config, args)
    save()


if __name__ == "__main__":
    main()
