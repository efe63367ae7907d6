"""What host and HTTP take beside a device of a given speed: the real scheduler, engine loop and server,
with an emulated step in place of the compiled one. Needs no accelerator.

The emulated step returns after --queue ms, for half of which it holds the interpreter's lock (as jax's dispatch
of a step with some 500 arguments does in part), and its tokens are there a step's time after those before it.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from jlora.console import prepare_devices
from jlora.llm import LLM
from jlora.options import ServeOptions

PROMPT, NEW = 128, 128
TOKENS = (1000, 40000)
"""Ordinary tokens of the demo model's vocabulary."""

H200 = {8: 4.3, 32: 4.6, 64: 5.2, 128: 6.1, 256: 9.3}
"""ms of a step by rows: experiments/012 (64: between its neighbours)."""


class Device:
    """One step after the other, `step` seconds each."""

    def __init__(self, step: float, queue: float):
        self.step, self.queue, self.free = step, queue, 0.0

    def run(self, shape: Any) -> tuple[Any, None]:
        """Stands for Runner._run."""
        until = time.perf_counter() + self.queue / 2
        while time.perf_counter() < until:
            pass
        time.sleep(self.queue / 2)
        self.free = max(self.free, time.perf_counter()) + self.step
        return SimpleNamespace(tokens=Sampled(shape.rows, self.free)), None


class Sampled:
    """Random tokens that are there at a certain time."""

    def __init__(self, rows: int, ready: float):
        self.rows, self.ready = rows, ready

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        time.sleep(max(0.0, self.ready - time.perf_counter()))
        return np.random.randint(*TOKENS, self.rows, dtype=np.int32)


def serve(rows: int, device: Device) -> tuple[int, str]:
    """(port, model) of a server with `rows` places on the emulated device, in a thread."""
    from jlora.engine.runner import Runner
    from jlora.server.run import bind, make_server, run

    options = ServeOptions(
        max_num_seqs=rows, max_model_len=512, max_num_batched_tokens=2048, kv_cache_memory="2GiB"
    )
    llm = LLM.load(options)
    Runner._run = lambda runner, shape, *rest: device.run(shape)  # type: ignore[method-assign]
    server, sock = make_server(llm, options), bind("127.0.0.1", 0)
    threading.Thread(target=run, args=(server, sock), daemon=True).start()
    while not server.started:
        time.sleep(0.05)
    return sock.getsockname()[1], llm.names[0]


async def client(port: int, model: str, end: float, seen: dict[str, list[float]]) -> None:
    """One request after the other on a connection of its own, until `end`. Reads bytes: a client
    library would take more of the cores than the server."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while time.perf_counter() < end:
        prompt = np.random.randint(*TOKENS, PROMPT).tolist()
        body = {"model": model, "prompt": prompt, "max_tokens": NEW, "ignore_eos": True}
        data = json.dumps(body | {"temperature": 0, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        sent, last, tail = time.perf_counter(), None, b""
        writer.write(head.encode() + data)
        while not tail.endswith(b"0\r\n\r\n"):
            part = await reader.read(1 << 16)
            assert part, "the server closed the connection"
            now, tail = time.perf_counter(), (tail + part)[-64:]
            if b"data: {" in part:
                seen["first" if last is None else "gaps"].append(now - (last or sent))
                last = now
        assert b"[DONE]" in tail, tail
        seen["done"].append(NEW)
    writer.close()


def load(port: int, model: str, clients: int, seconds: float) -> dict[str, float]:
    """A closed loop. `gap`: ms between what a client gets, one token or several."""
    seen: dict[str, list[float]] = {"first": [], "gaps": [], "done": []}

    async def all_clients() -> float:
        start = time.perf_counter()
        jobs = [client(port, model, start + seconds, seen) for _ in range(clients)]
        await asyncio.gather(*jobs)
        return time.perf_counter() - start

    took = asyncio.run(all_clients())
    gaps = np.percentile(seen["gaps"], (50, 99)) * 1e3
    return {
        "tok_s": sum(seen["done"]) / took,
        "gap_p50": gaps[0],
        "gap_p99": gaps[1],
        "first_p50": statistics.median(seen["first"]) * 1e3,
    }


def measure(args: argparse.Namespace, rows: int) -> dict[str, Any]:
    """One process with engine and server, one with the clients."""
    inside = [sys.executable, __file__, "--queue", str(args.queue), "--inside", str(rows)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(inside, env=env, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port, model = server.stdout.readline().split()
        try:
            got = load(int(port), model, rows, args.seconds)
        finally:
            server.terminate()
    return {"rows": rows, "step_ms": H200[rows], "device_tok_s": rows / H200[rows] * 1e3, **got}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", choices=H200, default=[8, 32, 64, 128, 256])
    parser.add_argument("--queue", type=float, default=2.0, help="ms that queueing a step takes")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON lines")
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        prepare_devices(1)
        device = Device(H200[args.inside] / 1e3, args.queue / 1e3)
        print(*serve(args.inside, device), flush=True)
        threading.Event().wait()
    print(
        "| rows | step, ms | the device alone, tok/s | tok/s | of it | gap p50 / p99 ms | first p50 ms |"
    )
    print("|--:|--:|--:|--:|--:|--:|--:|")
    for rows in args.rows:
        runs = [measure(args, rows) for _ in range(args.rounds)]
        if args.out:
            with args.out.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(run) + "\n" for run in runs)
        m = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        print(
            f"| {rows} | {m['step_ms']} | {m['device_tok_s']:.0f} | {m['tok_s']:.0f} | {m['tok_s'] / m['device_tok_s']:.2f} "
            f"| {m['gap_p50']:.1f} / {m['gap_p99']:.0f} | {m['first_p50']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
