"""A picture of how much an adapter changes each layer. matplotlib is optional (the extra `plot`)."""

import os
from collections.abc import Sequence
from pathlib import Path

from jlora.adapters.adapter import NO_LAYER
from jlora.errors import ParameterError
from jlora.inspection.norms import Projection

SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """ParameterError where no picture could be written to `path`: told before the work."""
    if path.suffix.lower() not in SUFFIXES:
        raise ParameterError(
            f"--plot takes a file that ends in {', '.join(SUFFIXES)}, got {path}", "plot"
        )
    if os.path.lexists(path):
        raise ParameterError(f"{path} exists: nothing is overwritten, name a new file", "plot")
    try:
        import matplotlib  # noqa: F401  (optional)
    except ImportError:
        raise ParameterError("--plot needs matplotlib: pip install 'jlora[plot]'", "plot") from None


def plot_norms(rows: Sequence[Projection], path: Path, title: str) -> None:
    """A line for each projection over the layers: norm of the change, and its share of the weight's."""
    from matplotlib.figure import Figure  # optional, and slow to import

    known = all(row.shares for row in rows)
    figure = Figure(figsize=(12 if known else 7, 4.5), layout="constrained")
    panels = figure.subplots(1, 2 if known else 1, squeeze=False)[0]
    last = max((max(row.numbers) for row in rows), default=0)
    for axes, name in zip(panels, ("norms", "shares"), strict=False):
        for row in rows:
            # what is in no layer goes to the ends: the embedding before the first, the head after the last
            end = -1 if row.name == "embed_tokens" else last + 1
            at = [end if number == NO_LAYER else number for number in row.numbers]
            values = [100 * v if name == "shares" else v for v in getattr(row, name)]
            axes.plot(at, values, marker="o", markersize=3, label=row.name)
        axes.set_xlabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("Frobenius norm of the change")
    if known:
        panels[1].set_ylabel("change in % of the weight's norm")
    if rows:
        panels[0].legend(fontsize="small")
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise ParameterError(
            f"{path} cannot be written: {error.strerror or error}", "plot"
        ) from None
