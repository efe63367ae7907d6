"""Paged attention against torch's scaled_dot_product_attention on each sequence's contiguous K/V."""

import types
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.paged_attention import cases, paged_attention
from kernels_pallas.paged_attention.xla import write_kv

torch = pytest.importorskip("torch")

PAGE, HEADS, KV_HEADS, WIDTH, BLOCK = 4, 6, 2, 16, 8
RNG = np.random.default_rng(3)


def expected(q, k, v, first, window):
    """Attention of query tokens at positions first, first+1, ... of one sequence."""
    at = first + np.arange(len(q))[:, None]
    seen = np.arange(len(k))[None] <= at
    if window is not None:
        seen &= np.arange(len(k))[None] > at - window
    group = HEADS // KV_HEADS
    q, k, v = (torch.tensor(x).transpose(0, 1)[None].double() for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q,
        k.repeat_interleave(group, 1),
        v.repeat_interleave(group, 1),
        attn_mask=torch.tensor(seen),
        scale=0.3,
    )
    return out[0].transpose(0, 1).numpy()


@pytest.mark.parametrize("window", [None, 5, 300])
@pytest.mark.parametrize("longest", [30, 400])  # one turn of the loop sees all, or it does not
def test_decode_rows_and_prefill_blocks_of_a_step_equal_torch(longest, window):
    lengths = [1, longest, 17, 9]  # three decode rows; the last one is a prompt's chunk from 3 on
    table = -(-longest // PAGE)
    pages = 1 + sum(-(-n // PAGE) for n in lengths)
    shape = (pages, KV_HEADS, PAGE, WIDTH)
    # pages that nobody owns hold NaN, and so does the trash page
    keys, values = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
    tables, sequences, free = np.zeros((5, table), np.int32), [], iter(RNG.permutation(pages - 1))
    for row, length in enumerate(lengths):
        own = [int(next(free)) + 1 for _ in range(-(-length // PAGE))]
        tables[row, : len(own)] = own
        k, v = (RNG.standard_normal((2, length, KV_HEADS, WIDTH)) * 2).astype(np.float32)
        sequences.append((k, v))
        at = np.arange(length)
        page_of, offset = jnp.asarray([own[i // PAGE] for i in at]), jnp.asarray(at % PAGE)
        for page in own:
            keys[page], values[page] = 0, 0
        keys = np.array(write_kv(jnp.asarray(keys), jnp.asarray(k), page_of, offset))
        values = np.array(write_kv(jnp.asarray(values), jnp.asarray(v), page_of, offset))
    decode = 4  # the fourth decode row and the second block are padding
    tables = np.stack([tables[0], tables[1], tables[2], tables[4], tables[3], tables[4]])
    positions = np.full(decode + 2 * BLOCK, -1, np.int32)
    positions[:3] = [0, longest - 1, 16]
    positions[decode : decode + 6] = np.arange(3, 9)
    values[0], keys[0] = 0, 0  # the runner's pools start as zeros
    q = RNG.standard_normal((len(positions), HEADS, WIDTH)).astype(np.float32)
    got = np.asarray(
        paged_attention(
            jnp.asarray(q),
            jnp.asarray(keys),
            jnp.asarray(values),
            jnp.asarray(tables),
            jnp.asarray(positions),
            decode=decode,
            block=BLOCK,
            scale=0.3,
            window=window,
        )
    )
    assert np.isfinite(got).all()
    for token, (k, v) in enumerate(sequences[:3]):
        want = expected(q[token : token + 1], k, v, len(k) - 1, window)
        np.testing.assert_allclose(got[token : token + 1], want, atol=2e-5)
    k, v = sequences[3]
    want = expected(q[decode : decode + 6], k, v, 3, window)
    np.testing.assert_allclose(got[decode : decode + 6], want, atol=2e-5)


@pytest.mark.parametrize("longest", [30, 400])
def test_a_softcap_gives_what_gemma_2_computes_in_transformers(longest):
    gemma = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    shape = cases.Heads(heads=4, kv_heads=2, width=16)
    step = cases.step([longest, 3], [(9, 8)], shape=shape, page=4, block=8, dtype=jnp.float32)
    options: dict[str, Any] = {"scale": 0.7, "softcap": 5.0}
    got = np.asarray(paged_attention(*step.arrays, decode=2, block=8, **options))
    module = types.SimpleNamespace(num_key_value_groups=2, training=False)
    for tokens, row, length in [([0], 0, longest), ([1], 1, 3), (list(range(2, 10)), 2, 17)]:
        at = np.arange(length)
        page = np.asarray(step.tables)[row, at // 4]
        q, k, v = (
            torch.tensor(np.asarray(x)).double().transpose(0, 1)[None]
            for x in (
                step.q[np.array(tokens)],
                step.keys[page, :, at % 4],
                step.values[page, :, at % 4],
            )
        )
        seen = at[None] <= np.asarray(step.positions)[tokens][:, None]
        mask = torch.where(torch.tensor(seen), 0.0, -torch.inf).double()[None, None]
        want, _ = gemma.eager_attention_forward(
            module, q, k, v, mask, dropout=0.0, scaling=0.7, softcap=5.0
        )
        np.testing.assert_allclose(got[tokens], want[0].numpy(), atol=2e-5)
        plain = cases.exact(step, scale=0.7)[tokens]
        assert longest < 100 or np.abs(plain - want[0].numpy()).max() > 0.01  # the cap matters
    np.testing.assert_allclose(got, cases.exact(step, **options), atol=2e-5)


def test_an_unknown_implementation_is_refused_by_name():
    nothing = jnp.zeros((1, 1, 1, 4))
    with pytest.raises(NotImplementedError, match="'cudnn'"):
        paged_attention(
            nothing[0],
            nothing,
            nothing,
            jnp.zeros((1, 1), jnp.int32),
            jnp.zeros(1, jnp.int32),
            decode=1,
            block=1,
            scale=1.0,
            implementation="cudnn",
        )
