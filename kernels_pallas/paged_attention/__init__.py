"""Attention of a step's rows over a paged K/V pool: decode rows and prefill blocks in one call.

Semantics (numpy-like; G = N // K query heads share a kv head):

    for t in range(T):
        row = t if t < decode else decode + (t - decode) // block
        p = positions[t]                       # -1: padding, out[t] is unspecified but finite
        lo = max(0, p - window + 1) if window else 0
        for j in range(lo, p + 1):
            page, offset = tables[row, j // page_size], j % page_size
            score[n, j] = q[t, n] @ keys[page, n // G, offset] * scale
        out[t, n] = softmax(score[n, lo : p + 1]) @ values[...]

Scores and sums are float32 whatever the storage dtype.
"""

from jaxtyping import Array, Float, Int

from kernels_pallas.paged_attention import xla as _xla


def paged_attention(
    q: Float[Array, "T N H"],
    keys: Float[Array, "P K page H"],
    values: Float[Array, "P K page H"],
    tables: Int[Array, "B W"],
    positions: Int[Array, "T"],
    *,
    decode: int,
    block: int,
    scale: float,
    window: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "T N H"]:
    """Attention as the module's Semantics say. K/V of the step's own tokens are in the pool already.

    Args:
        decode: how many of the T tokens are decode rows; the rest are prefill blocks.
        block: tokens in a prefill block; `T - decode` is a multiple of it.
        scale: factor on the scores, usually H ** -0.5.
        window: sliding window in tokens, the query's own included; None: full attention.
        implementation: "xla" or None (chosen by the platform).

    Raises:
        NotImplementedError: for an implementation that does not exist.
    """
    if implementation not in (None, "xla"):
        raise NotImplementedError(f"paged_attention has no implementation {implementation!r}")
    return _xla.paged_attention(
        q, keys, values, tables, positions, decode=decode, block=block, scale=scale, window=window
    )
