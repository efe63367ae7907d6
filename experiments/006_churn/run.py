"""The cliff: what happens when more adapters are asked for than the device has room for."""

import sys
from pathlib import Path
from typing import Any

from experiments.common import Experiment
from experiments.show import counts, error_bars, room
from jlora.benchmark.results import Group


def plot(figure: Any, groups: list[Group]) -> None:
    """Speed and evictions over the number of adapters; a line where the room ends."""
    group = groups[-1]
    rows = group.of("unmerged")
    numbers = [row["adapters"] for row in rows]
    speed, first, moved = figure.subplots(1, 3)
    middle, spread = error_bars(rows)
    speed.errorbar(numbers, middle, spread, marker="o", capsize=3)
    speed.set_ylabel("tok/s over base, same round")
    for key, style in (("ttft_p50", "o-"), ("ttft_p99", "o--")):
        first.plot(numbers, [row[key] for row in rows], style, label=key[-3:])
    first.set_ylabel("ms to the first token")
    first.legend(frameon=False)
    per_request = [row["evicted_from_device"] / row["requests"] for row in rows]
    moved.plot(numbers, per_request, "o-")
    moved.set_ylabel("evictions per request")
    for axes in (speed, first, moved):
        axes.axvline(room(group), color="#999999", linestyle=":")
        counts(axes, numbers)
        axes.set_xlabel("adapters (dotted: room)")


EXPERIMENT = Experiment(folder=Path(__file__).parent, plot=plot)

if __name__ == "__main__":
    sys.exit(EXPERIMENT.main())
