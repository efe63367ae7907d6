"""What the command line tools share: devices before jax is imported, logs, progress bars, the end
after Ctrl-C, the memory plan.
"""

import importlib.metadata
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from jlora.models.config import PROJECTIONS
from jlora.parts import MemoryPlan

HOST_DEVICES = "--xla_force_host_platform_device_count"


def prepare_devices(mesh: int) -> None:
    """Make jax show `mesh` CPU devices. Must run before jax is imported; GPUs are not affected."""
    assert "jax" not in sys.modules, "jax reads XLA_FLAGS when it is imported"
    flags = os.environ.get("XLA_FLAGS", "")
    if mesh > 1 and HOST_DEVICES not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {HOST_DEVICES}={mesh}".strip()


def setup_logging(level: str) -> None:
    """One line per event, `key=value` pairs, on stderr; other libraries only when they warn."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("jlora").setLevel(level.upper())
    logging.getLogger("uvicorn.access").setLevel(level.upper())


class ProgressBars:
    """Rich bars on stderr, one for each long job, as they come: `bars(what, done, total)`. Parts of
    what is done may be told, too: the time that is left is estimated from the last half minute."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "ProgressBars":
        return self  # nothing is drawn before the first call: others may show bars of their own

    def __exit__(self, *_: object) -> None:
        if self._tasks:  # else rich would print an empty line
            self._progress.stop()

    def __call__(self, what: str, done: float, total: int) -> None:
        if what not in self._tasks:
            self._progress.start()
            self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._tasks[what], completed=done, total=total)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C is ignored meanwhile. For the end of an engine: a second Ctrl-C would leave its thread
    running into the end of the process, where jax aborts."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def version() -> str:
    """jlora's version as it was installed."""
    try:
        return importlib.metadata.version("jlora")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "checkout"


def size(count: int) -> str:
    """Bytes for people: 268 MiB, 1.5 GiB."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return (
        f"{value:.0f} {units[0]}" if value >= 100 or units[0] == "B" else f"{value:.1f} {units[0]}"
    )


def memory_plan(plan: MemoryPlan) -> str:
    """The memory plan as one line."""
    copies = f" and {size(plan.adapter_copies)} of copies for steps" if plan.adapter_copies else ""
    held = plan.adapter_projections
    only = f" for {', '.join(held)}" if len(held) < len(PROJECTIONS) else ""
    return (
        f"Memory: weights {size(plan.weights)}, "
        f"adapters {size(plan.adapter_pages)} ({plan.adapter_page_count} pages of {plan.adapter_page_rows} rank rows{only}){copies}, "
        f"KV cache {size(plan.kv_pages)} ({plan.kv_page_count} pages, {plan.kv_tokens} tokens); "
        f"together {size(plan.total)}"
    )
