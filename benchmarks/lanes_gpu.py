"""Can a decode step hide its attention, bound by memory, behind its matmuls, bound by arithmetic?

    python benchmarks/lanes_gpu.py --out lanes.json

Two halves of a batch alternate: one half's matmuls run on some multiprocessors while the other half's attention runs
on the others. Also: how fast large matmuls are when they leave multiprocessors free, under sustained load.
"""

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastgen
from fastgen.checkpoint import files
from fastgen.compiled.compiled_ops import CompiledOps
from fastgen.core import transformer
from fastgen.core.transformer import TORCH_OPS
from fastgen.core.types import Batch, KVCache, Params
from fastgen.kernels import rope_cache
from fastgen.kernels.attention import paged_attention

HERE = Path(__file__).parent
PAGE = 16


def carve(processors: int) -> None:
    """Makes matmuls leave this many multiprocessors free."""
    torch._C._set_sm_carveout_experimental(processors or None)


def batch(rows: int, context: int, first: int, table: Tensor) -> Batch:
    """Returns a batch of `rows` sequences at `context` tokens, from `req_idx` `first` on."""
    n = torch.arange(rows, dtype=torch.int32, device="cuda")
    req_idx = n + first
    position = torch.full_like(n, context - 1)
    slot = table[req_idx, (context - 1) // PAGE] * PAGE + (context - 1) % PAGE
    start = torch.arange(rows + 1, dtype=torch.int32, device="cuda")
    return Batch(n + 5, position, slot, start, position + 1, req_idx, table, n, PAGE)


def one(params: Params, cache: KVCache, b: Batch, spec: fastgen.ModelConfig, ops: Any) -> Tensor:
    x, y = transformer.run_layers(params, cache, b, spec, ops)
    return ops.final_norm(x, y, params.final_norm, spec.rms_norm_eps)


def lanes(
    params: Params, cache: KVCache, halves: list[Batch], spec: fastgen.ModelConfig, ops: Any, side: Any
) -> list[Tensor]:
    """Runs both halves at once: matmuls on the current stream, attention on `side`."""
    main = torch.cuda.current_stream()
    x, y, turn, attend, q, o, ready = [[None] * 2 for _ in range(7)]
    for i, b in enumerate(halves):
        x[i], y[i], *turn[i] = ops.embed(params.embed, b.token_ids, b.positions, spec)
        attend[i] = ops.attention(b, spec)

    def begin(i: int, n: int) -> None:
        layer = params.layers[n]
        x[i], qkv = ops.add_norm_qkv(x[i], y[i], layer.attn_norm, spec.rms_norm_eps, layer.qkv, layer.qkv_bias)
        q[i] = ops.rope_and_cache_kv(
            qkv.unflatten(-1, (-1, spec.head_dim)), *turn[i], halves[i].slot_mapping, cache.k[n], cache.v[n]
        )
        side.wait_event(main.record_event())
        with torch.cuda.stream(side):
            o[i] = attend[i](q[i], cache.k[n], cache.v[n], None)
            ready[i] = side.record_event()

    def end(i: int, n: int) -> None:
        layer = params.layers[n]
        main.wait_event(ready[i])
        y[i] = ops.linear(o[i].flatten(1), layer.out, layer.out_bias)
        x[i], gated = ops.add_norm_gate_up(x[i], y[i], layer.ffn_norm, spec.rms_norm_eps, layer.gate_up)
        y[i] = ops.linear(gated, layer.down)

    for i in range(2):
        begin(i, 0)
    for n in range(spec.num_layers):
        for i in range(2):
            end(i, n)
            if n + 1 < spec.num_layers:
                begin(i, n + 1)
    return [ops.final_norm(x[i], y[i], params.final_norm, spec.rms_norm_eps) for i in range(2)]


def graph_ms(f: Any, priority: int = 0, seconds: float = 1.5) -> float:
    stream = torch.cuda.Stream(priority=priority)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        f()
    times, begin = [], time.perf_counter()
    while time.perf_counter() - begin < seconds:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(5):
            graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 5)
    return statistics.median(times[len(times) // 2 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mistral-7b-instruct-v0.3")
    parser.add_argument("--context", type=int, default=1088)
    parser.add_argument("--rows", type=int, nargs="*", default=[512, 256])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "lanes_gpu.json")
    args = parser.parse_args()
    results: list[dict[str, Any]] = []

    def note(**row: Any) -> None:
        results.append(row)
        print(row, flush=True)

    torch.backends.cuda.preferred_blas_library("cublaslt")
    spec = fastgen.from_hf_config(files.read_hf_config(HERE / "configs" / f"{args.model}.json"))
    params = fastgen.init(spec, device="cuda", dtype=torch.bfloat16)
    wide = -(-args.context // PAGE)
    most = max(args.rows)
    cache = fastgen.new_kv_cache(spec, (most * wide + 1) * PAGE, device="cuda", dtype=torch.bfloat16)
    for leaf in (*cache.k, *cache.v):
        leaf.normal_()
    table = torch.cat((torch.zeros(1, wide), torch.randperm(most * wide).view(most, wide) + 1)).int().cuda()
    region = CompiledOps()
    ops = TORCH_OPS._replace(
        attention=paged_attention, embed=region(transformer.embed), final_norm=region(transformer.final_norm),
        add_norm_qkv=region(transformer.add_norm_qkv), add_norm_gate_up=region(transformer.add_norm_gate_up),
        rope_and_cache_kv=rope_cache.rope_and_cache_kv,
    )  # fmt: skip
    with torch.no_grad():
        one(params, cache, batch(40, args.context, 1, table), spec, ops)
        for rows in args.rows:
            whole = batch(rows, args.context, 1, table)
            halves = [batch(rows // 2, args.context, 1 + i * rows // 2, table) for i in range(2)]
            carve(0)
            want = one(params, cache, whole, spec, ops)
            note(rows=rows, lanes=1, ms=graph_ms(partial(one, params, cache, whole, spec, ops)))
            note(rows=rows // 2, lanes=1, ms=graph_ms(partial(one, params, cache, halves[0], spec, ops)))
            for free in (0, 24, 36, 48, 60):
                for low in (0, -1):
                    side = torch.cuda.Stream(priority=0)
                    carve(free)
                    ms = graph_ms(partial(lanes, params, cache, halves, spec, ops, side), priority=low)
                    off = max((a - b).abs().max().item() for a, b in zip(
                        lanes(params, cache, halves, spec, ops, side), want.split(rows // 2), strict=True))  # fmt: skip
                    note(rows=rows, lanes=2, free=free, priority=low, ms=ms, off=off)
        carve(0)
        layer = params.layers[0]
        for tokens in (8192, 512, 256):
            x = torch.randn(tokens, spec.hidden_size, device="cuda", dtype=torch.bfloat16)
            for free in (0, 16, 32, 48):
                carve(free)
                ms = graph_ms(lambda: [x @ layer.gate_up.T for _ in range(4)], seconds=2.5)  # noqa: B023
                rate = 4 * 2 * tokens * layer.gate_up.numel() / ms / 1e9
                note(product=[tokens, *layer.gate_up.shape], free=free, tflops=rate)
    args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
