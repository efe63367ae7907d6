"""LoRA as peft's `target_parameters` writes it: of all experts of a layer in one pair of tensors.

A parameter of E experts [E, d1, d2] has lora_A [E·r, ·], expert by expert, and lora_B [·, r·E],
rank by rank. Since peft 0.19.1 A has the inputs (d2) and B the outputs (d1); before, the other way
round. Shapes tell which; where d1 equals d2 the version in adapter_config.json must.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jlora.adapters.keys import STACKS, Found, Place, shown_place
from jlora.adapters.lora_config import CONFIG_FILE, LoraConfig
from jlora.adapters.tensors import TensorInfo
from jlora.errors import AdapterError
from jlora.models.config import STACKED_GROUPS, ModelConfig

PARAMETERS = dict(zip(STACKED_GROUPS, ("gate_up_proj", "down_proj"), strict=True))
"""What transformers calls the stacked parameter of a group. peft wraps the first first: of two
stacks the outer one, `experts.lora_A`, is the second's."""

_TURNED = (0, 19, 1)
"""The version of peft that turned the pair round."""
_VERSION = re.compile(
    r"([0-9]{1,4})\.([0-9]{1,4})\.([0-9]{1,4})(\.?(?:dev|a|b|rc)[0-9]*)?(?:[@+].*)?"
)
_BLOCKS = ("mlp", "block_sparse_moe")
"""What the sparse MLP is called in transformers 5, and in Mixtral's checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The pairs of all experts of a layer for one group."""

    layer: int
    group: str
    name: str
    """The parameter's, as peft saw it: what patterns are matched against."""
    a: TensorInfo
    b: TensorInfo
    rank: int
    turned: bool = False
    """A has the outputs and B the inputs: peft before 0.19.1."""

    def pairs(
        self, a: np.ndarray, b: np.ndarray, experts: int
    ) -> Iterator[tuple[Float[np.ndarray, "R K"], Float[np.ndarray, "N R"]]]:
        """(A, B) of each expert."""
        by_expert = a.reshape(experts, self.rank, -1)
        by_rank = np.ascontiguousarray(b.reshape(-1, self.rank, experts).transpose(2, 1, 0))
        for own, other in zip(by_expert, by_rank, strict=True):
            yield (other, own.T) if self.turned else (own, other.T)


@dataclass(frozen=True, kw_only=True)
class Targeted:
    """What `target_parameters` has to do with a file's tensors."""

    modules: dict[Place, Found]
    """All but the stacks, under the names that patterns know."""
    places: frozenset[Place] = frozenset()
    """Those of them that it names."""
    stacks: list[Stack] = field(default_factory=list)


def resolve(
    modules: Mapping[Place, Found], config: LoraConfig, cfg: ModelConfig, folder: Path
) -> Targeted:
    """Tells stacks from modules. AdapterError where a stack's parameter or order cannot be told, or
    where target_parameters and tensors disagree."""
    stacks = {place: found for place, found in modules.items() if place[1].endswith(STACKS)}
    if not stacks and not config.parameters:
        return Targeted(modules=dict(modules))
    wanted, left = frozenset(config.parameters), set(config.parameters)

    def names(*parameter: str) -> set[str]:
        hits = {hit for name in parameter for hit in _suffixes(name) if hit in wanted}
        left.difference_update(hits)
        return hits

    plain = {place: found for place, found in modules.items() if place not in stacks}
    places: set[Place] = set()
    made: list[Stack] = []
    for layer in range(cfg.layers):
        for place, parameters in _linears(cfg, layer):
            if names(*parameters):
                if place not in plain:
                    raise AdapterError(
                        f"{folder}: target_parameters names {shown_place(*place)}, which has no tensors"
                    )
                places.add(place)
                found = plain[place]
                plain[place] = replace(found, name=f"{found.name}.weight")
        if cfg.experts is None or not cfg.is_sparse(layer):
            continue
        groups = []
        for group, parameter in PARAMETERS.items():
            paths = [f"model.layers.{layer}.{block}.experts.{parameter}" for block in _BLOCKS]
            if names(*paths):
                groups.append((group, paths[0]))
        own = [
            (layer, f"{cfg.experts.module}.{name}")
            for name in (STACKS if len(groups) < 2 else STACKS[::-1])
        ][: len(groups)]
        _check_found(layer, own, stacks, groups, config, folder)
        for place, (group, name) in zip(own, groups, strict=True):
            made.append(_stack(layer, group, name, stacks[place], config, cfg, folder))
    if left:
        raise AdapterError(
            f"{folder}: target_parameters lists {min(left)[:120]!r}, of which {cfg.name!r} has none"
        )
    return Targeted(
        modules=plain, places=frozenset(places), stacks=_ordered(made, config, cfg, folder)
    )


def _suffixes(name: str) -> Iterator[str]:
    """ "a.b.c", "b.c", "c": what an entry of target_parameters may be to name it."""
    words = name.split(".")
    return (".".join(words[start:]) for start in range(len(words)))


def _linears(cfg: ModelConfig, layer: int) -> Iterator[tuple[Place, list[str]]]:
    """(place, names of its parameter) of matrices: for peft these are stacks of one."""
    for module in cfg.modules_of(layer):
        block = (
            "self_attn" if module in ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj") else "mlp"
        )
        yield (layer, module), [f"model.layers.{layer}.{block}.{module}.weight"]
    if cfg.experts is not None and cfg.is_sparse(layer):
        router = cfg.experts.router
        yield (layer, router), [f"model.layers.{layer}.{block}.gate.weight" for block in _BLOCKS]


def _check_found(
    layer: int,
    own: list[Place],
    stacks: Mapping[Place, Found],
    groups: list[tuple[str, str]],
    config: LoraConfig,
    folder: Path,
) -> None:
    """The stacks of a layer are those that target_parameters asks for."""
    found = sorted(place for place in stacks if place[0] == layer)
    named = ", ".join(PARAMETERS[group] for group, _ in groups) or "none"
    if found != sorted(own):
        raise AdapterError(
            f"{folder}: target_parameters names {named} of the experts in layer {layer}, the file holds "
            f"{len(found)} stacks for it{' (experts.base_layer without experts)' if len(found) == len(own) else ''}"
        )
    for place in own:
        extra = stacks[place].tensors.keys() - {"A", "B"}
        if extra or config.use_dora or config.lora_bias or config.init is not None:
            what = f"tensors of kind {min(extra)}" if extra else "DoRA, lora_bias, PiSSA and OLoRA"
            raise AdapterError(f"{folder}: {what} with target_parameters on experts: peft has none")


def _stack(
    layer: int,
    group: str,
    name: str,
    found: Found,
    config: LoraConfig,
    cfg: ModelConfig,
    folder: Path,
) -> Stack:
    """Checked but for the order."""
    assert cfg.experts is not None
    a, b, count = found.tensors["A"], found.tensors["B"], cfg.experts.count
    where = f"{folder}: {PARAMETERS[group]} of the experts in layer {layer}"
    rank = config.rank_of(name)
    inputs, outputs = _widths(group, cfg)
    expected = ([count * rank, inputs], [outputs, rank * count])
    before = ([count * rank, outputs], [inputs, rank * count])
    if [list(a.shape), list(b.shape)] not in (list(expected), list(before)):
        raise AdapterError(
            f"{where} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, expected {expected[0]} and "
            f"{expected[1]} for {count} experts of rank {rank} (peft before 0.19.1: {before[0]} and "
            f"{before[1]})"
        )
    if not np.isfinite(config.scaling_of(name, rank)):
        raise AdapterError(f"{where}: lora_alpha / r is not finite")
    return Stack(layer=layer, group=group, name=name, a=a, b=b, rank=rank)


def _widths(group: str, cfg: ModelConfig) -> tuple[int, int]:
    """(inputs, outputs) of an expert's stacked parameter."""
    assert cfg.experts is not None
    wide = 2 * cfg.experts.mlp if group == STACKED_GROUPS[0] else cfg.embed
    return (cfg.embed if group == STACKED_GROUPS[0] else cfg.experts.mlp), wide


def _ordered(
    stacks: list[Stack], config: LoraConfig, cfg: ModelConfig, folder: Path
) -> list[Stack]:
    """The same, with their order: one for the whole file."""
    told: set[bool] = set()
    for stack in stacks:
        inputs, outputs = _widths(stack.group, cfg)
        if inputs != outputs:
            told.add(stack.a.shape[1] == outputs)
    if len(told) > 1:
        raise AdapterError(
            f"{folder}: some stacks of experts are as peft writes them, others as it did before 0.19.1"
        )
    turned = told.pop() if told else (bool(stacks) and _turned(config, folder))
    return [replace(stack, turned=turned) for stack in stacks]


def _turned(config: LoraConfig, folder: Path) -> bool:
    """By peft_version: asked only where both orders have the same shapes."""
    match = _VERSION.fullmatch(config.peft_version or "")
    if match is not None:
        version = tuple(int(match[i]) for i in (1, 2, 3))
        if version != _TURNED or not match[4]:
            return version < _TURNED
    raise AdapterError(
        f"{folder}: an expert's inputs are as many as its outputs here, so shapes do not tell in which "
        f"order peft wrote them, and peft_version in {CONFIG_FILE} is {config.peft_version!r}; set it to "
        "the version that saved the adapter (0.19.1 changed the order)"
    )
