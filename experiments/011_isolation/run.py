"""Who waits when adapters come and go? Streams beside adapters that load from disk, and twice as many
adapters as places. Prints a line a measurement and writes them as JSON lines.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jlora.benchmark.adapters import write_random_adapters
from jlora.benchmark.load import Run, closed_loop, open_loop, time_request
from jlora.benchmark.options import BenchOptions
from jlora.benchmark.report import provenance
from jlora.benchmark.shapes import write_shape
from jlora.benchmark.targets import EngineTarget
from jlora.console import prepare_devices
from jlora.demo.model import demo_model_folder
from jlora.llm import LLM
from jlora.models.config import ModelConfig
from jlora.options import ModelOptions

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of the measurements on one kind of machine."""

    clients: int
    stream: tuple[int, int]
    """Prompt and new tokens of the streams beside the loads."""
    seconds: float
    gaps: tuple[float, ...]
    """Seconds between loads."""
    places: int
    """Of adapters on the device; twice as many are asked for."""
    rate: float
    """Requests per second, Poisson, over those."""
    open: tuple[tuple[int, int], ...]
    """Prompt and new tokens of them."""
    options: dict[str, Any]
    shape: str | None = None


SCALES = {
    "smoke": Scale(
        clients=2, stream=(8, 8), seconds=1, gaps=(0.3,), places=1, rate=4.0, open=((8, 8),),
        options={
            "max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 32,
            "load_format": "dummy",
        },
        shape="tiny",
    ),
    "cpu": Scale(
        clients=4, stream=(32, 48), seconds=20, gaps=(2.0,), places=4, rate=0.5, open=((32, 32),),
        options={"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 64},
    ),
    "h100": Scale(
        clients=16, stream=(128, 256), seconds=15, gaps=(0.6, 0.2), places=8, rate=4.0,
        open=((1024, 256), (1024, 512)), shape="llama-3.1-8b",
        options={
            "max_model_len": 2048, "max_num_seqs": 32, "dtype": "bfloat16",
            "load_format": "dummy",
        },
    ),
}  # fmt: skip
SCALES["h200"] = SCALES["h100"]
RANK = 16
MORE_LEFT = 75
"""Exit status when --stop-after cut the run."""

Add = Callable[[str, Callable[[], Awaitable[dict[str, Any]]]], Awaitable[None]]
"""Measures what a label names, unless it is measured already."""


class Late(Exception):
    """--stop-after is over."""


class Load:
    """Requests of one engine; make it on the running loop."""

    def __init__(self, llm: LLM, scale: Scale):
        self.llm, self.scale, self.target = llm, scale, EngineTarget(llm)
        self.rng = np.random.default_rng(0)

    def jobs(self, label: str, models: Sequence[str], sizes: tuple[int, int], **arrivals: Any):
        """Endless requests for these models in turn, or for any of them where they arrive at a rate."""
        options = BenchOptions(
            random_input_len=sizes[0],
            random_output_len=sizes[1],
            num_prompts=1,
            **({"arrivals": "poisson", "rate": (arrivals["rate"],)} if arrivals else {}),
        )
        workload = options.workload(self.llm.parts.vocab, max_len=self.llm.engine.max_model_len)
        requests = workload.requests(label, case=label, **arrivals)
        for number, request in enumerate(requests):
            pick = int(self.rng.integers(len(models))) if arrivals else number % len(models)
            yield models[pick], request

    async def beside_loads(
        self, label: str, resident: Sequence[str], folders: Sequence[Path], gap: float | None
    ) -> dict[str, Any]:
        """Streams over resident adapters; beside them, every `gap` seconds, an adapter is read from its
        folder, serves one short request and is unloaded."""
        scale, loads, firsts = self.scale, [], []
        short = self.jobs(f"{label}-new", ["new"], (min(64, scale.stream[0]), 8))

        async def one(name: str, folder: Path) -> None:
            start = time.perf_counter()
            await asyncio.to_thread(self.llm.store.load, name, folder)
            loads.append(time.perf_counter() - start)
            timing = await time_request(self.target, name, next(short)[1].prompt, 8)
            firsts.append(timing.first)
            self.llm.store.unload(name)

        async def loader() -> None:
            tasks = []
            while gap is not None and not done.is_set():
                number = len(tasks)
                name = f"{label}-{number}"
                tasks.append(asyncio.create_task(one(name, folders[number % len(folders)])))
                await asyncio.sleep(gap)
            await asyncio.gather(*tasks)

        done = asyncio.Event()
        task = asyncio.create_task(loader())
        run = await closed_loop(
            self.target,
            self.jobs(label, resident, scale.stream),
            clients=scale.clients,
            duration=scale.seconds,
        )
        done.set()
        await task
        return {
            "case": "beside loads",
            "loads_per_minute": 0 if gap is None else round(60 / gap),
            **figures(run),
            "loads": len(loads),
            "load_ms": milliseconds(loads),
            "new_first_ms": milliseconds(firsts),
        }

    async def beyond_room(
        self, label: str, adapters: Sequence[str], sizes: tuple[int, int], room: int
    ) -> dict[str, Any]:
        """Requests for any of the adapters at the scale's rate."""
        before = self.llm.store.counters().evictions["device"]
        run = await open_loop(
            self.target,
            self.jobs(label, adapters, sizes, rate=self.scale.rate),
            duration=self.scale.seconds + 5,
        )
        return {
            "case": "beyond room",
            "adapters": len(adapters),
            "room": room,
            "prompt": sizes[0],
            "new": sizes[1],
            **figures(run),
            "evictions": self.llm.store.counters().evictions["device"] - before,
        }


def figures(run: Run) -> dict[str, float]:
    return {name: round(value, 2) for name, value in asdict(run).items()}


def milliseconds(seconds: list[float]) -> dict[str, float]:
    """Median and largest."""
    return {"p50": round(1e3 * np.median(seconds), 1), "max": round(1e3 * max(seconds), 1)} if seconds else {}  # fmt: skip


async def measure(llm: LLM, folders: Mapping[str, Path], scale: Scale, add: Add) -> None:
    """All measurements of a scale. `folders`: three times as many adapters as places; the first two
    thirds are loaded."""
    load, names, places = Load(llm, scale), list(folders), scale.places
    engine: Any = llm.engine
    while not engine.settled:
        await asyncio.sleep(0.02)
    resident, others = names[:places], [folders[name] for name in names[2 * places :]]
    await load.beside_loads("streams0", resident, others, None)  # warms up
    for number, gap in enumerate((None, *(g for own in scale.gaps for g in (own, None))), start=1):
        label = f"streams{number}"
        await add(label, partial(load.beside_loads, label, resident, others, gap))
    asked = names[: 2 * places]
    for number, sizes in enumerate(scale.open):
        label = f"open{number}"
        await add(f"{label} room", partial(load.beyond_room, label, asked, sizes, 2 * places))
    pins = {f"pin-{name}": folders[name] for name in names[2 * places :]}
    for name, folder in pins.items():
        llm.store.load(name, folder, pinned=True)
    short = load.jobs("pins", list(pins), (8, 2))
    for name in pins:
        await time_request(load.target, name, next(short)[1].prompt, 2)
    for number, sizes in enumerate(scale.open):
        label = f"open{number}"
        await add(f"{label} half", partial(load.beyond_room, label, asked, sizes, places))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", choices=sorted(SCALES), default="cpu")
    parser.add_argument("--out", type=Path, help="results file, if not results_SCALE.jsonl")
    parser.add_argument(
        "--stop-after", type=float, help="seconds; exit 75, and the next call goes on"
    )
    args = parser.parse_args()
    scale, started = SCALES[args.scale], time.monotonic()
    prepare_devices(1)
    import jax  # after prepare_devices

    page = 16 if jax.default_backend() == "gpu" else 8  # ranks, as jlora.build has it
    out = args.out or HERE / f"results_{args.scale}.jsonl"
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {line.get("label") for line in lines}
    with tempfile.TemporaryDirectory() as root, out.open("a") as file:
        model = write_shape(scale.shape, root) if scale.shape else demo_model_folder(None)
        cfg = ModelConfig.from_folder(model)
        folders = write_random_adapters(f"{root}/made", cfg, [RANK] * 3 * scale.places)
        loaded = list(folders.items())[: 2 * scale.places]
        options = ModelOptions(
            model=str(model),
            lora_modules=tuple(f"{name}={path}" for name, path in loaded),
            max_loras=2 * scale.places,
            lora_memory=f"{2 * scale.places * RANK // page}pages",
            **scale.options,
        )
        llm = LLM.load(options)

        def write(row: dict[str, Any]) -> None:
            print(json.dumps(row), flush=True)
            file.write(json.dumps(row) + "\n")
            file.flush()

        async def add(label: str, one: Callable[[], Awaitable[dict[str, Any]]]) -> None:
            if label in done:
                return
            if args.stop_after and time.monotonic() - started > args.stop_after:
                raise Late
            write({"label": label, **await one()})

        facts = {"kind": "session", **provenance([]), "command": " ".join(sys.argv)}
        write({**facts, "device": jax.devices()[0].device_kind})
        try:
            asyncio.run(measure(llm, folders, scale, add))
        except Late:
            return MORE_LEFT
        finally:
            llm.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
