"""Whether an adapter's config, its tensors and the base model agree: `check_modules`.

Looks at names and shapes only. The tensors are the truth; what the config says must not contradict
them, because then one of the two is not what its author meant.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from jlora.adapters.adapter import NO_LAYER, is_norm
from jlora.adapters.keys import BLOCKS, VOCABULARY, Found, Kind, Place, shown_place
from jlora.adapters.lora_config import CONFIG_FILE, LoraConfig
from jlora.adapters.tensors import TensorInfo
from jlora.errors import AdapterError
from jlora.models.config import EXPERT_PARTS, PROJECTIONS, ModelConfig

Modules = Mapping[Place, Found]


_FEATURES: tuple[tuple[Kind, str, str], ...] = (
    ("magnitude", "DoRA", "use_dora"),
    ("B.bias", "lora_bias", "lora_bias"),
)


def check_modules(
    modules: Modules,
    config: LoraConfig,
    cfg: ModelConfig,
    folder: Path,
    by_parameter: frozenset[Place] = frozenset(),
) -> int:
    """Tokens that the adapter adds to the base's vocabulary. Raises AdapterError where config, tensors
    and base model disagree. target_parameters names the places `by_parameter`: target_modules
    need not."""
    for place, found in modules.items():
        if "weight" in found.tensors and place[1] in VOCABULARY and not is_saved(place[1], config):
            if "copy" in found.tensors:
                raise AdapterError(f"{folder}: {shown_place(*place)} has two copies of its weight")
            found.tensors["copy"] = found.tensors.pop("weight")
    _check_kinds(modules, config, cfg, folder)
    vocab = vocabulary(modules, config, cfg)
    _check_shapes(modules, config, replace(cfg, vocab=vocab), folder)
    _check_targets(modules, config, cfg, folder, by_parameter)
    _check_added(modules, config, cfg, vocab, folder)
    return vocab - cfg.vocab


def vocabulary(modules: Modules, config: LoraConfig, cfg: ModelConfig) -> int:
    """Rows of the embedding that the adapter was trained on: the base's, or more."""
    rows = [cfg.vocab]
    for name in VOCABULARY:
        found = modules.get((NO_LAYER, name))
        if found is not None:
            whole = (found.tensors.get(kind) for kind in ("weight", "copy"))
            rows += [info.shape[0] for info in whole if info is not None and info.shape]
            if "tokens" in found.tensors:
                index = tokens_of(name, config, cfg)
                # A row each: a number far beyond would make arrays of its size.
                rows += [cfg.vocab + sum(i >= cfg.vocab for i in index)]
    return max(rows)


def tokens_of(name: str, config: LoraConfig, cfg: ModelConfig) -> tuple[int, ...]:
    """The trainable tokens of an end; the two ends of a tied model share theirs."""
    if name not in config.tokens and cfg.tied:
        name = VOCABULARY[0]
    return config.tokens.get(name, ())


def _check_added(
    modules: Modules, config: LoraConfig, cfg: ModelConfig, vocab: int, folder: Path
) -> None:
    """Every added token needs a row in both ends."""
    added = set(range(cfg.vocab, vocab)) if vocab > cfg.vocab else set()
    if not added:
        return
    for name in VOCABULARY:
        found = modules.get((NO_LAYER, name))
        kinds: set[Kind] = {"weight", "copy"}
        if found is None and cfg.tied:
            found = modules.get((NO_LAYER, VOCABULARY[0]))
            kinds = {"copy", "original"}
        has = found.tensors.keys() if found is not None else set()
        trained = set(tokens_of(name, config, cfg)) if "tokens" in has else set()
        if not (has & kinds or added <= trained):
            raise AdapterError(
                f"{folder} adds tokens {cfg.vocab} to {vocab - 1}, but has no rows of {name} for "
                "them; save it with save_embedding_layers=True"
            )


def _check_kinds(modules: Modules, config: LoraConfig, cfg: ModelConfig, folder: Path) -> None:
    """What the config switches on and what the file holds must be the same."""
    on = {"magnitude": config.use_dora, "B.bias": config.lora_bias}
    for place, found in modules.items():
        has, where = found.tensors, f"{folder}: {shown_place(*place)}"
        if "." in place[1] and (other := sorted(has.keys() - {"A", "B"})):
            raise AdapterError(
                f"{where} has {has[other[0]].name[:160]!r}: routers and experts take lora_A and lora_B "
                "only (no DoRA, biases or full weights)"
            )
        for kind, feature, field in _FEATURES:
            if kind in has and ("A" not in has or not on[kind]):
                raise AdapterError(
                    f"{where} has {has[kind].name[:160]!r}, but {CONFIG_FILE} does not say {field}"
                    if "A" in has
                    else f"{where} has {has[kind].name[:160]!r} but no lora_A and lora_B"
                )
            if on[kind] and "A" in has and kind not in has:
                raise AdapterError(
                    f"{where} has no {feature} tensor, though {CONFIG_FILE} says {field}"
                )
        if is_norm(place[1]) and (other := has.keys() - {"weight"}):
            raise AdapterError(
                f"{where} has {has[min(other)].name[:160]!r}: a norm can only be saved whole "
                "(modules_to_save)"
            )
        saved = is_saved(place[1], config)
        if "weight" in has and not saved:
            raise AdapterError(
                f"{where} has a full weight, {has['weight'].name[:160]!r}, which modules_to_save "
                f"does not name (it names {', '.join(config.saved) or 'nothing'})"
            )
        if "bias" in has and not (config.biases or saved):
            raise AdapterError(
                f"{where} has a trained bias, {has['bias'].name[:160]!r}, but {CONFIG_FILE} says bias "
                "'none'"
            )
        for kind in ("copy", "original"):
            if kind in has and place[1] not in VOCABULARY:
                raise AdapterError(
                    f"{folder}: {has[kind].name[:160]!r} is a weight of the base itself"
                )
        asked = (
            bool(tokens_of(place[1], config, cfg)) if "tokens" in has else place[1] in config.tokens
        )
        if place[1] in VOCABULARY and ("tokens" in has) != asked:
            raise AdapterError(
                f"{where}: trainable_token_indices and the tensors disagree (one of them is missing)"
            )
        if "tokens" in has and place[0] != NO_LAYER:
            raise AdapterError(f"{where} cannot have trainable tokens")
    for name in config.tokens:
        if (NO_LAYER, name) not in modules:
            raise AdapterError(f"{folder}: trainable_token_indices names {name}, without tensors")
    for name in config.saved:
        if not any(
            place[1].endswith(name) and "weight" in modules[place].tensors for place in modules
        ):
            raise AdapterError(f"{folder}: modules_to_save names {name!r}, which has no tensors")


def is_saved(module: str, config: LoraConfig) -> bool:
    """Whether modules_to_save names a module; peft compares ends of names: "norm" is all norms."""
    return any(module.endswith(name) for name in config.saved)


def _check_shapes(modules: Modules, config: LoraConfig, cfg: ModelConfig, folder: Path) -> None:
    for place, found in modules.items():
        has = found.tensors
        if "A" in has:
            _check_pair(place, found, config, cfg, folder)
        if (norm := cfg.norm_width(place[1])) is not None:
            _check_shape(has["weight"], (norm,), folder)
            continue
        width, out = cfg.shape(place[1])
        stored = (width, out) if place[1] == VOCABULARY[0] else (out, width)
        expected: dict[Kind, tuple[int, ...]] = {
            "magnitude": (out,),
            "B.bias": (out,),
            "bias": (out,),
            "weight": stored,
            "copy": stored,
            "twin": stored,
            "original": stored,
        }
        if "tokens" in has:
            index = tokens_of(place[1], config, cfg)
            expected["tokens"] = (len(index), cfg.embed)
            if max(index, default=0) >= cfg.vocab:
                raise AdapterError(
                    f"{folder}: trainable_token_indices names token {max(index)}, beyond the "
                    f"{cfg.vocab} that {cfg.name!r} and the adapter's own rows make"
                )
        for kind, shape in expected.items():
            if kind in has:
                _check_shape(has[kind], shape, folder)


def _check_shape(info: TensorInfo, shape: tuple[int, ...], folder: Path) -> None:
    if info.shape == shape:
        return
    raise AdapterError(
        f"{folder}: {info.name[:160]!r} is {list(info.shape)}, expected {list(shape)}"
    )


def _check_pair(
    place: Place, found: Found, config: LoraConfig, cfg: ModelConfig, folder: Path
) -> None:
    where, a, b = f"{folder}: {shown_place(*place)}", found.tensors["A"], found.tensors["B"]
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise AdapterError(
            f"{where}: lora_A {list(a.shape)} and lora_B {list(b.shape)} must be matrices"
        )
    width, out = cfg.shape(place[1])
    (rank, got_width), (got_out, rank_b) = a.shape, b.shape
    if (got_width, got_out) != (width, out):
        raise AdapterError(
            f"{where} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, "
            f"expected [r, {width}] and [{out}, r]; was this adapter trained on another base "
            f"model? {CONFIG_FILE} says {config.base_model!r}, this server runs {cfg.name!r}"
        )
    if rank != rank_b or rank == 0:
        raise AdapterError(f"{where} has rank {rank} in lora_A and rank {rank_b} in lora_B")
    if rank != (said := config.rank_of(found.name)):
        raise AdapterError(f"{where} has rank {rank} in its tensors, {CONFIG_FILE} says {said}")
    if not math.isfinite(config.scaling_of(found.name, rank)):
        raise AdapterError(f"{where}: lora_alpha / r is not finite")


def _check_targets(
    modules: Modules,
    config: LoraConfig,
    cfg: ModelConfig,
    folder: Path,
    by_parameter: frozenset[Place],
) -> None:
    """target_modules and layers_to_transform, where they are lists, must agree with the tensors."""
    if config.layers is not None and (high := max(config.layers)) >= cfg.layers:
        raise AdapterError(
            f"{folder}: layers_to_transform names layer {high}, {cfg.name!r} has layers 0 to "
            f"{cfg.layers - 1}"
        )
    if config.targets is None or (cfg.experts is not None and config.targets is PROJECTIONS):
        return  # not a list, or "all-linear", which covered experts or not as versions went
    pairs = {place for place, found in modules.items() if "A" in found.tensors}
    expected: set[Place] = set()
    for target in config.targets:
        places = _targeted(target, config.layers, cfg)
        if not places:
            raise AdapterError(
                f"{folder}: target_modules lists {target[:120]!r}, which has no tensors"
            )
        expected |= places
    if extra := sorted(pairs - expected - by_parameter):
        raise AdapterError(
            f"{folder}: {shown_place(*extra[0])} has tensors but target_modules and "
            f"layers_to_transform do not name it ({len(extra)} such modules)"
        )
    missing = sorted(expected - pairs)
    if config.excluded is None:  # a regex: what it takes away is not known
        seen = {projection for _, projection in pairs}
        missing = [place for place in missing if place[1] not in seen]
    else:
        away = set().union(*(_targeted(name, None, cfg) for name in config.excluded))
        missing = [place for place in missing if place not in away]
    if missing:
        raise AdapterError(
            f"{folder}: target_modules names {shown_place(*missing[0])}, which has no tensors "
            f"({len(missing)} modules lack theirs); is the file complete?"
        )


def _targeted(target: str, layers: frozenset[int] | None, cfg: ModelConfig) -> set[Place]:
    """Projections that an entry of target_modules names: a name, or a path that ends in one."""
    words = target.split(".")
    places = _targeted_sparse(target, layers, cfg)
    if places and len(words) > 1:
        return places
    if words[-1] in VOCABULARY:
        return {(NO_LAYER, words[-1])}
    words[-1], _ = cfg.stored_in(words[-1])  # "all-linear" stands for projections
    if words[-1] not in BLOCKS or (len(words) > 1 and words[-2] != BLOCKS[words[-1]]):
        return places
    if len(words) <= 2:
        every = layers or range(cfg.layers)
        dense = {(layer, words[-1]) for layer in every if words[-1] in cfg.modules_of(layer)}
        return places | dense
    layer = words[-3]
    if not (layer.isascii() and layer.isdigit()) or int(layer[:7]) >= cfg.layers:
        return set()
    return {(int(layer), words[-1])}  # peft: a full name counts in spite of layers_to_transform


_SPARSE_TARGET = re.compile(
    r"(?:(?:(?:.*\.)?layers\.(?P<layer>[0-9]{1,6})\.)?(?:mlp|block_sparse_moe)\.)?"
    r"(?:gate|experts\.(?P<expert>[0-9]{1,6})\.(?P<part>[a-z0-9_]+))"
    r"|(?P<any>[a-z0-9_]+)"
)


def _targeted_sparse(target: str, layers: frozenset[int] | None, cfg: ModelConfig) -> set[Place]:
    """Routers and linears of experts that an entry of target_modules names."""
    match, facts = _SPARSE_TARGET.fullmatch(target), cfg.experts
    if match is None or facts is None:
        return set()
    part, expert = match["part"] or match["any"], match["expert"]
    if part is None:
        modules = [facts.router]
    elif part not in facts.parts:
        return set()
    else:
        ours = EXPERT_PARTS[facts.parts.index(part)]
        experts = range(facts.count) if expert is None else [int(expert)]
        modules = [facts.name_of(ours, number) for number in experts]
    every = layers or range(cfg.layers)
    if match["layer"] is not None:
        every = [int(match["layer"])]
    return {
        (layer, module)
        for layer in every
        if layer < cfg.layers and cfg.is_sparse(layer)
        for module in modules
    }
