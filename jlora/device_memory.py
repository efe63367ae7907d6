"""How much memory a device has, and how much of it is taken."""

import ctypes
from typing import Any


def device_memory(device: Any) -> tuple[int, int]:
    """(limit, in use) of a jax device, bytes: of this process's pool where it has one, else of the
    whole card, other processes included.

    Raises OSError if neither jax nor NVIDIA's driver knows.
    """
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"], stats["bytes_in_use"]
    return _cuda_memory(device.local_hardware_id)


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
