"""What is measured: an engine in this process, as each system of a comparison, or a server."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from jlora.benchmark.load import Target, closed_loop
from jlora.benchmark.rounds import Case
from jlora.benchmark.targets import EngineTarget
from jlora.benchmark.workload import Request
from jlora.engine.config import buckets, pick
from jlora.llm import LLM

PLACED_AT_ONCE = 8
"""Adapters that `place` asks for together."""


class EngineSubject:
    """An engine in this process. Make it on the running loop."""

    def __init__(self, llm: LLM, folders: Mapping[str, str]):
        """`folders`: where each adapter lies, for merging."""
        self._llm, self._folders = llm, folders
        self._target = EngineTarget(llm)
        self._merge: Any = None

    async def settle(self) -> None:
        """Until every program has run once. The engine does that in idle moments; a request that
        comes meanwhile waits for it, and would be measured so."""
        while self._engine.ready and not self._engine.settled:
            await asyncio.sleep(0.02)

    async def place(self, names: Sequence[str]) -> None:
        """Brings these adapters to the device while there is room, by a token each: as at a start,
        which is over. Where several recipes share an engine it held another's adapters last."""
        pages = {
            str(entry["name"]): int(str(entry["pages"])) for entry in self._llm.store.adapters()
        }
        room, placed = self._llm.store.num_pages, []
        for name in names:
            if pages[name] <= room:
                room -= pages[name]
                placed.append(name)
        request = Request(at=0.0, adapter=None, prompt=[0], output_len=1)
        jobs = ((name, request) for name in placed)
        await closed_loop(self._target, jobs, clients=PLACED_AT_ONCE)

    @asynccontextmanager
    async def target(self, case: Case) -> AsyncIterator[Target]:
        """As `rounds.Subject` says. The weights are the base's again at the end."""
        if case.system == "merged":
            from jlora.benchmark.merged import MergedTarget  # lazy: imports jax

            merge = self._in_place(case)

            def switch(name: str | None) -> None:
                self._engine.exclusive(partial(merge.switch, name))

            try:
                yield MergedTarget(self._target, self._llm.names[0], switch)
            finally:
                switch(None)
        elif case.system == "compiled":
            restore = self._always_lora()
            try:
                yield self._target
            finally:
                self._engine.exclusive(restore)
        else:
            yield self._target

    def _in_place(self, case: Case) -> Any:
        if self._merge is None:
            from jlora.benchmark.merged import InPlaceMerge  # lazy: imports jax

            self._merge = InPlaceMerge(self._runner)
        for name in case.models:
            self._merge.prepare(name, self._folders[name])
        return self._merge

    def _always_lora(self) -> Any:
        """Every step runs the program with LoRA that it would run with one adapter."""
        engine, runner = self._engine, self._runner
        shapes = [shape for shape in buckets(engine.config) if shape.rank_pages]
        dispatch = runner.dispatch

        def with_lora(plan: Any, shape: Any, rank_pages: Any) -> Any:
            pages = max(1, shape.rank_pages)
            return dispatch(plan, pick(shapes, shape.decode, shape.prefill, pages), rank_pages)

        runner.dispatch = with_lora
        return partial(setattr, runner, "dispatch", dispatch)

    @property
    def _engine(self) -> Any:
        return self._llm.engine

    @property
    def _runner(self) -> Any:
        return self._engine.runner

    def counters(self) -> dict[str, float]:
        """How often adapters were found where, pushed out, read, and switched."""
        store = self._llm.store.counters()
        return {
            "adapter_loads": store.loads,
            **{f"found_on_{tier}": count for tier, count in store.hits.items()},
            **{f"evicted_from_{tier}": count for tier, count in store.evictions.items()},
            "preemptions": self._llm.engine.stats().preemptions,
            **cpu_seconds(),
            "switches": self._merge.switches if self._merge else 0,
            "switch_seconds": round(self._merge.seconds, 3) if self._merge else 0,
        }

    def gauges(self) -> dict[str, float]:
        """Memory of this process."""
        store = self._llm.store.counters()
        return {
            **process_memory(),
            **accelerator_memory(),
            "adapters_host_bytes": store.host_bytes,
            "rank_pages_used": store.device_pages,
        }


def cpu_seconds() -> dict[str, float]:
    """Seconds that all cores together have worked, for anybody and for this process; Linux only.

    Their difference is what others took: a measurement in which that is much is disturbed."""
    own = time.process_time()
    try:
        ticks = [int(text) for text in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    except OSError:
        return {"cpu_own": own}
    busy = sum(ticks[:3]) + sum(ticks[5:8])  # without idle and waiting for disks; with steal
    return {"cpu_own": round(own, 2), "cpu_all": busy / os.sysconf("SC_CLK_TCK")}


def process_memory() -> dict[str, float]:
    """Bytes that this process holds now, and the most that it ever held; Linux only."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    table = dict(line.split(":", 1) for line in lines)
    names = {"rss": "VmRSS", "rss_anonymous": "RssAnon", "rss_peak": "VmHWM"}
    return {name: int(table[key].split()[0]) * 1024 for name, key in names.items() if key in table}


def accelerator_memory() -> dict[str, float]:
    """Bytes that arrays hold on the fullest accelerator, now and at most; nothing on a CPU."""
    import jax  # lazy: --mesh is set before jax is imported

    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    names = {"device_bytes": "bytes_in_use", "device_bytes_peak": "peak_bytes_in_use"}
    return {
        name: max(own[key] for own in stats)
        for name, key in names.items()
        if all(key in own for own in stats)
    }


class ServerSubject:
    """A server, of which only the answers are known."""

    def __init__(self, target: Target):
        self._target = target

    @asynccontextmanager
    async def target(self, case: Case) -> AsyncIterator[Target]:
        """As `rounds.Subject` says."""
        yield self._target

    def counters(self) -> dict[str, float]:
        """Nothing."""
        return {}

    def gauges(self) -> dict[str, float]:
        """Nothing."""
        return {}
