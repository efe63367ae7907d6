"""Adapters on routers and experts, in the three ways in which files hold them.

`EACH`: a pair for each expert, as peft wrote them on transformers 4. `STACKED`: peft's
target_parameters, written by peft itself. `TURNED`: the same before peft 0.19.1.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from tests import tiny

EACH, STACKED, TURNED = "each", "stacked", "turned"
DIALECTS = (EACH, STACKED, TURNED)
PARAMETERS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight")
PREFIX = "base_model.model."


def make_each(
    model: Path,
    folder: Path,
    targets: tuple[str, ...] | None = None,
    *,
    r: int = 4,
    alpha: float = 8,
    seed: int = 0,
    effect: float = 0.5,
    dense: bool = False,
    **changes: Any,
) -> Path:
    """A pair for each expert, and for routers where `targets` name the gate; None: all of these.

    `dense`: for MLPs of dense layers too, which peft 0.21 drops from such a file.
    """
    base = json.loads((model / "config.json").read_text())
    own = ("w1", "w2", "w3") if base["model_type"] == "mixtral" else tiny.ALL[4:]
    targets = (*own, "gate") if targets is None else targets
    rng, tensors = np.random.default_rng(seed), {}
    for name, (rows, *columns) in tiny.model_shapes(base).items():
        module = name.removesuffix(".weight")
        sparse = dense or ".experts." in name or module.endswith(".gate")
        if not {module, module.rpartition(".")[2]} & set(targets) or not (
            sparse or "self_attn" in name
        ):
            continue
        a = rng.standard_normal((r, *columns), dtype=np.float32) / np.float32(columns[0] ** 0.5)
        b = rng.standard_normal((rows, r), dtype=np.float32) * effect / (alpha / r) / r**0.5
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b.astype(np.float32)
    if not dense:  # the last word alone would name dense layers too
        targets = tuple(key[len(PREFIX) :].partition(".lora_")[0] for key in tensors if "_A" in key)
    config = tiny.adapter_config(model, targets, r=r, lora_alpha=alpha, **changes)
    return tiny.write_adapter(folder, config, tensors)


def make_stacked(
    model: Path,
    folder: Path,
    parameters: tuple[str, ...] = PARAMETERS,
    *,
    r: int = 4,
    alpha: float = 8,
    seed: int = 0,
    effect: float = 0.5,
    **options: Any,
) -> Path:
    """Written by peft, every tensor then random."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=options.pop("target_modules", []),
        target_parameters=list(parameters),
        task_type="CAUSAL_LM",
        **options,
    )
    torch.manual_seed(seed)
    wrapped = get_peft_model(base, config)
    with torch.no_grad():
        for name, tensor in wrapped.named_parameters():
            if ".lora_A." in name:
                tensor.copy_(torch.randn_like(tensor) / tensor.shape[1] ** 0.5)
            elif ".lora_B." in name:
                tensor.copy_(torch.randn_like(tensor) * effect / (alpha / r) / r**0.5)
    wrapped.save_pretrained(str(folder))
    return folder


def turn(model: Path, stacked: Path, folder: Path, version: str | None = "0.18.1") -> Path:
    """The same adapter as peft before 0.19.1 wrote it: delta[e] = (B_e A_e)^T."""
    base = json.loads((model / "config.json").read_text())
    experts = base.get("num_experts") or base["num_local_experts"]
    config = json.loads((stacked / "adapter_config.json").read_text())
    config["peft_version"] = version
    if version is None:
        del config["peft_version"]
    tensors = load_file(stacked / "adapter_model.safetensors")
    for key in list(tensors):
        if ".experts." not in key or "lora_A" not in key:
            continue
        other = key.replace("lora_A", "lora_B")
        a, b = tensors[key], tensors[other]
        rank = a.shape[0] // experts
        by_expert = b.reshape(-1, rank, experts).transpose(2, 1, 0)  # [E, r, out]
        tensors[key] = np.ascontiguousarray(by_expert.reshape(experts * rank, -1))
        by_rank = a.reshape(experts, rank, -1).transpose(2, 1, 0)  # [in, r, E]
        tensors[other] = np.ascontiguousarray(by_rank.reshape(-1, rank * experts))
    return tiny.write_adapter(folder, config, tensors)


def merged(model: Path, each: Path, folder: Path) -> Path:
    """The checkpoint with the deltas of an adapter of `EACH` in its weights: what transformers then
    computes needs no peft."""
    config = json.loads((each / "adapter_config.json").read_text())
    own, tensors = (
        load_file(each / "adapter_model.safetensors"),
        load_file(model / "model.safetensors"),
    )
    for key, a in own.items():
        if "lora_A" not in key:
            continue
        module, b = key.removesuffix(".lora_A.weight"), own[key.replace("lora_A", "lora_B")]
        scaling = config["lora_alpha"] / (len(a) ** 0.5 if config.get("use_rslora") else len(a))
        tensors[f"{module.removeprefix(PREFIX)}.weight"] += np.float32(scaling) * (b @ a)
    shutil.copytree(model, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
