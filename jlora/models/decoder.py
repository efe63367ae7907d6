"""The one decoder: all families by facts of the config, never by name.

`forward(model, pools, kv, batch, shape) -> (hidden, kv)` is pure; it runs under `jax.shard_map`
and sees local shapes. Adapters come in as rank pools (an argument, never module state).
Layers are a Python loop: a scan over stacked weights is 3x slower in decode on an H100.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jlora import ops
from jlora.batch import Batch
from jlora.models.config import ADDED, ModelConfig, RopeConfig, rope_frequencies
from jlora.models.experts import Experts
from jlora.ops import KV
from jlora.quant import Dense, matmul
from jlora.shape import Shape
from jlora.sharding import AXIS, GROUP_AXES, Layout
from kernels_pallas.gated_mlp import gated_mlp
from kernels_pallas.lora_matmul import (
    ActivePages,
    RankPool,
    Segments,
    lora_delta,
    lora_epilogue,
    lora_vectors,
)

Pools = list[dict[str, RankPool]]
"""Rank pools by layer and projection group, and "norms" if adapters may change them; then, likewise,
by VOCAB_GROUPS, "norm" and ADDED."""

Adapters = Pools | list[dict[str, ActivePages]]
"""What a step takes: the pools, or copies of the active pages."""

Ends = dict[str, RankPool] | dict[str, ActivePages]
"""Those of VOCAB_GROUPS, "norm" and ADDED."""


class Linear(nnx.Module):
    """A group of projections that share an input, fused: one weight, its bias if it has one."""

    def __init__(self, layout: Layout, group: str, bias: bool, dtype: jnp.dtype):
        self.group = group
        self.parts = layout.part_sizes(group)
        shape, axes = layout.group_shape(group), GROUP_AXES[group]
        self.weight = Dense(shape, axes, dtype)
        self.bias = nnx.Param(jnp.zeros(shape[1:], dtype), axes=axes[1:]) if bias else None
        self.summed_over = layout.tp if group in ("o", "down") else 1  # sharded on the input

    def __call__(
        self,
        x: Float[Array, "T in"],
        pools: dict[str, RankPool] | dict[str, ActivePages] | None,
        batch: Batch,
        *,
        summed: bool = True,
    ) -> Float[Array, "*sums T out"]:
        """Projection plus what the rows' adapters change, in float32 or x's type. The only all-reduce
        is the base's: for an input-sharded group the adapter's partial sum joins it. Devices send
        each other what their product gives: on GPUs x's type, as vLLM does.

        `summed` false: with an axis of parts that the reader sums, where nothing else is to be done."""
        own = pools.get(self.group) if pools is not None else None
        dtype = jnp.float32 if _is_scaled(own) else ops.product_dtype(x.dtype)
        summed = summed or not self.is_plain(own)
        y = self.weight.matmul(x, own, batch.segments, self.parts, dtype, summed=summed)
        y = ops.all_reduce(y, self.summed_over)
        if own is not None:
            y = lora_epilogue(y, own, batch.segments)
        return y if self.bias is None else y + self.bias[...]

    def is_plain(self, own: RankPool | ActivePages | None) -> bool:
        """Whether the projection is nothing but `lora_matmul`."""
        return self.summed_over == 1 and not _is_scaled(own) and self.bias is None


def _is_scaled(own: RankPool | ActivePages | None) -> bool:
    """Whether adapters may scale the product, as DoRA does."""
    return own is not None and own.scale is not None


class Layer(nnx.Module):
    """Attention and MLP with their norms."""

    def __init__(self, layout: Layout, dtype: jnp.dtype, index: int):
        cfg = layout.cfg
        sparse = cfg.is_sparse(index)
        linear = partial(Linear, layout, dtype=dtype)
        self.attn_norm = _norm(cfg.embed, dtype)
        self.qkv = linear("qkv", cfg.qkv_bias)
        self.q_norm = _norm(cfg.head_dim, dtype) if cfg.qk_norm else None
        self.k_norm = _norm(cfg.head_dim, dtype) if cfg.qk_norm else None
        self.o = linear("o", cfg.o_bias)
        self.attn_post_norm = _norm(cfg.embed, dtype) if cfg.post_norms else None
        self.mlp_norm = _norm(cfg.embed, dtype)
        self.experts = Experts(layout, dtype) if sparse else None
        self.gate_up = None if sparse else linear("gate_up", cfg.mlp_bias)
        self.down = None if sparse else linear("down", cfg.mlp_bias)
        self.mlp_post_norm = _norm(cfg.embed, dtype) if cfg.post_norms else None


def _norm(width: int, dtype: jnp.dtype) -> nnx.Param:
    return nnx.Param(jnp.ones((width,), dtype), axes=("norm",))


class Decoder(nnx.Module):
    """Weights of a decoder-only transformer and the static facts that its forward needs.

    A tied head is kept as a second, transposed copy when `copy_head` is set: twice as fast on
    XLA:CPU, at the price of one more [D, V] array.
    """

    def __init__(self, layout: Layout, dtype: jnp.dtype, copy_head: bool = True):
        cfg = layout.cfg
        self.cfg = cfg
        self.tp = layout.tp
        vocab = len(layout.vocab_index)
        self.embed = nnx.Param(jnp.zeros((vocab, cfg.embed), dtype), axes=("vocab", "embed"))
        self.layers = nnx.List([Layer(layout, dtype, index) for index in range(cfg.layers)])
        self.norm = _norm(cfg.embed, dtype)
        own_head = copy_head or not cfg.tied
        self.head = Dense((cfg.embed, vocab), ("embed", "vocab"), dtype) if own_head else None


def forward(
    model: Decoder,
    pools: Adapters | None,
    kv: list[KV],
    batch: Batch,
    shape: Shape,
    tokens: Int[Array, "T"],
) -> tuple[Float[Array, "T D"], list[KV]]:
    """One step of every row. `pools` None: the variant without LoRA.

    Returns the normalised hidden state of every token and the K/V pools with the step's tokens
    stored. DONATES kv when the caller's jit does.
    """
    own = ends(model.cfg, pools)
    x = embed(model, own, batch, tokens)
    x, kv = through_layers(model, pools, kv, batch, shape, x)
    return finish(model, own, batch, x), kv


def embed(model: Decoder, own: Ends, batch: Batch, tokens: Int[Array, "T"]) -> Float[Array, "T D"]:
    """What enters the first layer."""
    x = ops.embed(model.embed[...], tokens, model.tp, own.get("embed"), batch.segments)
    scale = model.cfg.embed_scale
    return x if scale is None else x * jnp.asarray(scale, x.dtype)


def through_layers(
    model: Decoder,
    pools: Adapters | None,
    kv: list[KV],
    batch: Batch,
    shape: Shape,
    x: Float[Array, "T D"],
) -> tuple[Float[Array, "T D"], list[KV]]:
    """The first layers of the model, as many as there are in `kv`."""
    cfg = model.cfg
    turn = local_turn = _turn(cfg, cfg.rope, batch)
    if cfg.local_rope is not None:
        local_turn = _turn(cfg, cfg.local_rope, batch)
    # Where one launch adds and normalises, a layer's last sum meets the next layer's norm.
    fused = ops.on_gpu() and (pools is None or "norms" not in pools[0])
    norms = [*(layer.attn_norm for layer in list(model.layers)[1:]), model.norm] if fused else []
    h = _normed(x, model.layers[0].attn_norm, cfg) if fused else None
    out = []
    for index, layer_kv in enumerate(kv):
        with jax.named_scope(f"layer{index}"):
            x, h, layer_kv = _layer(
                model.layers[index],
                x,
                h,
                norms[index][...] if fused else None,
                turn if cfg.windows[index] is None else local_turn,
                layer_kv,
                pools[index] if pools is not None else None,
                batch,
                _Static(cfg, shape.decode, shape.block, cfg.windows[index]),
            )
        out.append(layer_kv)
    return x, out


def finish(model: Decoder, own: Ends, batch: Batch, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
    """What leaves the last layer, normalised."""
    change = lora_vectors(own["norm"], batch.segments) if "norm" in own else None
    return _normed(x, model.norm, model.cfg, change)


def ends(cfg: ModelConfig, pools: Adapters | None) -> Ends:
    """What adapters change before and after the layers; empty if they may not."""
    return pools[cfg.layers] if pools is not None and len(pools) > cfg.layers else {}


def _turn(cfg: ModelConfig, rope: RopeConfig, batch: Batch) -> tuple[Array, Array]:
    """cos and sin of each token's angles, [T, half]."""
    inv_freq, scaling = rope_frequencies(rope, cfg.head_dim, cfg.max_positions)
    angle = jnp.maximum(batch.positions, 0)[:, None] * jnp.asarray(inv_freq, jnp.float32)
    return jnp.cos(angle) * scaling, jnp.sin(angle) * scaling


def _normed(
    x: Float[Array, "T D"],
    weight: nnx.Param | None,
    cfg: ModelConfig,
    change: Float[Array, "T D"] | None = None,
) -> Array:
    """x RMS-normalised; a norm that the model lacks changes nothing. `change`: what each row's adapter
    adds to the weight."""
    if weight is None:
        return x
    return ops.rms_norm(x, _changed(weight, change), cfg.norm_eps, cfg.norm_plus_one)


def _changed(weight: nnx.Param, change: Float[Array, "T ... D"] | None) -> Float[Array, "... D"]:
    """A norm's weight, or that of each row."""
    own = weight[...]
    return own if change is None else (own.astype(jnp.float32) + change).astype(own.dtype)


def _norm_changes(
    cfg: ModelConfig, pools: dict[str, RankPool] | dict[str, ActivePages] | None, batch: Batch
) -> dict[str, Float[Array, "T width"]]:
    """What the rows' adapters add to a layer's norms; empty if they may not."""
    if pools is None or "norms" not in pools:
        return {}
    changes, at = {}, 0
    every = lora_vectors(pools["norms"], batch.segments)
    for name, width in cfg.norms.values():
        changes[name] = every[:, at : at + width]
        at += width
    return changes


class _Static(tuple):
    """(cfg, decode, block, window): what a layer's trace depends on beside array shapes."""

    def __new__(cls, cfg: ModelConfig, decode: int, block: int, window: int | None):
        return super().__new__(cls, (cfg, decode, block, window))


@partial(jax.jit, static_argnums=8)  # traced and lowered once for all layers of a step
def _layer(
    layer: Layer,
    x: Float[Array, "T D"],
    h: Float[Array, "T D"] | None,
    next_norm: Float[Array, " D"] | None,
    turn: tuple[Array, Array],
    kv: KV,
    pools: dict[str, RankPool] | dict[str, ActivePages] | None,
    batch: Batch,
    static: _Static,
) -> tuple[Float[Array, "T D"], Float[Array, "T D"] | None, KV]:
    """x after the layer, and if `next_norm` is given x normalised with it: the next layer's `h`."""
    cfg, decode, block, window = static
    dtype = x.dtype
    own_norms = _norm_changes(cfg, pools, batch)

    def normed(x: Array, name: str) -> Array:
        return _normed(x, getattr(layer, name), cfg, own_norms.get(name))

    def head_norm(name: str) -> Array:
        change = own_norms.get(name)
        return _changed(getattr(layer, name), None if change is None else change[:, None])

    def add_normed(x: Array, y: Array, weight: Array) -> tuple[Array, Array]:
        return ops.add_norm(x, y, weight, eps=cfg.norm_eps, plus_one=cfg.norm_plus_one)

    # One launch that adds and normalises sums the parts of a projection on its way.
    summed = cfg.post_norms or next_norm is None
    h = normed(x, "attn_norm") if h is None else h
    qkv = layer.qkv(h, pools, batch).astype(dtype)
    norms = None
    if cfg.qk_norm:
        of_heads = head_norm("q_norm"), head_norm("k_norm")
        norms = ops.Norms(
            q=of_heads[0], k=of_heads[1], eps=cfg.norm_eps, plus_one=cfg.norm_plus_one
        )
    scale, cap = cfg.attention_scale, cfg.attention_softcap
    own = {"decode": decode, "block": block, "window": window, "scale": scale, "cap": cap}
    out, kv = ops.attention(qkv, turn, kv, batch, norms=norms, **own)
    out = layer.o(out.reshape(out.shape[0], -1), pools, batch, summed=summed)
    if layer.attn_post_norm is not None:
        out = normed(out.astype(dtype), "attn_post_norm")
    mlp_norm = _changed(layer.mlp_norm, own_norms.get("mlp_norm"))
    x, h = add_normed(x, _narrow(out, dtype), mlp_norm)
    out = _mlp(layer, h, pools, batch, cfg, summed=summed)
    if layer.mlp_post_norm is not None:
        out = normed(out.astype(dtype), "mlp_post_norm")
    if next_norm is None:
        return ops.add(x, out.astype(dtype)), None, kv
    return *add_normed(x, _narrow(out, dtype), next_norm), kv


def _narrow(out: Float[Array, "*sums T D"], dtype: jnp.dtype) -> Float[Array, "*sums T D"]:
    """What `add_norm` takes: parts that are to be summed as they are, all else in x's type."""
    if out.ndim == 3 and len(out) > 1:
        return out
    return (out[0] if out.ndim == 3 else out).astype(dtype)


def _mlp(
    layer: Layer,
    h: Float[Array, "T D"],
    pools: dict[str, RankPool] | dict[str, ActivePages] | None,
    batch: Batch,
    cfg: ModelConfig,
    summed: bool,
) -> Float[Array, "*sums T D"]:
    if layer.experts is not None:
        return layer.experts(h, cfg, batch, pools or {})
    assert layer.gate_up is not None
    assert layer.down is not None
    parts = _in_one_launch(layer.gate_up, layer.down, h, pools, batch, cfg)
    if parts is not None:
        return parts.sum(0) if summed else parts
    both = layer.gate_up(h, pools, batch)
    h = ops.act_mul(both, activation=cfg.activation).astype(h.dtype)
    return layer.down(h, pools, batch, summed=summed)


def _in_one_launch(
    gate_up: Linear,
    down: Linear,
    h: Float[Array, "T D"],
    pools: dict[str, RankPool] | dict[str, ActivePages] | None,
    batch: Batch,
    cfg: ModelConfig,
) -> Float[Array, "parts T D"] | None:
    """The MLP in parts where nothing but projections and the activation is to be done, and a kernel
    does that."""
    own = [pools.get(linear.group) if pools is not None else None for linear in (gate_up, down)]
    plain = gate_up.is_plain(own[0]) and down.is_plain(own[1])
    if not plain or (own[0] is None) != (own[1] is None):
        return None
    both = None if own[0] is None or own[1] is None else (own[0], own[1])
    return gated_mlp(
        h,
        gate_up.weight.kernel[...],
        down.weight.kernel[...],
        both,
        batch.segments if both else None,
        activation=cfg.activation,
        rows=batch.positions,
    )


def logits(
    model: Decoder,
    hidden: Float[Array, "B D"],
    own: Ends | None = None,
    segments: Segments | None = None,
) -> Float[Array, "B V"]:
    """Scores over the whole vocabulary, float32, on every device; padding entries are cut off, and
    tokens that another adapter added score -inf.

    `own`: what adapters change at the ends; `segments` tells which of them each of the B rows uses.
    """
    changes = own or {}
    if model.head is not None:
        local = model.head.matmul(hidden)
    else:
        local = matmul(hidden, model.embed[...].T)
    head = changes.get("head")
    if head is not None and segments is not None:
        width = local.shape[1:]
        local += lora_delta(hidden, head, segments, part_sizes=width, out_dtype=jnp.float32)
        local = lora_epilogue(local, head, segments)
    if model.tp > 1:
        local = jax.lax.all_gather(local, AXIS, axis=1, tiled=True)
    cfg = model.cfg
    scores = ops.softcap(local[:, : cfg.vocab_rows], cfg.logits_softcap)
    if not cfg.extra_vocab:
        return scores
    has = jnp.zeros((), bool)
    if (added := changes.get(ADDED)) is not None and segments is not None:
        has = lora_vectors(added, segments) > 0
    extra = jnp.where(has, scores[:, cfg.vocab :], -jnp.inf)
    return jnp.concatenate([scores[:, : cfg.vocab], extra], axis=1)
