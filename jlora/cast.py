"""Casts to a device's or a file's type, with a refusal of what it cannot hold."""

import math

import numpy as np
from jaxtyping import Float

from jlora.errors import JloraError


def narrowed(
    values: Float[np.ndarray, "..."], dtype: np.dtype, what: str, error: type[JloraError]
) -> Float[np.ndarray, "..."]:
    """`values` as `dtype`, `values` itself if it is of it; `error` about `what` if one becomes infinite or is NaN."""
    with np.errstate(over="ignore"):  # reported below, by name
        cast = values.astype(dtype, copy=False)
    if not math.isfinite(largest(cast)):
        wider = "; use --dtype bfloat16 or float32" if dtype == np.float16 else ""
        raise error(f"{what}: values up to {largest(values):.3g} do not fit {dtype.name}{wider}")
    return cast


def largest(values: Float[np.ndarray, "..."]) -> float:
    """The largest magnitude; not finite where a value is infinite or NaN. 0 for no values.

    Bits without their sign are in the order of magnitudes, infinity and NaN the largest. numpy's
    own functions take ten times as long for bfloat16, and hold the interpreter's lock.
    """
    bits = values.view(f"u{values.itemsize}")
    most = np.bitwise_and(bits, np.iinfo(bits.dtype).max >> 1).max(initial=0)
    return float(np.array(most, bits.dtype).view(values.dtype))
