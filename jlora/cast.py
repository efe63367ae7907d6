"""Casts to a device's or a file's type, with a refusal of what it cannot hold."""

import numpy as np
from jaxtyping import Float

from jlora.errors import JloraError


def narrowed(
    values: Float[np.ndarray, "..."], dtype: np.dtype, what: str, error: type[JloraError]
) -> Float[np.ndarray, "..."]:
    """`values` as `dtype`, `values` itself if it is of it; `error` about `what` if one becomes infinite or is NaN."""
    with np.errstate(over="ignore"):  # reported below, by name
        cast = values.astype(dtype, copy=False)
    if not np.isfinite(cast).all():
        wider = "; use --dtype bfloat16 or float32" if dtype == np.float16 else ""
        most = float(np.abs(values).max())
        raise error(f"{what}: values up to {most:.3g} do not fit {dtype.name}{wider}")
    return cast
