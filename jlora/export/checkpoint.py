"""A merged checkpoint: float32 arithmetic, a block of a tensor's rows at a time.

Peak memory is one block and the low-rank pair of one tensor. Tensors without a change are copied.
A tied base is untied where the embedding or the head alone changes.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jlora.cast import narrowed
from jlora.errors import ModelError, ParameterError
from jlora.export.changes import EMBED, HEAD, Change, Changes
from jlora.export.folder import DTYPES, Entry, write_json, write_tensors, written_aside
from jlora.export.tokenizer import copy_tokenizer, set_template
from jlora.models.checkpoint import FLOATS, INDEX, SINGLE, Checkpoint
from jlora.models.config import ModelConfig
from jlora.models.weights import sources as sources_of
from jlora.models.weights import tensor_shapes
from jlora.sharding import Layout

Progress = Callable[[int, int], None]
"""Called with (tensors done, tensors in all)."""

BLOCK = 1 << 24
"""Values of a tensor that are in memory at a time: 64 MiB in float32."""

_WEIGHTS = re.compile(
    r".*(\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx|onnx_data)|\.index\.json)"
)
_LEFT_OUT = ("adapter_config.json",)
"""transformers takes a folder with this file for an adapter."""
_FOLDERS = ("additional_chat_templates",)


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """One tensor of the result."""

    entry: Entry
    source: str
    """The base's tensor that it is made of."""
    make: Callable[[], Change] | None


def open_base(model: Path) -> tuple[ModelConfig, Checkpoint]:
    """Config and tensors of a base, checked against each other. ModelError, for a quantised one too."""
    check_not_quantised(model)
    cfg = ModelConfig.from_folder(model)
    checkpoint = Checkpoint.open(model)
    checkpoint.check(expected_shapes(cfg), tied=cfg.tied, multimodal=cfg.multimodal)
    return cfg, checkpoint


def expected_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor that a checkpoint of `cfg` holds."""
    return tensor_shapes(cfg, sources_of(cfg, Layout(cfg, 1)))


def check_not_quantised(model: Path) -> None:
    """ModelError that says what to do instead: a merge into 4-bit weights would be rounded away."""
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # ModelConfig says what is wrong
    found = isinstance(config, dict) and (
        config.get("quantization_config") or config.get("compression_config")
    )
    if found:
        method = found.get("quant_method") if isinstance(found, dict) else None
        raise ModelError(
            f"{model} is quantised (quant_method {method or '(not named)'!r}): a merge would be lost in "
            "its rounding; merge into the float16 or bfloat16 checkpoint that it was made from and "
            "quantise the result, or serve the adapter unmerged"
        )


def merge_checkpoint(
    model: Path,
    changes: Changes,
    output: Path,
    *,
    dtype: str = "auto",
    max_shard_bytes: int = 5 * 10**9,
    chat_template: str | None = None,
    tokenizer: Path | None = None,
    added_tokens: int = 0,
    progress: Progress | None = None,
) -> None:
    """Writes the checkpoint in `model` with `changes` to `output`, a folder that must not exist.

    Config, generation config, tokenizer (that of the folder `tokenizer`) and templates come along.
    `added_tokens`: rows that the changes append to the embedding and the head. Raises ModelError for a broken
    base, a change of a tensor that is not there or a value that the type cannot hold. A tensor
    larger than a shard gets a file of its own.
    """
    cfg, checkpoint = open_base(model)
    untied = cfg.tied and not changes.keys().isdisjoint((EMBED, HEAD))
    vocab = cfg.vocab + added_tokens
    planned = _plan(checkpoint, changes, dtype, untied, vocab)
    shards = _shards(planned, max_shard_bytes)
    total, done = len(planned), 0

    def data(shard: Sequence[_Planned]) -> Iterator[Iterator[np.ndarray]]:
        nonlocal done
        for plan in shard:
            yield _merged(checkpoint, plan)
            done += 1
            if progress is not None:
                progress(done, total)

    with written_aside(output, sum(plan.entry.nbytes for plan in planned)) as folder:
        for number, shard in enumerate(shards, start=1):
            path = folder / _file(number, len(shards))
            write_tensors(path, [plan.entry for plan in shard], data(shard))
        if len(shards) > 1:
            _write_index(folder, shards)
        _copy_files(model, folder, dtype, untied, vocab if added_tokens else None)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, folder)
        if chat_template is not None:
            set_template(folder, chat_template)


def _plan(
    checkpoint: Checkpoint, changes: Changes, dtype: str, untied: bool, vocab: int
) -> list[_Planned]:
    names = [name for name in checkpoint.tensors if not (untied and name == HEAD)]
    plan = {name: name for name in names} | ({HEAD: EMBED} if untied else {})
    if missing := sorted(changes.keys() - plan.keys()):
        raise ModelError(
            f"{checkpoint.folder} has no {', '.join(missing[:5])}, which the adapter changes: a merged "
            "checkpoint of this architecture has no place for it; serve the adapter unmerged"
        )
    return [
        _Planned(
            entry=Entry(
                name=_stored_name(checkpoint, name),
                shape=(vocab, *checkpoint.tensors[source].shape[1:])
                if name in (EMBED, HEAD)
                else checkpoint.tensors[source].shape,
                dtype=_dtype(checkpoint.tensors[source].dtype, dtype),
            ),
            source=source,
            make=changes.get(name),
        )
        for name, source in plan.items()
    ]


def _stored_name(checkpoint: Checkpoint, name: str) -> str:
    """The tensor's name in a file: that of the base's, for a new head that which fits the embedding's."""
    if name in checkpoint.tensors:
        return checkpoint.tensors[name].name
    embed = checkpoint.tensors[EMBED].name
    return f"language_model.{name}" if embed.startswith("language_model.") else name


def _dtype(stored: str, wanted: str) -> str:
    if stored not in FLOATS:
        raise ModelError(f"a tensor of the base is of type {stored}, expected {', '.join(FLOATS)}")
    if wanted != "auto":
        return wanted
    known = {name: dtype for dtype, (_, name) in DTYPES.items()}
    return known.get(stored, "float32")  # float64


def _shards(planned: Sequence[_Planned], most: int) -> list[list[_Planned]]:
    if most < 1:
        raise ParameterError("max-shard-size must be at least one byte", "max_shard_size")
    shards: list[list[_Planned]] = [[]]
    room = most
    for plan in planned:
        if shards[-1] and plan.entry.nbytes > room:
            shards.append([])
            room = most
        shards[-1].append(plan)
        room -= plan.entry.nbytes
    return shards


def _file(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def blocks(shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Row numbers of a tensor, at most BLOCK values at a time."""
    step = max(1, BLOCK // max(1, int(np.prod(shape[1:]))))
    for start in range(0, shape[0], step):
        yield np.arange(start, min(start + step, shape[0]))


def _merged(checkpoint: Checkpoint, plan: _Planned) -> Iterator[np.ndarray]:
    """The tensor's rows in blocks, of its type."""
    kind = DTYPES[plan.entry.dtype][0]
    change = plan.make() if plan.make is not None else None
    read_as = kind if change is None else np.dtype(np.float32)
    for rows in blocks(plan.entry.shape):
        with checkpoint.reader(read_as) as read:  # anew: what was read is unmapped
            old = np.where(rows < checkpoint.tensors[plan.source].shape[0], rows, -1)
            yield _block(read(plan.source, old, None), plan, int(rows[0]), change, kind)


def _block(
    weight: np.ndarray, plan: _Planned, start: int, change: Change | None, kind: np.dtype
) -> np.ndarray:
    if change is None:
        return weight
    return narrowed(change.rows(weight, start), kind, f"{plan.entry.name}, merged", ModelError)


def _write_index(folder: Path, shards: Sequence[Sequence[_Planned]]) -> None:
    weight_map = {
        plan.entry.name: _file(number, len(shards))
        for number, shard in enumerate(shards, start=1)
        for plan in shard
    }
    size = sum(plan.entry.nbytes for shard in shards for plan in shard)
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _copy_files(model: Path, folder: Path, dtype: str, untied: bool, vocab: int | None) -> None:
    """Everything of the base's folder that is no weight; type, tying and a new vocabulary in config.json."""
    for file in sorted(model.iterdir()):
        if file.is_dir() and file.name in _FOLDERS:
            shutil.copytree(file, folder / file.name, copy_function=shutil.copyfile)
        elif file.is_file() and not _WEIGHTS.fullmatch(file.name) and file.name not in _LEFT_OUT:
            shutil.copyfile(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    changed = dict(config)
    if dtype != "auto":
        changed.pop("dtype", None)  # transformers 5 writes it, 4 reads only the older key
        changed["torch_dtype"] = dtype
    news: dict[str, object] = {"tie_word_embeddings": False} if untied else {}
    news |= {"vocab_size": vocab} if vocab is not None else {}
    changed |= news
    if news and isinstance(text := changed.get("text_config"), dict):
        changed["text_config"] = text | news
    if changed != config:
        write_json(folder / "config.json", changed)
