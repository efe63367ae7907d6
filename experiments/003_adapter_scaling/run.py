"""How many adapters? Throughput, time to the first token and memory from 1 adapter to many."""

import sys
from pathlib import Path
from typing import Any

from experiments.common import Experiment
from experiments.show import counts, error_bars
from jlora.benchmark.results import Group


def plot(figure: Any, groups: list[Group]) -> None:
    """Three panels over the number of adapters."""
    rows = groups[-1].of("unmerged")
    numbers = [row["adapters"] for row in rows]
    speed, first, memory = figure.subplots(1, 3)
    middle, spread = error_bars(rows)
    speed.errorbar(numbers, middle, spread, marker="o", capsize=3)
    speed.axhline(1, color="#999999", linewidth=0.8)
    speed.set_ylabel("tok/s over base, same round")
    for key, style in (("ttft_p50", "o-"), ("ttft_p99", "o--")):
        first.plot(numbers, [row[key] for row in rows], style, label=key[-3:])
    first.set_ylabel("ms to the first token")
    first.legend(frameon=False)
    memory.plot(numbers, [row["rss"] / 1e9 for row in rows], "o-", label="process")
    memory.plot(
        numbers, [row["adapters_host_bytes"] / 1e9 for row in rows], "o--", label="host copies"
    )
    memory.set_ylabel("GB (all adapters are loaded throughout)")
    memory.legend(frameon=False)
    for axes in (speed, first, memory):
        counts(axes, numbers, log=True)
        axes.set_xlabel("adapters asked for")


EXPERIMENT = Experiment(folder=Path(__file__).parent, plot=plot)

if __name__ == "__main__":
    sys.exit(EXPERIMENT.main())
