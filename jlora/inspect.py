"""`python -m jlora.inspect ADAPTER --model BASE`: what an adapter is, and how much it changes."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from jlora.adapters.adapter import Adapter, LoraWeights
from jlora.adapters.lora_config import read_config
from jlora.adapters.peft import read_adapter
from jlora.cli import fail, parse
from jlora.console import setup_logging, size
from jlora.errors import JloraError, ParameterError
from jlora.models.checkpoint import Checkpoint
from jlora.models.config import MODULES, ModelConfig
from jlora.models.weights import tensor_name

PROG = "jlora.inspect"


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """One adapter."""

    adapter: str = field(default="", metadata={"positional": True})
    """Folder of a PEFT adapter."""

    model: str | None = None
    """Folder of the base checkpoint. Default: the one that adapter_config.json names, if it is here."""

    json: bool = False
    """Print one JSON document, with the norms of each layer."""

    def __post_init__(self) -> None:
        if not self.adapter:
            raise ParameterError(
                "an adapter is needed: python -m jlora.inspect ADAPTER --model BASE", "adapter"
            )


@dataclass(frozen=True, kw_only=True)
class Projection:
    """One projection of all layers."""

    name: str
    layers: int
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    parameters: int
    norms: tuple[float, ...]
    """Frobenius norm of scaling · B A, by layer in ascending order."""
    shares: tuple[float, ...]
    """The same as a share of the base weight's norm."""


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(InspectOptions, argv, prog=PROG)
    setup_logging("warning")
    try:
        model = base_folder(options)
        adapter = read_adapter(options.adapter, ModelConfig.from_folder(model))
        rows = describe(adapter, Checkpoint.open(model))
    except JloraError as error:
        fail(PROG, error)
    except KeyboardInterrupt:
        return 130
    facts = {
        "adapter": options.adapter,
        "model": str(model),
        "base_model_name_or_path": adapter.base_model,
        "rank": adapter.rank,
        "parameters": sum(row.parameters for row in rows),
        "bytes": adapter.nbytes,
        "chat_template": adapter.chat_template is not None,
        "uid": adapter.uid,
    }
    if options.json:
        print(json.dumps(facts | {"projections": [asdict(row) for row in rows]}))
        return 0
    console = Console()
    console.print(table(rows))
    console.print(
        f"{adapter.path}: {len(adapter.weights)} modules bound, {facts['parameters']:,} parameters, "
        f"{size(adapter.nbytes)}; base {adapter.base_model or 'not named'}"
        + ("; brings a chat template" if adapter.chat_template else ""),
        soft_wrap=True,
    )
    return 0


def base_folder(options: InspectOptions) -> Path:
    """The base checkpoint's folder. ParameterError where there is none to be had."""
    named = options.model or read_config(Path(options.adapter)).base_model
    if named is None or not Path(named).is_dir():
        raise ParameterError(
            f"the base model {named or '(not named)'} is no folder here; give --model BASE", "model"
        )
    return Path(named)


def describe(adapter: Adapter, base: Checkpoint) -> list[Projection]:
    """One entry for each projection that the adapter touches, in the model's order."""
    rows = []
    for name in MODULES:
        layers = sorted(layer for layer, projection in adapter.weights if projection == name)
        if not layers:
            continue
        pairs = [adapter.weights[layer, name] for layer in layers]
        norms = [delta_norm(pair) for pair in pairs]
        bases = [_base_norm(base, tensor_name(layer, name)) for layer in layers]
        rows.append(
            Projection(
                name=name,
                layers=len(layers),
                ranks=tuple(sorted({pair.rank for pair in pairs})),
                scalings=tuple(sorted({pair.scaling for pair in pairs})),
                parameters=sum(pair.a.size + pair.b.size for pair in pairs),
                norms=tuple(norms),
                shares=tuple(n / b if b else 0.0 for n, b in zip(norms, bases, strict=True)),
            )
        )
    return rows


def delta_norm(pair: LoraWeights) -> float:
    """Frobenius norm of scaling · B A, from two rank x rank products: B A is never made."""
    a, b = pair.a.astype(np.float64), pair.b.astype(np.float64)
    square = float(np.sum((a @ a.T) * (b.T @ b)))
    return abs(pair.scaling) * max(square, 0.0) ** 0.5


def _base_norm(base: Checkpoint, tensor: str) -> float:
    with base.reader(np.dtype(np.float32)) as read:
        return float(np.linalg.norm(read(tensor, np.arange(base.tensors[tensor].shape[0]), None)))


def table(rows: Sequence[Projection]) -> Table:
    """What `main` prints."""
    shown = Table(
        "projection", "layers", "rank", "scaling", "parameters", "share of |W|: median", "most"
    )
    for row in rows:
        shown.add_row(
            row.name,
            str(row.layers),
            ", ".join(map(str, row.ranks)),
            ", ".join(f"{scaling:.4g}" for scaling in row.scalings),
            f"{row.parameters:,}",
            f"{float(np.median(row.shares)):.2%}",
            f"{max(row.shares):.2%}",
        )
    return shown


if __name__ == "__main__":
    sys.exit(main())
