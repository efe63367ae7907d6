"""Measured runs beside what `jlora.plan` computes: bytes of a process, time of its decode steps."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from jlora.benchmark.report import spread
from jlora.benchmark.results import DISTURBED, Group, read_groups
from jlora.benchmark.shapes import SHAPES, model_config, shape_config
from jlora.benchmark.workload import Workload
from jlora.errors import JloraError, ParameterError
from jlora.models.config import PROJECTIONS, ModelConfig
from jlora.planning import (
    ITEMSIZE,
    MEASURED,
    Device,
    adapter_parameters,
    floor,
    in_one_page,
    kv_bytes_per_token,
    memory,
    parameters,
    prefill,
    reached,
)

EMBEDDED = "smollm2-135m"
"""The shape of the model that a benchmark takes by default."""
WINDOWS = 200
"""Draws of a step's adapters whose distinct ones are counted."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """The decode steps of one case. Times are in milliseconds, errors computed / measured - 1."""

    source: str
    case: str
    rows: int
    active: float
    """Different adapters of a step, on average."""
    floor: float
    forecast: float | None
    """None where no step was timed on the device before."""
    from_base: float | None
    """The process's own base step, times what adapters add to the floor. None for a base."""
    measured: float
    """ITL p50, the median of the rounds."""
    error: float | None
    """Of the forecast."""
    error_from_base: float | None
    tok_s: float
    tok_s_forecast: float | None
    """Prefill at its floor and decode steps as forecast, one after the other; no adapter is read."""
    tok_s_error: float | None
    spread: str
    """Half the range of the rounds' tok/s: an error below it says nothing."""


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """What a process planned for itself when it started, and what it held, beside what is computed."""

    source: str
    adapters: int
    computed: dict[str, int]
    """Of weights, adapter_pages and kv_pages."""
    engine: dict[str, int]
    """The same, as the engine counted them, and adapter_copies."""
    measured: float | None
    """Of the process, at most; where the device has a memory of its own, there."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that could be compared."""

    steps: tuple[Step, ...]
    memory: tuple[Bytes, ...]
    left_out: dict[str, int]
    """Why how many processes' runs could not be."""


def compare(paths: Sequence[Path], cfg: ModelConfig, device: Device) -> Comparison:
    """Results of `jlora.bench` in process, where they are of this model on one such device.

    ParameterError for what is no such file.
    """
    steps: list[Step] = []
    held: list[Bytes] = []
    left_out: Counter[str] = Counter()
    for path in paths:
        if not path.is_file():
            raise ParameterError(f"--against {path}: there is no such file", "against")
        for group in read_groups(path):
            if why := mismatch(group.session, cfg, device):
                left_out[why] += 1
                continue
            held.append(_bytes(path, group, cfg, device))
            if why := not_decode(group.session["workload"]):
                left_out[why] += 1
                continue
            if any(row.get("others_cpu", 0.0) > DISTURBED for row in group.rows):
                left_out["while others took the cores: memory alone"] += 1
                continue
            steps += _steps(path, group, cfg, device)
    return Comparison(steps=tuple(steps), memory=tuple(held), left_out=dict(left_out))


def mismatch(session: dict[str, Any], cfg: ModelConfig, device: Device) -> str:
    """Why a process says nothing about this model on such a device; "" if it does."""
    if not session.get("plan"):
        return "of a server, whose device is not known"
    work, kind = session["workload"], str(session["device"]["kind"])
    if device.name.partition("-")[0] not in kind.lower():
        return f"on {kind}"
    if work["mesh"] != 1:
        return f"on {work['mesh']} devices together"
    name = work["model"] or work["shape"] or EMBEDDED
    try:
        same = _sizes(model_config(name)) == _sizes(cfg)
    except JloraError:
        return f"of {name}, which is not here"
    return "" if same else f"of {session['model']}"


def not_decode(work: dict[str, Any]) -> str:
    """Why the time between tokens is no steady step of known rows; "" if it is."""
    if work["arrivals"] != "closed":
        return f"with {work['arrivals']} arrivals: memory alone"
    return "" if work["lengths"] == "fixed" else f"with {work['lengths']} lengths: memory alone"


def _sizes(cfg: ModelConfig) -> tuple[object, ...]:
    heads = cfg.layers, cfg.heads, cfg.kv_heads, cfg.head_dim
    return cfg.embed, cfg.vocab, cfg.tied, *heads, parameters(cfg)


def _steps(path: Path, group: Group, cfg: ModelConfig, device: Device) -> list[Step]:
    work = group.session["workload"]
    timed = any(point.device == device.name for point in MEASURED)
    shapes = {name: shape_config(name) for name in SHAPES}
    prompt = prefill(cfg, device, work["random_input_len"])
    bases: dict[float, tuple[float, float]] = {}  # by load: its floor, its measured time
    found = []
    for row in group.rows:
        if row["system"] not in ("base", "unmerged"):
            continue
        rows = min(int(row["load"]), work["max_num_seqs"] or int(row["load"]))
        active = distinct(row, work, rows)
        ranks = [int(rank) for rank in (row["ranks"] or "0").split(",")]
        least = (
            1e3
            * floor(
                cfg,
                device,
                rows=rows,
                context=work["random_input_len"] + work["random_output_len"] / 2,
                active=active,
                rank=sum(ranks) / len(ranks),
                dtype=_dtype(work, device),
                projections=work["adapter_modules"],
            ).seconds
        )
        if row["system"] == "base":
            bases[row["load"]] = least, row["itl_p50"]
        base = bases.get(row["load"]) if active else None
        forecast = least / reached(shapes, device, MEASURED, rows) if timed else None
        output = work["random_output_len"]
        tok_s = forecast and output / (prompt + output * forecast / 1e3 / rows)
        from_base = None if base is None else base[1] * least / base[0]
        found.append(
            Step(
                source=str(path), case=row["case"], rows=rows, active=active, floor=least,
                forecast=forecast, from_base=from_base, measured=row["itl_p50"],
                error=_error(forecast, row["itl_p50"]),
                error_from_base=_error(from_base, row["itl_p50"]),
                tok_s=row["tok_s"], tok_s_forecast=tok_s, tok_s_error=_error(tok_s, row["tok_s"]),
                spread=spread(row["tok_s_rounds"]),
            )
        )  # fmt: skip
    return found


def _error(computed: float | None, measured: float) -> float | None:
    return None if computed is None or not measured else computed / measured - 1


def distinct(row: dict[str, Any], work: dict[str, Any], rows: int) -> float:
    """Different adapters among `rows` requests of a case, on average, drawn as the benchmark draws."""
    count, popularity = row["adapters"], row["popularity"]
    if not count:
        return 0
    drawn: Workload = Workload(vocab=2, zipf_s=work["zipf_s"], power_alpha=work["power_alpha"])
    picks = drawn.picks(count, popularity, "plan")
    mean = sum(len(set(islice(picks, rows))) for _ in range(WINDOWS)) / WINDOWS
    return min(mean, *(most for most in (work["room"], work["max_loras"]) if most), rows)


def _targets(work: Mapping[str, Any]) -> Sequence[str]:
    """The projections that the rank pages of a run held: by default those of its random adapters."""
    asked = work.get("lora_target_modules")
    if asked is None or work["lora_modules"] or any(name.startswith("all") for name in asked):
        return PROJECTIONS  # None: before pages could hold less
    return asked or work["adapter_modules"]


def _dtype(work: dict[str, Any], device: Device) -> str:
    return device.dtype if work["dtype"] == "auto" else work["dtype"]


def _bytes(path: Path, group: Group, cfg: ModelConfig, device: Device) -> Bytes:
    work, engine = group.session["workload"], group.session["plan"]
    dtype = _dtype(work, device)
    held = in_one_page(_targets(work))
    page = adapter_parameters(cfg, engine["adapter_page_rows"], held) * ITEMSIZE[dtype]
    tokens = engine["kv_tokens"] // (engine["kv_page_count"] - 1) * engine["kv_page_count"]
    measured = "rss" if device.cpu else "device_bytes"
    most = max((row.get(measured) or 0 for row in group.rows), default=0)
    return Bytes(
        source=str(path),
        adapters=group.session.get("adapters") or 0,
        computed={
            "weights": memory(cfg, device, adapters=0, rank=1, dtype=dtype).weights,
            "adapter_pages": (engine["adapter_page_count"] + 1) * page,  # and the padding page
            "kv_pages": tokens * kv_bytes_per_token(cfg, ITEMSIZE[dtype]),
        },
        engine={
            name: engine[name]
            for name in ("weights", "adapter_pages", "adapter_copies", "kv_pages")
        },
        measured=most or None,
    )
