"""The load: prompts, a closed loop of clients, and what one run of it says.

Closed loop: each of `concurrency` clients sends its next request when its last one has ended.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Target(Protocol):
    """What can be loaded: an engine in this process, or a server."""

    def generate(self, model: str, prompt: list[int], max_tokens: int) -> AsyncIterator[int]:
        """Greedy tokens past any end-of-sequence: how many more there are, as they come."""
        ...


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every request looks like."""

    input_len: int
    """Prompt tokens."""
    output_len: int
    """Tokens to generate."""
    vocab: int
    """Prompt tokens are drawn below this id."""
    seed: int = 0

    def prompts(self, count: int, *label: object) -> list[list[int]]:
        """`count` random prompts; the same for the same label, else distinct from all others, so
        that no prefix cache helps and every target gets the same ones."""
        rng = random.Random(repr((self.seed, *label)))
        return [[rng.randrange(self.vocab) for _ in range(self.input_len)] for _ in range(count)]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One request, in seconds."""

    first: float
    """From sending to the first token."""
    gaps: list[float]
    """Between tokens; tokens that come together have a gap of 0."""
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """One closed loop, in tokens per second and milliseconds."""

    tok_s: float
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    tokens: int
    seconds: float


def run_of(timings: Sequence[Timing], seconds: float) -> Run:
    """The figures of requests that together took `seconds`."""
    firsts = [timing.first for timing in timings]
    gaps = [gap for timing in timings for gap in timing.gaps] or [0.0]
    ttft, itl = (1e3 * np.percentile(values, [50, 99]) for values in (firsts, gaps))
    tokens = sum(timing.tokens for timing in timings)
    return Run(
        tok_s=tokens / seconds,
        ttft_p50=float(ttft[0]),
        ttft_p99=float(ttft[1]),
        itl_p50=float(itl[0]),
        itl_p99=float(itl[1]),
        tokens=tokens,
        seconds=seconds,
    )


async def time_request(target: Target, model: str, prompt: list[int], max_tokens: int) -> Timing:
    """Send one request and read it to its end."""
    start = last = time.perf_counter()
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
    models: Sequence[str],
    prompts: Sequence[list[int]],
    *,
    output_len: int,
    concurrency: int,
    on_done: Callable[[], None] = lambda: None,
) -> Run:
    """Run all prompts, rotating over `models`, with `concurrency` requests in flight."""
    todo = iter(enumerate(prompts))
    timings: list[Timing] = []

    async def client() -> None:
        for number, prompt in todo:
            model = models[number % len(models)]
            timings.append(await time_request(target, model, prompt, output_len))
            on_done()

    start = time.perf_counter()
    clients = [asyncio.ensure_future(client()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*clients)
    finally:
        for task in clients:
            task.cancel()
        # The others end before the target is closed under them.
        await asyncio.gather(*clients, return_exceptions=True)
    return run_of(timings, time.perf_counter() - start)
