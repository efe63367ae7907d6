"""`python -m kernels_pallas.bench`: LoRA on every linear layer of a Llama-3.1-8B against none
(`--attention`: paged attention, see bench_attention.py).

Times a jitted chain of layers (cold weights, one CUDA graph): the best that XLA makes of it
WITHOUT LoRA, then the same chain with LoRA. Last line: one JSON document.
"""

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import bench_attention, testing
from kernels_pallas.lora_matmul import PAGE, RankPool, lora_matmul
from kernels_pallas.lora_matmul.shapes import LLAMA_8B, Shapes

Matmul = Callable[[str, jax.Array], jax.Array]


def layer(x: jax.Array, matmul: Matmul, shapes: Shapes) -> jax.Array:
    """The linears of one layer with the elementwise work between them that keeps them apart."""
    dtype, (heads, kv, _) = x.dtype, shapes["qkv"][1]
    qkv = matmul("qkv", x)
    k_and_v = qkv[:, heads : heads + kv] + qkv[:, heads + kv :]
    attended = jnp.tanh(qkv[:, :heads] + 0.1 * jnp.tile(k_and_v, (1, heads // kv))).astype(dtype)
    # Barriers: XLA would recompute the residual stream from the first layer on.
    x = jax.lax.optimization_barrier((x + matmul("o", attended)).astype(dtype))
    gate, up = jnp.split(matmul("gate_up", x), 2, axis=1)
    x = x + matmul("down", (jax.nn.silu(gate) * up).astype(dtype))
    return jax.lax.optimization_barrier(x.astype(dtype))


def median_ms(f: Callable[..., Any], *args: Any, calls: int = 20, repeats: int = 5) -> float:
    """Milliseconds of one call: `calls` are queued and awaited together, so that the host hides."""
    for _ in range(4):
        jax.block_until_ready(f(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        out = None
        for _ in range(calls):
            out = f(*args)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls * 1e3)
    return float(np.median(times))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """Random weights and rank pools of a stack of layers."""

    shapes: Shapes
    dtype: Any
    pages: int
    weights: list[dict[str, jax.Array]]
    pools: list[dict[str, RankPool]]


def random_model(
    *, layers: int, pages: int, shapes: Shapes = LLAMA_8B, dtype: Any = jnp.bfloat16
) -> Model:
    """Made on the device; page 0 of every pool is zeros."""

    def random(seed: Any, shape: tuple[int, ...], scale: float) -> jax.Array:
        values = jax.random.normal(jax.random.key(seed), shape, jnp.float32) * scale
        return values.astype(dtype)

    make = jax.jit(random, static_argnums=(1, 2))
    weights: list[dict[str, jax.Array]] = [{} for _ in range(layers)]
    pools: list[dict[str, RankPool]] = [{} for _ in range(layers)]
    for i in range(layers):
        for j, (group, (k, parts)) in enumerate(shapes.items()):
            seed = np.int32(10 * (i * len(shapes) + j))
            # Small enough that the residual stream stays finite: NaN draws less power, and a GPU that
            # is short of power clocks higher.
            weights[i][group] = make(seed + 1, (k, sum(parts)), 0.5 * k**-0.5)
            a = make(seed + 2, (pages, len(parts) * PAGE, k), k**-0.5).at[0].set(0)
            b = make(seed + 3, (pages, PAGE, sum(parts)), 0.02).at[0].set(0)
            pools[i][group] = RankPool(a=a, b=b)
    jax.block_until_ready((weights, pools))
    return Model(shapes=shapes, dtype=dtype, pages=pages, weights=weights, pools=pools)


def run(
    model: Model, batches: list[testing.Rows], *, implementation: str | None = None
) -> list[dict[str, Any]]:
    """One result a batch (all of one size): milliseconds, and speed against no LoRA."""
    shapes, rows = model.shapes, len(batches[0].adapter)
    x = jax.random.normal(jax.random.key(0), (rows, shapes["qkv"][0]), jnp.float32)
    x = x.astype(model.dtype)
    bucket = -(-max(1, *(batch.pages for batch in batches)) // 8) * 8

    @jax.jit
    def base(x: jax.Array, weights: Any) -> jax.Array:
        for w in weights:
            x = layer(x, lambda g, z, w=w: z @ w[g], shapes)
        return x

    @jax.jit
    def with_lora(x: jax.Array, weights: Any, pools: Any, segs: Any) -> jax.Array:
        for w, pool in zip(weights, pools, strict=True):
            x = layer(
                x,
                lambda g, z, w=w, pool=pool: lora_matmul(
                    z, w[g], pool[g], segs, part_sizes=shapes[g][1], implementation=implementation
                ),
                shapes,
            )
        return x

    assert jnp.isfinite(base(x, model.weights)).all(), (
        "the chain overflows: times would not be real"
    )
    before = median_ms(base, x, model.weights)
    results = []
    for batch in batches:
        segs = testing.segments(batch, pool_pages=model.pages, bucket=bucket)
        lora = median_ms(with_lora, x, model.weights, model.pools, segs)
        results.append(
            {
                "rows": rows,
                "adapters": len(batch.ranks),
                "ranks": f"{min(batch.ranks, default=0)}..{max(batch.ranks, default=0)}",
                "pages": batch.pages,
                "base_ms": round(before, 4),
                "lora_ms": round(lora, 4),
                "speed": round(before / lora, 4),
            }
        )
        print("M={rows:5d} {adapters:4d} adapters of rank {ranks:6s} {pages:4d} pages  "
              "base {base_ms:.3f} ms  lora {lora_ms:.3f} ms  speed {speed:.3f}".format(**results[-1]),
              flush=True)  # fmt: skip
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--patterns", nargs="+", default=["base", "identical", "zipf", "distinct"])
    parser.add_argument("--mixed", action="store_true", help="add distinct adapters of ranks 8..64")
    parser.add_argument("--resident", type=int, default=32, help="adapters drawn from")
    parser.add_argument("--implementation", default=None)
    parser.add_argument("--attention", action="store_true", help="attention cases, no linears")
    parser.add_argument("--pages", type=int, nargs="+", default=[16], help="tokens of a K/V page")
    parser.add_argument("--against", nargs="*", default=["xla", "cudnn"], help="beside the kernel")
    args = parser.parse_args()
    if args.attention:
        finish(
            [r for page in args.pages for r in bench_attention.run(median_ms, page, args.against)]
        )
        return
    batches = {
        rows: [testing.pattern(name, rows, resident=args.resident) for name in args.patterns]
        + ([testing.pattern("distinct", rows, rank=None)] if args.mixed else [])
        for rows in args.rows
    }
    pages = 8 + max(batch.pages for some in batches.values() for batch in some)
    model = random_model(layers=args.layers, pages=pages)
    results = []
    for some in batches.values():
        results += run(model, some, implementation=args.implementation)
    finish(results)


def finish(results: list[dict[str, Any]]) -> None:
    """Print the last line: one JSON document."""
    here = os.path.dirname(os.path.abspath(__file__))
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
    print(
        json.dumps(
            {
                "device": jax.devices()[0].device_kind,
                "jax": jax.__version__,
                "python": platform.python_version(),
                "commit": git.stdout.strip() if git.returncode == 0 else None,
                "command": " ".join(sys.argv),
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
