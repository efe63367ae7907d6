"""PEFT folders of random weights for any base model: a benchmark needs adapters of a size, not of
a meaning. Small but not zero, so that no engine can leave them out.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jlora.models.config import PROJECTIONS, ModelConfig

ATTENTION = frozenset({"qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj"})
EFFECT = 0.05
"""Size of the change of a projection's output, for an input of size 1."""


def write_random_adapter(
    folder: str | Path,
    cfg: ModelConfig,
    *,
    rank: int,
    modules: Sequence[str] = PROJECTIONS,
    seed: int = 0,
) -> Path:
    """Writes a PEFT LoRA folder (bfloat16, all layers, alpha = 2 * rank). Returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for layer in range(cfg.layers):
        wanted = {cfg.stored_in(module)[0] for module in modules}  # the fused one, if it is in one
        for module in (name for name in cfg.modules_of(layer) if name in wanted):
            inputs, outputs = cfg.shape(module)
            block = "self_attn" if module in ATTENTION else "mlp"
            prefix = f"base_model.model.model.layers.{layer}.{block}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = _draw(rng, (rank, inputs), 1 / np.sqrt(inputs))
            size = EFFECT / np.sqrt(rank)
            tensors[f"{prefix}.lora_B.weight"] = _draw(rng, (outputs, rank), size)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": cfg.name,
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({name.split(".")[-3] for name in tensors}),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def write_random_adapters(
    root: str | Path,
    cfg: ModelConfig,
    ranks: Sequence[int],
    *,
    modules: Sequence[str] = PROJECTIONS,
    seed: int = 0,
) -> dict[str, Path]:
    """One adapter per rank, as `root/random-0`, `root/random-1` and so on; name -> folder."""

    def write(i: int) -> Path:
        folder = Path(root) / f"random-{i}"
        return write_random_adapter(folder, cfg, rank=ranks[i], modules=modules, seed=seed + i)

    with ThreadPoolExecutor() as workers:
        folders = workers.map(write, range(len(ranks)))
        return {f"random-{i}": folder for i, folder in enumerate(folders)}


def _draw(rng: np.random.Generator, shape: tuple[int, int], size: float) -> np.ndarray:
    """Random values of this standard deviation, one of 256 evenly spaced ones each: normal ones of an
    8B model's adapter would take a second to draw."""
    values = (np.arange(256) - 127.5) / np.sqrt((256**2 - 1) / 12) * size
    return values.astype(ml_dtypes.bfloat16)[rng.integers(0, 256, shape, dtype=np.uint8)]
