"""Memory of adapters: what the plan computes against what a process holds, for 1, 10 and 40 of them."""

import sys
from pathlib import Path
from typing import Any

from experiments.common import Experiment
from jlora.benchmark.results import Group

VARIANTS = tuple(("--adapters", str(n), "--room", str(n)) for n in (1, 10, 40))


def plot(figure: Any, groups: list[Group]) -> None:
    """The plan's parts, and the process, by adapters on the device."""
    axes = figure.subplots()
    rooms = [group.session["workload"]["room"] for group in groups]
    labels = [f"{room} adapter{'s' if room > 1 else ''}" for room in rooms]
    below = [0.0] * len(groups)
    parts = ("weights", "kv_pages", "adapter_pages", "adapter_copies")
    for name in parts:
        heights = [group.session["plan"][name] / 1e9 for group in groups]
        if not any(heights):  # only a CPU's steps read copies
            continue
        axes.bar(labels, heights, bottom=below, width=0.5, label=f"plan: {name.replace('_', ' ')}")
        below = [a + b for a, b in zip(below, heights, strict=True)]
    rows = [group.rows[-1] for group in groups]
    if "device_bytes" in rows[0]:  # of an accelerator, which holds no host copies
        measured, what = [row["device_bytes"] / 1e9 for row in rows], "arrays on the device"
        peak = [row["device_bytes_peak"] / 1e9 for row in rows]
        level(axes, peak, color="0.5", linestyle="--", label="their peak since the start")
    else:
        host = [row["adapters_host_bytes"] / 1e9 for row in rows]
        axes.bar(labels, host, bottom=below, width=0.5, label="host copies of adapters")
        measured, what = [row["rss"] / 1e9 for row in rows], "process (RSS)"
    level(axes, measured, color="black", label=what)
    axes.set_ylabel("GB")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def level(axes: Any, heights: list[float], **style: Any) -> None:
    """A line across each bar."""
    places = range(len(heights))
    axes.hlines(heights, [x - 0.2 for x in places], [x + 0.2 for x in places], **style)


EXPERIMENT = Experiment(folder=Path(__file__).parent, plot=plot, variants=VARIANTS)

if __name__ == "__main__":
    sys.exit(EXPERIMENT.main())
