"""Products that come in parts, as the Hopper kernels give them where K is split, are summed once
wherever they go: by the launch that adds and normalises, or before a norm, a bias or a plain sum. An MLP
that comes from one launch is used as what its three steps give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import ops, quant
from jlora.models import decoder
from kernels_pallas.act_mul import act_mul
from kernels_pallas.lora_matmul import lora_matmul
from tests.models.test_decoder_kinds import adapters, run  # noqa: F401


def in_two(y):
    """Two parts whose sum it is."""
    rest = jnp.linspace(-3, 3, y.shape[1], dtype=jnp.float32)
    return jnp.stack([y.astype(jnp.float32) - rest, jnp.broadcast_to(rest, y.shape)])


def as_on_a_gpu(monkeypatch, model, folders):
    """What a decoder computes that cuts its work as for a GPU, traced anew."""
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    jax.clear_caches()
    try:
        return run(model, folders, 1)
    finally:
        jax.clear_caches()


def agree(got, want):
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "kinds", "in_parts"),
    [
        ("llama", [], True),
        ("llama", ["plain"], True),
        ("llama", ["norms"], False),  # no launch adds and normalises then
        ("llama_bias", ["plain"], False),  # biases come after the sum
        ("llama_odd", ["dora"], False),
        ("gemma3", ["plain"], False),  # norms before the sum
    ],
)
def test_parts_of_a_product_are_summed_wherever_they_go(
    monkeypatch,
    tiny_model,
    adapters,  # noqa: F811
    family,
    kinds,
    in_parts,
):
    model, folders = tiny_model(family), [adapters(family, kind)[0] for kind in kinds]
    want = run(model, folders, 1)
    asked = []

    def some_parts(*args, summed=True, **options):
        y = lora_matmul(*args, summed=True, **options)
        if summed:
            return y
        asked.append(y.shape)
        return in_two(y)

    monkeypatch.setattr(quant, "lora_matmul", some_parts)
    agree(as_on_a_gpu(monkeypatch, model, folders), want)
    assert bool(asked) == in_parts


@pytest.mark.parametrize(
    ("family", "kinds", "at_once"),
    [
        ("llama", [], True),
        ("llama", ["plain"], True),
        ("llama", ["norms"], True),
        ("llama_bias", ["plain"], False),
        ("llama_odd", ["dora"], False),
        ("gemma3", ["plain"], True),
    ],
)
def test_an_mlp_from_one_launch_stands_for_its_three_steps(
    monkeypatch,
    tiny_model,
    adapters,  # noqa: F811
    family,
    kinds,
    at_once,
):
    model, folders = tiny_model(family), [adapters(family, kind)[0] for kind in kinds]
    want = run(model, folders, 1)
    asked = []

    def launch(x, gate_up, down, pools, segments, *, activation, rows):
        def product(x, w, which, part_sizes):
            own = (None, None) if pools is None else (pools[which], segments)
            return lora_matmul(x, w, *own, part_sizes=part_sizes, out_dtype=jnp.float32)

        asked.append(rows.shape)
        both = product(x, gate_up, 0, (down.shape[0],) * 2)
        y = product(act_mul(both, activation=activation).astype(x.dtype), down, 1, down.shape[1:])
        return in_two(y)

    monkeypatch.setattr(decoder, "gated_mlp", launch)
    agree(as_on_a_gpu(monkeypatch, model, folders), want)
    assert bool(asked) == at_once
