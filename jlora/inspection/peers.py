"""What other systems do with an adapter that differs from what was trained: `elsewhere`.

Facts from their sources, read 2026-11-23 (peft's were run): vLLM 0.33.0, SGLang 0.5.23, peft
0.21.2. What is not known here is not told: no entry is no promise.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

VLLM, SGLANG, PEFT = "vLLM 0.33.0", "SGLang 0.5.23", "peft 0.21.2"

_EACH = re.compile(r".*\.experts\.[0-9]+\.")
_DENSE = re.compile(r".*\.layers\.[0-9]+\.mlp\.(gate|up|down)_proj")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of --max-lora-rank; 16 by default."""
VLLM_HEAD = 258_048
"""Largest vocabulary of a LoRA on the output head."""
CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
"""Ways to start a LoRA that take something out of the base's weights."""

Outcome = Literal["refuses", "wrong", "needs"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One thing that one system does with an adapter."""

    system: str
    outcome: Outcome
    """refuses: an error. wrong: loads, with another result. needs: loads with this setting."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a PEFT folder says, before anybody has judged it."""

    config: Mapping[str, Any]
    """adapter_config.json."""
    names: tuple[str, ...]
    """Names of the tensors."""
    rank: int
    """The largest rank of any lora_A."""
    tied: bool | None = None
    """Whether the base's head is its embedding, if the base is known."""
    vocab: int | None = None

    def on(self, field: str) -> bool:
        """Whether a field of the config is there and says something."""
        return bool(self.config.get(field))

    @property
    def biases(self) -> bool:
        """Biases of the base were trained."""
        return self.config.get("bias") not in (None, "none")

    @property
    def init(self) -> str:
        """How the pairs started, if that took something out of the base; else empty."""
        init = self.config.get("init_lora_weights")
        name = init.lower() if isinstance(init, str) else ""
        return name if name.startswith(CHANGES_BASE) else ""

    @property
    def ends(self) -> bool:
        """There is LoRA on the embedding or the head."""
        return any("lora_" in name and ("embed_tokens" in name or "lm_head" in name)
                   for name in self.names)  # fmt: skip


def elsewhere(facts: Facts) -> list[Verdict]:
    """All that is known, system by system."""
    rules: tuple[tuple[str, Callable[[Facts], Iterator[tuple[Outcome, str]]]], ...] = (
        (VLLM, _vllm),
        (SGLANG, _sglang),
        (PEFT, _peft),
    )
    return [
        Verdict(system=system, outcome=outcome, reason=reason)
        for system, rule in rules
        for outcome, reason in rule(facts)
    ]


def _required(facts: Facts) -> Iterator[tuple[Outcome, str]]:
    for field in ("r", "lora_alpha"):
        if field not in facts.config:
            yield "refuses", f"adapter_config.json has no {field}"


def _vllm(facts: Facts) -> Iterator[tuple[Outcome, str]]:
    yield from _required(facts)
    if "target_modules" not in facts.config:
        yield "refuses", "adapter_config.json has no target_modules"
    if facts.rank > VLLM_RANKS[-1]:
        yield "refuses", f"rank {facts.rank}: max_lora_rank is at most {VLLM_RANKS[-1]}"
    elif facts.rank > 16:
        enough = next(rank for rank in VLLM_RANKS if rank >= facts.rank)
        yield (
            "needs",
            f"--max-lora-rank {enough} (16 by default, and all adapters are padded to it)",
        )
    for field, what in (
        ("use_dora", "DoRA"),
        ("lora_bias", "lora_bias"),
        ("trainable_token_indices", "trainable tokens"),
        ("alora_invocation_tokens", "aLoRA"),
        ("layer_replication", "layer_replication"),
        ("use_qalora", "QALoRA"),
        ("use_bdlora", "BD-LoRA"),
        ("kasa_config", "KaSA"),
    ):
        if facts.on(field):
            yield "refuses", f"{what} ({field})"
    if facts.biases:
        yield "refuses", f"trained biases (bias is {facts.config['bias']!r})"
    saved = [
        name
        for name in facts.config.get("modules_to_save") or ()
        if name not in ("classifier", "score")
    ]
    if saved:
        yield "refuses", f"modules_to_save {', '.join(map(str, saved))}"
    if facts.init:
        yield "refuses", f"init_lora_weights {facts.init!r}: convert it to plain LoRA first"
    on_head = any("lm_head" in name and "lora_" in name for name in facts.names)
    if on_head and facts.vocab is not None and facts.vocab > VLLM_HEAD:
        yield "refuses", f"LoRA on lm_head of {facts.vocab} tokens, more than {VLLM_HEAD}"


def _sglang(facts: Facts) -> Iterator[tuple[Outcome, str]]:
    yield from _required(facts)
    targets = facts.config.get("target_modules")
    if targets is None:
        yield "refuses", "target_modules is not there: a list is needed"
    elif isinstance(targets, str) and targets not in ("all", "all-linear"):
        yield "refuses", "target_modules is a regular expression"
    if facts.on("rank_pattern"):
        yield "refuses", "rank_pattern is not read: an assertion on shapes fails"
    if facts.on("use_dora"):
        yield "refuses", "DoRA (use_dora)"
    if facts.on("use_rslora") and facts.rank > 1:
        factor = facts.rank**0.5
        yield (
            "wrong",
            f"use_rslora is not read: the change is {factor:.3g} times too small (rank {facts.rank}; sglang issue 40835)",
        )
    for field, what in (
        ("alpha_pattern", "is not read: lora_alpha is taken for every module"),
        ("modules_to_save", "is dropped"),
        ("lora_bias", "is not read"),
        ("trainable_token_indices", "is dropped: new rows of the embedding are lost"),
        ("alora_invocation_tokens", "is not read: the adapter acts on every token"),
        ("layer_replication", "is not read"),
        ("use_qalora", "is not read"),
        ("use_bdlora", "is not read"),
        ("kasa_config", "is not read"),
        ("target_parameters", "is not read: the experts' tensors are skipped with a warning"),
    ):
        if facts.on(field):
            yield "wrong", f"{field} {what}"
    if facts.biases:
        yield "wrong", f"bias {facts.config['bias']!r} is not read: trained biases are lost"
    if facts.init:
        yield (
            "wrong",
            f"init_lora_weights {facts.init!r} is not read: the base keeps what it took out",
        )


def _peft(facts: Facts) -> Iterator[tuple[Outcome, str]]:
    if facts.names and not any(name.startswith("base_model.model.") for name in facts.names):
        yield (
            "wrong",
            "no tensor's name starts with base_model.model.: nothing is loaded, with one warning",
        )
    if facts.config.get("target_modules") is None and not facts.on("target_parameters"):
        yield (
            "wrong",
            "target_modules is not there: the architecture's default (q_proj, v_proj) is taken, other tensors are dropped",
        )
    yield from _peft_on_experts(facts)
    if facts.ends and facts.tied:
        yield "wrong", "merge_and_unload on this tied base changes embedding and head alike"


def _peft_on_experts(facts: Facts) -> Iterator[tuple[Outcome, str]]:
    """What it does, on transformers 5, with a pair for each expert: it makes stacks of them."""
    modules = {name.partition(".lora_")[0] for name in facts.names if ".lora_" in name}
    parts = {_EACH.sub("", module) for module in modules if _EACH.match(module)}
    if not parts:
        return
    first = parts & {"w1", "w3", "gate_proj", "up_proj"}
    if len(first) == 1:
        yield "refuses", f"{first.pop()} of experts without the other of gate and up"
    elif first and parts == first:
        yield "wrong", "gate and up of experts without down are dropped, with one warning"
    elif first and facts.on("use_rslora"):
        yield "wrong", "use_rslora: gate and up of experts change 1.41 times as much as they should"
    if any(_DENSE.fullmatch(module) for module in modules):
        yield "wrong", "the MLPs of layers without experts are dropped"
