"""Merged serving, to compare with: one adapter at a time added to the weights on the device.

`InPlaceMerge` changes the weights; `MergedTarget` lets requests through by turns.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora.adapters.peft import read_adapter
from jlora.adapters.pool import StagedAdapter
from jlora.benchmark.load import Target
from jlora.engine.runner import Runner
from jlora.errors import ParameterError
from jlora.models.config import GROUPS


class InPlaceMerge:
    """Adds adapters to a runner's weights and takes them away again, in one pass over the weights.

    In bfloat16 a weight that was changed and changed back may differ in its last bit. Adapters lie
    in host memory, laid out for the device: a switch reads no file.
    """

    def __init__(self, runner: Runner):
        layout = runner.programs.layout
        if layout.tp > 1:  # a device's columns of q, k and v lie between those of others
            raise ParameterError(f"systems: merged runs on one device, got --mesh {layout.tp}")
        if layout.cfg.experts is not None:
            raise ParameterError("systems: merged does not know models with experts yet")
        self._runner, self._cfg = runner, layout.cfg
        self._staged: dict[str, StagedAdapter] = {}
        self._now: StagedAdapter | None = None
        self.switches, self.seconds = 0, 0.0
        self._kernels = {
            (path[1], path[2]): index
            for path, index in runner.programs.flat.numbers.items()
            if path[0] == "layers" and path[2] in GROUPS and path[-1] == "kernel"
        }
        held = [self._cfg.groups(layer) for layer in range(self._cfg.layers)]
        assert len(self._kernels) == sum(map(len, held))
        self._parts = {group: layout.part_sizes(group) for group in GROUPS}

    def prepare(self, name: str, path: str) -> None:
        """Reads an adapter, once, so that `switch` can take it."""
        if name not in self._staged:
            adapter = read_adapter(path, self._cfg)
            if adapter.support:
                raise ParameterError(
                    f"systems: merged in place adds A and B only, {path} changes more"
                )
            self._staged[name] = self._runner.rank_pages.stage(adapter)

    def switch(self, name: str | None) -> None:
        """From the adapter that is merged to another one; None: to the base model. For
        `Engine.exclusive`: no step may run meanwhile, one on padding included."""
        start = time.perf_counter()
        wanted = None if name is None else self._staged[name]
        if wanted is self._now:
            return
        weights = self._runner.programs.weights
        for (layer, group), index in self._kernels.items():
            a, b = self._factors(self._now, -1, layer, group)
            more = self._factors(wanted, 1, layer, group)
            a, b = np.concatenate([a, more[0]], axis=1), np.concatenate([b, more[1]])
            weights[index] = add_delta(weights[index], a, b, self._parts[group])
        jax.block_until_ready([weights[index] for index in self._kernels.values()])
        self._now = wanted
        self.switches += 1
        self.seconds += time.perf_counter() - start

    def _factors(
        self, staged: StagedAdapter | None, sign: int, layer: int, group: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """(a [parts, ranks, K], b [ranks, N]) of one projection group; no ranks without an adapter."""
        pages = [] if staged is None else [page[group] for page in staged.host_pages]
        parts = len(GROUPS[group])
        width, out = self._runner.programs.layout.group_shape(group)
        dtype = self._runner.rank_pages.dtype
        a = [np.asarray(page.a[layer]).reshape(parts, -1, width) for page in pages]
        b = [np.asarray(page.b[layer]) * np.asarray(sign, dtype) for page in pages]
        none = np.zeros((parts, 0, width), dtype), np.zeros((0, out), dtype)
        return np.concatenate([none[0], *a], axis=1), np.concatenate([none[1], *b])


def _add_delta(
    kernel: Float[Array, "K N"],
    a: Float[Array, "parts R K"],
    b: Float[Array, "R N"],
    part_sizes: tuple[int, ...],
) -> Float[Array, "K N"]:
    """kernel + sum over ranks of aᵀ b, each part's columns with its own a. DONATES kernel."""
    columns, start = [], 0
    for part, size in enumerate(part_sizes):
        columns.append(
            jax.lax.dot_general(
                a[part],
                b[:, start : start + size],
                (((0,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
        )
        start += size
    return (kernel.astype(jnp.float32) + jnp.concatenate(columns, axis=1)).astype(kernel.dtype)


add_delta = jax.jit(_add_delta, donate_argnums=0, static_argnums=3)


class MergedTarget:
    """Requests of the merged adapter run together; those of others wait until it has none left.

    Then the adapter whose request has waited longest is merged, and all its requests run. While
    somebody waits, later requests of the running adapter wait, too: nobody starves.
    """

    def __init__(self, inner: Target, base: str, switch: Callable[[str], None]):
        """`switch` runs on a thread of its own while no request runs."""
        self._inner, self._base, self._switch = inner, base, switch
        self._now: str | None = None
        self._running = 0
        self._waiting: dict[str, list[asyncio.Future[None]]] = {}
        self._switching: asyncio.Task[None] | None = None

    async def generate(self, model: str, prompt: list[int], max_tokens: int) -> AsyncIterator[int]:
        """As `load.Target` says."""
        await self._enter(model)
        try:
            async for count in self._inner.generate(self._base, prompt, max_tokens):
                yield count
        finally:
            self._running -= 1
            self._wake()

    async def _enter(self, model: str) -> None:
        if model == self._now and not self._waiting:
            self._running += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(model, []).append(turn)
        self._wake()
        await turn

    def _wake(self) -> None:
        if self._running == 0 and self._waiting and self._switching is None:
            self._switching = asyncio.ensure_future(self._next())

    async def _next(self) -> None:
        model = next(iter(self._waiting))
        try:
            if model != self._now:
                await asyncio.to_thread(self._switch, model)
                self._now = model
        except BaseException as error:
            for turns in self._waiting.values():
                for turn in turns:
                    if not turn.done():
                        turn.set_exception(RuntimeError(f"merging {model} failed: {error}"))
            self._waiting.clear()
            raise
        finally:
            self._switching = None
        for turn in self._waiting.pop(model, []):
            if not turn.done():  # else its client has left
                self._running += 1
                turn.set_result(None)
        self._wake()
