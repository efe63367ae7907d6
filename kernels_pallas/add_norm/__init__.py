"""Residual add and RMSNorm as one launch.

Semantics (w is the weight, or 1 + weight for `plus_one`; arithmetic in float32):

    total = (x + y) rounded to x's dtype           # y [parts, T, D]: x + y.sum(0)
    n = total / sqrt(mean(total ** 2, axis=-1) + eps)
    normed = (n rounded to x's dtype) * weight          # plus_one: n * (1 + weight), rounded once
    return total, normed
"""

from kernels_pallas.add_norm.api import add_norm as add_norm
from kernels_pallas.add_norm.xla import add as add
from kernels_pallas.add_norm.xla import rms_norm as rms_norm
