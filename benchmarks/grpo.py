"""Trains with GRPO for several seeds, as `fgrun +experiment=grpo_smollm2`; plots the curves and records the wall time.

    OMP_NUM_THREADS=1 python benchmarks/grpo.py --seeds 0 1 2     # results/grpo.json and docs/grpo.png

A run that exists in a seed's folder is resumed, so that an interrupted call can be repeated. Further arguments are
overrides, as for fgrun.
"""

import argparse
import json
import platform
from pathlib import Path

import torch

from fastgen.cli.run import build_engine, compose
from fastgen.training.grpo import Trainer, plot_runs, train
from fastgen.training.problems import load_problem

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("outputs/grpo"), help="for the runs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "grpo.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "grpo.png")
    args = parser.parse_args()

    runs = {}
    for seed in args.seeds:
        folder = args.folder / f"seed{seed}"
        config = compose("+experiment=grpo_smollm2", f"seed={seed}", "grpo.export=false", *args.overrides)
        with build_engine(config, progress=False) as e:
            trainer = Trainer(e, load_problem(config.grpo.problem), config.grpo, config.sampling, seed)
            runs[f"seed {seed}"] = train(trainer, folder, resume=(folder / "checkpoint.pt").is_file())
            device = torch.cuda.get_device_name() if e.device.type == "cuda" else platform.processor() or "CPU"
        result = {
            "device": device, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "overrides": args.overrides, "runs": runs,
            "seconds": {name: round(sum(row["seconds"] for row in rows), 1) for name, rows in runs.items()},
        }  # fmt: skip
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        plot_runs(runs, args.plot)


if __name__ == "__main__":
    main()
