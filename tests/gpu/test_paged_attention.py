"""The Hopper attention kernels against float64. Run on the device machine: -m gpu."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import testing
from kernels_pallas.paged_attention import cases, paged_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("error"),
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
]
MIX = [1, 0, 64, 65, 700, 3000, 130, 0, 17]
LLAMA = cases.Heads()


def attend(step: cases.Step, **options):
    """The public function under jit, as the engine calls it."""
    return jax.jit(
        functools.partial(paged_attention, decode=step.decode, block=step.block, **options)
    )


def check(step: cases.Step, **options) -> None:
    out = attend(step, **options, implementation="hopper")(*step.arrays)
    got, want = np.asarray(out.astype(jnp.float32), np.float64), cases.exact(step, **options)
    real = np.asarray(step.positions) >= 0
    assert np.isfinite(got).all()
    error = np.linalg.norm(got[real] - want[real]) / np.linalg.norm(want[real])
    assert error < testing.tolerance(step.q.dtype) / 2


@pytest.mark.parametrize("group", [1, 4, 7, 8])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_mixed_steps_of_all_groups_and_widths_while_unseen_pages_hold_nan(group, width):
    heads = cases.Heads(heads=2 * group, kv_heads=2, width=width)
    step = cases.step(MIX, [(0, 100), (500, 64), (0, 0)], shape=heads, poison=True)
    check(step, scale=width**-0.5)


@pytest.mark.parametrize("page", [8, 32, 64, 256])
@pytest.mark.parametrize(
    ("window", "softcap"), [(None, 20.0), (100, None), (64, 5.0), (1000, None)]
)
def test_windows_softcaps_and_pages_in_chunked_prefill_and_decode(page, window, softcap):
    heads = cases.Heads(heads=8, kv_heads=2)
    step = cases.step(MIX, [(700, 200), (0, 64)], shape=heads, page=page, poison=True)
    check(step, scale=128**-0.5, window=window, softcap=softcap)


def test_float16_and_a_block_of_128_tokens():
    heads = cases.Heads(heads=4, kv_heads=2)
    step = cases.step(MIX[:8], [(70, 300)], shape=heads, block=128, dtype=jnp.float16, poison=True)
    check(step, scale=128**-0.5)


def test_blocks_that_are_no_multiple_of_64_are_still_right():
    step = cases.step(MIX, [(70, 50)], shape=cases.Heads(heads=4, kv_heads=2), block=16)
    check(step, scale=128**-0.5)


@pytest.mark.parametrize("lengths", [[30000], [192] * 32, [300] * 8, [5] * 300, [1] * 3 + [9000]])
def test_one_long_row_many_short_ones_and_very_unequal_ones(lengths):
    check(cases.step(lengths, shape=LLAMA, poison=True), scale=128**-0.5)


def test_repeated_and_chained_calls_agree_bitwise_and_leave_the_tickets_clean():
    step = cases.step([900, 0, 3000, 20], shape=LLAMA)
    f = attend(step, scale=128**-0.5, implementation="hopper")

    @jax.jit
    def chain(q, *rest):
        outs = []
        for _ in range(6):
            outs.append(f(q, *rest))
            q = jax.lax.optimization_barrier(q + 0 * outs[-1])
        return outs

    outs = [np.asarray(o.astype(jnp.float32)) for _ in range(5) for o in chain(*step.arrays)]
    error = max(np.abs(outs[0] - other).max() for other in outs)
    assert error == 0


def test_one_compiled_program_serves_any_lengths():
    traced = []
    step = cases.step([500] * 4, shape=LLAMA)

    @jax.jit
    def f(*args):
        traced.append(1)
        return paged_attention(*args, decode=4, block=64, scale=1.0)

    for lengths in ([500, 1, 0, 0], [3, 400, 500, 77], [0] * 4):
        positions = jnp.asarray(lengths, jnp.int32) - 1
        jax.block_until_ready(f(*step.arrays[:4], positions))
    assert len(traced) == 1


def test_the_default_takes_the_kernel_and_falls_back_aloud(caplog):
    step = cases.step([100, 7], shape=LLAMA)
    text = attend(step, scale=1.0).lower(*step.arrays).as_text()
    assert "mosaic_gpu" in text
    odd = cases.step([100, 7], shape=cases.Heads(heads=2, kv_heads=1, width=96))
    with caplog.at_level(logging.WARNING):
        text = attend(odd, scale=1.0).lower(*odd.arrays).as_text()
    assert "mosaic_gpu" not in text
    assert "heads of 96" in caplog.text
