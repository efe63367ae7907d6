"""Facts about a base model, read from its `config.json`: `ModelConfig` and the projection table.

Reads what transformers 4 and 5 write. Features come from the file's own fields, never from a
model's name; what the decoder cannot compute exactly is refused by name. No jax here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from jlora.errors import ModelError
from jlora.models.config_file import (
    EXPERT_PARTS as EXPERT_PARTS,
)
from jlora.models.config_file import (
    ROUTER as ROUTER,
)
from jlora.models.config_file import (
    ExpertsConfig as ExpertsConfig,
)
from jlora.models.config_file import (
    Reader,
    folder_name,
    is_null,
    read_activation,
    read_architecture,
    read_dtype,
    read_experts,
    read_json,
    read_ropes,
    read_windows,
    text_part,
)
from jlora.models.families import FAMILIES
from jlora.models.rope import RopeConfig as RopeConfig
from jlora.models.rope import rope_frequencies as rope_frequencies

GROUPS: dict[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""Projections that share an input, in the order in which their outputs are fused."""

VOCAB_GROUPS: dict[str, tuple[str, ...]] = {"embed": ("embed_tokens",), "head": ("lm_head",)}
"""What adapters may change beside the layers: a linear map from tokens, and one to tokens."""

EXPERT_GROUPS: dict[str, tuple[str, ...]] = {
    "router": (ROUTER,),
    "expert_gate_up": EXPERT_PARTS[:2],
    "expert_down": EXPERT_PARTS[2:],
}
"""What adapters may change in sparse layers, in engines that were built for it: the router, and
the linears of each expert."""

STACKED_GROUPS = tuple(EXPERT_GROUPS)[1:]
"""Those with pairs of their own for each expert."""

LAYER_GROUPS = GROUPS | EXPERT_GROUPS
ALL_GROUPS = LAYER_GROUPS | VOCAB_GROUPS

NORM_GROUPS = ("norms", "norm")
"""All norms of a layer, and the last one: what adapters may change there is vectors only."""

ADDED = "added"
"""The group that says which of `extra_vocab` tokens an adapter has."""

VECTOR_GROUPS = (*NORM_GROUPS, ADDED)
"""Groups whose pools hold vectors only."""

NORMS: tuple[str, ...] = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "q_norm",
    "k_norm",
    "norm",
)
"""Checkpoint names of the norms that a model may have; "norm" is the last one."""

PROJECTIONS: tuple[str, ...] = tuple(part for parts in GROUPS.values() for part in parts)
"""The seven projections of a layer, by their checkpoint names."""


FUSED: dict[str, tuple[str, ...]] = {
    "qkv_proj": GROUPS["qkv"],
    "gate_up_proj": GROUPS["gate_up"],
}
"""Modules of some checkpoints: the rows of these projections one after the other."""


MODULES: tuple[str, ...] = (*PROJECTIONS, *FUSED)
"""All names that linears of a layer have in checkpoints and adapters."""


def group_of(projection: str) -> str:
    """The group that a projection belongs to: `group_of("k_proj") == "qkv"`."""
    for group, parts in GROUPS.items():
        if projection in parts:
            return group
    raise KeyError(projection)


MAX_LAYERS = 4096
"""More is a damaged config.json: per-layer lists of it would fill the memory."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """All facts of one base model. Hashable: it can be a static argument of a jitted function."""

    name: str
    """Folder name (of a hub cache: the repository), else `_name_or_path`; used in messages."""
    architecture: str
    """transformers' class name, such as "LlamaForCausalLM"."""
    vocab: int
    """Rows of the embedding."""
    embed: int
    """Width of the residual stream."""
    layers: int
    """Decoder layers."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key/value heads; divides `heads`."""
    head_dim: int
    """Width of a head; heads · head_dim need not be `embed`."""
    mlp: int
    """Hidden width of the gated MLP."""
    norm_eps: float
    """Added to the mean square in RMSNorm."""
    rope: RopeConfig
    """Rotary embedding parameters."""
    max_positions: int
    """Longest context in tokens."""
    tied: bool
    """The output head is the embedding."""
    qkv_bias: bool
    """q, k and v have biases."""
    o_bias: bool
    """o has a bias."""
    mlp_bias: bool
    """gate, up and down have biases."""
    qk_norm: bool
    """q and k are RMS-normalised per head before rope."""
    windows: tuple[int | None, ...]
    """Per layer: a token sees this many last tokens, itself included; None: all."""
    dtype: str
    """Data type that the config names, one of `config_file.DTYPES`; float32 if it names none."""
    bos_id: int | None
    """First token of a text, if the model has one."""
    eos_ids: tuple[int, ...]
    """Tokens that end a generation; generation_config.json's list wins."""
    activation: str = "silu"
    """Activation of the gate: "silu" or "gelu_tanh"."""
    norm_plus_one: bool = False
    """Norms multiply by 1 + weight, in float32."""
    post_norms: bool = False
    """The outputs of attention and MLP are normalised before they join the residual stream."""
    embed_scale: float | None = None
    """Factor on the embedding, rounded to the weights' type; None: none."""
    attention_scale: float | None = None
    """Factor on attention scores; None: 1 / sqrt(head_dim)."""
    attention_softcap: float | None = None
    """Attention scores are squeezed into -softcap..softcap by tanh; None: they are not."""
    logits_softcap: float | None = None
    """Logits are squeezed into -softcap..softcap by tanh; None: they are not."""
    local_rope: RopeConfig | None = None
    """Rotary parameters of layers that have a window; None: `rope` holds for all layers."""
    experts: ExpertsConfig | None = None
    """Sparse MLPs; None: all layers are dense."""
    fused: bool = False
    """The checkpoint holds the modules of `FUSED`."""
    extra_vocab: int = 0
    """Rows beyond `vocab` that adapters may fill with tokens of their own; no checkpoint has them."""
    multimodal: bool = False
    """The checkpoint holds more than the text part; the rest is not read."""

    def shape(self, projection: str) -> tuple[int, int]:
        """(input, output) width of a projection, a module of `FUSED`, or one of a sparse MLP."""
        if projection in FUSED:
            widths = [self.shape(part) for part in FUSED[projection]]
            return widths[0][0], sum(out for _, out in widths)
        _, part = self.part_of(projection)
        if self.experts is not None and part in (ROUTER, *EXPERT_PARTS):
            width = self.experts.count if part == ROUTER else self.experts.mlp
            return (width, self.embed) if part == EXPERT_PARTS[2] else (self.embed, width)
        heads, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.embed, heads),
            "k_proj": (self.embed, kv),
            "v_proj": (self.embed, kv),
            "o_proj": (heads, self.embed),
            "gate_proj": (self.embed, self.mlp),
            "up_proj": (self.embed, self.mlp),
            "down_proj": (self.mlp, self.embed),
            "embed_tokens": (self.vocab, self.embed),
            "lm_head": (self.embed, self.vocab),
        }[projection]

    def fused_rows(self, module: str) -> dict[str, slice]:
        """Rows of each projection in a module of `FUSED`; empty for any other module."""
        rows, at = {}, 0
        for part in FUSED.get(module, ()) if self.fused else ():
            rows[part] = slice(at, at := at + self.shape(part)[1])
        return rows

    def stored_in(self, projection: str) -> tuple[str, int]:
        """(module of the checkpoint that holds a projection, its first row there)."""
        for module in FUSED:
            if projection in (rows := self.fused_rows(module)):
                return module, rows[projection].start
        return projection, 0

    def is_sparse(self, layer: int) -> bool:
        """Whether the layer's MLP is made of experts."""
        return self.experts is not None and self.experts.layers[layer]

    def groups(self, layer: int) -> tuple[str, ...]:
        """The groups of a layer; experts are in none."""
        return tuple(GROUPS)[:2] if self.is_sparse(layer) else tuple(GROUPS)

    def pairs_of(self, group: str) -> int:
        """Low-rank pairs of a group in a layer, for each of its parts: one for each expert."""
        return self.experts.count if self.experts and group in STACKED_GROUPS else 1

    def part_of(self, module: str) -> tuple[int | None, str]:
        """(expert, part of ALL_GROUPS) of a module of a layer or a projection."""
        if self.experts is not None and "." in module and module not in EXPERT_PARTS:
            return self.experts.part_of(module)
        return None, module

    def modules_of(self, layer: int) -> tuple[str, ...]:
        """The linears of a layer by their checkpoint names, but for those of sparse MLPs."""
        return self._modules[layer]

    def sparse_modules(self, layer: int) -> tuple[str, ...]:
        """The rest of them: router and experts."""
        return tuple(self.experts.modules()) if self.experts and self.is_sparse(layer) else ()

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """The linears of any layer, in the same sense."""
        return tuple(dict.fromkeys(chain(*self._modules)))

    @cached_property
    def _modules(self) -> list[tuple[str, ...]]:
        """By layer. Readers of adapters ask for each tensor."""
        stored = {part: self.stored_in(part)[0] for parts in GROUPS.values() for part in parts}
        return [
            tuple(
                dict.fromkeys(stored[part] for group in self.groups(at) for part in GROUPS[group])
            )
            for at in range(self.layers)
        ]

    @property
    def default_context(self) -> int:
        """Longest context that is computed as transformers does it, whatever the text's length."""
        if self.rope.kind == "longrope" and self.rope.original_max_positions:
            return min(self.rope.original_max_positions, self.max_positions)
        return self.max_positions

    def for_context(self, tokens: int) -> "ModelConfig":
        """The config of an engine whose texts have up to `tokens` tokens.

        longrope has two sets of factors. transformers takes the long ones once a text is longer
        than `default_context`, and computes its K/V anew; an engine, which shares K/V between
        texts, takes one set for all: the short one only if no text can be longer.
        """
        return replace(self, rope=replace(self.rope, long=tokens > self.default_context))

    @property
    def norms(self) -> dict[str, tuple[str, int]]:
        """The norms of every layer by their checkpoint names: (the decoder's name, width)."""
        table = {"input_layernorm": ("attn_norm", self.embed)}
        if self.post_norms:
            table["post_attention_layernorm"] = ("attn_post_norm", self.embed)
            table["pre_feedforward_layernorm"] = ("mlp_norm", self.embed)
            table["post_feedforward_layernorm"] = ("mlp_post_norm", self.embed)
        else:  # the name notwithstanding, it is the MLP's own norm
            table["post_attention_layernorm"] = ("mlp_norm", self.embed)
        if self.qk_norm:
            table |= {name: (name, self.head_dim) for name in ("q_norm", "k_norm")}
        return table

    def parts(self, group: str) -> tuple[str, ...]:
        """The projections of a group, or the vectors of one of VECTOR_GROUPS."""
        vectors = {"norms": tuple(self.norms), "norm": ("norm",), ADDED: (ADDED,)}
        return vectors.get(group) or ALL_GROUPS[group]

    @property
    def vocab_rows(self) -> int:
        """Tokens of the base and of any adapter."""
        return self.vocab + self.extra_vocab

    def norm_width(self, name: str) -> int | None:
        """Width of a norm by its checkpoint name, "norm" for the last one; None: no such norm."""
        return self.embed if name == "norm" else self.norms.get(name, (None, None))[1]

    def bias(self, group: str) -> bool:
        """Whether the projections of a group have biases."""
        return {"qkv": self.qkv_bias, "o": self.o_bias}.get(group, self.mlp_bias)

    @classmethod
    def from_folder(cls, path: str | Path) -> "ModelConfig":
        """Reads `config.json` and, where there is one, `generation_config.json`."""
        folder = Path(path)
        if not folder.is_dir():
            raise ModelError(f"{folder} is not a folder; --model takes a Hugging Face model folder")
        data = read_json(folder / "config.json")
        generation_file = folder / "generation_config.json"
        generation = read_json(generation_file) if generation_file.exists() else None
        return cls.from_dict(data | {"_name_or_path": folder_name(folder)}, generation)

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], generation: Mapping[str, Any] | None = None
    ) -> "ModelConfig":
        """From the contents of `config.json` (and of `generation_config.json`)."""
        whole, data = data, text_part(data)
        name = str(data.get("_name_or_path") or "model")
        multimodal = "text_config" in whole and "text_config" not in data
        architecture = read_architecture(data, name)
        family = FAMILIES[architecture]
        get = Reader(name, data, family.defaults)
        heads = get.size("num_attention_heads")
        kv_heads = (
            heads
            if is_null(data, family.defaults, "num_key_value_heads")
            else get.size("num_key_value_heads")
        )
        embed, layers = get.size("hidden_size"), get.size("num_hidden_layers", most=MAX_LAYERS)
        no_head_dim = is_null(data, family.defaults, "head_dim")
        head_dim = embed // heads if no_head_dim else get.size("head_dim")
        if heads % kv_heads:
            get.refuse(f"num_attention_heads {heads} is not a multiple of kv heads {kv_heads}")
        if head_dim % 2 or head_dim == 0:
            get.refuse(f"head_dim is {head_dim}, rope needs an even number")
        max_positions = get.size("max_position_embeddings")
        rope, local_rope = read_ropes(get, family, head_dim, max_positions)

        def bias(group: str) -> bool:
            decides = family.biases.get(group, False)
            return get.flag(decides) if isinstance(decides, str) else decides

        return cls(
            name=name,
            architecture=architecture,
            vocab=get.size("vocab_size"),
            embed=embed,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            mlp=get.size("intermediate_size"),
            norm_eps=get.number("rms_norm_eps", 1e-6),
            rope=rope,
            max_positions=max_positions,
            tied=get.flag("tie_word_embeddings"),
            qkv_bias=bias("qkv"),
            o_bias=bias("o"),
            mlp_bias=bias("gate_up"),
            qk_norm=family.qk_norm,
            windows=read_windows(get, family, layers),
            dtype=read_dtype(get),
            bos_id=get.token("bos_token_id", generation),
            eos_ids=get.tokens("eos_token_id", generation),
            activation=read_activation(get, family),
            local_rope=local_rope,
            experts=read_experts(get, family, layers),
            fused=family.fused,
            multimodal=multimodal,
            **(_gemma(get, embed, multimodal) if family.gemma else {}),
        )


def _gemma(get: Reader, embed: int, multimodal: bool) -> dict[str, Any]:
    """What Gemma's block has more than others, by fields of `ModelConfig`."""
    if get.flag("use_bidirectional_attention"):
        get.refuse("use_bidirectional_attention is not supported")
    caps = {
        key: get.number(key, 1.0) if get.value(key) is not None else None
        for key in ("attn_logit_softcapping", "final_logit_softcapping")
    }
    # Gemma 3 has the keys, but its code in transformers applies them only in part.
    third = "rope_local_base_freq" in get.defaults
    ignored = {"attn_logit_softcapping": third, "final_logit_softcapping": multimodal}
    for key, is_ignored in ignored.items():
        if is_ignored and caps[key] is not None:
            get.refuse(f"{key} is {caps[key]}, which transformers ignores here; remove it")
    return {
        "norm_plus_one": True,
        "post_norms": True,
        "embed_scale": embed**0.5,
        "attention_scale": get.number("query_pre_attn_scalar", 256) ** -0.5,
        "attention_softcap": caps["attn_logit_softcapping"],
        "logits_softcap": caps["final_logit_softcapping"],
    }
