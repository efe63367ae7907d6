"""The gate of a gated MLP as one launch.

Semantics (arithmetic in float32, rounded once to x's dtype):

    gate, up = x[:, :F], x[:, F:]
    out = activation(gate) * up            # "silu", or "gelu_tanh": gelu's tanh form
"""

from kernels_pallas.act_mul.api import act_mul as act_mul
from kernels_pallas.act_mul.xla import ACTIVATIONS as ACTIVATIONS
from kernels_pallas.act_mul.xla import Activation as Activation
