"""The load: requests sent in a closed loop or at their own times, and what one run of it says."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from jlora.benchmark.workload import Request

Job = tuple[str, Request]
"""The model that a request names, and the request."""


class Target(Protocol):
    """What can be loaded: an engine in this process, or a server."""

    def generate(self, model: str, prompt: list[int], max_tokens: int) -> AsyncIterator[int]:
        """Greedy tokens past any end-of-sequence: how many more there are, as they come."""
        ...


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One request, in seconds."""

    first: float
    """From its arrival to the first token."""
    gaps: list[float]
    """Between tokens; tokens that come together have a gap of 0."""
    tokens: int

    @property
    def total(self) -> float:
        """From its arrival to the last token."""
        return self.first + sum(self.gaps)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run, in tokens and requests per second, and milliseconds."""

    tok_s: float
    req_s: float
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    latency_p50: float
    latency_p99: float
    tokens: int
    requests: int
    seconds: float


def run_of(timings: Sequence[Timing], seconds: float) -> Run:
    """The figures of requests that together took `seconds`."""
    values = {
        "ttft": [timing.first for timing in timings],
        "itl": [gap for timing in timings for gap in timing.gaps],
        "latency": [timing.total for timing in timings],
    }
    percentiles = {
        f"{name}_p{percent}": float(1e3 * np.percentile(found or [0.0], percent))
        for name, found in values.items()
        for percent in (50, 99)
    }
    tokens = sum(timing.tokens for timing in timings)
    return Run(
        tok_s=tokens / seconds,
        req_s=len(timings) / seconds,
        tokens=tokens,
        requests=len(timings),
        seconds=seconds,
        **percentiles,
    )


async def time_request(
    target: Target, model: str, prompt: list[int], max_tokens: int, arrived: float | None = None
) -> Timing:
    """Send one request and read it to its end. `arrived`: when it should have been sent."""
    start = last = time.perf_counter() if arrived is None else arrived
    first, tokens = 0.0, 0
    gaps: list[float] = []
    async for count in target.generate(model, prompt, max_tokens):
        now = time.perf_counter()
        if tokens == 0:
            first = now - start
        elif count > 0:
            gaps.append(now - last)
        gaps += [0.0] * (count - 1)
        tokens += count
        last = now
    return Timing(first=first, gaps=gaps, tokens=tokens)


async def closed_loop(
    target: Target,
    jobs: Iterator[Job],
    *,
    clients: int,
    count: int | None = None,
    duration: float | None = None,
    on_done: Callable[[], None] = lambda: None,
) -> Run:
    """`clients` requests in flight, until `count` were sent or `duration` seconds are over; requests
    that run then are awaited and counted."""
    timings: list[Timing] = []
    todo = itertools.islice(jobs, count)
    start = time.perf_counter()

    async def client() -> None:
        for model, request in todo:
            timings.append(await time_request(target, model, request.prompt, request.output_len))
            on_done()
            if duration is not None and time.perf_counter() - start >= duration:
                return

    await _together([asyncio.ensure_future(client()) for _ in range(clients)])
    return run_of(timings, time.perf_counter() - start)


async def open_loop(
    target: Target,
    jobs: Iterator[Job],
    *,
    count: int | None = None,
    duration: float | None = None,
    on_done: Callable[[], None] = lambda: None,
) -> Run:
    """Each request at its own time, however many run already; times count from then on."""
    timings: list[Timing] = []
    todo = list(
        itertools.takewhile(
            lambda job: duration is None or job[1].at < duration, itertools.islice(jobs, count)
        )
    )
    start = time.perf_counter()

    async def send(model: str, request: Request) -> None:
        arrived = start + request.at
        await asyncio.sleep(arrived - time.perf_counter())
        timings.append(
            await time_request(target, model, request.prompt, request.output_len, arrived)
        )
        on_done()

    await _together([asyncio.ensure_future(send(*job)) for job in todo])
    return run_of(timings, time.perf_counter() - start)


async def _together(tasks: list[asyncio.Future[None]]) -> None:
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        # The others end before the target is closed under them.
        await asyncio.gather(*tasks, return_exceptions=True)
