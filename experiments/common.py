"""What the experiments share: `Experiment.main` runs `jlora.bench` with the configs of a scale, one
process each, into results/SCALE.jsonl, then prints the table and draws the plot.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.show import Plot, draw, markdown
from jlora.benchmark.report import print_table
from jlora.benchmark.results import read_groups

ROOT = Path(__file__).parent.parent
SCALES = ("smoke", "cpu", "h100", "h200", "h200x2")
RECIPES = {"h200": "h100"}
"""Scales that run another one's recipes."""

MORE_LEFT = 75
"""Exit status when --stop-after cut the run, as of jlora.bench."""


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
