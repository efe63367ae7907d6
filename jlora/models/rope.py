"""Rotary embedding: its parameters and the frequencies that follow from them, as transformers has them.

Pure numpy; `models/config.py` reads the parameters, the decoder turns frequencies into angles.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

ROPE_KINDS = ("default", "linear", "llama3", "yarn", "longrope")
"""Rope types that `rope_frequencies` computes."""


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding parameters. Fields that a kind does not use keep their defaults."""

    kind: str = "default"
    """One of `ROPE_KINDS`."""
    theta: float = 10000.0
    """Base of the wavelengths."""
    factor: float = 1.0
    """How many times longer the context is than it was in pretraining."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_positions / this are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_max_positions / this are kept."""
    original_max_positions: int | None = None
    """llama3, yarn, longrope: context length of pretraining, in tokens."""
    beta_fast: float = 32.0
    """yarn: rotations above which a dimension is kept."""
    beta_slow: float = 1.0
    """yarn: rotations below which a dimension is interpolated."""
    attention_factor: float | None = None
    """yarn, longrope: multiplies cos and sin; None: computed from `factor` and the mscales."""
    mscale: float | None = None
    """yarn: numerator's weight of log(factor) in the attention factor."""
    mscale_all_dim: float | None = None
    """yarn: denominator's weight of log(factor) in the attention factor."""
    truncate: bool = True
    """yarn: round the correction range to whole dimensions."""
    partial: float = 1.0
    """Share of a head's dimensions that turn, the first ones; the others pass as they are."""
    short_factors: tuple[float, ...] = ()
    """longrope: each pair's wavelength is this many times longer in contexts of pretraining."""
    long_factors: tuple[float, ...] = ()
    """longrope: the same in longer contexts."""
    long: bool = False
    """longrope: which of the two holds. It is fixed for an engine: K/V are stored turned."""


def rope_frequencies(
    rope: RopeConfig, head_dim: int, max_positions: int
) -> tuple[Float[np.ndarray, " half"], float]:
    """(inverse frequency of each pair of dimensions in float32, factor on cos and sin)."""
    head_dim = int(head_dim * rope.partial)
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wavelengths = np.float32(rope.theta) ** exponents  # in radians: position / this is the angle
    inverse = np.float32(1.0) / wavelengths
    if rope.kind == "default":
        return inverse, 1.0
    if rope.kind == "linear":
        return (inverse / np.float32(rope.factor)).astype(np.float32), 1.0
    original = rope.original_max_positions or max_positions
    if rope.kind == "llama3":
        turns = original * inverse.astype(np.float64) / (2 * math.pi)  # over the old context
        smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        smooth = np.clip(smooth, 0.0, 1.0)  # 0: slow dimension, scaled; 1: fast, kept
        return (inverse * ((1 - smooth) / rope.factor + smooth)).astype(np.float32), 1.0
    if rope.kind == "longrope":
        factors = np.array(rope.long_factors if rope.long else rope.short_factors, np.float32)
        growth = math.log(rope.factor) / math.log(original) if rope.factor > 1 else 0.0
        scaling = rope.attention_factor or math.sqrt(1 + growth)
        return np.float32(1.0) / (factors * wavelengths), scaling
    assert rope.kind == "yarn", rope.kind

    def dimension(rotations: float) -> float:
        """The dimension that makes this many rotations over the original context."""
        turns = original / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / width, 0.0, 1.0)
    kept = np.float32(1.0) - ramp.astype(np.float32)  # rounded where transformers rounds
    scaled = np.float32(1.0) / (np.float32(rope.factor) * wavelengths)
    inverse = scaled * (np.float32(1.0) - kept) + inverse * kept
    return inverse.astype(np.float32), _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return float(rope.attention_factor)

    def scale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)
