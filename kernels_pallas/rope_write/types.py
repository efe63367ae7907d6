"""What a model does with q and k before it rotates them."""

import dataclasses
from functools import partial

import jax
from jaxtyping import Array, Float


@partial(jax.tree_util.register_dataclass, data_fields=("q", "k"), meta_fields=("eps", "plus_one"))
@dataclasses.dataclass(frozen=True, kw_only=True)
class Norms:
    """RMSNorm of every head of q and k (see `kernels_pallas.add_norm.rms_norm`)."""

    q: Float[Array, "... H"]
    """One weight for all rows [H], or one for each [T, 1, H]."""
    k: Float[Array, "... H"]
    eps: float
    plus_one: bool
