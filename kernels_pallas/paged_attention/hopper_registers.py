"""What Pallas has no words for: weights that go back to the tensor cores, storing the wanted columns
of a wgmma result, and taking a ticket."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
"""How wgmma wants its operands in shared memory."""


def meet(*, interpret: bool) -> None:
    """Every thread of the warpgroup is here."""
    if interpret:
        return
    plgpu.inline_mgpu()(lambda _: mgpu.warpgroup_barrier())()


def store_weights(p: jax.Array, ref: Any, *, interpret: bool) -> None:
    """ref[...] = p.T, from wgmma's registers to where wgmma reads it. All threads meet in it."""
    if interpret:
        ref[...] = p.T
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(SWIZZLED)))
    def store(_: Any, p: Any, ref: Any) -> None:
        turned = p.to_layout(transposed())
        turned.store_tiled(mgpu.memref_transpose(ref, (1, 0, 3, 2)), swizzle=128)
        mgpu.inline_ptx("fence.proxy.async.shared::cta;", has_side_effects=True)  # pyright: ignore[reportAttributeAccessIssue]
        mgpu.warpgroup_barrier()

    store(p, ref)  # pyright: ignore[reportCallIssue]


def store_columns(values: jax.Array, ref: Any, above: jax.Array, *, interpret: bool) -> None:
    """ref[...] = values[:, above : above + rows].T, from wgmma's registers straight to global
    memory, 16 bits a number."""
    rows = ref.shape[0]
    if interpret:
        ref[...] = lax.dynamic_slice_in_dim(values, above, rows, axis=1).T
        return
    # The compiler's own types: only where a GPU is.
    from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
    from jax._src.lib.mlir.dialects import arith

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(), plgpu.Layout.WG_SPLAT(())))
    def store(_: Any, values: Any, ref: Any, above: Any) -> None:
        turned = values.to_layout(transposed())
        first = arith.index_cast(ir.IndexType.get(), above.registers.item())
        limit = mgpu.c(rows, ir.IndexType.get())
        places = turned.layout.thread_idxs(tuple(turned.shape))
        for pair, (row, column) in zip(turned.registers.flat, places, strict=True):
            column = arith.subi(column, first)
            mine = arith.cmpi(arith.CmpIPredicate.ult, column, limit)
            pointer = mgpu.memref_ptr(mgpu.memref_slice(ref, (column, row)))
            word = mgpu.bitcast(pair, ir.IntegerType.get_signless(32))
            ptx = "st.global.b32 [$0], $1;"
            mgpu.inline_ptx(ptx, pointer, word, predicate=mine, has_side_effects=True)  # pyright: ignore[reportAttributeAccessIssue]

    store(values, ref, above)  # pyright: ignore[reportCallIssue]


def transposed() -> Any:
    """wgmma's registers when threads hold pairs of rows, not of columns."""
    return plgpu.Layout.WGMMA_TRANSPOSED.to_mgpu()


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
