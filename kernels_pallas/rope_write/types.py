"""What a model does with q and k before it rotates them."""

import dataclasses

from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Norms:
    """RMSNorm of every head of q and k (see `kernels_pallas.add_norm.rms_norm`)."""

    q: Float[Array, "... H"]
    """One weight for all rows [H], or one for each [T, 1, H]."""
    k: Float[Array, "... H"]
    eps: float
    plus_one: bool
