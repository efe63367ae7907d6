"""adapter_config.json, checked: what we compute is kept, what we do not compute is refused by name.

The tensors are the truth; this file only gives the scaling, and what the tensors are checked
against. `target_modules` is compared as text: a regex in it is never run.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jlora.adapters.pattern import PatternTable
from jlora.adapters.tensors import parse_json, read_small
from jlora.errors import AdapterError
from jlora.models.config import PROJECTIONS

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG = 1 << 20
"""Bytes. A config that lists every module of an 80-layer model has about 50 kB."""
MAX_RANK = 1 << 16
DEFAULT_RANK = DEFAULT_ALPHA = 8
"""What peft takes for a missing r or lora_alpha."""

# Fields that change the result in a way that we do not compute, unless they are empty or false.
REFUSED: dict[str, str] = {
    "alora_invocation_tokens": "aLoRA (alora_invocation_tokens)",
    "layer_replication": "layer_replication",
    "use_bdlora": "BD-LoRA (use_bdlora)",
    "use_qalora": "QALoRA (use_qalora)",
    "kasa_config": "KaSA (kasa_config)",
    "arrow_config": "Arrow routing (arrow_config)",
    "monteclora_config": "MonteCLoRA (monteclora_config)",
}

# Fields without any effect on inference with the tensors at hand, whatever they hold.
HARMLESS = frozenset([
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying",
    "eva_config", "fan_in_fan_out", "inference_mode", "layers_pattern", "lora_dropout",
    "lora_ga_config", "loftq_config", "megatron_config", "megatron_core", "merge_weights",
    "path_initial_model_for_weight_conversion", "qalora_group_size",
    "revision", "runtime_config", "task_type", "velora_config",
])  # fmt: skip
_READ = frozenset([
    "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_to_transform",
    "lora_alpha", "lora_bias", "modules_to_save", "peft_type", "peft_version", "r",
    "rank_pattern", "target_modules", "target_parameters", "trainable_token_indices", "use_dora", "use_rslora",
])  # fmt: skip

# Ways to start a LoRA that leave the base weights alone, and those that do not.
PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})
BASE_CHANGING_INITS = ("pissa_niter", "corda", "loftq")
"""What they take out of the base cannot be computed again: it was random, or needs training data."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The facts of an adapter_config.json that matter at inference."""

    base_model: str | None
    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    ranks: PatternTable
    """`rank_pattern`'s keys, compiled."""
    alphas: PatternTable
    """`alpha_pattern`'s keys, compiled."""
    targets: tuple[str, ...] | None
    """target_modules where it is a list (or "all-linear"); None: absent, or a regex."""
    excluded: tuple[str, ...] | None
    """exclude_modules where it is a list, or nothing; None: a regex."""
    layers: frozenset[int] | None
    """layers_to_transform; None: all."""
    use_dora: bool
    lora_bias: bool
    biases: bool
    """Trained biases of the base itself (bias "all" or "lora_only")."""
    saved: tuple[str, ...]
    """modules_to_save: the last words of its names."""
    tokens: Mapping[str, tuple[int, ...]]
    """trainable_token_indices by module; a list is the embedding's."""
    init: Literal["pissa", "olora"] | None
    """How the pairs started, where that took something out of the base."""
    parameters: tuple[str, ...] = ()
    """target_parameters."""
    peft_version: str | None = None
    """Of the peft that wrote the file; 0.18 was the first to say so."""

    def rank_of(self, name: str) -> int:
        """The rank that the config gives to the module `name`."""
        key = self.ranks.find(name)
        return self.rank if key is None else self.rank_pattern[key]

    def scaling_of(self, name: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA."""
        key = self.alphas.find(name)
        alpha = self.alpha if key is None else self.alpha_pattern[key]
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_config(folder: Path) -> LoraConfig:
    """Reads and checks adapter_config.json of an adapter folder."""
    path = folder / CONFIG_FILE
    data = parse_json(read_small(path, MAX_CONFIG), str(path))
    if not isinstance(data, dict):
        raise AdapterError(f"{path} holds {type(data).__name__}, expected an object")
    return check_config(data, str(path))


def check_config(data: Mapping[str, Any], path: str) -> LoraConfig:
    """The facts in `data`; AdapterError names the first field that is wrong or not supported."""
    _refuse_features(data, path)
    rank_pattern = {
        key: _rank(value, f"{path}: rank_pattern[{key[:80]!r}]")
        for key, value in _table(data, "rank_pattern", path).items()
    }
    alpha_pattern = {
        key: _number(value, f"{path}: alpha_pattern[{key[:80]!r}]")
        for key, value in _table(data, "alpha_pattern", path).items()
    }
    base, version = data.get("base_model_name_or_path"), data.get("peft_version")
    return LoraConfig(
        base_model=base if isinstance(base, str) and base else None,
        rank=_rank(data.get("r", DEFAULT_RANK), f"{path}: r"),
        alpha=_number(data.get("lora_alpha", DEFAULT_ALPHA), f"{path}: lora_alpha"),
        use_rslora=_flag(data, "use_rslora", path),
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        ranks=PatternTable(f"{path}: rank_pattern", rank_pattern),
        alphas=PatternTable(f"{path}: alpha_pattern", alpha_pattern),
        targets=_targets(data, path),
        excluded=_excluded(data, path),
        layers=_layers(data.get("layers_to_transform"), path),
        use_dora=_flag(data, "use_dora", path),
        lora_bias=_flag(data, "lora_bias", path),
        biases=_biases(data, path),
        saved=_saved(data, path),
        tokens=_tokens(data.get("trainable_token_indices"), path),
        init=_init(data.get("init_lora_weights", True), path),
        parameters=_parameters(data, path),
        peft_version=version if isinstance(version, str) else None,
    )


def _refuse_features(data: Mapping[str, Any], path: str) -> None:
    kind = data.get("peft_type", "LORA")
    if kind != "LORA":
        raise AdapterError(f"{path}: peft_type {_shown(kind)} is not supported, only 'LORA' is")
    for field, feature in REFUSED.items():
        if data.get(field):
            raise AdapterError(f"{path}: {feature} is not supported (got {_shown(data[field])})")
    for field in data.keys() - _READ - HARMLESS - REFUSED.keys():
        # A newer peft adds fields all the time. What switches a method on is true or holds
        # something; a number or a word alone is a parameter of a method that is off.
        value = data[field]
        if value is True or (isinstance(value, dict | list) and value):
            raise AdapterError(
                f"{path}: the unknown field {field[:80]!r} is set ({_shown(value)}); if it does "
                "not change the adapter's result, remove it"
            )


def _init(init: Any, path: str) -> Literal["pissa", "olora"] | None:
    if init is None or isinstance(init, bool):
        return None
    name = init.lower() if isinstance(init, str) else ""
    if name in ("pissa", "olora"):
        return name
    if name.startswith(BASE_CHANGING_INITS):
        raise AdapterError(
            f"{path}: init_lora_weights {_shown(init)} took something out of the base weights that "
            "cannot be computed again; convert the adapter to plain LoRA (save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
    if name not in PLAIN_INITS:
        raise AdapterError(f"{path}: init_lora_weights {_shown(init)} is not known")
    return None


def _biases(data: Mapping[str, Any], path: str) -> bool:
    bias = data.get("bias", "none")
    if bias not in ("none", None, "all", "lora_only"):
        raise AdapterError(f"{path}: bias must be none, all or lora_only, got {_shown(bias)}")
    return bias in ("all", "lora_only")


def _saved(data: Mapping[str, Any], path: str) -> tuple[str, ...]:
    saved = data.get("modules_to_save") or []
    if not _is_texts(saved):
        raise AdapterError(f"{path}: modules_to_save must be a list, got {_shown(saved)}")
    return tuple(sorted({name.rpartition(".")[2] for name in saved}))


def _tokens(value: Any, path: str) -> dict[str, tuple[int, ...]]:
    """Token ids by module; sorted out which modules can have them when the tensors are known."""
    table = {"embed_tokens": value} if isinstance(value, list) else value or {}
    if not isinstance(table, dict):
        raise AdapterError(
            f"{path}: trainable_token_indices must be a list or an object, got {_shown(value)}"
        )
    tokens: dict[str, tuple[int, ...]] = {}
    for key, index in table.items():
        ok = isinstance(index, list) and all(type(i) is int and 0 <= i < 1 << 31 for i in index)
        if not ok or len(set(index)) != len(index):
            raise AdapterError(
                f"{path}: trainable_token_indices[{key[:80]!r}] must be a list of different token "
                f"ids, got {_shown(index)}"
            )
        name = key.rpartition(".")[2]
        if name not in ("embed_tokens", "lm_head"):
            raise AdapterError(
                f"{path}: trainable_token_indices names {key[:80]!r}, expected embed_tokens or lm_head"
            )
        if index:
            tokens[name] = tuple(index)
    return tokens


def _targets(data: Mapping[str, Any], path: str) -> tuple[str, ...] | None:
    targets = data.get("target_modules")
    if isinstance(targets, str):
        # A regex is not run: which modules it meant shows in the tensors.
        return PROJECTIONS if targets.lower() == "all-linear" else None
    if targets is not None and not _is_texts(targets):
        raise AdapterError(
            f"{path}: target_modules must be a list of names, a string or null, got "
            f"{_shown(targets)}"
        )
    return None if targets is None else tuple(targets)


def _parameters(data: Mapping[str, Any], path: str) -> tuple[str, ...]:
    parameters = data.get("target_parameters") or []
    if not _is_texts(parameters):
        raise AdapterError(f"{path}: target_parameters must be a list, got {_shown(parameters)}")
    return tuple(parameters)


def _excluded(data: Mapping[str, Any], path: str) -> tuple[str, ...] | None:
    excluded = data.get("exclude_modules") or []
    if isinstance(excluded, str):
        return None
    if not _is_texts(excluded):
        raise AdapterError(f"{path}: exclude_modules must be a list, got {_shown(excluded)}")
    return tuple(excluded)


def _layers(value: Any, path: str) -> frozenset[int] | None:
    if value is None or value == []:
        return None
    layers = value if isinstance(value, list) else [value]
    if not all(type(layer) is int and layer >= 0 for layer in layers):
        raise AdapterError(
            f"{path}: layers_to_transform must hold layer numbers from 0 on, got {_shown(value)}"
        )
    return frozenset(layers)


def _table(data: Mapping[str, Any], field: str, path: str) -> Mapping[str, Any]:
    table = data.get(field) or {}
    if not isinstance(table, dict):
        raise AdapterError(f"{path}: {field} must be an object, got {_shown(table)}")
    return table


def _rank(value: Any, what: str) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise AdapterError(f"{what} must be a rank from 1 to {MAX_RANK}, got {_shown(value)}")
    return value


def _number(value: Any, what: str) -> float:
    ok = isinstance(value, int | float) and not isinstance(value, bool)
    # abs first: float() of an integer with 400 digits overflows.
    if not ok or not abs(value) <= 1e30:
        raise AdapterError(f"{what} must be a finite number, got {_shown(value)}")
    return float(value)


def _flag(data: Mapping[str, Any], field: str, path: str) -> bool:
    value = data.get(field, False)
    if value is not None and not isinstance(value, bool):
        raise AdapterError(f"{path}: {field} must be true or false, got {_shown(value)}")
    return bool(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
