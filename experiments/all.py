"""`python -m experiments.all --scale h200 002 001 005`: experiments one after the other, in one engine
those whose recipes agree in it. Compiling is what such a run waits for on a machine that starts bare.

`--stop-after` ends with status 75; the same command goes on where the results end.
"""

import argparse
import runpy
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from experiments.common import MORE_LEFT, SCALES, Experiment, recipe, run
from jlora.benchmark.options import BenchOptions
from jlora.benchmark.recipes import BY_NAME, differences
from jlora.cli import parse

HERE = Path(__file__).parent
WITHOUT_RECIPES = {"011_isolation": ("smoke", "cpu", "h100", "h200")}
"""Experiments that are more than recipes, and their scales."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """What one process runs: recipes of an engine, or an experiment's own run.py."""

    names: tuple[str, ...]
    together: bool

    def command(self, scale: str, out: Path | None, left: float | None) -> list[str]:
        """Its command line. `out`: folder of the results, if not the experiments' own."""
        if self.together:
            files = [str(recipe(name, scale)) for name in self.names]
            where = str(out / f"{BY_NAME}.jsonl" if out else results(BY_NAME, scale))
            command = [sys.executable, "-m", "jlora.bench", "--out", where]
            command += [text for file in files for text in ("--config", file)]
        else:
            (name,) = self.names
            command = [sys.executable, str(HERE / name / "run.py"), "--scale", scale]
            command += ["--out", str(out / f"{name}.jsonl")] if out else []
        return command if left is None else [*command, "--stop-after", f"{max(left, 1):.0f}"]


def results(name: str, scale: str) -> Path:
    """The raw results of an experiment."""
    return HERE / name / "results" / f"{scale}.jsonl"


def experiment(name: str) -> Experiment | None:
    """What its run.py makes of it; None if that is more than recipes."""
    return runpy.run_path(str(HERE / name / "run.py")).get("EXPERIMENT")


def folders(wanted: Sequence[str], scale: str) -> list[str]:
    """Names of experiments by how they begin, in this order; without any: all that the scale has."""
    own = {name for name, scales in WITHOUT_RECIPES.items() if scale in scales}
    every = sorted(path.parent.name for path in HERE.glob("[0-9]*/run.py"))
    every = [name for name in every if name in own or recipe(name, scale).exists()]
    if not wanted:
        return every
    found = []
    for text in wanted:
        begin = [name for name in every if name.startswith(text)]
        if len(begin) != 1:
            raise SystemExit(
                f"experiments.all: {text!r} is none, or several, of {', '.join(every)}"
            )
        found += begin
    return found


def processes(names: Sequence[str], scale: str) -> list[Process]:
    """Experiments of one engine together, at the place of the first."""
    groups: list[tuple[BenchOptions | None, list[str]]] = []
    for name in names:
        own = experiment(name)
        if own is None or own.before is not None or len(own.variants) > 1:
            groups.append((None, [name]))
            continue
        options = parse(
            BenchOptions, ["--config", str(recipe(name, scale))], prog="experiments.all"
        )
        for other, together in groups:
            if other is not None and not differences(other, options):
                together.append(name)
                break
        else:
            groups.append((options, [name]))
    return [
        Process(names=tuple(together), together=options is not None) for options, together in groups
    ]


def wait_for(future: Future[int], stop: threading.Event) -> int:
    """What a process ended with. Ctrl-C: those that run have it, too, and end; no other is started."""
    while True:
        try:
            return future.result()
        except KeyboardInterrupt:
            stop.set()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="experiments.all", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NNN", help="experiments; default: all")
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument(
        "--out", type=Path, help="folder for NNN_name.jsonl, if not NNN_name/results"
    )
    parser.add_argument(
        "--stop-after", type=float, help="seconds; exit 75, and the next call goes on"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes at once, where figures do not matter"
    )
    parser.add_argument("--plots", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs: at least 1 is needed, got {args.jobs}")
    started, stop = time.monotonic(), threading.Event()
    names = folders(args.names, args.scale)
    out = None if args.out is None else args.out.resolve()

    def one(process: Process) -> int:
        left = None if args.stop_after is None else args.stop_after - time.monotonic() + started
        if stop.is_set() or (left is not None and left <= 0):
            return MORE_LEFT
        ended = run(process.command(args.scale, out, left))
        print(f"{', '.join(process.names)}: exit {ended}, {time.monotonic() - started:.0f} s", flush=True)  # fmt: skip
        if ended in (MORE_LEFT, 130):
            stop.set()
        return ended

    with ThreadPoolExecutor(args.jobs) as pool:
        running = [pool.submit(one, process) for process in processes(names, args.scale)]
        ended = [wait_for(future, stop) for future in running]
    status = next((code for code in ended if code not in (0, MORE_LEFT)), max(ended, default=0))
    for name in names:
        if (own := experiment(name)) is not None:
            where = out / f"{name}.jsonl" if out else results(name, args.scale)
            own.show(where, plots=args.plots)
    return status


if __name__ == "__main__":
    sys.exit(main())
