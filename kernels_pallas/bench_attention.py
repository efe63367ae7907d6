"""Attention cases of `python -m kernels_pallas.bench --attention`: decode by bytes, prefill by FLOP.

A jitted chain of layers, each with a pool of its own (cold K/V, one CUDA graph), every
implementation on the same data; a layer's output is the next one's query.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from kernels_pallas.paged_attention import cases, paged_attention

BANDWIDTH = 3.1e12
"""Bytes a second that an H100 80GB HBM3 reads (measured: FACTS.md)."""

COLD = 1.2e9
"""Bytes of K/V that a chain reads at least, so that L2 holds none of it."""

DECODE: dict[str, list[int]] = {
    "32 x 192": [192] * 32,
    "32 x 2k": [2048] * 32,
    "8 x 16k": [16384] * 8,
    "1 x 8k": [8192],
    "256 x 160": [160] * 256,
    "32 x 16..8k": [int(n) for n in np.geomspace(16, 8192, 32)],
}


PREFILL: dict[str, list[tuple[int, int]]] = {
    "8k": [(0, 8192)],
    "2k after 6k": [(6144, 2048)],
    "16 x 128": [(0, 128)] * 16,
}
"""Prompts of (positions before, tokens)."""


def chain(step: cases.Step, layers: int, attend: Callable[..., jax.Array]) -> Callable[[], Any]:
    """A call that runs `layers` attentions in a row, each over a pool of its own."""
    pools = [(step.keys, step.values)]
    for _ in range(1, layers):
        pools.append((step.keys + 0, step.values + 0))
    jax.block_until_ready(pools)

    @jax.jit
    def run(q: jax.Array, pools: Any, tables: jax.Array, positions: jax.Array) -> jax.Array:
        for keys, values in pools:
            q = attend(q, keys, values, tables, positions)
        return q

    return functools.partial(run, step.q, pools, step.tables, step.positions)


def decode_bytes(lengths: list[int], shape: cases.Heads) -> int:
    """Bytes of K and V that a layer must read."""
    return sum(lengths) * shape.kv_heads * shape.width * 2 * 2


def run_decode(
    median_ms: Callable[..., float],
    *,
    names: list[str],
    implementations: list[str],
    page: int,
    shape: cases.Heads,
) -> list[dict[str, Any]]:
    """One result a case and implementation."""
    results = []
    for name in names:
        lengths = DECODE[name]
        step = cases.step(lengths, shape=shape, page=page)
        size = decode_bytes(lengths, shape)
        layers = int(min(32, max(4, -(-COLD // size))))
        for implementation in implementations:
            attend = functools.partial(
                paged_attention, decode=len(lengths), block=64, scale=shape.width**-0.5,
                implementation=implementation,
            )  # fmt: skip
            us = median_ms(chain(step, layers, attend)) * 1e3 / layers
            results.append(
                {
                    "attention": name, "implementation": implementation, "page": page,
                    "us": round(us, 2), "GB/s": round(size / us / 1e3),
                    "share": round(size / BANDWIDTH * 1e6 / us, 3),
                }
            )  # fmt: skip
            print("{attention:12s} page {page:3d} {implementation:8s} {us:8.1f} us  {GB/s:5d} GB/s  "
                  "{share:.3f} of read bandwidth".format(**results[-1]), flush=True)  # fmt: skip
    return results


def prefill_flops(prompts: list[tuple[int, int]], shape: cases.Heads) -> float:
    """Multiplications and additions that causal attention needs."""
    pairs = sum(n * first + n * (n + 1) / 2 for first, n in prompts)
    return 4 * pairs * shape.heads * shape.width


def cudnn(step: cases.Step, prompts: list[tuple[int, int]]) -> Callable[..., jax.Array] | None:
    """XLA's call of cuDNN on the same number of tokens, contiguous K/V; None where it cannot."""
    if len({*prompts}) > 1 or prompts[0][0]:
        return None
    batch, tokens = len(prompts), prompts[0][1]

    def attend(q: jax.Array, keys: jax.Array, values: jax.Array, *_: jax.Array) -> jax.Array:
        kv_heads, width = keys.shape[1], keys.shape[3]
        size = batch * tokens * kv_heads * width
        k, v = (
            x.reshape(-1)[:size].reshape(batch, tokens, kv_heads, width) for x in (keys, values)
        )
        q4 = q.reshape(batch, tokens, *q.shape[1:])
        out = jax.nn.dot_product_attention(q4, k, v, is_causal=True, implementation="cudnn")
        return out.reshape(q.shape)

    return attend


def run_prefill(
    median_ms: Callable[..., float],
    *,
    names: list[str],
    implementations: list[str],
    page: int,
    shape: cases.Heads,
) -> list[dict[str, Any]]:
    """One result a case and implementation ("cudnn" among them)."""
    results = []
    for name in names:
        prompts = PREFILL[name]
        step = cases.step([], prompts, shape=shape, page=page)
        for implementation in implementations:
            attend: Callable[..., jax.Array] | None = functools.partial(
                paged_attention, decode=0, block=64, scale=shape.width**-0.5,
                implementation=implementation,
            )  # fmt: skip
            if implementation == "cudnn":
                attend = cudnn(step, prompts)
            if attend is None:
                continue
            us = median_ms(chain(step, 4, attend)) * 1e3 / 4
            results.append(
                {
                    "attention": name, "implementation": implementation, "page": page,
                    "us": round(us, 1), "TFLOP/s": round(prefill_flops(prompts, shape) / us / 1e6),
                }
            )  # fmt: skip
            print("{attention:12s} page {page:3d} {implementation:8s} {us:8.1f} us  "
                  "{TFLOP/s:5d} TFLOP/s".format(**results[-1]), flush=True)  # fmt: skip
    return results


def run(median_ms: Callable[..., float], page: int, against: list[str]) -> list[dict[str, Any]]:
    """All cases of Llama-3.1-8B's heads. `against`: "xla" and "cudnn" (prefill only) or less."""
    shape = cases.Heads()
    plain = [name for name in against if name != "cudnn"]
    options: dict[str, Any] = {"page": page, "shape": shape}
    decode = run_decode(
        median_ms, names=list(DECODE), implementations=["hopper", *plain], **options
    )
    prefill = run_prefill(
        median_ms, names=list(PREFILL), implementations=["hopper", *against], **options
    )
    return decode + prefill
