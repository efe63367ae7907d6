"""The public function: one of the implementations.

"xla" runs everywhere; "hopper" is a Mosaic GPU kernel for bfloat16 and float16 on an H100 or H200. A
named implementation never falls back: what it cannot do is a NotImplementedError.
"""

from jaxtyping import Array, Float

from kernels_pallas.act_mul import xla
from kernels_pallas.hardware import is_hopper, say_once

IMPLEMENTATIONS = ("xla", "hopper")


def act_mul(
    x: Float[Array, "T twice"],
    *,
    activation: str,
    implementation: str | None = None,
) -> Float[Array, "T F"]:
    """activation(x's first half) * its second half, as the package's Semantics say.

    Args:
        activation: a name of ACTIVATIONS.
        implementation: "xla", "hopper" or None (chosen by the platform).

    Raises:
        NotImplementedError: for an implementation that does not exist, or cannot do this.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise NotImplementedError(
            f"act_mul has no implementation {implementation!r}; there are {IMPLEMENTATIONS}"
        )
    if implementation == "hopper" or (implementation is None and is_hopper("act_mul")):
        from kernels_pallas.act_mul import hopper  # imports Mosaic GPU: only where used

        try:
            return hopper.act_mul(x, activation=activation)
        except NotImplementedError as reason:
            if implementation is not None:
                raise
            say_once(f"act_mul: no kernel, XLA instead ({reason})")
    return xla.act_mul(x, activation=activation)
