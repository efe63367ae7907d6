"""What LoRA costs: no adapter, one, several in a batch, and switching with nearly every request."""

import sys
from pathlib import Path
from typing import Any

from experiments.common import Experiment
from experiments.show import plot_ratios, room
from jlora.benchmark.results import Group


def plot(figure: Any, groups: list[Group]) -> None:
    """Speed over base and the time between tokens."""
    group = groups[-1]
    rows = [*group.of("base"), *group.of("unmerged")]
    labels = [
        "none"
        if not row["adapters"]
        else f"{row['adapters']}{' (churn)' if row['adapters'] > room(group) else ''}"
        for row in rows
    ]
    plot_ratios(figure, rows, labels, "adapters in turn")


EXPERIMENT = Experiment(folder=Path(__file__).parent, plot=plot)

if __name__ == "__main__":
    sys.exit(EXPERIMENT.main())
