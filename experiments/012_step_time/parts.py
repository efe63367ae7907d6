"""What the parts of the LoRA matmul cost: device time of its launches while some are left out, or
with more tiles of w after the expand steps. What is left out makes the products garbage.

`PYTHONPATH=. python experiments/012_step_time/parts.py [--rows 256] [--tails]`, on an H100 or H200: chains of
cold launches of Llama-3.1-8B's projections, rank 16; medians in microseconds.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments.profiled import launches
from kernels_pallas import testing
from kernels_pallas.lora_matmul import (
    RankPool,
    Segments,
    hopper,
    hopper_wide_produce,
    hopper_wide_shrink,
    hopper_wide_tuning,
)
from kernels_pallas.lora_matmul.hopper_kernel import Kernel
from kernels_pallas.lora_matmul.hopper_shrink import Shrink
from kernels_pallas.lora_matmul.hopper_sync import Counters
from kernels_pallas.lora_matmul.hopper_tuning import tuning
from kernels_pallas.lora_matmul.hopper_wide_plan import Plan, Tile
from kernels_pallas.lora_matmul.shapes import LLAMA_8B

CALLS, PAGES, TURNS = 6, 40, 5
MATMULS = ("lora_matmul", "gemm", "nvjet")
"""Names of matmuls in a profile: ours and XLA's."""
Data = dict[str, tuple[list[jax.Array], list[RankPool], jax.Array]]
PARTS = {
    "nothing left out": "",
    "no expand steps": "expand",
    "no waits for the grid": "wait",
    "no shrink": "shrink",
    "no shrink, no waits": "shrink wait",
    "none of the three": "expand shrink wait",
}
"""Of the kernel for few rows."""

WIDE_PARTS = {
    "nothing left out": "",
    "no expand steps": "expand",
    "no wait for u": "wait",
    "no slices": "slices",
    "no sums": "sums",
    "no slices, sums, wait": "slices sums wait",
}
"""Of the kernel for many."""


@contextmanager
def left_out(parts: str) -> Iterator[None]:
    """Launches that are traced in the body do without these parts."""
    few = Kernel._expands, Shrink._units_of_block, Counters.meet
    wide = Plan.tile, Plan.units_of_worker, hopper_wide_shrink.sums, hopper_wide_produce.meet

    def tile(self: Plan, counts: jax.Array, i: jax.Array) -> Tile:
        return dataclasses.replace(wide[0](self, counts, i), expands=jnp.int32(0))

    if "expand" in parts:
        Kernel._expands = lambda self, active, s: jnp.int32(0)
        Plan.tile = tile
    if "shrink" in parts:
        Shrink._units_of_block = lambda self, total: jnp.int32(0)
    if "slices" in parts:
        Plan.units_of_worker = lambda self, work: jnp.int32(0)
    if "sums" in parts:
        hopper_wide_shrink.sums = lambda plan, r, work, index, meet: None
    if "wait" in parts:
        Counters.meet = lambda self, which: None
        hopper_wide_produce.meet = lambda counter, target, last: None
    jax.clear_caches()
    try:
        yield
    finally:
        Kernel._expands, Shrink._units_of_block, Counters.meet = few
        Plan.tile, Plan.units_of_worker, hopper_wide_shrink.sums, hopper_wide_produce.meet = wide
        jax.clear_caches()


def random_data(rows: int) -> Data:
    """By group: weights and rank pools of each call, and an input."""

    @partial(jax.jit, static_argnums=(1, 2))
    def random(seed: int, shape: tuple[int, ...], size: float) -> jax.Array:
        return (jax.random.normal(jax.random.key(seed), shape) * size).astype(jnp.bfloat16)

    data = {}
    for i, (group, (width, parts)) in enumerate(LLAMA_8B.items()):
        seeds = range(1000 * i, 1000 * i + 3 * CALLS, 3)
        total, ranks = sum(parts), 16 * len(parts)
        weights = [random(seed, (width, total), width**-0.5) for seed in seeds]
        pools = [
            RankPool(
                a=random(seed + 1, (PAGES, ranks, width), width**-0.5).at[0].set(0),
                b=random(seed + 2, (PAGES, 16, total), 0.02).at[0].set(0),
            )
            for seed in seeds
        ]
        data[group] = weights, pools, random(1000 * i + 999, (rows, width), 1.0)
    return data


def chain(change: Callable[[Any], Any] | None, rows: int) -> Callable[[Data, Segments], jax.Array]:
    """All calls of all groups, in alphabetical order, each waiting for the one before. `change` of the
    tiles; None: the products alone, of many rows by XLA."""
    many = rows > hopper.NARROW_ROWS
    tiles = hopper_wide_tuning.tuning if many else tuning

    def run(data: Data, segments: Segments) -> jax.Array:
        last = jnp.float32(0)
        for group in sorted(data):
            weights, pools, x = data[group]
            width, parts = LLAMA_8B[group]
            for w, pool in zip(weights, pools, strict=True):
                x = (x + last * 1e-30).astype(x.dtype)
                if change is not None:
                    config = change(tiles(rows, width, parts, 132))
                    y = hopper.matmul(x, w, pool, segments, part_sizes=parts, config=config)
                elif many:
                    y = jnp.dot(x, w)[None]
                else:
                    y = hopper.base_matmul(x, w, part_sizes=parts)
                last = jnp.nan_to_num(y[0, 0, 0].astype(jnp.float32), posinf=0.0, neginf=0.0)
        return last

    return run


def measure(name: str, program: Callable[..., jax.Array], data: Data, segments: Segments) -> None:
    """Prints a line."""

    def work() -> None:
        for _ in range(TURNS):
            jax.block_until_ready(program(data, segments))

    work()
    us = [us for _, name, us in launches(work) if any(kind in name for kind in MATMULS)]
    groups = sorted(data)
    assert len(us) == TURNS * len(groups) * CALLS, len(us)
    medians = [
        statistics.median(
            us[(turn * len(groups) + i) * CALLS + call]
            for turn in range(TURNS)
            for call in range(CALLS)
        )
        for i in range(len(groups))
    ]
    cells = "  ".join(f"{g} {m:6.2f}" for g, m in zip(groups, medians, strict=True))
    print(f"{name:36s} {cells}  layer {sum(medians):6.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tails", action="store_true", help="other tiles, nothing left out")
    args = parser.parse_args()
    rows, data = args.rows, random_data(args.rows)
    uses = {0: ("base", None), 1: ("identical", None), 8: ("uniform", 8), 32: ("uniform", 32)}
    if rows <= 32:
        uses[32] = ("distinct", None)
    segments = {
        count: testing.segments(
            testing.pattern(name, rows, **({"resident": few} if few else {})),
            pool_pages=PAGES,
            bucket=32,
        )
        for count, (name, few) in uses.items()
    }
    if args.tails:
        for tail in (8, 4, 2, 1):
            program = jax.jit(chain(lambda t, tail=tail: dataclasses.replace(t, tail=tail), rows))
            for count, own in segments.items():
                measure(f"tail {tail}, {count} adapters", program, data, own)
        return
    measure("the products alone", jax.jit(chain(None, rows)), data, segments[0])
    for name, parts in (WIDE_PARTS if rows > hopper.NARROW_ROWS else PARTS).items():
        with left_out(parts):
            program = jax.jit(chain(lambda t: t, rows))
            for count in (0, 1, 8, 32) if not parts else (1, 8, 32):
                measure(f"{count} adapters, {name}", program, data, segments[count])


if __name__ == "__main__":
    main()
