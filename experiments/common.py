"""What the experiments share: `Experiment.main` runs `jlora.bench` with the configs of a scale, one
process each, into results/SCALE.jsonl, then prints the table and draws the plot.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jlora.benchmark.report import cell, print_table
from jlora.benchmark.results import Group as Group
from jlora.benchmark.results import read_groups as read_groups

ROOT = Path(__file__).parent.parent
SCALES = ("smoke", "cpu", "h100", "h200", "h200x2")
RECIPES = {"h200": "h100"}
"""Scales that run another one's recipes."""

MORE_LEFT = 75
"""Exit status when --stop-after cut the run, as of jlora.bench."""

Plot = Callable[[Any, list[Group]], None]
"""Draws results on a matplotlib figure."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One folder."""

    folder: Path
    plot: Plot | None = None
    variants: Sequence[Sequence[str]] = ((),)
    """More flags for each process, of which there is one for each."""
    before: Callable[[str, Path], int] | None = None
    """Something of its own, given the scale and the results file; gives an exit status."""

    def config(self, scale: str) -> Path:
        """The recipe of a scale."""
        return recipe(self.folder.name, scale)

    def results(self, scale: str) -> Path:
        """The raw results of a scale."""
        return self.folder / "results" / f"{scale}.jsonl"

    def main(self) -> int:
        """Run what the command line asks for."""
        parser = argparse.ArgumentParser(description=f"{self.folder.name}: see its README")
        parser.add_argument("--scale", choices=SCALES, default="cpu")
        parser.add_argument("--out", type=Path, help="results file, if not results/SCALE.jsonl")
        parser.add_argument(
            "--stop-after", type=float, help="seconds; exit 75, and the next call goes on"
        )
        parser.add_argument("--show", action="store_true", help="run nothing, print and plot")
        parser.add_argument(
            "--markdown", action="store_true", help="run nothing, print for a README"
        )
        args = parser.parse_args()
        out = args.out or self.results(args.scale)
        if args.markdown:
            print("\n\n".join(markdown(group) for group in read_groups(out)))
            return 0
        status = 0
        if not args.show:
            status = self._run(args.scale, out, args.stop_after)
        self.show(out)
        return status

    def _run(self, scale: str, out: Path, stop_after: float | None) -> int:
        if self.before is not None and (status := self.before(scale, out)):
            return status
        if not self.config(scale).exists():
            return 0
        started = time.monotonic()
        for flags in self.variants:
            command = [sys.executable, "-m", "jlora.bench", "--config", str(self.config(scale))]
            command += ["--out", str(out), *flags]
            if stop_after is not None:
                left = stop_after - (time.monotonic() - started)
                if left <= 0:
                    return MORE_LEFT
                command += ["--stop-after", f"{max(left, 1):.0f}"]
            if status := run(command):
                return status
        return 0

    def show(self, out: Path, *, plots: bool = True) -> None:
        """Tables on stdout and the plot beside the results."""
        groups = read_groups(out)
        for group in groups:
            print_table(group.rows, f"{self.folder.name}, {group.session['model']}")
        if plots and groups and self.plot is not None:
            draw(self.plot, groups, out.with_suffix(".svg"))


def recipe(name: str, scale: str) -> Path:
    """The recipe of an experiment at a scale."""
    return ROOT / "configs" / "bench" / RECIPES.get(scale, scale) / f"{name}.toml"


def markdown(group: Group) -> str:
    """The medians of one process's settings as a table for a README."""
    heads = (
        "system",
        "adapters",
        "popularity",
        "ranks",
        "tok/s",
        "spread",
        "of base: median (rounds)",
    )
    heads += ("TTFT p50 / p99 ms", "ITL p50 / p99 ms", "evictions", "others' CPU")
    lines = [f"| {' | '.join(heads)} |", "|---" * 4 + "|--:" * 7 + "|"]
    for row in group.rows:
        rounds = ", ".join(f"{ratio:.2f}" for ratio in row["ratio_rounds"])
        cells = [
            row["system"],
            *(cell(key, row) for key in ("adapters", "popularity", "ranks", "tok_s", "spread")),
            f"{cell('ratio_to_base', row)} ({rounds})",
            f"{row['ttft_p50']:.0f} / {row['ttft_p99']:.0f}",
            f"{_ms(row['itl_p50'])} / {_ms(row['itl_p99'])}",
            f"{row.get('evicted_from_device', 0):.0f}",
            f"{row.get('others_cpu', 0):.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    host, device = group.session["host"], group.session["device"]
    on = f"{host['cpu']}, {host['cores']} cores"
    if device["platform"] != "cpu":
        on = f"{device['count']} x {device['kind']}, {host['cores']} cores"
    jax = group.session["versions"]["jax"]
    lines += ["", f"Commit {', '.join(group.commits)}, {on}, jax {jax}."]
    return "\n".join(lines)


def _ms(value: float) -> str:
    return f"{value:.1f}" if value < 20 else f"{value:.0f}"


def run(command: Sequence[str]) -> int:
    """A child process from the repository's root; gives its exit status."""
    print("+", *command, flush=True)
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL) as child:
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:  # the child has it, too: it keeps what is done, and ends
                continue


def environment() -> dict[str, str]:
    """This process's, in which this checkout is found first."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": paths}


def draw(plot: Plot, groups: list[Group], path: Path) -> None:
    """One figure as SVG; without matplotlib (an optional extra) a line that says so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: pip install -e '.[plots]' brings matplotlib", file=sys.stderr)
        return
    import matplotlib as mpl

    mpl.rcParams |= {"svg.hashsalt": path.stem, "svg.fonttype": "none", "font.size": 9}
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
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
    """(medians, [below, above]) of `ratio_rounds` or `tok_s_rounds`, for matplotlib."""
    every = [row[f"{key}_rounds"] or [0.0] for row in rows]
    middle = [statistics.median(values) for values in every]
    below = [m - min(values) for m, values in zip(middle, every, strict=True)]
    above = [max(values) - m for m, values in zip(middle, every, strict=True)]
    return middle, [below, above]


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
        right.plot(labels, [row[key] for row in rows], style, label=key.replace("_", " "))
    right.set_ylabel("ms between tokens")
    right.set_ylim(bottom=0)
    right.legend(frameon=False)
    for axes in (left, right):
        axes.tick_params(axis="x", rotation=25)
        axes.spines[["top", "right"]].set_visible(False)
