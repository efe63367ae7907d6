"""How long a compiled decode step takes by itself: no scheduler, no sampler, no server.

`PYTHONPATH=. python experiments/012_step_time/run.py [--rows 32 --adapters 0 1 8 32]`: dummy weights of a named
shape. The cases of a round take turns in random order. Last line: one JSON document.
"""

import argparse
import dataclasses
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.profiled import launches
from jlora.adapters.pool import RankPages
from jlora.batch import empty
from jlora.benchmark.report import commit
from jlora.benchmark.shapes import shape_config
from jlora.device_memory import small_blocks
from jlora.engine import sampler
from jlora.engine.config import EngineConfig, buckets, pick
from jlora.engine.flat_model import FlatModel
from jlora.engine.steps import KV_AXES, Adapters, Steps
from jlora.models.weights import abstract_decoder, dummy_weights
from jlora.planning import DEVICES, floor, prefill
from jlora.shape import Shape
from jlora.sharding import Layout, make_mesh, sharding
from kernels_pallas.gated_mlp import hopper as gated_mlp
from kernels_pallas.lora_matmul import hopper

PAGE, RANK_PAGE = 16, 16
QUEUED = 4
"""Steps whose queueing is timed: later ones wait for the device."""
PROMPTS, BLOCK = 8, 64
"""Prompts of a step of prefill, and tokens of their blocks."""


VARIANTS = {
    "": "what serves",
    "three": "the MLP as three launches",
    "xla": "likewise, and base products by XLA; without adapters",
    "summed": "as many slices of u for any number of rank pages, all summed",
}
"""Ways to compile a step."""


def serves(name: str, shape: Shape) -> bool:
    """Whether this variant of a step differs from others."""
    return {
        "xla": shape.rank_pages == 0,
        "summed": shape.rank_pages == 1 or shape.rank_pages > 32,
    }.get(name, True)


def room(pages: int, rows: int, tokens: int) -> int:
    """Rank pages that the engine's program for such a step holds, with --max-loras 32 or what is needed."""
    if not pages:
        return 0
    sequences, prompts = rows or PROMPTS, tokens or BLOCK
    config = EngineConfig(
        max_model_len=PAGE,
        max_num_seqs=sequences,
        max_num_batched_tokens=prompts,
        prefill_block=BLOCK,
        rank_page=RANK_PAGE,
        max_loras=max(32, -(-pages * RANK_PAGE // 64)),
        free_padding=jax.default_backend() == "gpu",
        decode_buckets=(sequences,),
        prefill_buckets=((sequences, prompts),),
    )
    return pick(buckets(config), rows, tokens, pages).rank_pages


@contextmanager
def variant(name: str) -> Iterator[None]:
    """Traces in the body compile steps in this way."""
    before = hopper.BASE_ROWS, gated_mlp.worth_it
    before_pages = hopper.for_pages, gated_mlp.for_pages
    if name == "xla":
        hopper.BASE_ROWS = (1, 0)
    if name in ("three", "xla"):
        gated_mlp.worth_it = lambda x, hidden, *, lora: False
    if name == "summed":
        hopper.for_pages = gated_mlp.for_pages = lambda t, pages, sms: t
    jax.clear_caches()
    try:
        yield
    finally:
        hopper.BASE_ROWS, gated_mlp.worth_it = before
        hopper.for_pages, gated_mlp.for_pages = before_pages
        jax.clear_caches()


@dataclasses.dataclass(frozen=True)
class Work:
    """What steps are about, beside their rows."""

    ranks: list[int]
    """Of the adapters, in turns."""
    prefill: list[int]
    """Tokens of the steps that are prompts and no decode rows."""

    def ranks_of(self, adapters: int) -> list[int]:
        return [self.ranks[i % len(self.ranks)] for i in range(adapters)]

    def pages_of(self, adapters: int) -> list[int]:
        """Rank pages of each adapter."""
        return [-(-rank // RANK_PAGE) for rank in self.ranks_of(adapters)]

    def pages(self, adapters: int) -> int:
        return sum(self.pages_of(adapters))


class Machine:
    """Weights, K/V and rank pages on the device, and what runs on them."""

    def __init__(
        self,
        name: str,
        mesh: int,
        rows: list[int],
        work: Work,
        contexts: list[int],
        adapters: int,
    ):
        cfg = shape_config(name)
        self.work, most_rows = work, max([*rows, PROMPTS])
        longest = max([*contexts, *(-(-tokens // PROMPTS) for tokens in work.prefill)])
        self.table = -(-(longest + 1) // PAGE)
        self.mesh, self.layout = make_mesh(mesh), Layout(cfg, mesh)
        dtype = np.dtype(jnp.bfloat16)
        abstract = abstract_decoder(self.layout, dtype, copy_head=False)
        self.flat = FlatModel(abstract, self.mesh)
        model = dummy_weights(self.layout, self.mesh, dtype, 0, copy_head=False)
        self.weights = self.flat.leaves(model)
        self.steps = Steps(self.flat, cfg, self.mesh, split=False)
        held = work.pages(adapters)
        pages = RankPages(cfg, self.layout, self.mesh, held, dtype, RANK_PAGE)
        self.pools = [
            {
                group: jax.tree.map(
                    lambda array, seed=10 * i + j: jax.device_put(
                        _random_page_array(array, seed), array.sharding
                    ),
                    pool,
                )
                for j, (group, pool) in enumerate(own.items())
            }
            for i, own in enumerate(pages.pools)
        ]
        kv = (most_rows * self.table + 1, self.layout.kv_heads, PAGE, cfg.head_dim)
        shapes = [(kv, kv)] * cfg.layers
        zeros = jax.jit(
            lambda: jax.tree.map(
                lambda shape: jnp.zeros(shape, dtype), shapes, is_leaf=lambda x: x == kv
            ),
            out_shardings=sharding(self.mesh, *KV_AXES),
        )
        self.kv = zeros()
        self.slots = most_rows
        # As the engine lays them out, so that no step changes its CUDA graph: here the scores come and
        # go as well.
        on_gpu = jax.default_backend() == "gpu"
        self._small_blocks = [
            small_blocks(device, 4 * count * cfg.vocab_rows)
            for device in (self.mesh.devices.flat if on_gpu else ())
            for count in {*rows, PROMPTS}
        ]
        state = sampler.empty_slots(most_rows, cfg.vocab_rows)
        self.last = jax.device_put(state.last, sharding(self.mesh))

    def lower(self, shape: Shape) -> jax.stages.Lowered:
        """The step's program, for compiling."""
        specs = jax.tree.map(lambda array: array.sharding.spec, self.pools)
        adapters = Adapters(abstract=self.pools, specs=specs)
        if not shape.rank_pages:
            adapters = Adapters(abstract=None, specs=jax.sharding.PartitionSpec())
        return self.steps.lower(("whole", shape), adapters, self.kv, self.last)

    def batch(self, shape: Shape, context: int, adapters: int) -> np.ndarray:
        """Decode rows, all at position `context`, or prompts of equal length; adapters one after another."""
        packed, arrays = empty(shape, self.slots - 1)
        rows, length = shape.tokens, 1
        arrays["tokens"][:] = np.random.default_rng(0).integers(1, 1000, rows)
        arrays["positions"][:] = context
        used = context // PAGE + 1
        if shape.prefill:
            length = shape.prefill // PROMPTS
            arrays["positions"][:] = np.tile(np.arange(length), PROMPTS)
            used = -(-length // PAGE)
        sequences, blocks = rows // length, -(-length // shape.block)
        arrays["slots"][blocks - 1 :: blocks] = np.arange(sequences)
        arrays["last"][blocks - 1 :: blocks] = np.arange(sequences) * length + length - 1
        arrays["samples"][blocks - 1 :: blocks] = 1
        pages = 1 + np.arange(sequences * used).reshape(sequences, used)
        arrays["tables"][:, :used] = np.repeat(pages, blocks, axis=0)
        if adapters:
            own = np.repeat(np.arange(sequences) % adapters, length)
            arrays["adapter"][:] = np.sort(own)
            owner = np.repeat(np.arange(adapters), self.work.pages_of(adapters))
            arrays["pages"][: len(owner)] = 1 + np.arange(len(owner))
            arrays["owner"][: len(owner)] = owner
        return packed

    def run(
        self, step: Callable[..., Any], lora: bool, batch: np.ndarray, steps: int
    ) -> tuple[float, float]:
        """(ms of a step, ms that the host needs to queue one: of the first, while the queue is empty)."""
        pools = self.pools if lora else None
        begin = queued = time.perf_counter()
        scores = None
        for number in range(1, steps + 1):
            self.kv, scores, *_ = step(self.weights, pools, self.kv, self.last, batch)
            if number == min(steps, QUEUED):
                queued = time.perf_counter()
        jax.block_until_ready(scores)
        end = time.perf_counter()
        return (end - begin) / steps * 1e3, (queued - begin) / min(steps, QUEUED) * 1e3

    def floor_ms(self, shape: Shape, context: int, adapters: int) -> float | None:
        """Bytes that a decode step must read, over the bandwidth, or products of prompts, over the rate of
        a large matmul; None where these were never measured."""
        kind = jax.devices()[0].device_kind.lower().split()
        device = next((own for own in DEVICES.values() if own.measured and own.name in kind), None)
        if device is None:
            return None
        if shape.prefill:
            least = prefill(self.layout.cfg, device, shape.prefill // PROMPTS) * PROMPTS
            return least / self.mesh.size * 1e3
        rank = statistics.mean(self.work.ranks_of(adapters)) if adapters else 0
        step = floor(
            self.layout.cfg, device, rows=shape.decode, context=context, active=adapters, rank=rank,
            dtype="bfloat16",
        )  # fmt: skip
        return (step.weights + step.adapters + step.kv) / self.mesh.size * 1e3


@jax.jit  # one program for each shape
def _random_page_array(array: jax.Array, seed: int) -> jax.Array:
    numbers = jax.random.normal(jax.random.key(seed), array.shape, jnp.float32) * 0.01
    return numbers.astype(array.dtype).at[0].set(0)


@dataclasses.dataclass(frozen=True)
class Case:
    """A step and how many adapters its rows use."""

    adapters: int
    program: Callable[..., Any]
    shape: Shape
    note: str = ""


def measure(
    machine: Machine,
    cases: list[Case],
    context: int,
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Rounds over all cases; a result and a line for each."""
    batches = [machine.batch(case.shape, context, case.adapters) for case in cases]
    times: list[list[tuple[float, float]]] = [[] for _ in cases]
    for turn in range(args.repeats + 1):
        order = list(zip(cases, batches, times, strict=True))
        random.Random(turn).shuffle(order)
        for case, batch, own in order:
            took = machine.run(case.program, case.shape.rank_pages > 0, batch, args.steps)
            if turn:  # the first warms up
                own.append(took)
    base = next((i for i, case in enumerate(cases) if not case.adapters and not case.note), 0)
    results = []
    for case, own in zip(cases, times, strict=True):
        ms, host = (statistics.median(column) for column in zip(*own, strict=True))
        ratio = statistics.median(b[0] / o[0] for b, o in zip(times[base], own, strict=True))
        steps = [took for took, _ in own]
        rows, tokens = case.shape.decode, case.shape.prefill
        row = {
            "rows": rows, "context": context, "adapters": case.adapters, "note": case.note,
            "ranks": machine.work.ranks, "prefill": tokens, "mesh": machine.mesh.size,
            "ms": round(ms, 4), "spread": round((max(steps) - min(steps)) / 2 / ms, 4),
            "of_base": round(ratio, 4), "host_ms": round(host, 3),
        }  # fmt: skip
        what = f"{tokens} prompt tokens" if tokens else f"{rows:4d} rows at {context:5d}"
        line = f"{what}, {case.adapters:3d} adapters {case.note:6s}: "
        line += f"{ms:.3f} ms (±{row['spread']:.1%}), {ratio:.3f} of base, host {host:.2f} ms"
        if (least := machine.floor_ms(case.shape, context, case.adapters)) is not None:
            row["floor_ms"] = round(least, 3)
            line += f", {'products' if tokens else 'bytes'} alone {least:.2f} ms ({least / ms:.2f})"
        results.append(row)
        print(line, flush=True)
    return results


def profile(machine: Machine, case: Case, context: int, steps: int = 4) -> None:
    """Prints what XLA's profiler says of each kind of launch, without CUDA graphs."""
    batch, lora = machine.batch(case.shape, context, case.adapters), case.shape.rank_pages > 0
    machine.run(case.program, lora, batch, 2)

    def work() -> None:
        machine.run(case.program, lora, batch, steps)

    took: dict[str, list[float]] = {}
    for _, name, us in launches(work):
        took.setdefault(name, []).append(us)
    for name, us in sorted(took.items(), key=lambda item: -sum(item[1])):
        each, total = statistics.median(us), sum(us) / steps
        print(f"{total:9.1f} us = {len(us) / steps:5.1f} x {each:7.2f} us  {name}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--mesh", type=int, default=1, help="devices that share the model")
    parser.add_argument("--rows", type=int, nargs="*", default=[8, 32, 64], help="decode rows")
    parser.add_argument(
        "--prefill", type=int, nargs="*", default=[], help=f"tokens of {PROMPTS} prompts, steps of their own"
    )  # fmt: skip
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[RANK_PAGE], help="of the adapters, in turns"
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[160])
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 1, 8, 32])
    parser.add_argument(
        "--also", nargs="+", default=[], choices=[name for name in VARIANTS if name],
        help="; ".join(f"{name}: {what}" for name, what in VARIANTS.items() if name),
    )  # fmt: skip
    parser.add_argument("--profile", action="store_true", help="device time of launches by name")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if odd := [tokens for tokens in args.prefill if tokens % (PROMPTS * BLOCK)]:
        parser.error(f"--prefill: {odd} must be multiples of {PROMPTS * BLOCK}")
    work, most = Work(args.ranks, args.prefill), max(*args.adapters, 1)
    machine = Machine(args.shape, args.mesh, args.rows, work, args.contexts, most)
    kind = jax.devices()[0].device_kind
    results = []
    for rows, tokens in [(rows, 0) for rows in args.rows] + [(0, n) for n in args.prefill]:
        counts = [n for n in args.adapters if n <= (PROMPTS if tokens else rows)]
        begin = time.perf_counter()
        shapes = {
            n: Shape(
                decode=rows, prefill=tokens, rank_pages=room(work.pages(n), rows, tokens),
                block=BLOCK, table=machine.table,
            )
            for n in counts
        }  # fmt: skip
        wanted = [(name, n) for name in ("", *args.also) for n in counts if serves(name, shapes[n])]
        programs: dict[tuple[str, Shape], Future[jax.stages.Compiled]] = {}
        with ThreadPoolExecutor() as workers:  # lowering is one by one, compiling is not
            for name, n in wanted:
                if (name, shapes[n]) not in programs:
                    with variant(name):
                        lowered = machine.lower(shapes[n])
                    programs[name, shapes[n]] = workers.submit(lowered.compile)
        cases = [Case(n, programs[name, shapes[n]].result(), shapes[n], name) for name, n in wanted]
        print(f"{rows or tokens} rows compiled in {time.perf_counter() - begin:.0f} s", flush=True)
        for context in args.contexts:
            results += measure(machine, cases, context, args)
        if args.profile:
            for case in cases[: len(counts)]:
                print(f"\n{case.adapters} adapters {case.note}, launches of a step:")
                profile(machine, case, args.contexts[0])
    about = {"device": kind, "jax": jax.__version__, "python": platform.python_version()}
    about |= {"commit": commit(), "command": " ".join(sys.argv)}
    print(json.dumps({**about, "results": results}))


if __name__ == "__main__":
    main()
