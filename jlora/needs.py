"""What rank pages must hold: what the options ask for, or what the adapters of the start need."""

from collections.abc import Sequence
from dataclasses import dataclass

from jlora.adapters.adapter import EVERY, LEVELS, Support, Targets, targets_of
from jlora.adapters.peft import required_support
from jlora.errors import ParameterError
from jlora.models.config import ModelConfig
from jlora.options import LoraModule, ModelOptions

ALL = ("all", "all-linear")
"""SGLang's and peft's word for every projection."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What an engine is built for; every step with adapters pays for it."""

    support: Support
    targets: Targets
    added_tokens: int
    """Tokens that adapters may add to the vocabulary."""


def needs(options: ModelOptions, cfg: ModelConfig, adapters: Sequence[LoraModule]) -> Needs:
    """`adapters` are those of the start. Raises AdapterError, and ParameterError for modules that the
    model lacks."""
    level, extra = options.lora_support, options.lora_extra_vocab_size
    support = LEVELS["plain" if level == "auto" else level]
    targets, added = _asked(options.lora_target_modules, cfg), 0
    unknown = targets is None and not options.open_to_adapters and bool(adapters)
    found: Targets = frozenset()
    for module in adapters if level == "auto" or extra is None or unknown else ():
        own = required_support(module.path, cfg)
        support |= own.support if level == "auto" else frozenset()
        added, found = max(added, own.added_tokens), found | own.targets
    extra = added if extra is None else extra
    ends: Support = frozenset({"vocabulary"} if extra else ())
    if targets is None:
        targets = found if unknown else EVERY
    return Needs(support=support | ends, targets=targets, added_tokens=extra)


def _asked(modules: Sequence[str], cfg: ModelConfig) -> Targets | None:
    """The groups that --lora-target-modules names; None if it names nothing."""
    if not modules:
        return None
    if any(name in ALL for name in modules):
        return EVERY
    if others := [name for name in modules if not targets_of([name], cfg)]:
        raise ParameterError(
            f"lora_target_modules: {others[0]!r} is not a projection of {cfg.name}; it has "
            f"{', '.join(cfg.modules)}, and all is every one",
            "lora_target_modules",
        )
    return targets_of(modules, cfg)
