"""Device time of single launches, from XLA's profiler. It runs them without CUDA graphs."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import jax

Launch = tuple[int, str, float]
"""Start in nanoseconds, name, microseconds."""


def launches(work: Callable[[], None]) -> list[Launch]:
    """What ran on the GPU while `work` did, in order. `work` waits for its last result."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            work()
        (file,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
    found = [
        (event.start_ns, event.name, event.duration_ns / 1e3)
        for plane in planes
        for line in (plane.lines if "GPU" in plane.name else ())
        for event in (line.events if "Stream" in (line.name or "") else ())
    ]
    return sorted(found)
