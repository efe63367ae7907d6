"""`python -m kernels_pallas.bench`: LoRA on every linear layer of a Llama-3.1-8B against none.

Times a jitted chain of layers (cold weights, one CUDA graph): the best that XLA makes of it
WITHOUT LoRA, then the same chain with LoRA. Last line: one JSON document.
"""

import argparse
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

from kernels_pallas import testing
from kernels_pallas.lora_matmul import RankPool, lora_matmul
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


def run(
    *,
    rows: int,
    cases: list[tuple[str, int | None]],
    layers: int = 32,
    implementation: str | None = None,
    shapes: Shapes = LLAMA_8B,
    dtype: Any = jnp.bfloat16,
) -> list[dict[str, Any]]:
    """One result a case (pattern, rank or None for mixed): milliseconds and speed against base."""
    width = shapes["qkv"][0]
    batches = [testing.pattern(name, rows, rank=rank) for name, rank in cases]
    pages = max(batch.pages for batch in batches) + 8

    def random(seed: int, shape: tuple[int, ...], scale: float) -> jax.Array:
        values = jax.random.normal(jax.random.key(seed), shape, jnp.float32) * scale
        return values.astype(dtype)

    make = jax.jit(random, static_argnums=(1, 2))
    x = make(0, (rows, width), 1.0)
    weights, pools = [], []
    for i in range(layers):
        weights.append({})
        pools.append({})
        for j, (group, (k, parts)) in enumerate(shapes.items()):
            seed = 10 * (i * len(shapes) + j)
            weights[i][group] = make(seed + 1, (k, sum(parts)), k**-0.5)
            a = make(seed + 2, (pages, len(parts) * 16, k), k**-0.5).at[0].set(0)
            b = make(seed + 3, (pages, 16, sum(parts)), 0.02).at[0].set(0)
            pools[i][group] = RankPool(a=a, b=b)
    jax.block_until_ready((weights, pools))

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

    before = median_ms(base, x, weights)
    results = []
    for (name, rank), batch in zip(cases, batches, strict=True):
        segs = testing.segments(batch, pool_pages=pages, bucket=pages)
        lora = median_ms(with_lora, x, weights, pools, segs)
        results.append(
            {
                "rows": rows,
                "pattern": name,
                "rank": rank or "8..64",
                "adapters": len(batch.ranks),
                "pages": batch.pages,
                "base_ms": round(before, 4),
                "lora_ms": round(lora, 4),
                "speed": round(before / lora, 4),
            }
        )
        print(json.dumps(results[-1]), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--patterns", nargs="+", default=["base", "identical", "zipf", "distinct"])
    parser.add_argument("--mixed", action="store_true", help="add distinct adapters of ranks 8..64")
    parser.add_argument("--implementation", default=None)
    args = parser.parse_args()
    cases: list[tuple[str, int | None]] = [(name, 16) for name in args.patterns]
    if args.mixed:
        cases.append(("distinct", None))
    results = []
    for rows in args.rows:
        results += run(
            rows=rows, cases=cases, layers=args.layers, implementation=args.implementation
        )
    for r in results:
        print("M={rows:5d} {pattern:10s} rank {rank!s:6s} {adapters:4d} adapters  "
              "base {base_ms:.3f} ms  lora {lora_ms:.3f} ms  {speed:.3f}".format(**r))  # fmt: skip
    here = os.path.dirname(os.path.abspath(__file__))
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
    device = jax.devices()[0]
    print(
        json.dumps(
            {
                "device": device.device_kind,
                "jax": jax.__version__,
                "python": platform.python_version(),
                "commit": git.stdout.strip() or None,
                "command": " ".join(sys.argv),
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
