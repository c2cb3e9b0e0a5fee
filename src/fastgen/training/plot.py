"""Learning curves as an image."""

import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path


def plot_runs(runs: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> bool:
    """Plots reward and completion length over steps, one line per run. Returns False if matplotlib is missing."""
    if not find_spec("matplotlib"):
        print("no plot: it needs matplotlib, pip install fastgen[notebook]", file=sys.stderr)
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, name, label in ((left, "reward", "mean reward"), (right, "length", "tokens per completion")):
        for run, rows in runs.items():
            axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=run)
        axes.set(xlabel="step", ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
    left.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return True
