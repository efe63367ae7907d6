"""What a rank costs, and what rank pages save where ranks are mixed."""

import sys
from pathlib import Path
from typing import Any

from experiments.common import Experiment
from experiments.show import plot_ratios
from jlora.benchmark.results import Group


def padding(ranks: str, adapters: int, page: int) -> tuple[int, int, int]:
    """Rank rows of the adapters: their own, in pages, and padded to the largest."""
    every = [int(rank) for rank in ranks.split(",")]
    own = [every[i % len(every)] for i in range(adapters)]
    return sum(own), sum(-(-rank // page) * page for rank in own), max(own) * len(own)


def plot(figure: Any, groups: list[Group]) -> None:
    """Speed over base by ranks, with the rank rows that a step reads."""
    group = groups[-1]
    rows = group.of("unmerged")
    page = group.session["plan"]["adapter_page_rows"]
    labels = []
    for row in rows:
        _, paged, padded = padding(row["ranks"], row["adapters"], page)
        labels.append(f"{row['ranks']}\n{paged} / {padded}")
    (adapters,) = group.session["workload"]["adapters_n"]
    title = f"{adapters} adapters of these ranks\nrank rows in pages / padded to the largest"
    plot_ratios(figure, rows, labels, title)


EXPERIMENT = Experiment(folder=Path(__file__).parent, plot=plot)

if __name__ == "__main__":
    sys.exit(EXPERIMENT.main())
