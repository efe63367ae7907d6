"""LoRA matmul over rank pages: `y = x @ w`, plus each row's own low-rank delta.

Semantics (numpy-like; accumulation in float32; result in x's dtype):
    y = x @ w                                                    # [T, N]
    for i in range(Pa):                                          # active pages
        p, rows = pages[i], (adapter == owner[i]) & (adapter >= 0)
        for j in range(len(part_sizes)):                         # q, k, v | gate, up | ...
            u = x[rows] @ a[p, 16*j : 16*(j+1)].T                # [rows, 16]
            y[rows, cols[j]] += u @ b[p, :, cols[j]]             # cols: running sum of part_sizes

An adapter may also scale and shift a projection's whole output, and change rows of an embedding:
`lora_epilogue` and `lora_embedding`, in plain XLA. `lora_vectors` gives each row what its adapter adds to a
weight that is a vector.

Pages that are not in `pages` are never read into a result (they may hold NaN); active pages must be
finite. Inside shard_map all shapes are local and nothing communicates: with x, a and w sharded on
K the result is a partial sum; with b and w sharded on N it is the local columns.
"""

from kernels_pallas.lora_matmul.api import lora_delta as lora_delta
from kernels_pallas.lora_matmul.api import lora_matmul as lora_matmul
from kernels_pallas.lora_matmul.types import PAGE as PAGE
from kernels_pallas.lora_matmul.types import ActivePages as ActivePages
from kernels_pallas.lora_matmul.types import RankPool as RankPool
from kernels_pallas.lora_matmul.types import Segments as Segments
from kernels_pallas.lora_matmul.xla import active_pages as active_pages
from kernels_pallas.lora_matmul.xla import active_stacks as active_stacks
from kernels_pallas.lora_matmul.xla import lora_embedding as lora_embedding
from kernels_pallas.lora_matmul.xla import lora_epilogue as lora_epilogue
from kernels_pallas.lora_matmul.xla import lora_vectors as lora_vectors
from kernels_pallas.lora_matmul.xla import pair_of_stacks as pair_of_stacks
