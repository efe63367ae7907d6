"""Reads and stages adapters for the store, whatever they are made of; counts and times it."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic

from jlora.adapters.adapter import Adapter
from jlora.adapters.entry import AdapterEntry, S
from jlora.adapters.mix import mixed


class AdapterReader(Generic[S]):
    """`fetch` on any thread: folder, or several folders and their weights -> staged adapter."""

    def __init__(self, read: Callable[[str], Adapter], stage: Callable[[Adapter], S]):
        self._read, self._stage = read, stage
        self._lock = threading.Lock()
        self._seconds: deque[float] = deque(maxlen=4096)
        self.loads = 0
        self.failures = 0

    def fetch(self, path: str, mix: Sequence[tuple[AdapterEntry, float]] = ()) -> tuple[S, float]:
        """(staged adapter, seconds that it took). Raises what `read` and `stage` raise."""
        start = time.perf_counter()
        try:
            if mix:
                parts = [self._read(entry.path) for entry, _ in mix]
                adapter = mixed(path, parts, [weight for _, weight in mix])
            else:
                adapter = self._read(path)
            staged = self._stage(adapter)
        except BaseException:
            with self._lock:
                self.failures += 1
            raise
        seconds = time.perf_counter() - start
        with self._lock:
            self.loads += 1
            self._seconds.append(seconds)
        return staged, seconds

    def take_seconds(self) -> list[float]:
        """Durations since the last call (at most the last 4096)."""
        with self._lock:
            seconds = list(self._seconds)
            self._seconds.clear()
            return seconds
