"""Does it matter who is asked for? Punica's popularities: identical, distinct, uniform, zipf."""

import sys
from pathlib import Path
from typing import Any

from experiments.common import Experiment
from experiments.show import plot_ratios
from jlora.benchmark.results import Group


def plot(figure: Any, groups: list[Group]) -> None:
    """Speed over base by popularity."""
    rows = groups[-1].of("unmerged")
    (adapters,) = groups[-1].session["workload"]["adapters_n"]
    plot_ratios(figure, rows, [row["popularity"] for row in rows], f"{adapters} adapters")


EXPERIMENT = Experiment(folder=Path(__file__).parent, plot=plot)

if __name__ == "__main__":
    sys.exit(EXPERIMENT.main())
