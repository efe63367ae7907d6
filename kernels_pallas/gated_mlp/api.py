"""The public function. There is one implementation, for an H100 or H200: elsewhere the functions of
which the Semantics are made do the same, and `gated_mlp` says so by giving None."""

import jax
from jaxtyping import Array, Float, Int

from kernels_pallas.hardware import is_hopper
from kernels_pallas.lora_matmul.api import check
from kernels_pallas.lora_matmul.types import ActivePages, RankPool, Segments

IMPLEMENTATIONS = ("hopper",)


def gated_mlp(
    x: Float[Array, "T D"],
    gate_up: Float[Array, "D twice"],
    down: Float[Array, "F D"],
    pools: tuple[RankPool | ActivePages, RankPool | ActivePages] | None = None,
    segments: Segments | None = None,
    *,
    activation: str,
    rows: Int[Array, "..."] | None = None,
    implementation: str | None = None,
) -> Float[Array, "parts T D"] | None:
    """The package's Semantics in parts that are to be summed; None where its three steps are faster
    one by one, or there is no kernel.

    Calls that share `segments` or `rows` must depend on one another, as layers of a decoder do.

    Args:
        activation: a name of `act_mul.ACTIVATIONS`.
        pools, segments: both or neither.
        rows: without segments, any integers that are the same for all layers of a step: of them the
            grid-wide counters are made.
        implementation: "hopper" or None (chosen by platform and shape).

    Raises:
        ValueError: for shapes that do not fit each other, and pools without segments or the reverse.
        NotImplementedError: for a named implementation that does not exist, or cannot do this.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise NotImplementedError(
            f"gated_mlp has no implementation {implementation!r}; there are {IMPLEMENTATIONS}"
        )
    hidden, width = down.shape
    if x.shape[1:] != (width,) or gate_up.shape != (width, 2 * hidden):
        raise ValueError(
            f"x {x.shape}, gate_up {gate_up.shape}, down {down.shape}; expected [T, D], [D, 2 F] and "
            "[F, D]"
        )
    if (pools is None) != (segments is None):
        raise ValueError(
            "pools and segments come together: without one, adapters would be left out"
        )
    if pools is not None and segments is not None:
        check(x, pools[0], segments, (hidden, hidden))
        between = jax.ShapeDtypeStruct((x.shape[0], hidden), x.dtype)
        check(between, pools[1], segments, (width,))
    if implementation is None and not is_hopper("gated_mlp"):
        return None
    from kernels_pallas.gated_mlp import hopper  # imports Mosaic GPU: only where it is used

    try:
        if implementation is None and not hopper.worth_it(x, hidden, lora=pools is not None):
            return None
        return hopper.gated_mlp(x, gate_up, down, pools, segments, rows, activation=activation)
    except NotImplementedError:
        if implementation is not None:
            raise
        return None
