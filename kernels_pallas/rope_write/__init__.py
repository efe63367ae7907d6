"""Rotary embedding of q and k, and the step's K/V stored in their pages, as one launch.

Semantics (N query heads, K kv heads; rope in the half-split form of Hugging Face's Llama):

    q, k, v = split(qkv, (N, N + K), axis=1)                    # [T, N | K | K, H]
    q, k = rms_norm(q, q_norm), rms_norm(k, k_norm)             # where a model has them
    q, k = rope(q, cos, sin), rope(k, cos, sin)                 # in float32, then rounded
    keys[pages[t], :, offsets[t]] = k[t]                        # in place
    values[pages[t], :, offsets[t]] = where(isfinite(v[t]), v[t], 0)
    return q, keys, values

V is finite in a pool: a masked position weighs 0, and 0 · NaN is NaN, so what an adapter that overflows leaves
in a page must not reach the page's next owner. (Masked keys are harmless: their score is replaced.)
"""

from kernels_pallas.rope_write.api import rope_write as rope_write
from kernels_pallas.rope_write.types import Norms as Norms
from kernels_pallas.rope_write.xla import rope as rope
