"""Measures decoding on a busy CPU with different waiting of OpenMP's threads; other processes should be running.

    python benchmarks/busy_cpu.py benchmarks/results/busy_cpu.json

Each setting runs in a process of its own, since libgomp reads the variables when torch is imported. A row has the load
average before the run, the tokens/s of each request of the default model, and its CPU seconds per second.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

SETTINGS: list[dict[str, str]] = [{}, {"OMP_WAIT_POLICY": "passive"}, {"GOMP_SPINCOUNT": "1000"}]


def measure(num_tokens: int, num_repeats: int) -> dict[str, object]:
    """Returns the rates of requests that run alone, in this process."""
    import torch

    import fastgen

    sampling = fastgen.SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    row: dict[str, object] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
    }
    rates, cpu = list[float](), list[float]()
    with fastgen.Engine.from_pretrained(progress=False, cache_tokens=4096, prefix_cache=False) as engine:
        engine.generate("Hello", fastgen.SamplingParams(temperature=0, max_tokens=2), progress=False)
        for _ in range(num_repeats):
            start, cpu_start = time.perf_counter(), time.process_time()
            engine.generate("The sea is", sampling, progress=False)
            seconds = time.perf_counter() - start
            rates.append(round(num_tokens / seconds, 2))
            cpu.append(round((time.process_time() - cpu_start) / seconds, 2))
    return row | {"tokens": num_tokens, "tok_s": rates, "cpu_per_s": cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a JSON file for the rows")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of each request (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="requests (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="processes for each setting, in turn (%(default)s)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.tokens, args.repeats)))
        return
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [
        sys.executable,
        __file__,
        str(args.out),
        f"--tokens={args.tokens}",
        f"--repeats={args.repeats}",
        "--child",
    ]
    rows = []
    for _ in range(args.rounds):
        for setting in SETTINGS:
            done = subprocess.run(command, env=clean | setting, stdout=subprocess.PIPE, text=True, check=True)
            rows.append({"setting": setting, "cpus": os.cpu_count(), **json.loads(done.stdout)})
            print(rows[-1], flush=True)
    args.out.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
