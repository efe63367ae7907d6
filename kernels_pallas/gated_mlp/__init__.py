"""The gated MLP of a decoder layer: two LoRA matmuls and the gate between them as one launch.

Semantics (lora_matmul, act_mul: theirs; pools: of gate and up together, and of down):

    both = lora_matmul(x, gate_up, pools[0], segments, part_sizes=(F, F))
    h = act_mul(both, activation)                               # rounded to x's dtype
    out = lora_matmul(h, down, pools[1], segments, part_sizes=(D,))

`hopper` does not round `both`. It gives out in parts that the caller sums, in float32.
"""

from kernels_pallas.gated_mlp.api import gated_mlp as gated_mlp
