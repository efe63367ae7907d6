"""`python -m jlora.merge`: adapters merged for good, joined to one adapter, or taken from a tuned model."""

import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jlora.adapters.adapter import (
    LEVELS,
    Adapter,
    Level,
    level_of,
    shown_module,
    support_of,
    widened,
)
from jlora.adapters.peft import read_adapter
from jlora.cli import fail, parse
from jlora.console import ProgressBars, setup_logging
from jlora.errors import AdapterError, JloraError
from jlora.export.adapter import write_adapter
from jlora.export.changes import Changes, changes
from jlora.export.checkpoint import merge_checkpoint, open_base
from jlora.export.combine import Place, Recipe, combine
from jlora.export.extract import Extracted, extract
from jlora.export.folder import check_output
from jlora.export.options import MergeOptions
from jlora.export.svd import Pair
from jlora.export.tokenizer import adds_tokens, tuned_template
from jlora.export.verify import compare
from jlora.models.base import BaseWeights
from jlora.models.config import MODULES, ExpertsConfig
from jlora.options import parse_bytes

PROG = "jlora.merge"
DEFAULT_RANK = 32
"""Of --extract."""


@dataclass(frozen=True, kw_only=True)
class Joined:
    """The adapters, read, and what comes along."""

    adapters: list[Adapter]
    weights: tuple[float, ...]
    recipe: Recipe
    changes: Changes
    chat_template: str | None
    """That of the adapters, where they bring one and do not disagree."""
    tokenizer: Path | None
    """The folder of the one adapter that added tokens."""
    base: str
    """The base's name for an adapter_config.json."""
    added_tokens: int
    """Rows that the result has beyond the base's vocabulary."""
    experts: ExpertsConfig | None
    """The base's."""

    @property
    def pairs(self) -> dict[Place, Callable[[], Pair]]:
        """The delta as one plain adapter. AdapterError where it is none."""
        for adapter in self.adapters:
            if adapter.added_tokens:
                raise AdapterError(
                    f"{adapter.path} adds {adapter.added_tokens} tokens: it cannot be joined to a plain "
                    "adapter; --output merges it"
                )
            if adapter.vectors:
                raise AdapterError(
                    f"{adapter.path} has DoRA, biases or norms: it cannot be joined to a plain adapter; "
                    "--output merges it"
                )
        return combine(self.adapters, self.weights, self.recipe)

    @property
    def support(self) -> Level:
        """What an engine must support for all of them."""
        return level_of(LEVELS["plain"].union(*(adapter.support for adapter in self.adapters)))


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(MergeOptions, argv, prog=PROG)
    setup_logging("warning")
    try:
        with _stopped_cleanly():
            if options.extract:
                run_extract(options)
            else:
                run_merge(options)
    except JloraError as error:
        fail(PROG, error)
    except KeyboardInterrupt:
        return 130
    return 0


def run_merge(options: MergeOptions) -> None:
    """--model and --adapters: writes what was asked for and says so."""
    joined = join(options)
    with ProgressBars() as progress:
        merge(options, joined, progress)
    if options.output:
        print(f"merged: {options.output}")
    if options.output_adapter:
        print(f"adapter: {options.output_adapter}")
    if options.verify:
        difference, effect = verify(options, joined)
        print(
            f"verified: log-probabilities differ from the unmerged adapter's by "
            f"{difference:.2g} at most; the adapter moves them by up to {effect:.2g}"
        )


def join(options: MergeOptions) -> Joined:
    """Reads the adapters; what cannot be merged is refused here, before anything is written."""
    folder = Path(options.model)
    cfg, _ = open_base(folder)
    adapters = [read_adapter(path, cfg, BaseWeights(folder, cfg)) for path in options.adapters]
    for adapter in adapters:
        if adapter.base_model and _last(adapter.base_model) != _last(cfg.name):
            note(f"{adapter.path} says it was trained on {adapter.base_model}, not on {cfg.name}")
    bases = {adapter.base_model for adapter in adapters}
    named = bases.pop() if len(bases) == 1 else None
    weights = options.weights or (1.0,) * len(adapters)
    own = [
        path
        for path, adapter in zip(map(Path, options.adapters), adapters, strict=True)
        if adds_tokens(path, folder, cfg.vocab + adapter.added_tokens) or adapter.added_tokens
    ]
    if len(own) > 1:
        raise AdapterError(
            f"{own[0]} and {own[1]} add tokens of their own: one checkpoint has one tokenizer"
        )
    added = max(adapter.added_tokens for adapter in adapters)
    if added:
        adapters = [widened(adapter, cfg.vocab + added) for adapter in adapters]
    return Joined(
        adapters=adapters,
        weights=weights,
        recipe=options.recipe,
        changes=changes(adapters, weights, options.recipe),
        chat_template=_template(adapters),
        tokenizer=own[0] if own else None,
        base=named or options.model,
        added_tokens=added,
        experts=cfg.experts,
    )


def _template(adapters: Sequence[Adapter]) -> str | None:
    found = {adapter.chat_template for adapter in adapters if adapter.chat_template is not None}
    if len(found) > 1:
        note("the adapters bring different chat templates: the base's is kept")
        return None
    return found.pop() if found else None


def _last(name: str) -> str:
    return Path(name).name.lower()


def note(text: str) -> None:
    """A warning on stderr."""
    print(f"{PROG}: note: {text}", file=sys.stderr)


def merge(options: MergeOptions, joined: Joined, progress: ProgressBars) -> None:
    """Writes the merged checkpoint and the joined adapter. JloraError with one line for the user."""
    size = parse_bytes(options.max_shard_size, "max_shard_size")
    assert size is not None
    for output in (options.output, options.output_adapter):
        if output:
            check_output(Path(output))
    if options.output_adapter:
        write_adapter(
            Path(options.output_adapter),
            joined.pairs,
            joined.base,
            dtype=options.dtype,
            chat_template=joined.chat_template,
            experts=joined.experts,
            progress=lambda done, total: progress("joining modules", done, total),
        )
    if options.output:
        merge_checkpoint(
            Path(options.model),
            joined.changes,
            Path(options.output),
            dtype=options.dtype,
            max_shard_bytes=size,
            chat_template=joined.chat_template,
            tokenizer=joined.tokenizer,
            added_tokens=joined.added_tokens,
            progress=lambda done, total: progress("merging tensors", done, total),
        )


def run_extract(options: MergeOptions) -> None:
    """--extract: writes the adapter, prints its errors, warns of what it cannot hold."""
    base, tuned = options.extract
    output = Path(options.output)
    check_output(output)
    rank = DEFAULT_RANK if options.rank is None else options.rank
    with ProgressBars() as progress:
        found = extract(
            Path(base),
            Path(tuned),
            rank,
            dtype=options.dtype,
            progress=lambda done, total: progress("comparing tensors", done, total),
        )
        write_adapter(
            output,
            {place: _ready(pair) for place, pair in found.pairs.items()},
            base,
            dtype=options.dtype,
            chat_template=tuned_template(Path(base), Path(tuned)),
            experts=found.cfg.experts,
        )
    report(found)
    print(f"adapter: {output} (rank {max(pair.rank for pair in found.pairs.values())})")
    if options.verify:
        difference, effect = compare(
            base, str(output), tuned, rank, level_of(support_of(found.pairs, ()))
        )
        print(
            f"verified: with the adapter, log-probabilities differ from the tuned model's by "
            f"{difference:.2g} at most; the adapter moves the base's by up to {effect:.2g}"
        )


def _ready(pair: Pair) -> Callable[[], Pair]:
    return lambda: pair


def report(found: Extracted) -> None:
    """The relative error of each module, layers down and projections across; then the warnings."""
    errors: dict[tuple[int, str], float] = {}
    for (layer, module), error in found.errors.items():  # of experts the largest
        shown_place = layer, shown_module(module)
        errors[shown_place] = max(error, errors.get(shown_place, 0.0))
    names = sorted({name for _, name in errors}, key=lambda name: (_order(name), name))
    table = Table("layer", *names, title="relative error of each module's difference")
    for layer in sorted({layer for layer, _ in errors}):
        shown = (errors.get((layer, name)) for name in names)
        table.add_row(str(layer), *("-" if e is None else f"{e:.2%}" for e in shown))
    Console().print(table)
    if found.others:
        most = sorted(found.others.items(), key=lambda item: -item[1])
        listed = ", ".join(f"{name} ({share:.2%} of its norm)" for name, share in most[:10])
        more = f" and {len(most) - 10} more" if len(most) > 10 else ""
        note(f"{len(most)} tensors differ that LoRA cannot hold, and are left out: {listed}{more}")
    if found.settings:
        note(f"config.json differs in {', '.join(found.settings)}: no adapter can hold that")


def _order(name: str) -> int:
    return MODULES.index(name) if name in MODULES else len(MODULES)


def verify(options: MergeOptions, joined: Joined | None = None) -> tuple[float, float]:
    """(largest difference between merged and unmerged log-probabilities of a random prompt, largest
    difference between unmerged and base)."""
    joined = joined or join(options)
    if len(joined.adapters) == 1 and joined.recipe == Recipe() and joined.weights == (1.0,):
        (alone,) = joined.adapters
        extra = joined.added_tokens
        return compare(options.model, alone.path, options.output, alone.rank, joined.support, extra)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter"
        rank = write_adapter(path, joined.pairs, joined.base, experts=joined.experts)
        return compare(options.model, str(path), options.output, rank, joined.support)


@contextmanager
def _stopped_cleanly() -> Iterator[None]:
    """SIGTERM ends the work as Ctrl-C does: what is half made is removed."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
