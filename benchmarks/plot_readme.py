"""Draws docs/throughput.png, the plot of the README, from rows in results/: python benchmarks/plot_readme.py"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
MODEL, HARDWARE = "mistral-7b-instruct-v0.3", "NVIDIA H200"
ENGINES = {"fastgen": ("fastgen", "C0"), "vllm": ("vLLM", "C1")}
PROMPTS, SINGLE, LONG = "512x1024x", "1x128x256", "512x1024x512"
Row = dict[str, Any]


def read_rows() -> list[Row]:
    """Returns the rows of the session in which both engines ran, and fastgen's longest outputs, from another one."""
    rows = json.loads((RESULTS / "mistral_gpu.json").read_text())
    longest = [row for row in json.loads((RESULTS / "models_gpu.json").read_text()) if row["workload"] == LONG]
    rows = [row for row in rows + longest if (row["model"], row["hardware"], row["tp"]) == (MODEL, HARDWARE, 1)]
    assert {row["engine"] for row in rows} == ENGINES.keys()
    return rows


def plot(rows: list[Row], path: Path) -> None:
    """Writes the plot: 512 prompts of 1,024 tokens for each output length on the left, batch size 1 on the right."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    lengths = sorted({row["output_len"] for row in rows if row["workload"].startswith(PROMPTS)})
    for i, (engine, (name, color)) in enumerate(ENGINES.items()):
        own = [row for row in rows if row["engine"] == engine]
        version = next(row["engine_version"] for row in own)
        for row in own:
            if row["workload"].startswith(PROMPTS):
                alone = row["workload"] == LONG
                x = lengths.index(row["output_len"]) + (0 if alone else 0.4 * i - 0.2)
                fill = {"color": "none", "edgecolor": color, "hatch": "//"} if alone else {"color": color}
                label = f"{name} {version}" + ", one run on another H200" * alone
                known = left.get_legend_handles_labels()[1]
                bars = left.bar(x, row["output_tok_s"], 0.4, label=label if label not in known else None, **fill)
                left.bar_label(bars, fmt="{:,.0f}", fontsize="small")
            elif row["workload"] == SINGLE:
                right.bar_label(right.bar(name, row["output_tok_s"], 0.6, color=color), fmt="{:,.0f}", fontsize="small")
    left.set_xticks(range(len(lengths)), [str(n) for n in lengths])
    left.set(title="512 prompts of 1,024 tokens", xlabel="output tokens of each prompt", ylabel="output tokens/s")
    left.legend(fontsize="small")
    right.set(title="one request, 128 tokens", xlabel="256 output tokens")
    for axes in (left, right):
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.margins(y=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Mistral 7B's shapes in bf16 with random weights, on one H200", fontsize="medium")
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS.parents[1] / "docs" / "throughput.png")
    plot(read_rows(), parser.parse_args().out)


if __name__ == "__main__":
    main()
