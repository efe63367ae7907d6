"""Results on disk: JSON lines that say where they come from, so that a run that was cut goes on.

A `session` line (versions, commit, command, device) is followed by its `run` lines. Runs of other
settings may lie in the same file: `settings` tells them apart.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jlora.benchmark.load import Run
from jlora.benchmark.rounds import Case, Measurement, summarise
from jlora.errors import ParameterError

DISTURBED = 0.1
"""Runs during which other processes took more of the cores count for nothing, base or not."""


def fingerprint(settings: dict[str, Any]) -> str:
    """Equal for equal settings, in every process."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Results:
    """One file; without a path, nothing is kept."""

    def __init__(self, path: str | None, settings: dict[str, Any]):
        self._path = None if path is None else Path(path)
        self._settings = fingerprint(settings)
        self.done = self._read()
        """What earlier runs of the same settings have measured."""

    @property
    def keys(self) -> frozenset[str]:
        """What need not be measured any more."""
        return frozenset(one.key for one in self.done)

    def open_session(self, facts: dict[str, Any]) -> None:
        """Says where the measurements that follow come from."""
        self._write({"kind": "session", "settings": self._settings, **facts})

    def add(self, one: Measurement) -> None:
        """Keeps a measurement."""
        self.done.append(one)
        case = asdict(one.case)
        del case["models"]
        line = {"kind": "run", "settings": self._settings, "round": one.round, "load": one.load}
        run = {name: round(value, 3) for name, value in asdict(one.run).items()}
        self._write({**line, "case": case, **run, "seen": one.seen})

    def _write(self, line: dict[str, Any]) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _read(self) -> list[Measurement]:
        if self._path is None or not self._path.exists():
            return []
        return [
            measurement(line)
            for line in read_lines(self._path)
            if line["kind"] == "run" and line["settings"] == self._settings
        ]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All lines of a results file. ParameterError if it is something else."""
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
            if not {"kind", "settings"} <= line.keys():
                raise ValueError("keys are missing")
        except (ValueError, AttributeError):
            raise ParameterError(
                f"{path}: line {number} is not a benchmark's result; name another file or repair it",
                "out",
            ) from None
        lines.append(line)
    return lines


def measurement(line: dict[str, Any]) -> Measurement:
    """The measurement of a `run` line."""
    run = {name: line[name] for name in Run.__dataclass_fields__}
    return Measurement(
        round=line["round"],
        load=line["load"],
        case=Case(**line["case"]),
        run=Run(**run),
        seen=line["seen"],
    )


@dataclass(frozen=True, kw_only=True)
class Group:
    """The results of one process's settings."""

    session: dict[str, Any]
    """Versions, commit, command, device, memory plan, all options (`workload`)."""
    rows: list[dict[str, Any]]
    """Medians by load and case."""
    commits: tuple[str, ...]
    """Of all sessions that measured; several if the code changed between them."""

    def of(self, system: str) -> list[dict[str, Any]]:
        """The rows of a system."""
        return [row for row in self.rows if row["system"] == system]


def read_groups(path: Path) -> list[Group]:
    """The results of a file by settings, in the order in which they were first measured, without
    the disturbed runs; all of them if there are no others (memory is as it is)."""
    lines = read_lines(path) if path.exists() else []
    groups = []
    for settings in dict.fromkeys(line["settings"] for line in lines):
        here = [line for line in lines if line["settings"] == settings]
        sessions = [line for line in here if line["kind"] == "session"]
        every = [measurement(line) for line in here if line["kind"] == "run"]
        runs = [run for run in every if run.seen.get("others_cpu", 0.0) <= DISTURBED] or every
        if sessions and runs:
            commits = tuple(dict.fromkeys(str(line["commit"]) for line in sessions))
            order = [(row["load"], row["case"]) for row in summarise(every)]  # of the recipe
            rows = sorted(summarise(runs), key=lambda row: order.index((row["load"], row["case"])))
            groups.append(Group(session=sessions[-1], rows=rows, commits=commits))
    return groups
