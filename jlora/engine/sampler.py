"""Sampling on the device: penalties, bias, temperature, min-p, top-k, top-p, seeds, logprobs.

What a request asks for is written once, when it gets its slot, into `Slots`; a step then only
names slots. How much of the sampler a step runs is a `Kind`: the host knows what its rows ask for,
and a branch on the device would make a GPU wait for the host. A random draw depends on the request's seed and the token's position alone, so it is
the same alone, in a batch and after preemption. Top-k and top-p need no sort: the threshold is
found by bisection over the bits of the probabilities, which is exact.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jlora.engine.params import MAX_STOP_TOKENS, SamplingParams

MAX_BIAS = 512
"""Entries of logit_bias that a slot holds."""

MAX_STOPS = MAX_STOP_TOKENS + 16
"""Stop tokens that min_tokens can hold back: a request's own and the model's."""

IN_PROMPT = 1 << 24
"""Added to a token's count when the prompt has it."""

GREEDY_BELOW = 1e-5
"""A smaller temperature is greedy."""

FLOATS = ("temperature", "top_p", "min_p", "presence", "frequency", "repetition")
INTS = ("top_k", "seed", "free_from", "logprobs")
"""free_from: the first position at which a stop token may be sampled (min_tokens)."""


class Kind(IntEnum):
    """How much of the sampler runs; each does all that a smaller one does."""

    GREEDY = 0
    """The likeliest token."""
    DRAW = 1
    """Rows with a temperature are drawn."""
    FILTER = 2
    """They may have top_p, top_k and min_p."""
    ANY = 3
    """Penalties, biases, held back stop tokens and log-probabilities too, each only if a row asks."""


def kind(params: SamplingParams) -> Kind:
    """The least kind that does what a request asks for."""
    if (
        params.logprobs is not None
        or params.logit_bias
        or params.min_tokens
        or (params.presence_penalty, params.frequency_penalty) != (0, 0)
        or params.repetition_penalty != 1
    ):
        return Kind.ANY
    if params.temperature < GREEDY_BELOW:
        return Kind.GREEDY
    filters = params.top_p < 1 or params.top_k > 0 or params.min_p > 0
    return Kind.FILTER if filters else Kind.DRAW


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """The sampling side of a step's rows."""

    slots: Int[Array, "B"]
    """Sequence slot of each row."""
    at: Int[Array, "B"]
    """Position that the sampled token will have."""
    samples: Int[Array, "B"]
    """1 where the row's token counts."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """What each sequence slot asks of the sampler, and what it has sampled. Slot S is trash."""

    last: Int[Array, "S"]
    """The token that the slot sampled last: the next step's input."""
    counts: Int[Array, "S V"]
    """How often a token was generated, plus IN_PROMPT if the prompt has it."""
    floats: Float[Array, "S F"]
    ints: Int[Array, "S I"]
    bias_ids: Int[Array, "S E"]
    bias: Float[Array, "S E"]
    stops: Int[Array, "S X"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """One step's result. Log-probabilities are those of the model, before any parameter."""

    tokens: Int[Array, "B"]
    logprobs: Float[Array, "B"]
    ranks: Int[Array, "B"]
    top_ids: Int[Array, "B k"]
    top_logprobs: Float[Array, "B k"]


def empty_slots(count: int, vocab: int) -> Slots:
    """Slots for `count` sequences and one for padding rows."""
    size = count + 1
    return Slots(
        last=jnp.zeros((size,), jnp.int32),
        counts=jnp.zeros((size, vocab), jnp.int32),
        floats=jnp.zeros((size, len(FLOATS)), jnp.float32).at[:, 1].set(1.0).at[:, 5].set(1.0),
        ints=jnp.zeros((size, len(INTS)), jnp.int32),
        bias_ids=jnp.full((size, MAX_BIAS), vocab, jnp.int32),
        bias=jnp.zeros((size, MAX_BIAS), jnp.float32),
        stops=jnp.full((size, MAX_STOPS), vocab, jnp.int32),
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotRow:
    """Host form of one row of `Slots`, ready to be written."""

    floats: np.ndarray
    ints: np.ndarray
    bias_ids: np.ndarray
    bias: np.ndarray
    stops: np.ndarray


def slot_row(
    params: SamplingParams, *, prompt_length: int, seed: int, stop_ids: tuple[int, ...], vocab: int
) -> SlotRow:
    """The row of a request: `stop_ids` are the tokens that would end it, its EOS included."""
    biased = sorted((params.logit_bias or {}).items())
    bias_ids = np.full(MAX_BIAS, vocab, np.int32)
    bias = np.zeros(MAX_BIAS, np.float32)
    bias_ids[: len(biased)] = [token for token, _ in biased]
    bias[: len(biased)] = [value for _, value in biased]
    held = stop_ids[:MAX_STOPS] if params.min_tokens else ()
    stops = np.full(MAX_STOPS, vocab, np.int32)
    stops[: len(held)] = held
    floats = [
        0.0 if params.temperature < GREEDY_BELOW else params.temperature,
        params.top_p,
        params.min_p,
        params.presence_penalty,
        params.frequency_penalty,
        params.repetition_penalty,
    ]
    ints = [
        min(max(params.top_k, 0), vocab),  # any integer is allowed; int32 holds it now
        seed & 0x7FFFFFFF,
        prompt_length + params.min_tokens,
        int(params.logprobs is not None),
    ]
    return SlotRow(
        np.asarray(floats, np.float32), np.asarray(ints, np.int32), bias_ids, bias, stops
    )


def write_slot(slots: Slots, slot: Int[Array, ""], row: SlotRow) -> Slots:
    """`slots` with one row replaced and its counts cleared. DONATES slots."""
    return replace(
        slots,
        counts=slots.counts.at[slot].set(0),
        floats=slots.floats.at[slot].set(row.floats),
        ints=slots.ints.at[slot].set(row.ints),
        bias_ids=slots.bias_ids.at[slot].set(row.bias_ids),
        bias=slots.bias.at[slot].set(row.bias),
        stops=slots.stops.at[slot].set(row.stops),
    )


def count_tokens(
    slots: Slots, slot: Int[Array, ""], tokens: Int[Array, "C"], in_prompt: Bool[Array, "C"]
) -> Slots:
    """`slots` with tokens that the sequence already has; padding is a token >= V. DONATES slots."""
    row = slots.counts[slot]
    marked = row.at[tokens].max(jnp.where(in_prompt, IN_PROMPT, 0), mode="drop")
    counted = marked.at[tokens].add(jnp.where(in_prompt, 0, 1), mode="drop")
    return replace(slots, counts=slots.counts.at[slot].set(counted))


def sample(
    logits: Float[Array, "B V"], slots: Slots, rows: Rows, kind: Kind, max_logprobs: int
) -> tuple[Sampled, Slots]:
    """Draws one token a row and notes it in the row's slot. DONATES slots."""
    own = rows.slots
    floats = dict(zip(FLOATS, slots.floats[own].T, strict=True))
    ints = dict(zip(INTS, slots.ints[own].T, strict=True))
    adjusted = logits
    if kind is Kind.ANY:
        adjusted = jax.lax.cond(
            _any_adjusts(slots, own, floats, ints, rows.at),
            lambda: _adjust(logits, slots, own, floats, ints["free_from"] > rows.at),
            lambda: logits,
        )
    tokens = jnp.argmax(adjusted, axis=-1).astype(jnp.int32)
    if kind is Kind.ANY:
        tokens = jax.lax.cond(
            jnp.any(floats["temperature"] > 0),
            lambda: _drawn(adjusted, tokens, floats, ints, rows.at, kind),
            lambda: tokens,
        )
    elif kind is not Kind.GREEDY:
        tokens = _drawn(adjusted, tokens, floats, ints, rows.at, kind)
    sampled = Sampled(*_no_logprobs(tokens, max_logprobs))
    if kind is Kind.ANY:
        sampled = jax.lax.cond(
            jnp.any(ints["logprobs"] > 0),
            lambda: describe(logits, tokens, max_logprobs),
            lambda: sampled,
        )
    # rows that sample nothing (padding, the middle of a prompt) write to the trash slot
    to = jnp.where(rows.samples > 0, own, slots.last.shape[0] - 1)
    slots = replace(
        slots,
        last=slots.last.at[to].set(tokens),
        counts=slots.counts.at[to, tokens].add(1),
    )
    return sampled, slots


def describe(logits: Float[Array, "B V"], tokens: Int[Array, "B"], max_logprobs: int) -> Sampled:
    """Log-probability and rank of the given tokens, and the most likely ones beside them."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=1)
    ranks = jnp.sum(logprobs > chosen, axis=-1, dtype=jnp.int32) + 1
    top, ids = jax.lax.top_k(logprobs, max_logprobs)
    return Sampled(tokens, chosen[:, 0], ranks, ids.astype(jnp.int32), top)


def _no_logprobs(tokens: Int[Array, "B"], k: int) -> tuple[Array, ...]:
    rows = tokens.shape[0]
    return (
        tokens,
        jnp.zeros(rows),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros((rows, k), jnp.int32),
        jnp.zeros((rows, k)),
    )


def _any_adjusts(slots: Slots, own: Array, floats: dict, ints: dict, at: Array) -> Bool[Array, ""]:
    return (
        jnp.any(floats["presence"] != 0)
        | jnp.any(floats["frequency"] != 0)
        | jnp.any(floats["repetition"] != 1)
        | jnp.any(slots.bias[own] != 0)
        | jnp.any(ints["free_from"] > at)
    )


def _adjust(
    logits: Float[Array, "B V"], slots: Slots, own: Array, floats: dict, hold: Bool[Array, "B"]
) -> Float[Array, "B V"]:
    """Repetition penalty (Keskar et al. 2019; prompt and output), OpenAI's presence and frequency
    penalties (output only), logit_bias, and no stop token before min_tokens."""
    rows = jnp.arange(logits.shape[0])[:, None]
    counts = slots.counts[own]
    generated = counts & (IN_PROMPT - 1)
    repetition = jnp.where(counts > 0, floats["repetition"][:, None], 1.0)
    out = jnp.where(logits > 0, logits / repetition, logits * repetition)
    out = out - floats["frequency"][:, None] * generated
    out = out - floats["presence"][:, None] * (generated > 0)
    out = out.at[rows, slots.bias_ids[own]].add(slots.bias[own], mode="drop")
    held = jnp.where(hold[:, None], slots.stops[own], logits.shape[1])
    return out.at[rows, held].set(-jnp.inf, mode="drop")


def _drawn(
    logits: Float[Array, "B V"],
    greedy: Int[Array, "B"],
    floats: dict,
    ints: dict,
    at: Int[Array, "B"],
    kind: Kind,
) -> Int[Array, "B"]:
    """A token of each row that has a temperature, by the Gumbel-max trick, from the logits that
    min-p, top-k and top-p leave (in this order, each on what the one before left)."""
    draws = floats["temperature"] > 0
    scaled = logits / jnp.where(draws, floats["temperature"], 1.0)[:, None]
    if kind is Kind.FILTER:
        scaled = _filter(scaled, floats, ints)
    elif kind is Kind.ANY:
        unfiltered = scaled
        scaled = jax.lax.cond(
            jnp.any((floats["top_p"] < 1) | (floats["min_p"] > 0) | (ints["top_k"] > 0)),
            lambda: _filter(unfiltered, floats, ints),
            lambda: unfiltered,
        )
    gumbel = -jnp.log(-jnp.log(_uniform(ints["seed"], at, logits.shape[1])))
    return jnp.where(draws, jnp.argmax(scaled + gumbel, axis=-1).astype(jnp.int32), greedy)


def _uniform(seeds: Int[Array, "B"], at: Int[Array, "B"], count: int) -> Float[Array, "B V"]:
    """Numbers in (0, 1) that depend on seed, position and column alone.

    A counter-based hash: threefry takes seconds to compile and is several times slower on a CPU.
    """
    row = _mix(_mix(seeds.astype(jnp.uint32)) ^ (at.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)))
    bits = _mix(row[:, None] + _mix(jnp.arange(count, dtype=jnp.uint32)))
    return (bits >> 8).astype(jnp.float32) * 2.0**-24 + 2.0**-25


def _mix(x: Array) -> Array:
    """A bijection of uint32 whose output bits each depend on every input bit ("lowbias32", found
    by Chris Wellons' hash prospector)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _filter(logits: Float[Array, "B V"], floats: dict, ints: dict) -> Float[Array, "B V"]:
    probability = jax.nn.softmax(logits, axis=-1)
    # the bits of a non-negative float are ordered as the float is
    bits = jax.lax.bitcast_convert_type(probability, jnp.int32)
    least = floats["min_p"] * probability.max(-1)
    floor = jax.lax.bitcast_convert_type(least, jnp.int32)
    k = jnp.where(ints["top_k"] > 0, ints["top_k"], logits.shape[1])
    floor = _largest(floor, lambda cut: jnp.sum((bits >= cut[:, None]), -1) >= k)
    mass = jnp.sum(jnp.where(bits >= floor[:, None], probability, 0), -1)
    wanted = floats["top_p"] * mass
    floor_p = _largest(
        floor,
        lambda cut: jnp.sum(jnp.where(bits >= cut[:, None], probability, 0), -1) >= wanted,
    )
    floor = jnp.where(floats["top_p"] < 1, floor_p, floor)
    floor = jnp.minimum(floor, bits.max(-1))  # the most likely token always stays
    return jnp.where(bits >= floor[:, None], logits, -jnp.inf)


def _largest(
    low: Int[Array, "B"], holds: Callable[[Int[Array, "B"]], Bool[Array, "B"]]
) -> Int[Array, "B"]:
    """The largest cut >= low for which `holds` (monotone: true below, false above); low if none."""
    one = jnp.int32(0x3F800001)  # just above the bits of 1.0

    def halve(_: Array, span: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = span
        middle = low + (high - low) // 2
        good = holds(middle)
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    low, _ = jax.lax.fori_loop(0, 31, halve, (low, jnp.full_like(low, one)))
    return low
