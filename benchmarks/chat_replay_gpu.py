"""Conversations taken up again and again: what reuse on the device and pages on the host bring.

    python benchmarks/chat_replay_gpu.py mistral-7b-instruct-v0.3 --out chat.json

64 conversations of 8 turns, each with a system prompt of its own of 1,024 tokens; a turn adds 256 tokens and is
answered with 32. The turns of all conversations take turns, so that when one comes again the others have used the
cache, which holds a quarter of what all of them need in the end. Random weights.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import fastgen

HERE = Path(__file__).parent
MODES: dict[str, dict[str, Any]] = {
    "no reuse": {"prefix_cache": False},
    "device": {},
    "device + host": {"offload": "host"},
}


def copy_rates(size: int = 2**30) -> dict[str, float]:
    """GB/s of plain copies between pinned memory and the device."""
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
    """GB/s of the mover alone, bringing back pages that it took away."""
    mover, page = engine._mover, engine.state.page
    n = min(mover.host_pages, engine.capacity // page, 256)
    pairs = tuple((i + 1, i + 1) for i in range(n))
    mover.move(fastgen.schedule.Moves(out=pairs))
    torch.cuda.synchronize()
    times = []
    for _ in range(4):
        start = time.perf_counter()
        mover.move(fastgen.schedule.Moves(back=pairs))
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    size = n * page * engine.spec.layers * 2 * engine.spec.kv_heads * engine.spec.head * engine.dtype.itemsize
    return size / statistics.median(times) / 1e9


def replay(engine: fastgen.Engine, args: argparse.Namespace) -> dict[str, Any]:
    """All turns of all conversations; at most `args.together` at once."""
    generator = torch.Generator().manual_seed(0)

    def words(n: int) -> list[int]:
        return torch.randint(100, engine.spec.vocab, (n,), generator=generator).tolist()

    sampling = fastgen.SamplingParams(temperature=0.7, max_tokens=args.answer, ignore_eos=True, seed=1)
    talks = [words(args.system) for _ in range(args.conversations)]
    due = [(turn, i) for turn in range(args.turns) for i in range(args.conversations)]
    added: dict[int, tuple[int, int, float]] = {}
    first: dict[int, float] = {}
    waits: list[list[float]] = [[] for _ in range(args.turns)]
    start, made, prompt, reused = time.perf_counter(), 0, 0, 0
    while due or engine.unfinished:
        while due and len(added) < args.together:
            turn, i = due.pop(0)
            talks[i] += words(args.turn)
            added[engine.add(talks[i], sampling, live=False)] = turn, i, time.perf_counter()
            prompt += len(talks[i])
        for event in engine.step():
            turn, i, asked = added[event.request_id]
            if event.request_id not in first:
                first[event.request_id] = time.perf_counter() - asked
                waits[turn].append(first[event.request_id])
            if event.output is not None:
                talks[i] += event.output.completions[0].token_ids
                made += len(event.output.completions[0].token_ids)
                reused += event.output.cached_tokens
                del added[event.request_id]
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds, "output_tok_s": made / seconds, "total_tok_s": (made + prompt) / seconds,
        "first_token_ms": [1e3 * statistics.median(x) for x in waits], "prompt_tokens": prompt, "reused": reused,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--system", type=int, default=1024)
    parser.add_argument("--turn", type=int, default=256)
    parser.add_argument("--answer", type=int, default=32)
    parser.add_argument("--together", type=int, default=64, help="conversations that wait for an answer at once")
    parser.add_argument("--trace", type=Path, help="of steps in which pages come back")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "chat_replay_gpu.json")
    args = parser.parse_args()
    spec = fastgen.from_hf(json.loads((HERE / "configs" / f"{args.model}.json").read_text()))
    with torch.no_grad():
        params = fastgen.init(spec, 0, device="cuda", dtype=torch.bfloat16)
    # A quarter of what all conversations hold in the end.
    tokens = args.conversations * (args.system + args.turns * (args.turn + args.answer)) // 4
    per_token = 2 * spec.layers * spec.kv_heads * spec.head * 2
    found: dict[str, Any] = {"model": args.model, "gpu": torch.cuda.get_device_name(), "copies": copy_rates()}
    found |= {"settings": {k: v for k, v in vars(args).items() if isinstance(v, int)}, "cache_tokens": tokens}
    for name, mode in MODES.items():
        host = {"host_gb": 5 * tokens * per_token / 1e9} if "offload" in mode else {}
        with fastgen.Engine(
            params, spec, progress=False, max_requests=64, token_budget=4096, cache_tokens=tokens, **mode, **host
        ) as engine:
            if "offload" in mode:
                found["host"] = {"gb": host["host_gb"], "seconds": engine._mover.seconds}
                found["page_in_gb_s"] = page_in_rate(engine)
            found[name] = replay(engine, args)
            c = engine.counts
            found[name]["counts"] = {k: getattr(c, k) for k in c.__slots__}
            print(name, json.dumps(found[name]), flush=True)
            if "offload" in mode and args.trace:
                with engine.profile(steps=6, path=args.trace, skip=1) as p:
                    replay(engine, argparse.Namespace(**vars(args) | {"turns": 1}))
                found["profile"] = str(p.summary)
                print(p.summary)
    found["speedup"] = {name: found["no reuse"]["seconds"] / found[name]["seconds"] for name in MODES}
    print(json.dumps({k: found.get(k) for k in ("speedup", "copies", "page_in_gb_s", "host")}, indent=1))
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
