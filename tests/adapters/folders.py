"""Hand-made adapter folders, good and bad, for a tiny model. Written without peft and torch."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jlora.adapters.peft import read_adapter
from jlora.errors import AdapterError
from jlora.models.config import PROJECTIONS, ModelConfig
from tests import tiny

CFG = ModelConfig.from_dict(tiny.model_config("llama"))
PREFIX = "base_model.model.model."
DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}


def module(layer: int, projection: str) -> str:
    """Path of a projection below the decoder."""
    block = "mlp" if projection in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"layers.{layer}.{block}.{projection}"


def config(**changes: Any) -> dict[str, Any]:
    """adapter_config.json of a plain adapter on q_proj and v_proj, rank 4; None removes a key."""
    plain = {
        "peft_type": "LORA",
        "base_model_name_or_path": "tiny/llama",
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "v_proj"],
        **changes,
    }
    return {key: value for key, value in plain.items() if value is not None}


def tensors(
    targets: Iterable[str] = ("q_proj", "v_proj"),
    r: int = 4,
    *,
    layers: Iterable[int] = range(CFG.layers),
    prefix: str = PREFIX,
    middle: str = "",
    dtype: str = "float32",
    cfg: ModelConfig = CFG,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """A and B of every target in every layer; `middle` is ".default" in some files."""
    rng = np.random.default_rng(seed)
    made = {}
    for layer in layers:
        for projection in targets:
            width, out = cfg.shape(projection)
            for half, shape in (("A", (r, width)), ("B", (out, r))):
                key = f"{prefix}{module(layer, projection)}.lora_{half}{middle}.weight"
                made[key] = rng.standard_normal(shape).astype(DTYPES[dtype])
    return made


def write(folder: Path, facts: Any, arrays: dict[str, np.ndarray] | None) -> Path:
    """The two files of an adapter folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(
        facts if isinstance(facts, str) else json.dumps(facts)
    )
    if arrays is not None:
        save_file(arrays, folder / "adapter_model.safetensors")
    return folder


def good(folder: Path, **changes: Any) -> Path:
    """A folder that loads."""
    return write(folder, config(**changes), tensors())


def refused(folder: Path, reason: str) -> None:
    """The folder is an AdapterError that gives the reason, and the folder, in one line."""
    with pytest.raises(AdapterError) as error:
        read_adapter(folder, CFG)
    message = str(error.value)
    assert reason in message
    assert str(folder) in message
    assert "\n" not in message
    assert len(message) < 700


__all__ = [
    "CFG",
    "PREFIX",
    "PROJECTIONS",
    "config",
    "good",
    "module",
    "refused",
    "tensors",
    "write",
]
