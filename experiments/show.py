"""How results are shown: tables for READMEs, plots, and what plots have in common."""

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jlora.benchmark.report import cell
from jlora.benchmark.results import Group

Plot = Callable[[Any, list[Group]], None]
"""Draws results on a matplotlib figure."""


def markdown(group: Group) -> str:
    """The medians of one process's settings as a table for a README, without columns that say
    nothing, and where they come from."""
    left, right = "---", "--:"
    columns = [
        ("system", left, [row["system"] for row in group.rows]),
        *((name, left, [cell(name, row) for row in group.rows]) for name in ("adapters", "popularity", "ranks")),
        ("tok/s", right, [cell("tok_s", row) for row in group.rows]),
        ("spread", right, [cell("spread", row) for row in group.rows]),
        ("of base: median (rounds)", right, [_ratios(row) for row in group.rows]),
        ("TTFT p50 / p99 ms", right, [_pair("ttft", row) for row in group.rows]),
        ("ITL p50 / p99 ms", right, [_pair("itl", row) for row in group.rows]),
        ("evictions", right, [f"{row.get('evicted_from_device', 0):.0f}" for row in group.rows]),
    ]  # fmt: skip
    columns = [column for column in columns if set(column[2]) - {"-", "0"}]
    names, aligned, cells = zip(*columns, strict=True)
    lines = [names, aligned, *zip(*cells, strict=True)]
    table = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([*table, "", origin(group)])


def origin(group: Group) -> str:
    """Where results come from, as a sentence: commit, device, versions, what else ran."""
    on, versions = device_of(group), group.session["versions"]
    others = max((row.get("others_cpu", 0) for row in group.rows), default=0)
    return (
        f"Commit {', '.join(group.commits)}, {on}, jax {versions['jax']}; other processes took at most "
        f"{others:.0%} of the cores."
    )


def device_of(group: Group) -> str:
    """The machine that was measured."""
    host, device = group.session["host"], group.session["device"]
    if device is None:
        return "a server"
    if device["platform"] == "cpu":
        return f"{host['cpu']}, {host['cores']} cores"
    return f"{device['count']} x {device['kind']}, {host['cores']} cores"


def _ratios(row: dict[str, Any]) -> str:
    rounds = ", ".join(f"{ratio:.2f}" for ratio in row["ratio_rounds"])
    return f"{cell('ratio_to_base', row)} ({rounds})"


def _pair(name: str, row: dict[str, Any]) -> str:
    p50, p99 = row[f"{name}_p50"], row[f"{name}_p99"]
    return f"{_ms(p50)} / {_ms(p99)}"


def _ms(value: float) -> str:
    return f"{value:.1f}" if value < 20 else f"{value:.0f}"


def draw(plot: Plot, groups: list[Group], path: Path) -> None:
    """One figure as SVG; without matplotlib (an optional extra) a line that says so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: pip install -e '.[plots]' brings matplotlib", file=sys.stderr)
        return
    import matplotlib as mpl

    mpl.rcParams |= {"svg.hashsalt": path.stem, "svg.fonttype": "none", "font.size": 9}
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    figure.suptitle(f"{groups[-1].session['model']}, {device_of(groups[-1])}", fontsize=9)
    plot(figure, groups)
    figure.savefig(path, metadata={"Date": None})


def room(group: Group) -> int:
    """Adapters of the group's (first) rank that the device has room for."""
    workload, plan = group.session["workload"], group.session["plan"]
    if workload["room"] is not None:
        return workload["room"]
    rank = max(int(part) for part in workload["ranks"][0].split(","))
    return plan["adapter_page_count"] // -(-rank // plan["adapter_page_rows"])


def error_bars(rows: Sequence[dict[str, Any]], key: str = "ratio") -> tuple[list, list]:
    """(medians, [below, above]) of `ratio_rounds` or `tok_s_rounds`, for matplotlib; NaN, of which
    nothing is drawn, for a row without: no round in which neither it nor base was disturbed."""
    every = [row[f"{key}_rounds"] or [math.nan] for row in rows]
    middle = [statistics.median(values) for values in every]
    below = [m - min(values) for m, values in zip(middle, every, strict=True)]
    above = [max(values) - m for m, values in zip(middle, every, strict=True)]
    return middle, [below, above]


def from_zero(axes: Any) -> None:
    """The y axis from 0, with space above what is drawn."""
    if math.isfinite(axes.dataLim.ymax):  # else nothing is drawn
        axes.set_ylim(0, 1.08 * axes.dataLim.ymax)
    axes.spines[["top", "right"]].set_visible(False)


def counts(axes: Any, numbers: Sequence[int], *, log: bool = False) -> None:
    """The x axis of these numbers of adapters: each has its tick, nothing is between."""
    if log:
        axes.set_xscale("log")
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.minorticks_off()
    from_zero(axes)


def plot_ratios(
    figure: Any, rows: Sequence[dict[str, Any]], labels: Sequence[str], title: str
) -> None:
    """Bars of speed over base with the range of the rounds; and the time between tokens."""
    left, right = figure.subplots(1, 2)
    middle, spread = error_bars(rows)
    left.bar(labels, middle, yerr=spread, color="#4477aa", ecolor="#333333", capsize=3)
    left.axhline(1, color="#999999", linewidth=0.8)
    left.set_ylabel("tok/s over base, same round")
    left.set_title(title, fontsize=9)
    for key, style in (("itl_p50", "o-"), ("itl_p99", "o--")):
        right.plot(labels, [row[key] for row in rows], style, label=key[-3:])
    right.set_ylabel("ms between tokens")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.tick_params(axis="x", labelsize=8)
        from_zero(axes)
