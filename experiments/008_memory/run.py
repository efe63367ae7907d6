"""Memory of adapters: what the plan computes against what a process holds, for 1 and 10 of them."""

import sys
from pathlib import Path
from typing import Any

from experiments.common import Experiment
from jlora.benchmark.results import Group

VARIANTS = tuple(("--adapters", str(n), "--room", str(n)) for n in (1, 10, 40))


def plot(figure: Any, groups: list[Group]) -> None:
    """The plan's parts, and the process, by adapters on the device."""
    axes = figure.subplots()
    labels = [f"{group.session['workload']['room']} adapters" for group in groups]
    below = [0.0] * len(groups)
    parts = ("weights", "kv_pages", "adapter_pages", "adapter_copies")
    for name in parts:
        heights = [group.session["plan"][name] / 1e9 for group in groups]
        axes.bar(labels, heights, bottom=below, width=0.5, label=f"plan: {name.replace('_', ' ')}")
        below = [a + b for a, b in zip(below, heights, strict=True)]
    rows = [group.rows[-1] for group in groups]
    if "device_bytes" in rows[0]:  # of an accelerator, which holds no host copies
        measured, what = [row["device_bytes"] / 1e9 for row in rows], "arrays on the device"
    else:
        host = [row["adapters_host_bytes"] / 1e9 for row in rows]
        axes.bar(labels, host, bottom=below, width=0.5, label="host copies of adapters")
        measured, what = [row["rss"] / 1e9 for row in rows], "process (RSS)"
    axes.plot(labels, measured, "k_", markersize=40, label=what)
    axes.set_ylabel("GB")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


EXPERIMENT = Experiment(folder=Path(__file__).parent, plot=plot, variants=VARIANTS)

if __name__ == "__main__":
    sys.exit(EXPERIMENT.main())
