"""How much of a GPU jax takes, how much memory a device has and how much of it is taken, and how small
arrays lie in it.
"""

import ctypes
import os
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

FRACTION = "XLA_CLIENT_MEM_FRACTION"
"""Share of a GPU that jax's pool is; jax reads it when its backend starts, by itself it takes 0.75."""

USERS_CHOICE = (
    FRACTION,
    "XLA_PYTHON_CLIENT_MEM_FRACTION",  # its old name; jax refuses both together
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
)
"""Who sets one of these shares out the memory himself."""

LARGEST_POOL = 0.95
"""Of a card: CUDA's context, kernels and graphs lie outside of the pool."""

SLACK = 0.05
"""Share of the pool that is left to temporary buffers, if they need no more."""

SMALL_BLOCKS = {4 << 10: 256, 128 << 10: 256}
"""Bytes of a block -> how many `small_blocks` lays out, half of them free."""


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Bytes of a device."""

    card: int
    """Of all of it; of the pool where NVIDIA's driver is not there to ask."""
    pool: int
    """That this process can have at most: jax's pool, or less of it if others took what it has not yet."""
    used: int
    """Of the pool; of the card, other processes included, where jax has no pool."""

    def room(self, utilization: float, temporaries: int) -> int:
        """What may still be taken: all together at most `utilization` of the card, and so much of the
        pool that temporary buffers fit into the rest. Negative if more is taken already."""
        most = self.pool - max(temporaries, int(self.pool * SLACK))
        return min(int(self.card * utilization), most) - self.used


def start_backend(utilization: float) -> str:
    """jax's platform. If its backend has not started, it does here: on a GPU with a pool that is a
    little more than `utilization` of the card.

    The environment is then as it was: other processes get nothing from it, and programs, whose names
    have it in them (`program_cache`), stay the same. A backend that runs already keeps its pool.
    """
    if jax.config.values["jax_platforms"] == "cpu" or any(map(os.environ.get, USERS_CHOICE)):
        return jax.default_backend()
    os.environ[FRACTION] = f"{min(LARGEST_POOL, utilization + SLACK):.4f}"
    try:
        return jax.default_backend()
    finally:
        del os.environ[FRACTION]


def device_memory(device: Any) -> DeviceMemory:
    """The memory of a jax device.

    Raises OSError if neither jax nor NVIDIA's driver knows.
    """
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    try:
        card, free = _cuda_memory(device.local_hardware_id)
    except OSError:
        if limit is None:
            raise
        card = free = limit
    if limit is None:
        return DeviceMemory(card=card, pool=card, used=card - free)
    used, held = stats["bytes_in_use"], stats.get("pool_bytes", -1)
    if held < used:  # not told: jax says -1 then
        held = limit
    # Less than the limit is held while the pool grows, or where others had taken too much.
    return DeviceMemory(card=card, pool=min(limit, held + free), used=used)


def small_blocks(device: Any, most: int) -> list[jax.Array]:
    """Leaves free blocks for arrays of up to `most` bytes between blocks that the result holds.

    A step's inputs and results are small and come and go; its temporary buffer is large. XLA's
    allocator (best fit, adjacent free blocks joined) cuts a small array off the large free region
    if it finds nothing smaller; then the next step's temporary buffer begins elsewhere, and XLA
    changes every node of the step's CUDA graph on the host: 1 to 5 ms. With blocks of their own
    small arrays come back to the same places, and nothing is changed (experiments/LOG.md).
    """
    sizes = dict(SMALL_BLOCKS)
    if most > max(sizes):
        sizes[most] = 8
    held: list[jax.Array] = []
    for size, count in sizes.items():
        blocks = [jax.device_put(np.zeros(size, np.uint8), device) for _ in range(count)]
        jax.block_until_ready(blocks)
        held += blocks[1::2]
    return held


def _cuda_memory(ordinal: int) -> tuple[int, int]:
    """(total, free) by the CUDA driver API (cuMemGetInfo), in the context that XLA has made already."""
    cuda = ctypes.CDLL("libcuda.so.1")
    place, context = ctypes.c_int(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()

    def call(name: str, *args: Any) -> None:
        if status := getattr(cuda, name)(*args):
            raise OSError(f"{name} of device {ordinal} failed with CUDA error {status}")

    call("cuInit", 0)
    call("cuDeviceGet", ctypes.byref(place), ordinal)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), place)
    try:
        call("cuCtxPushCurrent_v2", context)
        call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        call("cuCtxPopCurrent_v2", ctypes.byref(context))
    finally:
        call("cuDevicePrimaryCtxRelease_v2", place)
    return total.value, free.value
