"""Rounds of a benchmark: the cases take turns, so that a machine that slows down slows all of them,
and what is reported are medians over the rounds.
"""

import os
import statistics
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import Any, Literal, Protocol

from jlora.benchmark.load import Job, Run, Target, closed_loop, open_loop
from jlora.benchmark.workload import Popularity, Workload

System = Literal["base", "compiled", "merged", "unmerged"]
"""base: the base model, steps without LoRA. compiled: the base model in steps that have LoRA compiled
in. merged: one adapter at a time in the weights, switched when requests ask for another one.
unmerged: all adapters in one batch."""

WARM_TOKENS = 4
"""Tokens of the request that a model gets before anything is measured."""

TRIES = 3
"""How often a run that others disturb is made at most; the least disturbed one counts."""

WARM_MODELS = 8
"""Adapters of a case that get one; more would take longer than what is measured."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to compare. Numbers of adapters count within the adapters of its ranks."""

    system: System
    adapters: int = 0
    """0 for base and compiled."""
    popularity: Popularity = "distinct"
    ranks: str = ""
    """Ranks of the adapters, as given; a server does not tell."""
    models: tuple[str, ...] = ()
    """Names: of the base model, or of the adapters."""

    @property
    def label(self) -> str:
        """Short and unique: `unmerged 5 zipf r16`."""
        if not self.adapters:
            return self.system
        ranks = f" r{self.ranks}" if self.ranks else ""
        popularity = f" {self.popularity}" if self.adapters > 1 else ""
        return f"{self.system} {self.adapters}{popularity}{ranks}"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One run of one case."""

    round: int
    load: float
    """Clients of a closed loop, or requests per second."""
    case: Case
    run: Run
    seen: dict[str, float] = field(default_factory=dict)
    """What the target says about it: evictions, memory and so on."""

    @property
    def key(self) -> str:
        """What it is a measurement of."""
        return key(self.round, self.load, self.case)


def key(number: int, load: float, case: Case) -> str:
    """A measurement's place in the schedule."""
    return f"{number}|{load:g}|{case.label}"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What is measured, in order: each round has every load, and there every case."""

    cases: Sequence[Case]
    loads: Sequence[float]
    repeats: int
    closed: bool = True
    num_prompts: int | None = None
    """Requests of a run; None: two for each client and at least six, or those of `duration`."""
    duration: float | None = None
    """Seconds in which requests are sent."""

    def clients(self, load: float) -> int:
        """Requests at once that make a first batch of the usual size."""
        return int(load) if self.closed else 1

    def count(self, load: float) -> int | None:
        """Requests of one run; None: as many as its duration holds."""
        if self.num_prompts or self.duration:
            return self.num_prompts
        return max(6, 2 * int(load))

    def steps(self) -> Iterator[tuple[int, float, Case]]:
        """(round, load, case). Odd rounds go backwards: no case always follows another."""
        for number in range(self.repeats):
            for load in self.loads:
                for case in self.cases if number % 2 == 0 else reversed(self.cases):
                    yield number, load, case

    def __len__(self) -> int:
        return self.repeats * len(self.loads) * len(self.cases)

    @property
    def keys(self) -> frozenset[str]:
        """Of all its measurements."""
        return frozenset(key(*step) for step in self.steps())


class Subject(Protocol):
    """What is measured: its targets by case, and what it says about itself."""

    def target(self, case: Case) -> AbstractAsyncContextManager[Target]:
        """What takes the requests of this case."""
        ...

    def counters(self) -> dict[str, float]:
        """Totals since the start."""
        ...

    def gauges(self) -> dict[str, float]:
        """Values of now."""
        ...


async def measure(
    subject: Subject,
    workload: Workload,
    schedule: Schedule,
    *,
    skip: frozenset[str] = frozenset(),
    others_limit: float | None = None,
    on_request: Callable[[int | None], None] = lambda count: None,
) -> AsyncIterator[Measurement]:
    """Runs the schedule but for the keys of `skip`; every case is warmed up before its first run.
    `on_request` hears of every request that ended, with the number of its run, if it has one.

    A run during which other processes took more than `others_limit` of all cores is repeated.
    """
    warm: set[str] = set()  # labels; nothing has run at all while it is empty
    for number, load, case in schedule.steps():
        if key(number, load, case) in skip:
            continue
        tried: list[Measurement] = []
        async with subject.target(case) as target:
            if case.label not in warm:
                clients = 1 if warm else schedule.clients(load)
                await _warm_up(target, workload, case, clients=clients)
                warm.add(case.label)
            while len(tried) < TRIES:
                before = subject.counters()
                given = jobs(workload, number, load, case, len(tried))
                tell = partial(on_request, schedule.count(load))
                run = await _run(target, given, schedule, load, tell)
                seen = {name: value - before[name] for name, value in subject.counters().items()}
                seen |= {"others_cpu": others_cpu(seen, run.seconds), "tries": len(tried) + 1}
                tried.append(Measurement(round=number, load=load, case=case, run=run, seen=seen))
                if others_limit is None or seen["others_cpu"] <= others_limit:
                    break
        best = min(tried, key=lambda one: one.seen["others_cpu"])
        yield replace(best, seen=best.seen | subject.gauges() | {"tries": len(tried)})


def others_cpu(seen: dict[str, float], seconds: float) -> float:
    """The share of all cores that other processes took, where the subject knows."""
    taken = seen.get("cpu_all", 0.0) - seen.get("cpu_own", 0.0)
    return round(max(0.0, taken) / (seconds * (os.cpu_count() or 1)), 3)


def jobs(
    workload: Workload, number: int, load: float, case: Case, attempt: int = 0
) -> Iterator[Job]:
    """The requests of one run, without end. Another attempt has other tokens, else the same."""
    requests = workload.requests(
        number,
        load,
        case=f"{case.label} {attempt}",
        adapters=case.adapters,
        popularity=case.popularity,
        rate=load,
    )
    for request in requests:
        yield case.models[request.adapter or 0], request


async def _warm_up(target: Target, workload: Workload, case: Case, *, clients: int) -> None:
    # The first one twice: merged must have switched from the last one back to it.
    names = [*case.models[:WARM_MODELS], case.models[0]]
    names += names[:1] * (clients - len(names))
    drawn = zip(names, workload.requests("warm", case=case.label), strict=False)
    short = (
        (name, replace(request, output_len=min(WARM_TOKENS, request.output_len)))
        for name, request in drawn
    )
    await closed_loop(target, short, clients=clients, count=len(names))


async def _run(
    target: Target,
    given: Iterator[Job],
    schedule: Schedule,
    load: float,
    on_request: Callable[[], None],
) -> Run:
    limits: dict[str, Any] = {"count": schedule.count(load), "duration": schedule.duration}
    if schedule.closed:
        return await closed_loop(target, given, clients=int(load), on_done=on_request, **limits)
    return await open_loop(target, given, on_done=on_request, **limits)


def summarise(done: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Medians over the rounds for every load and case, and the ratio to base: the median of the
    rounds' own ratios, since a round's runs are neighbours in time."""
    groups: dict[tuple[float, str], list[Measurement]] = {}
    for one in done:
        groups.setdefault((one.load, one.case.label), []).append(one)
    bases = {(one.round, one.load): one.run.tok_s for one in done if one.case.system == "base"}
    rows = []
    for (load, label), group in groups.items():
        ratios = [
            one.run.tok_s / base
            for one in group
            if (base := bases.get((one.round, one.load)))  # 0: no request came in its time
        ]
        row: dict[str, Any] = {"case": label, **_facts(group[0].case), "load": load}
        for name in (found.name for found in fields(Run)):
            row[name] = round(statistics.median(getattr(one.run, name) for one in group), 3)
        for name in group[0].seen:
            row[name] = statistics.median(one.seen.get(name, 0) for one in group)
        row["ratio_to_base"] = round(statistics.median(ratios), 4) if ratios else None
        row["ratio_rounds"] = [round(ratio, 4) for ratio in ratios]
        row["tok_s_rounds"] = [round(one.run.tok_s, 3) for one in group]
        rows.append(row)
    return sorted(rows, key=lambda row: row["load"])  # stable: cases stay in order


def _facts(case: Case) -> dict[str, Any]:
    facts = asdict(case)
    del facts["models"]
    return facts
