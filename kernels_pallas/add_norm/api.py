"""The public function: one of the implementations.

"xla" runs everywhere; "hopper" is a Mosaic GPU kernel for bfloat16 and float16 on an H100 or H200. A
named implementation never falls back: what it cannot do is a NotImplementedError.
"""

from jaxtyping import Array, Float

from kernels_pallas.add_norm import xla
from kernels_pallas.hardware import is_hopper, say_once

IMPLEMENTATIONS = ("xla", "hopper")


def add_norm(
    x: Float[Array, "T D"],
    y: Float[Array, "*parts T D"],
    weight: Float[Array, "... D"],
    *,
    eps: float,
    plus_one: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
    """(x + y, its RMSNorm) as the package's Semantics say.

    Args:
        y: whole, or parts that are still to be summed.
        weight: one for all rows [D], or one for each [T, D].
        implementation: "xla", "hopper" or None (chosen by the platform).

    Raises:
        NotImplementedError: for an implementation that does not exist, or cannot do this.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise NotImplementedError(
            f"add_norm has no implementation {implementation!r}; there are {IMPLEMENTATIONS}"
        )
    if implementation == "hopper" or (implementation is None and is_hopper("add_norm")):
        from kernels_pallas.add_norm import hopper  # imports Mosaic GPU: only where used

        try:
            return hopper.add_norm(x, y, weight, eps=eps, plus_one=plus_one)
        except NotImplementedError as reason:
            if implementation is not None:
                raise
            say_once(f"add_norm: no kernel, XLA instead ({reason})")
    return xla.add_norm(x, y, weight, eps=eps, plus_one=plus_one)
