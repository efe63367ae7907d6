"""What Pallas has no words for: storing the first rows of a wgmma result, and taking a ticket."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu


def store_rows(values: jax.Array, ref: Any, above: jax.Array, *, interpret: bool) -> None:
    """ref[...] = values[above : above + rows], from wgmma's registers straight to global memory.
    `above` is less than 8, and 0 if rows is a multiple of 8."""
    rows = ref.shape[0]
    if interpret:
        ref[...] = lax.dynamic_slice_in_dim(values, above, rows)
        return
    # The compiler's own types: only where a GPU is.
    from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
    from jax._src.lib.mlir.dialects import arith, vector

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(), plgpu.Layout.WG_SPLAT(())))
    def store(_: Any, values: Any, ref: Any, above: Any) -> None:
        shape = tuple(values.shape)
        registers = values.layout.registers_shape(shape)
        last = -(-rows // 8) * 8 + (8 if rows % 8 and 8 % rows else 0)  # above is less than 8
        strides = values.layout.tiling.tile_strides((shape[1], 1))
        first = arith.index_cast(ir.IndexType.get(), above.registers.item())
        limit = mgpu.c(rows, ir.IndexType.get())
        for index, (row, column) in zip(
            np.ndindex(registers), values.layout.thread_idxs(shape), strict=True
        ):
            if sum(i * s for i, s in zip(index, strides, strict=True)) // shape[1] >= last:
                continue  # no thread has a wanted row in this register
            pair = values.registers[index]
            row = arith.subi(row, first)
            mine = arith.cmpi(arith.CmpIPredicate.ult, row, limit)
            pointer = mgpu.memref_ptr(mgpu.memref_slice(ref, (row, column)))
            kind = ir.VectorType(pair.type).element_type
            if mgpu.bitwidth(kind) == 16:
                word = mgpu.bitcast(pair, ir.IntegerType.get_signless(32))
                args, ptx = (pointer, word), "st.global.b32 [$0], $1;"
            else:
                both = [vector.extract(pair, [], [i]) for i in range(2)]
                args, ptx = (pointer, *both), "st.global.v2.f32 [$0], {$1, $2};"
            mgpu.inline_ptx(ptx, *args, predicate=mine, has_side_effects=True)  # pyright: ignore[reportAttributeAccessIssue]

    store(values, ref, above)  # pyright: ignore[reportCallIssue]


def take_ticket(counter: Any, flag: Any, last: jax.Array) -> jax.Array:
    """How many took one of `counter` before; it is zero again after the ticket `last`. What this
    worker wrote before is seen by whoever takes a later ticket."""
    from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
    from jax._src.lib.mlir.dialects import arith, memref

    scalar = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), scalar),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=scalar),
    )
    def take(_: Any, counter: Any, flag: Any, last: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        mgpu.warpgroup_barrier()
        chosen = arith.extui(i32, mgpu.single_thread_predicate(mgpu.ThreadSubset.WARPGROUP))
        mgpu.inline_ptx(  # pyright: ignore[reportAttributeAccessIssue]
            "{ .reg .pred p; .reg .u32 t; setp.ne.u32 p, $3, 0;"
            " @p atom.acq_rel.gpu.global.inc.u32 t, [$0], $1; @p st.shared.u32 [$2], t; }",
            mgpu.memref_ptr(counter),
            last.registers.item(),
            mgpu.memref_ptr(flag),
            chosen,
            has_side_effects=True,
        )
        mgpu.warpgroup_barrier()
        zero = mgpu.c(0, ir.IndexType.get())
        ticket = memref.load(flag, [zero])
        return type(last).splat(ticket, (), is_signed=True)

    return take(counter, flag, last)  # pyright: ignore[reportCallIssue]
