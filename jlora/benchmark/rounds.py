"""Rounds of a benchmark: the cases take turns, so that a machine that slows down slows all of them,
and what is reported are medians over the rounds.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from jlora.benchmark.load import Run, Target, Workload, closed_loop, time_request

CASES = ("base", "one", "mixed")
"""The base model; one adapter; all adapters, in turn."""

WARM_TOKENS = 4
"""Tokens of the request that every model gets before anything is measured."""


def models_of(names: Sequence[str]) -> dict[str, list[str]]:
    """The cases that a base model and its adapters allow -> the models that their requests name."""
    base, *adapters = names
    cases = {"base": [base]}
    if adapters:
        cases |= {"one": adapters[:1], "mixed": adapters}
    return cases


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One closed loop of one case."""

    round: int
    case: str
    concurrency: int
    run: Run


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What is measured, in order: each round has every concurrency, and there every case."""

    cases: Mapping[str, Sequence[str]]
    """Case -> models."""
    concurrency: Sequence[int]
    num_prompts: int | None
    """Requests of a closed loop; None: two for each client and at least six."""
    repeats: int

    def prompts_at(self, concurrency: int) -> int:
        """Requests of one closed loop."""
        return self.num_prompts or max(6, 2 * concurrency)

    @property
    def requests(self) -> int:
        """All requests that are measured."""
        per_round = len(self.cases) * sum(map(self.prompts_at, self.concurrency))
        return self.repeats * per_round

    def steps(self) -> Iterator[tuple[int, int, str]]:
        """(round, concurrency, case). Odd rounds go backwards: no case always follows another."""
        for number in range(self.repeats):
            cases = list(self.cases)
            for concurrency in self.concurrency:
                for case in cases if number % 2 == 0 else reversed(cases):
                    yield number, concurrency, case


async def measure(
    target: Target,
    workload: Workload,
    schedule: Schedule,
    done: list[Measurement],
    on_request: Callable[[], None] = lambda: None,
) -> None:
    """Warm every model up, then run the schedule. Results go to `done` as they come, so that the
    caller has them if this is cut."""
    names = dict.fromkeys(name for models in schedule.cases.values() for name in models)
    for name in names:
        (prompt,) = workload.prompts(1, "warm", name)
        await time_request(target, name, prompt, min(WARM_TOKENS, workload.output_len))
    for number, concurrency, case in schedule.steps():
        prompts = workload.prompts(schedule.prompts_at(concurrency), number, concurrency, case)
        run = await closed_loop(
            target,
            schedule.cases[case],
            prompts,
            output_len=workload.output_len,
            concurrency=concurrency,
            on_done=on_request,
        )
        done.append(Measurement(round=number, case=case, concurrency=concurrency, run=run))


def summarise(done: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Medians over the rounds for every case and concurrency, and the ratio to base: the median of
    the rounds' own ratios, since a round's runs are neighbours in time."""
    groups: dict[tuple[int, str], list[Measurement]] = {}
    for one in done:
        groups.setdefault((one.concurrency, one.case), []).append(one)
    bases = {(one.round, one.concurrency): one.run.tok_s for one in done if one.case == "base"}
    rows = []
    for (concurrency, case), group in groups.items():
        ratios = [
            one.run.tok_s / base
            for one in group
            if (base := bases.get((one.round, one.concurrency))) is not None
        ]
        medians = {
            field.name: round(statistics.median(getattr(one.run, field.name) for one in group), 3)
            for field in fields(Run)
        }
        rows.append(
            {
                "case": case,
                "concurrency": concurrency,
                **medians,
                "ratio_to_base": round(statistics.median(ratios), 4) if ratios else None,
                "tok_s_rounds": [round(one.run.tok_s, 3) for one in group],
            }
        )
    order = {case: number for number, case in enumerate(CASES)}
    return sorted(rows, key=lambda row: (row["concurrency"], order[row["case"]]))
