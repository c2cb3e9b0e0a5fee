"""Overlaps the memory-bound attention of a decode step with its compute-bound matmuls, to see whether it pays.

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


def reserve_sms(processors: int) -> None:
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


def run_batch(params: Params, cache: KVCache, b: Batch, model_config: fastgen.ModelConfig, ops: Any) -> Tensor:
    hidden, residual = transformer.run_layers(params, cache, b, model_config, ops)
    return ops.final_norm(hidden, residual, params.final_norm, model_config.rms_norm_eps)


def run_halves(
    params: Params, cache: KVCache, halves: list[Batch], model_config: fastgen.ModelConfig, ops: Any, side: Any
) -> list[Tensor]:
    """Runs both halves at once: matmuls on the current stream, attention on `side`."""
    main = torch.cuda.current_stream()
    hidden, residual, rotations, attend, q, o, ready = [[None] * 2 for _ in range(7)]
    for i, b in enumerate(halves):
        hidden[i], residual[i], *rotations[i] = ops.embed(params.embed, b.token_ids, b.positions, model_config)
        attend[i] = ops.attention(b, model_config)

    def begin_layer(i: int, n: int) -> None:
        layer = params.layers[n]
        hidden[i], qkv = ops.add_norm_qkv(
            hidden[i], residual[i], layer.attn_norm, model_config.rms_norm_eps, layer.qkv, layer.qkv_bias
        )
        q[i] = ops.rope_and_cache_kv(
            qkv.unflatten(-1, (-1, model_config.head_dim)),
            *rotations[i],
            halves[i].slot_mapping,
            cache.k[n],
            cache.v[n],
        )
        side.wait_event(main.record_event())
        with torch.cuda.stream(side):
            o[i] = attend[i](q[i], cache.k[n], cache.v[n], None)
            ready[i] = side.record_event()

    def end_layer(i: int, n: int) -> None:
        layer = params.layers[n]
        main.wait_event(ready[i])
        residual[i] = ops.linear(o[i].flatten(1), layer.out, layer.out_bias)
        hidden[i], gated = ops.add_norm_gate_up(
            hidden[i], residual[i], layer.ffn_norm, model_config.rms_norm_eps, layer.gate_up
        )
        residual[i] = ops.linear(gated, layer.down)

    for i in range(2):
        begin_layer(i, 0)
    for n in range(model_config.num_layers):
        for i in range(2):
            end_layer(i, n)
            if n + 1 < model_config.num_layers:
                begin_layer(i, n + 1)
    return [ops.final_norm(hidden[i], residual[i], params.final_norm, model_config.rms_norm_eps) for i in range(2)]


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

    def record(**row: Any) -> None:
        results.append(row)
        print(row, flush=True)

    torch.backends.cuda.preferred_blas_library("cublaslt")
    model_config = fastgen.from_hf_config(files.read_hf_config(HERE / "configs" / f"{args.model}.json"))
    params = fastgen.init(model_config, device="cuda", dtype=torch.bfloat16)
    pages_per_seq = -(-args.context // PAGE)
    max_rows = max(args.rows)
    cache = fastgen.new_kv_cache(
        model_config, (max_rows * pages_per_seq + 1) * PAGE, device="cuda", dtype=torch.bfloat16
    )
    for leaf in (*cache.k, *cache.v):
        leaf.normal_()
    pages = torch.randperm(max_rows * pages_per_seq).view(max_rows, pages_per_seq) + 1
    table = torch.cat((torch.zeros(1, pages_per_seq), pages)).int().cuda()
    compiled = CompiledOps()
    ops = TORCH_OPS._replace(
        attention=paged_attention, embed=compiled(transformer.embed), final_norm=compiled(transformer.final_norm),
        add_norm_qkv=compiled(transformer.add_norm_qkv), add_norm_gate_up=compiled(transformer.add_norm_gate_up),
        rope_and_cache_kv=rope_cache.rope_and_cache_kv,
    )  # fmt: skip
    with torch.no_grad():
        run_batch(params, cache, batch(40, args.context, 1, table), model_config, ops)
        for rows in args.rows:
            full_batch = batch(rows, args.context, 1, table)
            halves = [batch(rows // 2, args.context, 1 + i * rows // 2, table) for i in range(2)]
            reserve_sms(0)
            expected = run_batch(params, cache, full_batch, model_config, ops)
            record(rows=rows, lanes=1, ms=graph_ms(partial(run_batch, params, cache, full_batch, model_config, ops)))
            record(
                rows=rows // 2, lanes=1, ms=graph_ms(partial(run_batch, params, cache, halves[0], model_config, ops))
            )
            for num_free in (0, 24, 36, 48, 60):
                for low in (0, -1):
                    side = torch.cuda.Stream(priority=0)
                    reserve_sms(num_free)
                    ms = graph_ms(partial(run_halves, params, cache, halves, model_config, ops, side), priority=low)
                    outputs = run_halves(params, cache, halves, model_config, ops, side)
                    pairs = zip(outputs, expected.split(rows // 2), strict=True)
                    max_error = max((a - b).abs().max().item() for a, b in pairs)
                    record(rows=rows, lanes=2, free=num_free, priority=low, ms=ms, off=max_error)
        reserve_sms(0)
        layer = params.layers[0]
        for tokens in (8192, 512, 256):
            x = torch.randn(tokens, model_config.hidden_size, device="cuda", dtype=torch.bfloat16)
            for num_free in (0, 16, 32, 48):
                reserve_sms(num_free)
                ms = graph_ms(lambda: [x @ layer.gate_up.T for _ in range(4)], seconds=2.5)  # noqa: B023
                rate = 4 * 2 * tokens * layer.gate_up.numel() / ms / 1e9
                record(product=[tokens, *layer.gate_up.shape], free=num_free, tflops=rate)
    args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
