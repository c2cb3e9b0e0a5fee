"""Draws docs/quality.png from results/quality.json: python benchmarks/plot_quality.py"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

RESULT = Path(__file__).parent / "results" / "quality.json"
MARKERS = dict(zip(("bf16", "fp8 cache", "fp8 weights", "fp8 weights and cache"), "o^sD", strict=True))


def plot(result: dict[str, Any], path: Path) -> None:
    """Writes the plot: each variant's mean KL from fp32 over the position, and its distribution over all text."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    for i, (name, marker) in enumerate(MARKERS.items()):
        variant = result["variants"][name]
        ranges = [*variant["positions"], *([variant["copy"]] if "copy" in variant else [])]
        left.plot([r["kl_mean"] for r in ranges], marker=marker, color=f"C{i}", label=name, markersize=5)
        for x, key in enumerate(("kl_mean", "kl_p99_9")):
            right.bar(x + 0.2 * i - 0.3, variant["text"][key], 0.2, color=f"C{i}")
    reference = result["variants"]["fp32"]
    labels = [f"{r['start']:,}–\n{r['stop']:,}" for r in reference["positions"]]
    left.set_xticks(range(len(labels) + ("copy" in reference)), labels + ["copied\ntext"] * ("copy" in reference))
    left.set(title="mean, over the position in the context", ylabel="KL from fp32, nats per token")
    right.set_xticks(range(2), ["mean", "99.9th percentile"])
    right.set(title="all text")
    left.legend(fontsize="small", loc="lower left", ncols=2)
    for axes in (left, right):
        axes.set_yscale("log")
        axes.set_ylim(bottom=3e-4)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{result['model']}: how far each token's distribution moves from fp32", fontsize="medium")
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT.parents[2] / "docs" / "quality.png")
    plot(json.loads(RESULT.read_text()), parser.parse_args().out)


if __name__ == "__main__":
    main()
