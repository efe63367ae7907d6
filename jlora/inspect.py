"""`python -m jlora.inspect ADAPTER [--model BASE]`: what an adapter is, how much it changes, who loads it."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jlora.adapters.adapter import Adapter
from jlora.adapters.lora_config import CONFIG_FILE, MAX_CONFIG, check_config
from jlora.adapters.peft import open_weights, read_adapter
from jlora.adapters.tensors import TensorInfo, parse_json, read_small
from jlora.cli import fail, parse
from jlora.console import setup_logging, size
from jlora.errors import AdapterError, AdapterNotFound, JloraError, ParameterError
from jlora.inspection.norms import Projection, describe, unbound
from jlora.inspection.peers import Facts, Verdict, elsewhere
from jlora.inspection.plot import check_plot, plot_norms
from jlora.models.base import BaseWeights
from jlora.models.config import ModelConfig

PROG = "jlora.inspect"


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """One adapter."""

    adapter: str = field(default="", metadata={"positional": True})
    """Folder of a PEFT adapter."""

    model: str | None = None
    """Folder of the base checkpoint. Default: the one that adapter_config.json names, if it is here;
    else the adapter is not checked against a base."""

    plot: str | None = None
    """Picture to write: norm of the change by layer and projection (.png, .svg or .pdf)."""

    json: bool = False
    """Print one JSON document, with the norms of each layer."""

    def __post_init__(self) -> None:
        if not self.adapter:
            raise ParameterError(
                "an adapter is needed: python -m jlora.inspect ADAPTER --model BASE", "adapter"
            )


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that is told."""

    adapter: str
    model: str | None
    """The base that it was checked against."""
    base_model_name_or_path: str | None
    rank: int
    parameters: int
    """Of all tensors in the file."""
    bytes: int
    """Of all tensors in the file."""
    dtypes: tuple[str, ...]
    chat_template: bool | None
    added_tokens: int
    """Tokens beyond the base's vocabulary."""
    uid: str | None
    """Identity of its content; None: not read against a base."""
    refused: str | None
    """Why jlora refuses it."""
    elsewhere: tuple[Verdict, ...]
    """What other systems do with it that differs from what was trained."""
    projections: tuple[Projection, ...]


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(InspectOptions, argv, prog=PROG)
    setup_logging("warning")
    try:
        if options.plot is not None:
            check_plot(Path(options.plot))
        report = inspect(options)
        if options.json:
            print(json.dumps(asdict(report)))
        else:
            show(report)
        if options.plot is not None:
            plot_norms(report.projections, Path(options.plot), options.adapter)
    except JloraError as error:
        fail(PROG, error)
    except KeyboardInterrupt:
        return 130
    if report.refused is not None:
        fail(PROG, AdapterError(report.refused))
    return 0


def inspect(options: InspectOptions) -> Report:
    """Reads the folder. AdapterError only where there is nothing to tell."""
    if options.model is not None and not Path(options.model).is_dir():
        raise ParameterError(f"the base model {options.model} is no folder here", "model")
    folder = Path(options.adapter)
    config, header = _raw(folder)
    named = config.get("base_model_name_or_path")
    named = named if isinstance(named, str) and named else None
    model = options.model or (named if named and Path(named).is_dir() else None)
    cfg = ModelConfig.from_folder(model) if model else None
    adapter, refused = _judged(folder, config, cfg, model)
    facts = Facts(
        config=config,
        names=tuple(header),
        rank=max((info.shape[0] for name, info in header.items() if _is_a(name, info)), default=0),
    )
    if cfg is not None:
        facts = replace(facts, tied=cfg.tied, vocab=cfg.vocab)
    if adapter is not None:
        facts = replace(facts, rank=adapter.rank)
    return Report(
        adapter=options.adapter,
        model=model,
        base_model_name_or_path=named,
        rank=adapter.rank if adapter else facts.rank,
        parameters=sum(int(np.prod(info.shape)) for info in header.values()),
        bytes=sum(info.nbytes for info in header.values()),
        dtypes=tuple(sorted({info.dtype for info in header.values()})),
        chat_template=adapter.chat_template is not None if adapter else None,
        added_tokens=adapter.added_tokens if adapter else 0,
        uid=adapter.uid if adapter else None,
        refused=refused,
        elsewhere=tuple(elsewhere(facts)),
        projections=tuple(_rows(folder, config, adapter, cfg, model)),
    )


def _raw(folder: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Config and header as they are, not judged."""
    if not (folder / CONFIG_FILE).is_file():
        raise AdapterNotFound(f"No adapter found for {folder}: no {CONFIG_FILE}")
    path = folder / CONFIG_FILE
    config = parse_json(read_small(path, MAX_CONFIG), str(path))
    if not isinstance(config, dict):
        raise AdapterError(f"{path} holds {type(config).__name__}, expected an object")
    try:
        with open_weights(folder) as (_, _, header):
            return config, header
    except AdapterError:
        return config, {}  # the reader says why


def _is_a(name: str, info: TensorInfo) -> bool:
    """A of one pair: the rows of a stack of experts are more than a rank."""
    stacked = ".experts.lora_A" in name or ".experts.base_layer.lora_A" in name
    first = ".lora_A" in name or ".lora_embedding_A" in name
    return first and not stacked and len(info.shape) == 2


def _judged(
    folder: Path, config: dict[str, Any], cfg: ModelConfig | None, model: str | None
) -> tuple[Adapter | None, str | None]:
    """The adapter, or why it is refused; neither where there is no base to look at."""
    try:
        if cfg is None or model is None:
            check_config(config, str(folder / CONFIG_FILE))
            with open_weights(folder):
                return None, None
        return read_adapter(folder, cfg, BaseWeights(Path(model), cfg)), None
    except AdapterError as error:
        return None, str(error)


def _rows(
    folder: Path,
    config: dict[str, Any],
    adapter: Adapter | None,
    cfg: ModelConfig | None,
    model: str | None,
) -> list[Projection]:
    if adapter is not None and cfg is not None and model is not None:
        return describe(adapter, BaseWeights(Path(model), cfg))
    try:
        return unbound(folder, check_config(config, str(folder / CONFIG_FILE)))
    except AdapterError:
        return []  # refused, for a reason that is told; its numbers would mean nothing


def show(report: Report) -> None:
    """Tables and one line, on stdout."""
    console = Console()
    if report.projections:
        console.print(norms_table(report.projections))
    facts = [
        f"{sum(row.modules for row in report.projections)} modules bound"
        if report.uid
        else "not bound to a base",
        f"{report.parameters:,} parameters ({', '.join(report.dtypes)})",
        f"{size(report.bytes)}; base {report.base_model_name_or_path or 'not named'}",
    ]
    template = "; brings a chat template" if report.chat_template else ""
    template += f"; adds {report.added_tokens} tokens" if report.added_tokens else ""
    console.print(f"{report.adapter}: {', '.join(facts)}{template}", soft_wrap=True)
    if report.model is None:
        console.print("no base model here to check it against: give --model BASE", soft_wrap=True)
    if report.elsewhere:
        console.print(peers_table(report.elsewhere))
    else:
        console.print("nothing is known of other systems that would refuse it or get it wrong")


def norms_table(rows: Sequence[Projection]) -> Table:
    """How much each projection changes."""
    shown = Table(
        "projection", "layers", "rank", "scaling", "parameters", "share of |W|: median", "most"
    )
    for row in rows:
        extras = ", DoRA" * row.dora + f", {row.biases} biases" * bool(row.biases)
        shown.add_row(
            row.name + extras,
            str(row.layers),
            ", ".join(map(str, row.ranks)),
            ", ".join(f"{scaling:.4g}" for scaling in row.scalings),
            f"{row.parameters:,}",
            f"{float(np.median(row.shares)):.2%}" if row.shares else "-",
            f"{max(row.shares):.2%}" if row.shares else "-",
        )
    return shown


def peers_table(verdicts: Sequence[Verdict]) -> Table:
    """What other systems do with it."""
    shown = Table("system", "", "why", title="elsewhere")
    for verdict in verdicts:
        shown.add_row(verdict.system, verdict.outcome, verdict.reason)
    return shown


if __name__ == "__main__":
    sys.exit(main())
