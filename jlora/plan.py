"""`python -m jlora.plan --model llama-3.1-8b --adapters 100 --rank 16 --device h100`: what fits, how
fast it can be, and how far such figures were from what was measured.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from jlora.benchmark.against import Comparison, compare
from jlora.benchmark.shapes import SHAPES, model_config, shape_config
from jlora.cli import fail, parse
from jlora.console import size
from jlora.errors import JloraError, ParameterError
from jlora.models.config import PROJECTIONS, ModelConfig
from jlora.planning import (
    DEVICES,
    MEASURED,
    Device,
    Measured,
    floor,
    floor_of,
    memory,
    parameters,
    reached,
)

PROG = "jlora.plan"


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """A model, adapters and a device."""

    model: str = "llama-3.1-8b"
    """A named shape, a model folder or a config.json."""

    adapters: int = 100
    """Adapters on the device."""

    rank: int = 16
    """Their rank."""

    lora_target_modules: tuple[str, ...] = PROJECTIONS
    """Projections that they change: rank pages hold those, and others that share an input with one."""

    device: str = "h100"
    """Of h100, h200, a100, a100-40, l40s, a10g, cpu."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and cache. auto: bfloat16, float32 on a CPU."""

    rows: int = 32
    """Sequences that decode at once."""

    context: int = 1024
    """Tokens of each of them."""

    active: int | None = None
    """Different adapters among them. Default: as many as there are, at most one each."""

    utilization: float = 0.9
    """Share of the memory that may be used, as serve's --gpu-memory-utilization."""

    memory_gb: float | None = None
    """Memory of the device, in 10^9 bytes, if not the usual."""

    bandwidth_gb: float | None = None
    """Its read bandwidth in 10^9 bytes per second, if measured."""

    tflops: float | None = None
    """Its 10^12 operations per second, if measured."""

    against: tuple[str, ...] = ()
    """Results files of jlora.bench: forecast against measured, with the error, where model and device
    are these."""

    json: bool = False
    """Print one JSON document."""

    def __post_init__(self) -> None:
        for name in ("adapters", "active"):
            if (getattr(self, name) or 0) < 0:
                raise ParameterError(f"{name} must not be negative", name)
        for name in ("rank", "rows", "context", "memory_gb", "bandwidth_gb", "tflops"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ParameterError(f"{name} must be positive, got {value}", name)
        for name in self.lora_target_modules:
            if name not in PROJECTIONS:
                raise ParameterError(
                    f"lora_target_modules: {name!r} is not one of {', '.join(PROJECTIONS)}",
                    "lora_target_modules",
                )
        if not 0 < self.utilization <= 1:
            raise ParameterError(
                f"utilization must lie in (0, 1], got {self.utilization}", "utilization"
            )
        if self.device not in DEVICES:
            raise ParameterError(
                f"device {self.device!r} is not one of {', '.join(DEVICES)}; give another one's "
                "--memory-gb, --bandwidth-gb and --tflops",
                "device",
            )

    def hardware(self) -> Device:
        """The device, with what is known better."""
        found = DEVICES[self.device]
        given = {"memory": self.memory_gb, "bandwidth": self.bandwidth_gb}
        better = {name: value * 1e9 for name, value in given.items() if value is not None}
        if self.tflops is not None:
            better["flops"] = self.tflops * 1e12
        return replace(found, **better)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(PlanOptions, argv, prog=PROG)
    try:
        cfg, device = model_config(options.model), options.hardware()
        if cfg.experts is not None:
            raise ParameterError(f"{cfg.name}: models with experts cannot be planned yet", "model")
        plan = compute(options, cfg, device)
        found = compare([Path(path) for path in options.against], cfg, device)
    except JloraError as error:
        fail(PROG, error)
    if options.json:
        print(json.dumps(plan | {"against": asdict(found)}))
        return 0
    show(options, cfg, device, plan)
    if options.against:
        # A pipe has no width; the tables would be folded.
        show_against(found, Console(width=None if sys.stdout.isatty() else 200, highlight=False))
    return 0


def compute(options: PlanOptions, cfg: ModelConfig, device: Device) -> dict[str, Any]:
    """Everything that is shown."""
    dtype = device.dtype if options.dtype == "auto" else options.dtype
    plan = memory(
        cfg,
        device,
        adapters=options.adapters,
        rank=options.rank,
        dtype=dtype,
        utilization=options.utilization,
        projections=options.lora_target_modules,
    )
    most = min(options.adapters, options.rows)
    active = most if options.active is None else options.active
    step: dict[str, Any] = {"rows": options.rows, "context": options.context, "rank": options.rank}
    step["projections"] = options.lora_target_modules
    without = floor(cfg, device, active=0, dtype=dtype, **step)
    least = floor(cfg, device, active=active, dtype=dtype, **step)
    shapes = {name: shape_config(name) for name in SHAPES}
    share = reached(shapes, device, MEASURED, options.rows)
    timed = [point for point in MEASURED if point.device == device.name]
    return {
        "model": cfg.name,
        "device": device.name,
        "dtype": dtype,
        "parameters": parameters(cfg).total,
        "weights": plan.weights,
        "adapter": plan.adapter,
        "adapters": plan.adapters,
        "kv_token": plan.kv_token,
        "kv_room": plan.room,
        "kv_tokens": plan.kv_tokens,
        "sequences": plan.kv_tokens // options.context,
        "merged": plan.merged,
        "active": active,
        "bound": least.bound,
        "floor_ms": 1e3 * least.seconds,
        "floor_tok_s": options.rows / least.seconds,
        "lora_floor": without.seconds / least.seconds,
        "reached": share,
        "expected_ms": 1e3 * least.seconds / share,
        "expected_tok_s": options.rows * share / least.seconds,
        "measured": [
            measured_error(point, reached(shapes, device, MEASURED, point.rows)) for point in timed
        ],
    }


def measured_error(point: Measured, share: float) -> dict[str, Any]:
    """A step that was timed, beside its forecast."""
    least = floor_of(shape_config(point.shape), DEVICES[point.device], point).seconds
    return {
        "shape": point.shape,
        "rows": point.rows,
        "active": point.active,
        "floor_ms": 1e3 * least,
        "expected_ms": 1e3 * least / share,
        "measured_ms": 1e3 * point.step,
        "error": least / share / point.step - 1,
        "source": point.source,
    }


def show(options: PlanOptions, cfg: ModelConfig, device: Device, plan: dict[str, Any]) -> None:
    """The plan as text."""
    out = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    known = "measured" if device.measured else "the vendor's figures, never reached in full"
    out.print(
        f"[bold]{cfg.name}[/bold]: {plan['parameters'] / 1e9:.2f} billion parameters, {plan['dtype']}"
    )
    out.print(
        f"{device.name}: {device.memory / 1e9:.0f} GB, {device.bandwidth / 1e9:.0f} GB/s, "
        f"{device.flops / 1e12:.3g} TFLOP/s ({known})"
    )
    table = Table(show_header=False, box=None)
    for name, text in (
        ("weights", gb(plan["weights"])),
        (f"{options.adapters} adapters of rank {options.rank}", f"{gb(plan['adapters'])} ({size(plan['adapter'])} each; pages of {device.page} ranks)"),
        ("as merged models", gb(plan["merged"])),
        ("room for K/V", f"{gb(plan['kv_room'])} = {plan['kv_tokens']} tokens = {plan['sequences']} sequences of {options.context}" if plan["kv_room"] > 0 else f"none: {gb(-plan['kv_room'])} too much"),
        ("decode step, floor", f"{plan['floor_ms']:.2f} ms ({plan['bound']}), {plan['floor_tok_s']:.0f} tok/s; adapters leave {plan['lora_floor']:.3f} of base"),
        ("decode step, expected", expected(plan)),
    ):  # fmt: skip
        table.add_row(name, text)
    out.print(table)
    if not plan["measured"]:
        out.print("No step of this engine was timed on this device.")
        return
    timed = Table(
        "timed on this device", "rows", "adapters", "floor ms", "expected", "measured", "error"
    )
    for row in plan["measured"]:
        timed.add_row(
            f"{row['shape']} ({row['source']})", str(row["rows"]), str(row["active"]),
            f"{row['floor_ms']:.2f}", f"{row['expected_ms']:.2f}", f"{row['measured_ms']:.2f}",
            f"{row['error']:+.0%}" if row["active"] else "fitted",
        )  # fmt: skip
    out.print(timed)


def expected(plan: dict[str, Any]) -> str:
    """The forecast, or why there is none."""
    if not plan["measured"]:
        return "no forecast: nothing was measured here"
    return (
        f"{plan['expected_ms']:.1f} ms, {plan['expected_tok_s']:.0f} tok/s "
        f"(base steps reached {plan['reached']:.2f} of their floor)"
    )


def show_against(found: Comparison, out: Console) -> None:
    """Computed beside measured. Tables in Markdown, so that they can be pasted."""
    if found.steps:
        heads = ("decode step", "rows", "adapters", "floor ms", "forecast", "measured", "error")
        more = ("from its base", "error", "tok/s forecast", "measured", "error", "spread")
        table = right_aligned(*heads, *more)
        for step in found.steps:
            table.add_row(
                f"{label(step.source)}: {step.case}", str(step.rows), f"{step.active:.3g}",
                *map(ms, (step.floor, step.forecast, step.measured)), share(step.error),
                ms(step.from_base), share(step.error_from_base),
                "-" if step.tok_s_forecast is None else f"{step.tok_s_forecast:.0f}",
                f"{step.tok_s:.0f}", share(step.tok_s_error), step.spread,
            )  # fmt: skip
        out.print(table)
    if found.memory:
        parts = ("weights", "adapter_pages", "kv_pages")
        heads = (f"{part.replace('_', ' ')} (error)" for part in parts)
        table = right_aligned(
            "memory", "adapters", *heads, "planned", "measured", "beyond the plan"
        )
        for held in found.memory:
            planned = sum(held.engine.values())
            table.add_row(
                label(held.source), str(held.adapters),
                *(f"{size(held.engine[part])} ({held.computed[part] / held.engine[part] - 1:+.2%})" for part in parts),
                size(planned),
                "-" if held.measured is None else size(int(held.measured)),
                "-" if held.measured is None else size(int(held.measured - planned)),
            )  # fmt: skip
        out.print(table)
    if not found.memory:
        out.print("No measured run is of this model on this device.")
    for why, count in found.left_out.items():
        out.print(f"left out: {count} process{'es' if count > 1 else ''} {why}")


def right_aligned(first: str, *heads: str) -> Table:
    """A table of figures."""
    table = Table(first, box=MARKDOWN)
    for head in heads:
        table.add_column(head, justify="right")
    return table


def label(source: str) -> str:
    """An experiment's name, or that of the file."""
    path = Path(source)
    return path.parent.parent.name[:3] if path.parent.name == "results" else path.stem


def ms(value: float | None) -> str:
    """Milliseconds."""
    return "-" if value is None else f"{value:.1f}"


def share(value: float | None) -> str:
    """An error."""
    return "-" if value is None else f"{value:+.0%}"


def gb(count: float) -> str:
    """In 10^9 bytes, as cards are sold."""
    return f"{count / 1e9:.2f} GB"


if __name__ == "__main__":
    sys.exit(main())
