"""What kernel tests and benchmarks share: segments by popularity pattern, pools, tolerances."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from kernels_pallas.lora_matmul import PAGE, RankPool, Segments

PATTERNS = ("base", "identical", "zipf", "uniform", "distinct")
MIXED = (8, 16, 32, 64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Which adapter each row uses: batch-local numbers, sorted; and the adapters' ranks."""

    adapter: np.ndarray
    ranks: tuple[int, ...]

    @property
    def pages(self) -> int:
        """Rank pages that the batch's adapters own together."""
        return sum(-(-rank // PAGE) for rank in self.ranks)


def pattern(name: str, rows: int, *, rank: int | None = 16, resident: int = 32) -> Rows:
    """Rows by popularity over `resident` adapters. `rank` None: 8 to 64 in turn.

    identical: one adapter; distinct: one row each; uniform and zipf (1.5): drawn, seeded."""
    rng = np.random.default_rng(1234 + rows)
    resident = max(resident, rows) if name == "distinct" else resident
    if name == "base":
        slots = np.full(rows, -1)
    elif name == "identical":
        slots = np.full(rows, 5 % resident)
    elif name == "distinct":
        slots = rng.permutation(resident)[:rows]
    elif name == "uniform":
        slots = rng.integers(0, resident, size=rows)
    elif name == "zipf":
        chance = 1.0 / np.arange(1, resident + 1) ** 1.5
        order = np.random.default_rng(3).permutation(resident)
        slots = order[rng.choice(resident, size=rows, p=chance / chance.sum())]
    else:
        raise ValueError(f"pattern {name!r}; there are {PATTERNS}")
    used = sorted(set(slots.tolist()) - {-1})
    ranks = np.random.default_rng(7).permutation(np.resize(np.array(MIXED), resident))
    local = {slot: number for number, slot in enumerate(used)}
    return Rows(
        adapter=np.sort([local.get(slot, -1) for slot in slots.tolist()]).astype(np.int32),
        ranks=tuple(int(ranks[slot]) if rank is None else rank for slot in used),
    )


def segments(rows: Rows, *, pool_pages: int, bucket: int | None = None, seed: int = 0) -> Segments:
    """Segments with the adapters' pages scattered over the pool, padded to `bucket` pages."""
    bucket = max(rows.pages, 1) if bucket is None else bucket
    owner = np.repeat(np.arange(len(rows.ranks)), [-(-rank // PAGE) for rank in rows.ranks])
    free = np.random.default_rng(seed).permutation(np.arange(1, pool_pages))[: len(owner)]
    if len(free) < len(owner) or len(owner) > bucket:
        raise ValueError(f"{len(owner)} rank pages, but the pool has {pool_pages}, bucket {bucket}")
    padding = bucket - len(owner)
    return Segments(
        pages=jnp.asarray(np.pad(free, (0, padding)), jnp.int32),
        owner=jnp.asarray(np.pad(owner, (0, padding), constant_values=-1), jnp.int32),
        adapter=jnp.asarray(rows.adapter, jnp.int32),
    )


def random_pool(
    rng: np.random.Generator,
    *,
    pages: int,
    width: int,
    part_sizes: tuple[int, ...],
    dtype: jnp.dtype,
) -> RankPool:
    """Pages whose delta is about as large as x @ w for x, w of `random_inputs`; page 0 is zeros."""
    a = rng.normal(size=(pages, len(part_sizes) * PAGE, width)) / np.sqrt(width)
    b = rng.normal(size=(pages, PAGE, sum(part_sizes))) / np.sqrt(PAGE)
    a[0] = 0
    b[0] = 0
    return RankPool(a=jnp.asarray(a, dtype), b=jnp.asarray(b, dtype))


def random_inputs(
    rng: np.random.Generator, *, rows: int, width: int, total: int, dtype: jnp.dtype
) -> tuple[jnp.ndarray, jnp.ndarray]:
    """x of size 1 and w that keeps the size."""
    x = rng.normal(size=(rows, width))
    w = rng.normal(size=(width, total)) / np.sqrt(width)
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype)


def tolerance(dtype: jnp.dtype) -> float:
    """Largest |out - ref| / |ref| of a delta: a few roundings of the operands' type."""
    return {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.2e-2}[jnp.dtype(dtype).name]


def delta_error(out: np.ndarray, base: np.ndarray, delta: np.ndarray) -> float:
    """|out - base - delta| / |delta|, all in float64: what an implementation got wrong of the
    DELTA. Refuses a delta below a tenth of the output, where a dropped one could hide; NaN and
    unwritten outputs give infinity."""
    out, base, delta = (np.asarray(part, np.float64) for part in (out, base, delta))
    size, share = np.linalg.norm(delta), np.linalg.norm(delta) / np.linalg.norm(base + delta)
    if not share >= 0.1:
        raise ValueError(f"the delta is {share:.3f} of the output, at least 0.1 is needed")
    error = np.linalg.norm(out - base - delta) / size
    return float(error) if np.isfinite(error) else float("inf")


def exact(
    x: jnp.ndarray,
    w: jnp.ndarray,
    pool: RankPool,
    segs: Segments,
    part_sizes: tuple[int, ...],
) -> tuple[np.ndarray, np.ndarray]:
    """Base and delta in float64 (numpy, written from the Semantics, not from our jax code)."""
    x64, w64, a, b = (np.asarray(v.astype(jnp.float32), np.float64) for v in (x, w, pool.a, pool.b))
    base = x64 @ w64
    delta = np.zeros_like(base)
    ends = np.cumsum(part_sizes)
    adapter = np.asarray(segs.adapter)
    for page, owner in zip(np.asarray(segs.pages), np.asarray(segs.owner), strict=True):
        rows = (adapter == owner) & (adapter >= 0)
        for j, (end, size) in enumerate(zip(ends, part_sizes, strict=True)):
            u = x64[rows] @ a[page, PAGE * j : PAGE * (j + 1)].T
            delta[rows, end - size : end] += u @ b[page, :, end - size : end]
    return base, delta
