"""The report of a benchmark: a table for people, and one JSON document for everybody else."""

import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = {
    "load": "load",
    "system": "system",
    "adapters": "n",
    "popularity": "popularity",
    "ranks": "ranks",
    "tok_s": "tok/s",
    "spread": "spread",
    "ratio_to_base": "of base",
    "ttft_p50": "TTFT p50 ms",
    "ttft_p99": "p99",
    "itl_p50": "ITL p50 ms",
    "itl_p99": "p99",
}
"""Key of a result -> heading."""

LEFT = ("system", "popularity", "ranks")


def print_table(rows: Sequence[dict[str, Any]], title: str) -> None:
    """The results on stdout."""
    table = Table(title=title, title_justify="left")
    for key, heading in COLUMNS.items():
        table.add_column(heading, justify="left" if key in LEFT else "right")
    last = None
    for row in rows:
        if last not in (None, row["load"]):
            table.add_section()
        last = row["load"]
        table.add_row(*(cell(key, row) for key in COLUMNS))
    # A pipe has no width; 80 columns would fold the headings.
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def cell(key: str, row: dict[str, Any]) -> str:
    """A result under one of `COLUMNS`, as text."""
    if key == "spread":
        return spread(row["tok_s_rounds"])
    if key in ("adapters", "popularity") and row["adapters"] < (1 if key == "adapters" else 2):
        return "-"
    value = row[key]
    if value is None or value == "":
        return "-"
    if key == "load":
        return f"{value:g}"
    if isinstance(value, float):
        return f"{value:.2f}" if key in ("ratio_to_base", "itl_p50", "itl_p99") else f"{value:.1f}"
    return str(value)


def spread(values: Sequence[float]) -> str:
    """Half of the range as a share of the median: what repeats differ by."""
    if len(values) < 2 or not statistics.median(values):
        return "-"
    return f"±{(max(values) - min(values)) / 2 / statistics.median(values):.0%}"


def provenance(argv: Sequence[str]) -> dict[str, Any]:
    """Where figures come from: versions, commit, command, host."""
    return {
        "versions": {
            "python": platform.python_version(),
            "jax": package_version("jax"),
            "jlora": package_version("jlora") or "checkout",
        },
        "commit": commit(),
        "command": shlex.join(["python", "-m", "jlora.bench", *argv]),
        "host": {"cpu": cpu_name(), "cores": len(cores())},
    }


def package_version(name: str) -> str | None:
    """The version of an installed package, without importing it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The checkout's commit, with `-dirty` if files differ; $JLORA_COMMIT, or None, outside of a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("JLORA_COMMIT")
    return done.stdout.strip()


def cpu_name() -> str:
    """The processor's name, where Linux tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> set[int]:
    """The cores that this process may use."""
    return os.sched_getaffinity(0)
