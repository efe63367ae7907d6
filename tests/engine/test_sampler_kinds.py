"""A cheaper kind of sampling draws what the whole sampler draws, and is chosen only where it may be."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.engine import sampler
from jlora.engine.params import SamplingParams
from jlora.engine.sampler import Kind

VOCAB, ROWS = 97, 6


def slots_of(*params: SamplingParams) -> sampler.Slots:
    slots = sampler.empty_slots(len(params), VOCAB)
    for slot, one in enumerate(params):
        row = sampler.slot_row(one, prompt_length=3, seed=slot + 7, stop_ids=(2,), vocab=VOCAB)
        slots = sampler.write_slot(slots, jnp.int32(slot), row)  # type: ignore[arg-type]
    return slots


def draw(kind: Kind, params: SamplingParams, at: int) -> np.ndarray:
    logits = jnp.asarray(np.random.default_rng(at).normal(0, 2, (ROWS, VOCAB)), jnp.float32)
    rows = sampler.Rows(jnp.arange(ROWS), jnp.full(ROWS, at), jnp.ones(ROWS, jnp.int32))
    step = jax.jit(partial(sampler.sample, kind=kind, max_logprobs=2))
    sampled, slots = step(logits, slots_of(*[params] * ROWS), rows)
    np.testing.assert_array_equal(slots.last[:ROWS], sampled.tokens)
    return np.asarray(sampled.tokens)


@pytest.mark.parametrize(
    ("params", "least"),
    [
        (SamplingParams(temperature=0.0), Kind.GREEDY),
        (SamplingParams(temperature=0.0, top_p=0.5, top_k=3), Kind.GREEDY),
        (SamplingParams(temperature=0.8), Kind.DRAW),
        (SamplingParams(temperature=1.3, top_p=0.7), Kind.FILTER),
        (SamplingParams(temperature=1.3, top_k=5), Kind.FILTER),
        (SamplingParams(temperature=1.3, min_p=0.2), Kind.FILTER),
    ],
)
def test_the_kind_that_a_request_needs_draws_what_the_whole_sampler_draws(params, least):
    assert sampler.kind(params) is least
    for at in (4, 5, 90):
        whole = draw(Kind.ANY, params, at)
        for kind in Kind:
            if kind >= least:
                np.testing.assert_array_equal(draw(kind, params, at), whole)


def test_kinds_differ_where_they_should():
    """The comparison above could not fail if temperature and filters changed nothing."""
    hot = SamplingParams(temperature=5.0)
    narrow = SamplingParams(temperature=5.0, top_k=1)
    assert (draw(Kind.GREEDY, hot, 4) != draw(Kind.DRAW, hot, 4)).any()
    assert (draw(Kind.DRAW, narrow, 4) != draw(Kind.FILTER, narrow, 4)).any()


@pytest.mark.parametrize(
    "asked",
    [
        {"logprobs": 0},
        {"logit_bias": {5: 1.0}},
        {"min_tokens": 2},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"repetition_penalty": 1.1},
    ],
)
def test_whatever_changes_logits_or_reports_them_takes_the_whole_sampler(asked):
    assert sampler.kind(SamplingParams(temperature=0.0, **asked)) is Kind.ANY
