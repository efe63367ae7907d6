"""Plain XLA: one elementwise kernel on a GPU, fused with its neighbours on a CPU."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Activation = Callable[[Array], Array]

ACTIVATIONS: dict[str, Activation] = {
    "silu": jax.nn.silu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}
"""By name."""


def act_mul(x: Float[Array, "T twice"], *, activation: str) -> Float[Array, "T F"]:
    """See `kernels_pallas.act_mul`."""
    gate, up = jnp.split(x.astype(jnp.float32), 2, axis=1)
    return (ACTIVATIONS[activation](gate) * up).astype(x.dtype)
