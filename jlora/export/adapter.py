"""A PEFT adapter folder, as peft, jlora, vLLM and SGLang load it: one rank, scaling 1, plain LoRA."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from jlora.adapters.adapter import NO_LAYER
from jlora.cast import narrowed
from jlora.errors import AdapterError
from jlora.export.changes import name_of
from jlora.export.combine import Place
from jlora.export.folder import DTYPES, Entry, write_json, write_tensors, written_aside
from jlora.export.svd import Pair
from jlora.models.config import EXPERT_PARTS, ExpertsConfig

EMBEDDING = "embed_tokens"
Progress = Callable[[int, int], None]


def write_adapter(
    output: Path,
    pairs: Mapping[Place, Callable[[], Pair]],
    base: str,
    *,
    dtype: str = "auto",
    chat_template: str | None = None,
    experts: ExpertsConfig | None = None,
    progress: Progress | None = None,
) -> int:
    """Writes the delta to `output`, a folder that must not exist; gives its rank.

    Ranks are padded with zeros to the largest and lora_alpha equals it: tools that read neither
    rank_pattern nor alpha_pattern nor use_rslora get it right. Only an embedding or head of a
    larger rank (one that was replaced) has patterns. `dtype` auto is float32. All pairs are in
    memory. Of `experts`, all or none of a layer have pairs, zeros where nothing changed: peft
    takes no others.
    """
    made: dict[Place, Pair] = {}
    for done, (place, make) in enumerate(sorted(pairs.items()), start=1):
        made[place] = make()
        if progress is not None:
            progress(done, len(pairs))
    if experts is not None:
        made |= dict(_other_experts(made, experts))
    in_layers = [pair.rank for (layer, _), pair in made.items() if layer != NO_LAYER]
    rank = max(in_layers or [pair.rank for pair in made.values()])
    dtype = "float32" if dtype == "auto" else dtype
    tensors: dict[str, np.ndarray] = {}
    for place, pair in made.items():
        missing = max(rank - pair.rank, 0)
        for half, values in (
            ("A", np.pad(pair.a, ((0, missing), (0, 0)))),
            ("B", np.pad(pair.b, ((0, 0), (0, missing)))),
        ):
            name = f"lora_embedding_{half}" if place[1] == EMBEDDING else f"lora_{half}.weight"
            tensors[f"base_model.model.{_module(place)}.{name}"] = values
    _check_fits(tensors, dtype)
    entries = [
        Entry(name=name, shape=tensor.shape, dtype=dtype) for name, tensor in tensors.items()
    ]
    with written_aside(output, sum(entry.nbytes for entry in entries)) as folder:
        write_json(folder / "adapter_config.json", _config(made, rank, base))
        data = ([tensor] for tensor in tensors.values())
        write_tensors(folder / "adapter_model.safetensors", entries, data)
        if chat_template is not None:
            (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    return max(pair.rank for pair in made.values())


def _other_experts(
    made: Mapping[Place, Pair], experts: ExpertsConfig
) -> Iterator[tuple[Place, Pair]]:
    """Zeros for the linears of experts that are not there, in layers where some are."""
    known: dict[int, Pair] = {}
    for (layer, module), pair in made.items():
        if f"{experts.module}.experts." in module:
            down = experts.part_of(module)[1] == EXPERT_PARTS[2]
            known[layer] = Pair(a=pair.b.T, b=pair.a.T) if down else pair
    for layer, pair in known.items():
        a, b = np.zeros((1, pair.a.shape[1]), np.float32), np.zeros((len(pair.b), 1), np.float32)
        up, down = Pair(a=a, b=b), Pair(a=b.T, b=a.T)
        for module in experts.modules():
            if module != experts.router and (layer, module) not in made:
                yield (layer, module), down if experts.part_of(module)[1] == EXPERT_PARTS[2] else up


def _module(place: Place) -> str:
    return name_of(place).removesuffix(".weight")


def _check_fits(tensors: Mapping[str, np.ndarray], dtype: str) -> None:
    for name, tensor in tensors.items():
        narrowed(tensor, DTYPES[dtype][0], name, AdapterError)


def _config(made: Mapping[Place, Pair], rank: int, base: str) -> dict[str, object]:
    layers = sorted({layer for layer, _ in made})
    projections = sorted({projection for _, projection in made})
    # Both lists together mean every projection in every layer: else each module is named in full.
    full = len(made) == len(layers) * len(projections) and NO_LAYER not in layers
    larger = {_module(place): pair.rank for place, pair in made.items() if pair.rank > rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": larger,
        "alpha_pattern": larger,
        "lora_dropout": 0.0,
        "target_modules": projections if full else sorted(map(_module, made)),
        "layers_to_transform": layers if full else None,
        "bias": "none",
        "use_rslora": False,
        "inference_mode": True,
    }
