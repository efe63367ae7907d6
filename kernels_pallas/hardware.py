"""What the kernels run on, and how a fallback is told: once in the log."""

import logging
from functools import cache

import jax

_log = logging.getLogger(__name__)


@cache
def is_hopper(kernel: str) -> bool:
    """Whether the default backend has compute capability 9.0; another GPU is told in the log, with
    the name of the `kernel` that it does without."""
    if jax.default_backend() != "gpu":
        return False
    device = jax.devices()[0]
    if getattr(device, "compute_capability", "") == "9.0":
        return True
    say_once(f"{kernel}: no kernel for {device.device_kind}, XLA instead")
    return False


@cache
def load_runtime() -> None:
    """Loads what compiled kernels call. Lowering one does; a program that comes compiled from a file
    needs it first ("Symbols not found: mosaic_gpu_launch_kernel")."""
    if jax.default_backend() == "gpu":
        from jax.experimental.pallas import mosaic_gpu as mosaic_gpu


@cache
def say_once(message: str) -> None:
    """A warning that is logged the first time only."""
    _log.warning(message)
