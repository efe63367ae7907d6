"""How much memory a device has, how much of it is taken, and how small arrays lie in it."""

import ctypes
from typing import Any

import jax
import numpy as np

SMALL_BLOCKS = {4 << 10: 256, 128 << 10: 256}
"""Bytes of a block -> how many `small_blocks` lays out, half of them free."""


def device_memory(device: Any) -> tuple[int, int]:
    """(limit, in use) of a jax device, bytes: of this process's pool where it has one, else of the
    whole card, other processes included.

    Raises OSError if neither jax nor NVIDIA's driver knows.
    """
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"], stats["bytes_in_use"]
    return _cuda_memory(device.local_hardware_id)


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
    """By the CUDA driver API (cuMemGetInfo), in the context that XLA has made already."""
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
    return total.value, total.value - free.value
