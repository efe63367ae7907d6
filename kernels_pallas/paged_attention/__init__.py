"""Attention of a step's rows over a paged K/V pool: decode rows and prefill blocks in one call.

Semantics (numpy-like; G = N // K query heads share a kv head):

    for t in range(T):
        row = t if t < decode else decode + (t - decode) // block
        p = positions[t]                       # -1: padding, out[t] is unspecified but finite
        lo = max(0, p - window + 1) if window else 0
        for j in range(lo, p + 1):
            page, offset = tables[row, j // page_size], j % page_size
            score[n, j] = q[t, n] @ keys[page, n // G, offset] * scale
            score[n, j] = softcap * tanh(score[n, j] / softcap) if softcap else score[n, j]
        out[t, n] = softmax(score[n, lo : p + 1]) @ values[...]

Scores and sums are float32 whatever the storage dtype. Positions of a prefill block ascend by one, its
padding comes last. V is finite up to the end of each page that a row sees; all else in the pool may be NaN.
"""

from kernels_pallas.paged_attention.api import paged_attention as paged_attention
