"""Merging adapters into a Hugging Face checkpoint: float32 arithmetic, one tensor at a time.

The result is written beside the output and renamed when it is whole: nothing is overwritten, and
what is interrupted leaves nothing.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
from jaxtyping import Float
from safetensors.numpy import save_file

from jlora.adapters.adapter import Adapter, LoraWeights
from jlora.errors import AdapterError, ModelError, ParameterError
from jlora.models.checkpoint import INDEX, SINGLE, Checkpoint, Stored
from jlora.models.config import ModelConfig
from jlora.models.weights import sources as sources_of
from jlora.models.weights import tensor_name, tensor_shapes
from jlora.sharding import Layout

Combination = Literal["cat", "linear"]
"""As peft's `add_weighted_adapter` names them: cat is the weighted sum of the deltas; linear sums the
A's and the B's, each with the root of its weight, so that all adapters of a module must be of one rank."""

DTYPES = {
    "float32": (np.dtype(np.float32), "F32"),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), "BF16"),
    "float16": (np.dtype(np.float16), "F16"),
}
"""numpy's type and the safetensors name of each type that is written."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One projection's delta, `b @ a`, everything folded in."""

    a: Float[np.ndarray, "R K"]
    b: Float[np.ndarray, "N R"]


def combine(
    adapters: Sequence[Adapter], weights: Sequence[float], combination: Combination
) -> dict[tuple[int, str], Pair]:
    """The combined delta of each (layer, projection) that an adapter touches, in float32.

    Raises AdapterError where linear meets different ranks.
    """
    pairs: dict[tuple[int, str], Pair] = {}
    for key in sorted({key for adapter in adapters for key in adapter.weights}):
        here = [
            (adapter.weights[key], weight)
            for adapter, weight in zip(adapters, weights, strict=True)
            if key in adapter.weights
        ]
        ranks = {pair.rank for pair, _ in here}
        if combination == "linear" and len(ranks) > 1:
            raise AdapterError(
                f"combination-type linear needs adapters of one rank: layer {key[0]} {key[1]} has "
                f"ranks {sorted(ranks)}; cat takes any ranks"
            )
        pairs[key] = _linear(here) if combination == "linear" else _concatenated(here)
    return pairs


def _concatenated(here: list[tuple[LoraWeights, float]]) -> Pair:
    a = [pair.a.astype(np.float32) for pair, _ in here]
    b = [pair.b.astype(np.float32) * np.float32(weight * pair.scaling) for pair, weight in here]
    return Pair(a=np.concatenate(a), b=np.concatenate(b, axis=1))


def _linear(here: list[tuple[LoraWeights, float]]) -> Pair:
    # The sign goes to A alone: on both sides it would vanish.
    roots = [np.sqrt(np.float32(abs(weight * pair.scaling))) for pair, weight in here]
    signs = [np.float32(-1 if weight * pair.scaling < 0 else 1) for pair, weight in here]
    a = [p.a.astype(np.float32) * (r * s) for (p, _), r, s in zip(here, roots, signs, strict=True)]
    b = [p.b.astype(np.float32) * r for (p, _), r in zip(here, roots, strict=True)]
    return Pair(a=np.sum(a, axis=0), b=np.sum(b, axis=0))


def merge_checkpoint(
    model: Path,
    pairs: Mapping[tuple[int, str], Pair],
    output: Path,
    *,
    dtype: str = "auto",
    max_shard_bytes: int = 5 * 10**9,
    chat_template: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the checkpoint in `model` with `pairs` added to `output`, a folder that must not exist.

    Config, generation config, tokenizer and templates come along. Peak memory is one tensor in
    float32 and its delta. Raises ModelError for a broken base, an output that exists or a value
    that the type cannot hold. A tensor larger than a shard gets a file of its own.
    """
    if output.exists():
        raise ModelError(f"{output} exists: nothing is overwritten, name a new folder")
    cfg = ModelConfig.from_folder(model)
    checkpoint = Checkpoint.open(model)
    expected = tensor_shapes(cfg, sources_of(cfg, Layout(cfg, 1)))
    checkpoint.check(expected, tied=cfg.tied, multimodal=cfg.multimodal)
    deltas = {tensor_name(layer, name): pair for (layer, name), pair in pairs.items()}
    kinds = {name: _kind(stored, dtype) for name, stored in checkpoint.tensors.items()}
    shards = _shards(checkpoint.tensors, kinds, max_shard_bytes)
    total = sum(len(shard) for shard in shards)
    with _aside(output) as folder:
        done = 0
        for number, names in enumerate(shards, start=1):
            with (folder / _file(number, len(shards))).open("wb") as file:
                file.write(_header(names, checkpoint.tensors, kinds))
                for name in names:
                    file.write(_merged(checkpoint, name, kinds[name], deltas.get(name)).tobytes())
                    done += 1
                    if progress is not None:
                        progress(done, total)
        if len(shards) > 1:
            _write_index(folder, shards, checkpoint.tensors, kinds)
        _copy_files(model, folder, dtype, chat_template)


def write_adapter(folder: Path, pairs: Mapping[tuple[int, str], Pair], base: Path) -> int:
    """The combined delta as a PEFT adapter, ranks padded with zeros to the largest; gives that rank."""
    rank = max(pair.a.shape[0] for pair in pairs.values())
    tensors: dict[str, np.ndarray] = {}
    for (layer, projection), pair in pairs.items():
        module = "base_model.model." + tensor_name(layer, projection).removesuffix(".weight")
        missing = rank - pair.a.shape[0]
        tensors[f"{module}.lora_A.weight"] = np.pad(pair.a, ((0, missing), (0, 0)))
        tensors[f"{module}.lora_B.weight"] = np.pad(pair.b, ((0, 0), (0, missing)))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({projection for _, projection in pairs}),
        "layers_to_transform": sorted({layer for layer, _ in pairs}),
        "bias": "none",
    }
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return rank


def _kind(stored: Stored, dtype: str) -> tuple[np.dtype, str]:
    if dtype != "auto":
        return DTYPES[dtype]
    known = {name: kind for kind, name in DTYPES.values()}
    if stored.dtype in known:
        return known[stored.dtype], stored.dtype
    return DTYPES["float32"]  # float64


def _bytes(stored: Stored, kind: tuple[np.dtype, str]) -> int:
    return int(np.prod(stored.shape)) * kind[0].itemsize


def _shards(
    tensors: Mapping[str, Stored], kinds: Mapping[str, tuple[np.dtype, str]], most: int
) -> list[list[str]]:
    if most < 1:
        raise ParameterError("max-shard-size must be at least one byte", "max_shard_size")
    shards: list[list[str]] = [[]]
    room = most
    for name, stored in tensors.items():
        size = _bytes(stored, kinds[name])
        if shards[-1] and size > room:
            shards.append([])
            room = most
        shards[-1].append(name)
        room -= size
    return shards


def _file(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _header(
    names: Sequence[str],
    tensors: Mapping[str, Stored],
    kinds: Mapping[str, tuple[np.dtype, str]],
) -> bytes:
    """The start of a safetensors file (format: huggingface.co/docs/safetensors): data may follow
    tensor by tensor, which a library that takes all tensors at once would not allow."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        size = _bytes(tensors[name], kinds[name])
        header[tensors[name].name] = {
            "dtype": kinds[name][1],
            "shape": list(tensors[name].shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _merged(
    checkpoint: Checkpoint, name: str, kind: tuple[np.dtype, str], pair: Pair | None
) -> np.ndarray:
    shape = checkpoint.tensors[name].shape
    with checkpoint.reader(np.dtype(np.float32) if pair is not None else kind[0]) as read:
        weight = read(name, np.arange(shape[0]), None)
    if pair is None:
        return np.ascontiguousarray(weight)
    merged = weight + pair.b @ pair.a
    with np.errstate(over="ignore"):
        cast = merged.astype(kind[0])
    if not np.isfinite(cast).all():
        raise ModelError(
            f"{name}: merged values up to {float(np.abs(merged).max()):.3g} do not fit "
            f"{kind[0].name}; use --dtype bfloat16 or float32"
        )
    return cast


def _write_index(
    folder: Path,
    shards: Sequence[Sequence[str]],
    tensors: Mapping[str, Stored],
    kinds: Mapping[str, tuple[np.dtype, str]],
) -> None:
    index = {
        "metadata": {"total_size": sum(_bytes(s, kinds[n]) for n, s in tensors.items())},
        "weight_map": {
            tensors[name].name: _file(number, len(shards))
            for number, names in enumerate(shards, start=1)
            for name in names
        },
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2))


def _copy_files(model: Path, folder: Path, dtype: str, chat_template: str | None) -> None:
    """Everything of the base's folder that is no weight, its type in config.json renewed."""
    for file in sorted(model.iterdir()):
        if file.is_file() and file.suffix not in _WEIGHTS and file.name != INDEX:
            shutil.copyfile(file, folder / file.name)
    if dtype != "auto":
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config.pop("dtype", None)  # transformers 5 writes it, 4 reads only the older key
        config["torch_dtype"] = dtype
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


@contextmanager
def _aside(output: Path) -> Iterator[Path]:
    """A folder beside `output` that becomes it at the end, or is gone."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = output.parent / f".{output.name}.partial-{os.getpid()}"
        folder.mkdir()
    except OSError as error:
        raise ModelError(f"{output} cannot be written: {error}") from None
    try:
        yield folder
        folder.rename(output)
    except OSError as error:
        raise ModelError(f"{output} cannot be written: {error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
