"""What host and HTTP take beside a device of a given speed: the real scheduler, engine loop and server,
with an emulated step in place of the compiled one. Needs no accelerator.

The emulated step returns after --queue ms, for half of which it holds the interpreter's lock (as jax's dispatch
of a step with some 500 arguments does in part), and its tokens are there a step's time after those before it.
With --shape nothing is emulated: random weights of that shape on the device, and the same load once without HTTP.
"""

import argparse
import asyncio
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from jlora.benchmark.load import closed_loop
from jlora.benchmark.shapes import SHAPES, write_shape
from jlora.benchmark.targets import EngineTarget
from jlora.benchmark.workload import Request
from jlora.console import prepare_devices
from jlora.demo.model import demo_model_folder
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


def emulated(rows: int, device: Device) -> LLM:
    """The demo model with `rows` places on the emulated device."""
    from jlora.engine.runner import Runner

    llm = LLM.load(options(rows, kv_cache_memory="2GiB"))
    Runner._run = lambda runner, shape, *rest: device.run(shape)  # type: ignore[method-assign]
    return llm


def real(rows: int, shape: str, tokenizer: Path | None) -> LLM:
    """Random weights of a named shape, with the demo model's vocabulary: every token has a text."""
    demo = tokenizer or demo_model_folder()
    few = {"max_loras": 1, "lora_target_modules": ("q_proj",)}  # the base alone is asked
    with tempfile.TemporaryDirectory() as root:
        folder = write_shape(shape, root)
        config = json.loads((folder / "config.json").read_text())
        config["vocab_size"] = json.loads((demo / "config.json").read_text())["vocab_size"]
        (folder / "config.json").write_text(json.dumps(config))
        shutil.copy(demo / "tokenizer.json", folder)
        return LLM.load(options(rows, model=str(folder), load_format="dummy", **few))


def options(rows: int, **more: Any) -> ServeOptions:
    return ServeOptions(max_num_seqs=rows, max_model_len=512, max_num_batched_tokens=2048, **more)


def serve(llm: LLM, rows: int) -> int:
    """The port of a server in a thread."""
    from jlora.server.run import bind, make_server, run

    server, sock = make_server(llm, options(rows)), bind("127.0.0.1", 0)
    threading.Thread(target=run, args=(server, sock), daemon=True).start()
    while not server.started:
        time.sleep(0.05)
    return sock.getsockname()[1]


def without_http(llm: LLM, rows: int, seconds: float) -> float:
    """Tokens per second of the same load on the engine, in its process."""

    async def run() -> float:
        requests = (
            (llm.names[0], Request(at=0.0, adapter=None, prompt=prompt(), output_len=NEW))
            for _ in itertools.count()
        )
        run = await closed_loop(EngineTarget(llm), requests, clients=rows, duration=seconds)
        return run.tok_s

    return asyncio.run(run())


def queueing(llm: LLM, rows: int, seconds: float) -> tuple[float, float]:
    """(ms that queueing a step takes, ms of it that keep the interpreter's lock), medians, beside a thread
    that counts whenever it has the lock."""
    from jlora.engine.runner import Runner

    count, took, stop, queue = 0, [], threading.Event(), Runner._run

    def counting() -> None:
        nonlocal count
        while not stop.is_set():
            count += 1

    def idle() -> int:
        """Counted in a second in which nothing else runs."""
        before = count
        time.sleep(0.5)
        return 2 * (count - before)

    def timed(*args: Any) -> Any:
        before, begin = count, time.perf_counter()
        result = queue(*args)
        took.append((time.perf_counter() - begin, count - before))
        return result

    interval, thread = sys.getswitchinterval(), threading.Thread(target=counting)
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        alone = idle()
        Runner._run = timed  # type: ignore[method-assign]
        without_http(llm, rows, seconds)
        a_second = max(alone, idle())
    finally:
        Runner._run = queue  # type: ignore[method-assign]
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    held = [wall - counted / a_second for wall, counted in took]
    return statistics.median(wall for wall, _ in took) * 1e3, statistics.median(held) * 1e3


def prompt() -> list[int]:
    return np.random.randint(*TOKENS, PROMPT).tolist()


async def client(port: int, model: str, end: float, seen: dict[str, list[float]]) -> None:
    """One request after the other on a connection of its own, until `end`. Reads bytes: a client
    library would take more of the cores than the server."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while time.perf_counter() < end:
        body = {"model": model, "prompt": prompt(), "max_tokens": NEW, "ignore_eos": True}
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


class Inside:
    """Engine and server, in a process of their own: the clients' would share its lock."""

    def __init__(self, *args: str):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, __file__, *args, "--inside"],
            env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        port, self.model = self._read().split()
        self.port = int(port)

    def ask(self, what: str, rows: int, seconds: float) -> list[float]:
        """The numbers that `what` gives, for so many rows."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what} {rows} {seconds}\n")
        self._process.stdin.flush()
        return [float(word) for word in self._read().split()]

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def __enter__(self) -> "Inside":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


def inside(args: argparse.Namespace) -> None:
    """What such a process does: it serves, and measures what it is asked."""
    rows = max(args.rows)
    if args.shape:
        llm = real(rows, args.shape, args.tokenizer)
    else:
        llm = emulated(rows, Device(H200[rows] / 1e3, args.queue / 1e3))
    print(serve(llm, rows), llm.names[0], flush=True)
    for line in sys.stdin:
        what, rows, seconds = line.split()
        if what == "queueing":
            print(*queueing(llm, int(rows), float(seconds)), flush=True)
        else:
            print(without_http(llm, int(rows), float(seconds)), flush=True)


def on_emulated(args: argparse.Namespace, rows: int) -> list[dict[str, Any]]:
    """An engine of just so many places each time."""
    runs = []
    for _ in range(args.rounds):
        with Inside("--rows", str(rows), "--queue", str(args.queue)) as process:
            got = load(process.port, process.model, rows, args.seconds)
        device = {"step_ms": H200[rows], "device_tok_s": rows / H200[rows] * 1e3}
        runs.append({"rows": rows, **device, **got})
    return runs


def on_device(args: argparse.Namespace, process: Inside, rows: int) -> list[dict[str, Any]]:
    """Both ways in turns, in one engine."""
    queue_ms, lock_ms = process.ask("queueing", rows, args.seconds / 2)
    facts = {"rows": rows, "shape": args.shape, "queue_ms": queue_ms, "lock_ms": lock_ms}
    runs = []
    for _ in range(args.rounds):
        (alone,) = process.ask("alone", rows, args.seconds)
        got = load(process.port, process.model, rows, args.seconds)
        runs.append({**facts, "device_tok_s": alone, **got})
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", choices=H200, default=list(H200))
    parser.add_argument("--queue", type=float, default=2.0, help="ms that queueing a step takes")
    parser.add_argument("--shape", choices=SHAPES, help="on the real device")
    parser.add_argument("--tokenizer", type=Path, help="folder of the demo model's, with --shape")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON lines")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        prepare_devices(1)
        inside(args)
    else:
        outside(args)


def outside(args: argparse.Namespace) -> None:
    """Clients and the table."""
    first = ("step, ms", "the device alone, tok/s")
    with ExitStack() as stack:
        if args.shape:
            first = ("queueing a step, of it with the lock, ms", "without HTTP, tok/s")
            given = ["--rows", *map(str, args.rows), "--shape", args.shape]
            given += ["--tokenizer", str(args.tokenizer)] if args.tokenizer else []
            process = stack.enter_context(Inside(*given))
        print(
            f"| rows | {first[0]} | {first[1]} | tok/s | of it | gap p50 / p99 ms | first p50 ms |"
        )
        print("|--:|--:|--:|--:|--:|--:|--:|")
        for rows in args.rows:
            runs = on_device(args, process, rows) if args.shape else on_emulated(args, rows)
            if args.out:
                with args.out.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(run) + "\n" for run in runs)
            show(runs)


def show(runs: list[dict[str, Any]]) -> None:
    """A row of the table: medians."""
    m = {key: statistics.median(run[key] for run in runs) for key in runs[0] if key != "shape"}
    step = m["step_ms"] if "step_ms" in m else f"{m['queue_ms']:.1f} / {m['lock_ms']:.1f}"
    print(
        f"| {runs[0]['rows']} | {step} | {m['device_tok_s']:.0f} | {m['tok_s']:.0f} | {m['tok_s'] / m['device_tok_s']:.2f} "
        f"| {m['gap_p50']:.1f} / {m['gap_p99']:.0f} | {m['first_p50']:.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
