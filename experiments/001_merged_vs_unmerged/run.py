"""Merge or not? S-LoRA's ablation: 1, 2 and 5 adapters, merged (in turns) against unmerged."""

import sys
from pathlib import Path
from typing import Any

from experiments.common import Experiment
from experiments.show import counts, error_bars
from jlora.benchmark.results import Group


def plot(figure: Any, groups: list[Group]) -> None:
    """Speed over base by the number of adapters."""
    axes = figure.subplots()
    for system in ("merged", "unmerged"):
        rows = groups[-1].of(system)
        middle, spread = error_bars(rows)
        axes.errorbar(
            [row["adapters"] for row in rows], middle, spread, label=system, marker="o", capsize=3
        )
    for ratio in error_bars(groups[-1].of("compiled"))[0]:
        axes.axhline(ratio, color="#999999", linestyle=":", label="LoRA compiled in, unused")
    axes.axhline(1, color="#999999", linewidth=0.8)
    counts(axes, [row["adapters"] for row in groups[-1].of("unmerged")])
    axes.set_xlabel("adapters that requests ask for")
    axes.set_ylabel("tok/s over base, same round")
    axes.legend(frameon=False)


EXPERIMENT = Experiment(folder=Path(__file__).parent, plot=plot)

if __name__ == "__main__":
    sys.exit(EXPERIMENT.main())
