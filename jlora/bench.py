"""`python -m jlora.bench`: tokens per second and latencies of the base model, one adapter and several.

In process (`--model` and all options of a model) or against a server (`--base-url --models`). The
last line of stdout is one JSON document.
"""

import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

from jlora.benchmark.adapters import write_random_adapters
from jlora.benchmark.load import Target, Workload
from jlora.benchmark.options import HTTP_VOCAB, BenchOptions, split
from jlora.benchmark.report import print_table, provenance
from jlora.benchmark.rounds import Measurement, Schedule, measure, summarise
from jlora.benchmark.targets import EngineTarget, HttpTarget
from jlora.cli import fail, parse
from jlora.console import ProgressBars, prepare_devices, setup_logging, undisturbed
from jlora.demo.model import demo_model_folder
from jlora.errors import JloraError
from jlora.llm import LLM
from jlora.models.config import ModelConfig

PROG = "jlora.bench"


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    options = parse(BenchOptions, given, prog=PROG, accepted=("--enable-lora",))
    setup_logging("warning")
    done: list[Measurement] = []
    facts: dict[str, Any] = {}
    status = 0
    try:
        if options.base_url:
            asyncio.run(over_http(options, done, facts))
        else:
            prepare_devices(options.mesh)
            in_process(options, done, facts)
    except JloraError as error:
        fail(PROG, error)
    except KeyboardInterrupt:
        status = 130
        if not done:
            return status
    with undisturbed():
        report(options, done, facts, given, complete=status == 0)
    return status


async def over_http(options: BenchOptions, done: list[Measurement], facts: dict[str, Any]) -> None:
    """Load a server."""
    assert options.base_url is not None
    names = split(options.models)
    schedule, workload = options.schedule(names), options.workload(HTTP_VOCAB)
    facts |= {"target": options.base_url, "models": names, "device": None}
    async with HttpTarget(options.base_url, concurrency=max(options.concurrency)) as target:
        facts["server_version"] = await target.version()
        with ProgressBars() as bars:
            await run(target, workload, schedule, done, bars)


def in_process(options: BenchOptions, done: list[Measurement], facts: dict[str, Any]) -> None:
    """Load a model, then load it."""
    with ExitStack() as stack:
        bars = stack.enter_context(ProgressBars())
        if options.random_adapters:
            root = stack.enter_context(tempfile.TemporaryDirectory(prefix="jlora-bench-"))
            # Named, so that the demo's own adapters stay out.
            options = replace(options, model=options.model or str(demo_model_folder(bars)))
            cfg = ModelConfig.from_folder(options.model or "")
            made = write_random_adapters(root, cfg, options.adapter_ranks, seed=options.seed)
            modules = (*options.lora_modules, *(f"{name}={path}" for name, path in made.items()))
            options = replace(options, lora_modules=modules)
        llm = LLM.load(options, progress=bars)
        stack.callback(undisturbed()(llm.close))
        names = [llm.names[0], *(str(entry["name"]) for entry in llm.store.adapters())]
        schedule, workload = options.schedule(names), options.workload(llm.parts.vocab)
        facts |= {"target": "in process", "models": names, "device": device()}

        async def go() -> None:
            await run(EngineTarget(llm), workload, schedule, done, bars)

        asyncio.run(go())


async def run(
    target: Target,
    workload: Workload,
    schedule: Schedule,
    done: list[Measurement],
    bars: ProgressBars,
) -> None:
    """Measure under a progress bar."""
    count = 0
    bars("requests", 0, schedule.requests)

    def on_request() -> None:
        nonlocal count
        count += 1
        bars("requests", count, schedule.requests)

    await measure(target, workload, schedule, done, on_request)


def device() -> dict[str, Any]:
    """The accelerator that jax found; the model is loaded already."""
    import jax  # lazy: --mesh is set before jax is imported

    return {
        "platform": jax.default_backend(),
        "kind": jax.devices()[0].device_kind,
        "count": jax.device_count(),
    }


def report(
    options: BenchOptions,
    done: Sequence[Measurement],
    facts: dict[str, Any],
    argv: Sequence[str],
    *,
    complete: bool,
) -> None:
    """Table and JSON on stdout."""
    rows = summarise(done)
    names = facts["models"]
    print_table(rows, f"{names[0]}, {len(names) - 1} adapters, {facts['target']}")
    keys = ("random_input_len", "random_output_len", "num_prompts", "repeats", "seed")
    workload = {key: value for key, value in asdict(options).items() if key in keys}
    document = {**facts, **provenance(argv), "workload": workload, "results": rows}
    print(json.dumps(document | {"complete": complete}))


if __name__ == "__main__":
    sys.exit(main())
