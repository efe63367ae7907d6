"""Every launch is lowered for an H100 without one: Mosaic's own checks of what only a card can run.

The interpreter has no grid-wide counters and no layouts, so the launches that ship ("all" phases) are
seen here first. ptxas and the results are for tests/gpu.
"""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from kernels_pallas.act_mul import hopper as act_mul
from kernels_pallas.add_norm import hopper as add_norm
from kernels_pallas.gated_mlp import hopper as gated_mlp
from kernels_pallas.lora_matmul import RankPool, Segments
from kernels_pallas.lora_matmul import hopper as lora_matmul
from kernels_pallas.lora_matmul.shapes import LLAMA_8B
from kernels_pallas.paged_attention import hopper as paged_attention
from kernels_pallas.rope_write import hopper as rope_write

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the kernels need jax 0.11 (run .venv312)"
)
BF16 = jnp.bfloat16
PAGES = 40


def like(*shape: int, dtype: Any = BF16) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def ints(*shape: int) -> Any:
    return like(*shape, dtype=jnp.int32)


@contextmanager
def h100():
    from jax._src.mesh import AbstractDevice  # not exported

    device = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def launches(f: Callable[..., Any], *args: Any) -> int:
    """How many kernels the lowered function calls."""
    with h100():
        text = jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    return text.count("custom_call @mosaic_gpu")


def test_a_profile_tells_launches_by_name():
    pool = RankPool(a=like(PAGES, 16, 4096), b=like(PAGES, 16, 4096))
    segments = Segments(pages=ints(32), owner=ints(32), adapter=ints(32))
    args = (like(32, 4096), like(4096, 4096), pool, segments)
    with h100():
        f = jax.jit(lambda *args: lora_matmul.matmul(*args, part_sizes=(4096,)))
        text = f.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert "lora_matmul_4096x4096" in text


@pytest.mark.parametrize(
    ("rows", "pages"), [(8, 32), (8, 1), (32, 128), (64, 1), (128, 32), (2048, 32)]
)
@pytest.mark.parametrize("group", list(LLAMA_8B))
def test_the_lora_matmul_is_one_launch(group, rows, pages):
    width, parts = LLAMA_8B[group]
    pool = RankPool(a=like(PAGES, 16 * len(parts), width), b=like(PAGES, 16, sum(parts)))
    segments = Segments(pages=ints(pages), owner=ints(pages), adapter=ints(rows))

    def f(x, w, pool, segments):
        return lora_matmul.matmul(x, w, pool, segments, part_sizes=parts)

    assert launches(f, like(rows, width), like(width, sum(parts)), pool, segments) == 1


@pytest.mark.parametrize("rows", [9, 64])
@pytest.mark.parametrize("group", list(LLAMA_8B))
def test_the_base_product_is_one_launch_of_which_most_sms_have_a_tile(group, rows):
    width, parts = LLAMA_8B[group]
    x, w = like(rows, width), like(width, sum(parts))
    assert launches(lambda x, w: lora_matmul.base_matmul(x, w, part_sizes=parts), x, w) == 1
    with h100():
        assert lora_matmul.base_worth_it(x, w, parts)


@pytest.mark.parametrize(("decode", "prefill"), [(32, 0), (256, 0), (8, 64), (0, 2048)])
def test_attention_is_one_launch_for_each_kind_of_row(decode, prefill):
    tokens, rows = decode + prefill, decode + prefill // 64

    def f(*args):
        return paged_attention.paged_attention(
            *args, decode=decode, block=64, scale=0.1, window=None, softcap=None
        )

    pool = like(100, 8, 16, 128)
    args = (like(tokens, 32, 128), pool, pool, ints(rows, 64), ints(tokens))
    assert launches(f, *args) == (decode > 0) + (prefill > 0)


@pytest.mark.parametrize("parts", [(), (1,), (2,), (4,)])
def test_add_norm_is_one_launch_with_parts_to_sum_and_without(parts):
    kind = jnp.float32 if parts else BF16

    def f(x, y, weight):
        return add_norm.add_norm(x, y, weight, eps=1e-5, plus_one=False)

    assert launches(f, like(32, 4096), like(*parts, 32, 4096, dtype=kind), like(4096)) == 1


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_the_gate_is_one_launch(activation):
    def f(x):
        return act_mul.act_mul(x, activation=activation)

    assert launches(f, like(32, 28672)) == 1


@pytest.mark.parametrize("rows", [8, 32, 64])
@pytest.mark.parametrize("lora", [False, True])
def test_a_gated_mlp_is_one_launch(rows, lora):
    width, hidden, counts = 4096, 14336, ints(rows)
    pools = tuple(
        RankPool(a=like(PAGES, 16 * parts, inner), b=like(PAGES, 16, outer))
        for parts, inner, outer in ((2, width, 2 * hidden), (1, hidden, width))
    )
    segments = Segments(pages=ints(32), owner=ints(32), adapter=counts)

    def f(x, gate_up, down, pools, segments, rows):
        own = (pools, segments) if lora else (None, None)
        return gated_mlp.gated_mlp(x, gate_up, down, *own, rows, activation="silu")

    args = (like(rows, width), like(width, 2 * hidden), like(hidden, width))
    assert launches(f, *args, pools, segments, counts) == 1


def test_rope_and_write_are_one_launch():
    half, pool = like(32, 64, dtype=jnp.float32), like(100, 8, 16, 128)

    def f(*args):
        return rope_write.rope_write(*args, norms=None)

    args = (like(32, 48, 128), half, half, ints(32), ints(32), pool, pool)
    assert launches(f, *args) == 1
