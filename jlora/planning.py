"""What a model with adapters takes and how fast a decode step can be, computed: memory, floor, forecast.

The floor is physics: every weight, active rank page and cached token is read once a step, or every
product is computed, whichever takes longer. The forecast is the floor divided by the share of it
that this engine was measured to reach on the same device. No jax.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jlora.models.config import GROUPS, PROJECTIONS, ModelConfig

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator."""

    name: str
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes per second that a kernel can read."""
    flops: float
    """Products and sums per second, in the type that it serves in."""
    measured: bool
    """Bandwidth and flops were measured by us; else they are the vendor's, which nothing reaches."""
    page: int = 16
    """Rank rows of a rank page."""
    dtype: str = "bfloat16"
    cpu: bool = False


DEVICES = {
    device.name: device
    for device in (
        Device(name="h100", memory=80e9, bandwidth=3.1e12, flops=790e12, measured=True),
        # A copy of 8.6 GB, counting bytes read and written; an 8192 x 8192 x 8192 product on random data.
        Device(name="h200", memory=141e9, bandwidth=4.3e12, flops=790e12, measured=True),
        Device(name="a100", memory=80e9, bandwidth=2.04e12, flops=312e12, measured=False),
        Device(name="a100-40", memory=40e9, bandwidth=1.56e12, flops=312e12, measured=False),
        Device(name="l40s", memory=48e9, bandwidth=0.864e12, flops=362e12, measured=False),
        Device(name="a10g", memory=24e9, bandwidth=0.6e12, flops=70e12, measured=False),
        # Two cores of a Xeon at 2.8 GHz: a matrix of 512 MB times 1 and 256 rows in XLA, float32.
        Device(
            name="cpu", memory=24e9, bandwidth=20.6e9, flops=91e9, measured=True, page=8,
            dtype="float32", cpu=True,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of parameters."""

    embedding: int
    head: int
    """0 if the embedding serves as one."""
    layers: int
    """Projections of all layers; routers and experts too."""
    rest: int
    """Norms and biases."""

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.layers + self.rest


def parameters(cfg: ModelConfig) -> Parameters:
    """Of the base model."""
    widths = [cfg.shape(projection) for projection in PROJECTIONS]
    norms = (4 if cfg.post_norms else 2) * cfg.embed + (2 * cfg.head_dim if cfg.qk_norm else 0)
    qkv, rest = sum(out for _, out in widths[:3]), widths[3:]
    biases = cfg.qkv_bias * qkv + cfg.o_bias * rest[0][1]
    biases += cfg.mlp_bias * sum(out for _, out in rest[1:])
    table = cfg.vocab * cfg.embed
    return Parameters(
        embedding=table,
        head=0 if cfg.tied else table,
        layers=sum(_linears(cfg, layer) for layer in range(cfg.layers)),
        rest=cfg.layers * (norms + biases) + cfg.embed,
    )


def _linears(cfg: ModelConfig, layer: int) -> int:
    """Parameters of the matrices of one layer."""
    parts = (part for group in cfg.groups(layer) for part in GROUPS[group])
    total = sum(inputs * outputs for inputs, outputs in map(cfg.shape, parts))
    if cfg.experts is not None and cfg.is_sparse(layer):
        total += cfg.embed * cfg.experts.count * (1 + 3 * cfg.experts.mlp)
    return total


def adapter_parameters(
    cfg: ModelConfig, rank: int, projections: Sequence[str] = PROJECTIONS
) -> int:
    """Of one adapter of that rank in all layers."""
    held = [
        part for layer in range(cfg.layers) for group in cfg.groups(layer) for part in GROUPS[group]
    ]
    return rank * sum(sum(cfg.shape(part)) for part in held if part in projections)


def in_one_page(projections: Sequence[str]) -> tuple[str, ...]:
    """What rank pages for these projections hold: those too that share an input with one of them."""
    groups = [parts for parts in GROUPS.values() if any(part in projections for part in parts)]
    return tuple(part for parts in groups for part in parts)


def kv_bytes_per_token(cfg: ModelConfig, itemsize: int) -> int:
    """Keys and values of one token in all layers."""
    return 2 * cfg.layers * cfg.kv_heads * cfg.head_dim * itemsize


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device."""

    weights: int
    adapter: int
    """One adapter's pages."""
    adapters: int
    """All rank pages, the padding page included."""
    kv_token: int
    room: int
    """What is left for the K/V cache; negative if it does not fit."""
    merged: int
    """The same adapters as merged models, each a copy of the weights."""

    @property
    def kv_tokens(self) -> int:
        return max(0, self.room // self.kv_token)


def memory(
    cfg: ModelConfig,
    device: Device,
    *,
    adapters: int,
    rank: int,
    dtype: str,
    utilization: float = 0.9,
    projections: Sequence[str] = PROJECTIONS,
) -> Memory:
    """How a device's memory is shared out; adapters may change these projections. A CPU keeps a tied
    head as a second, transposed copy."""
    size, count = ITEMSIZE[dtype], parameters(cfg)
    copy = count.embedding if device.cpu and cfg.tied else 0
    weights = (count.total + copy) * size
    page = adapter_parameters(cfg, device.page, in_one_page(projections)) * size
    adapter = -(-rank // device.page) * page
    pages = adapters * adapter + page if adapters else 0
    return Memory(
        weights=weights,
        adapter=adapter,
        adapters=pages,
        kv_token=kv_bytes_per_token(cfg, size),
        room=int(device.memory * utilization) - weights - pages,
        merged=max(1, adapters) * weights,
    )


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The least time of a decode step, in seconds, by what has to be done."""

    weights: float
    adapters: float
    kv: float
    compute: float

    @property
    def seconds(self) -> float:
        """Reads happen one after the other, beside the computing."""
        return max(self.weights + self.adapters + self.kv, self.compute)

    @property
    def bound(self) -> str:
        """What it waits for."""
        return "compute" if self.compute > self.weights + self.adapters + self.kv else "memory"


def floor(
    cfg: ModelConfig,
    device: Device,
    *,
    rows: int,
    context: float,
    active: float,
    rank: float,
    dtype: str,
    projections: Sequence[str] = PROJECTIONS,
) -> Floor:
    """Of a step with `rows` sequences of `context` tokens and `active` different adapters of `rank`."""
    size, count = ITEMSIZE[dtype], parameters(cfg)
    # The embedding is a look-up; the head is read whole, tied or not.
    read = count.layers + count.rest + count.embedding
    adapter = adapter_parameters(cfg, 1, projections) * rank
    products = (count.layers + count.embedding + (adapter if active else 0)) * rows
    attention = 2 * cfg.layers * cfg.heads * cfg.head_dim * context * rows
    return Floor(
        weights=read * size / device.bandwidth,
        adapters=active * adapter * size / device.bandwidth,
        kv=rows * context * kv_bytes_per_token(cfg, size) / device.bandwidth,
        compute=2 * (products + attention) / device.flops,
    )


def prefill(cfg: ModelConfig, device: Device, tokens: int) -> float:
    """The least time of a prompt's products, in seconds; its last token alone meets the head."""
    attention = cfg.layers * cfg.heads * cfg.head_dim * tokens  # half of the pairs are seen
    products = parameters(cfg).layers * tokens + parameters(cfg).embedding + attention * tokens
    return 2 * products / device.flops


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A decode step of this engine that was timed."""

    device: str
    shape: str
    rows: int
    context: int
    active: int
    rank: int
    step: float
    """Seconds."""
    source: str


_CPU_001 = "ITL p50; experiments/001_merged_vs_unmerged"
_CPU_010 = "ITL p50; experiments/010_vllm_cpu, 1f0e238"
_H100 = "compiled steps back to back; experiments/LOG.md, 73bb288"
_H200 = "compiled steps back to back; experiments/012_step_time, 41bf834"
_H200_OLDER = "compiled steps back to back; experiments/012_step_time, 862af5f"
MEASURED = (
    Measured(
        device="h100", shape="llama-3.1-8b", rows=32, context=160, active=0, rank=0, step=6.27e-3,
        source=_H100,
    ),
    Measured(
        device="h100", shape="llama-3.1-8b", rows=32, context=160, active=8, rank=16, step=6.65e-3,
        source=_H100,
    ),
    Measured(
        device="h100", shape="llama-3.1-8b", rows=32, context=160, active=32, rank=16,
        step=6.27e-3 * 7.723 / 6.394, source="from the ratio to base at c071220; experiments/LOG.md",
    ),
    Measured(
        device="h200", shape="llama-3.1-8b", rows=8, context=160, active=0, rank=0, step=4.341e-3,
        source=_H200,
    ),
    Measured(
        device="h200", shape="llama-3.1-8b", rows=32, context=160, active=0, rank=0, step=4.529e-3,
        source=_H200,
    ),
    Measured(
        device="h200", shape="llama-3.1-8b", rows=32, context=160, active=8, rank=16, step=4.889e-3,
        source=_H200,
    ),
    Measured(
        device="h200", shape="llama-3.1-8b", rows=32, context=160, active=32, rank=16, step=5.528e-3,
        source=_H200,
    ),
    Measured(
        device="h200", shape="llama-3.1-8b", rows=128, context=160, active=0, rank=0, step=6.08e-3,
        source=_H200_OLDER,
    ),
    Measured(
        device="h200", shape="llama-3.1-8b", rows=128, context=160, active=32, rank=16, step=7.33e-3,
        source=_H200_OLDER,
    ),
    Measured(
        device="h200", shape="llama-3.1-8b", rows=256, context=160, active=0, rank=0, step=9.092e-3,
        source=_H200,
    ),
    Measured(
        device="h200", shape="llama-3.1-8b", rows=256, context=160, active=32, rank=16, step=9.958e-3,
        source=_H200,
    ),
    Measured(
        device="cpu", shape="smollm2-135m", rows=1, context=96, active=0, rank=0, step=37e-3,
        source=_CPU_010,
    ),
    Measured(
        device="cpu", shape="smollm2-135m", rows=32, context=96, active=0, rank=0, step=199e-3,
        source=_CPU_010,
    ),
    Measured(
        device="cpu", shape="smollm2-135m", rows=32, context=96, active=4, rank=16, step=276e-3,
        source=_CPU_010,
    ),
    Measured(
        device="cpu", shape="smollm2-135m", rows=8, context=76, active=0, rank=0, step=99e-3,
        source=_CPU_001,
    ),
    Measured(
        device="cpu", shape="smollm2-135m", rows=8, context=76, active=1, rank=16, step=107e-3,
        source=_CPU_001,
    ),
    Measured(
        device="cpu", shape="smollm2-135m", rows=8, context=76, active=5, rank=16, step=110e-3,
        source=_CPU_001,
    ),
)  # fmt: skip
"""What forecasts stand on. Other devices have none: their forecast is the floor, and says so."""


def reached(
    cfg_of: dict[str, ModelConfig], device: Device, points: Sequence[Measured], rows: int
) -> float:
    """The share of the floor that a step without adapters reaches on the device: that of the timed
    one whose rows are the nearest by ratio; 1 if none was timed."""
    base = [point for point in points if point.device == device.name and not point.active]
    if not base:
        return 1.0
    nearest = min(base, key=lambda point: abs(math.log(point.rows / rows)))
    return floor_of(cfg_of[nearest.shape], device, nearest).seconds / nearest.step


def floor_of(cfg: ModelConfig, device: Device, point: Measured) -> Floor:
    """The floor of a step that was timed."""
    return floor(
        cfg,
        device,
        rows=point.rows,
        context=point.context,
        active=point.active,
        rank=point.rank,
        dtype=device.dtype,
    )
