"""`python -m jlora.bench`: base, merged and unmerged adapters compared under a load.

In process (`--model` or `--shape` and all options of a model) or against any OpenAI-compatible
server (`--base-url --models`). The last line of stdout is one JSON document; `--out` keeps each
measurement, and a run that was cut goes on where it was.
"""

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

from jlora.benchmark.adapters import write_random_adapters
from jlora.benchmark.options import HTTP_VOCAB, BenchOptions, split
from jlora.benchmark.report import print_table, provenance
from jlora.benchmark.results import Results
from jlora.benchmark.rounds import Schedule, Subject, measure, summarise
from jlora.benchmark.shapes import write_shape
from jlora.benchmark.subjects import EngineSubject, ServerSubject
from jlora.benchmark.targets import HttpTarget
from jlora.benchmark.workload import Workload
from jlora.cli import fail, parse
from jlora.console import ProgressBars, prepare_devices, setup_logging, undisturbed
from jlora.demo.model import demo_model_folder
from jlora.errors import JloraError
from jlora.llm import LLM
from jlora.models.config import ModelConfig

PROG = "jlora.bench"
MORE_LEFT = 75
"""Exit status when --stop-after cut the run."""


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    options = parse(BenchOptions, given, prog=PROG, accepted=("--enable-lora",))
    setup_logging("warning")
    started = time.monotonic()
    facts: dict[str, Any] = {**provenance(given), "workload": options.settings()}
    try:
        results = Results(options.out, options.settings())
    except JloraError as error:
        fail(PROG, error)
    try:
        if options.base_url:
            complete = asyncio.run(over_http(options, results, facts, started))
        else:
            prepare_devices(options.mesh)
            complete = in_process(options, results, facts, started)
        status = 0 if complete else MORE_LEFT
    except JloraError as error:
        fail(PROG, error)
    except KeyboardInterrupt:
        status = 130
        if not results.done:
            return status
    with undisturbed():
        report(results, facts, complete=status == 0)
    return status


async def over_http(
    options: BenchOptions, results: Results, facts: dict[str, Any], started: float
) -> bool:
    """Load a server. Gives whether everything is measured."""
    assert options.base_url is not None
    base, *adapters = split(options.models)
    schedule = options.schedule(options.cases(base, {"": adapters}))
    workload = options.workload(HTTP_VOCAB)
    facts |= {"target": options.base_url, "device": None}
    async with HttpTarget(options.base_url, closed=schedule.closed) as target:
        facts["server_version"] = await target.version()
        results.open_session(facts)
        with ProgressBars() as bars:
            subject = ServerSubject(target)
            return await run(subject, workload, schedule, results, bars, options, started)


def in_process(
    options: BenchOptions, results: Results, facts: dict[str, Any], started: float
) -> bool:
    """Load a model, then load it. Gives whether everything is measured."""
    with ExitStack() as stack:
        bars = stack.enter_context(ProgressBars())
        options, by_ranks = with_adapters(options, stack, bars)
        if options.room is not None:
            options = replace(options, room=None, lora_memory=f"{pages_for(options)}pages")
        begun = time.monotonic()
        llm = LLM.load(options, progress=bars)
        facts["ready_s"] = round(time.monotonic() - begun, 1)
        stack.callback(undisturbed()(llm.close))
        if not by_ranks:
            by_ranks = {"": [str(entry["name"]) for entry in llm.store.adapters()]}
        schedule = options.schedule(options.cases(llm.names[0], by_ranks))
        workload = options.workload(
            llm.parts.vocab,
            max_len=llm.engine.max_model_len,
            count=lambda text: len(llm.tokenizer.encode(text)),
        )
        folders = {str(entry["name"]): str(entry["path"]) for entry in llm.store.adapters()}
        plan = None if llm.parts.plan is None else asdict(llm.parts.plan)
        facts |= {"target": "in process", "device": device(), "plan": plan}
        facts |= {"model": llm.names[0], "adapters": len(folders)}
        results.open_session(facts)

        async def go() -> bool:
            subject = EngineSubject(llm, folders)
            await subject.settle()
            return await run(subject, workload, schedule, results, bars, options, started)

        return asyncio.run(go())


def with_adapters(
    options: BenchOptions, stack: ExitStack, bars: ProgressBars
) -> tuple[BenchOptions, dict[str, list[str]]]:
    """Options with the shape's folder and random adapters written, and the adapters by ranks."""
    root = stack.enter_context(tempfile.TemporaryDirectory(prefix="jlora-bench-"))
    if options.shape is not None:
        folder = str(write_shape(options.shape, root))
        options = replace(options, shape=None, model=folder, load_format="dummy")
    if not options.adapters_to_make:
        return options, {}
    # Named, so that the demo's own adapters stay out.
    options = replace(options, model=options.model or str(demo_model_folder(bars)))
    cfg = ModelConfig.from_folder(options.model or "")
    by_ranks: dict[str, list[str]] = {}
    modules = list(options.lora_modules)
    for number, (mix, ranks) in enumerate(zip(options.ranks, options.mixes, strict=True)):
        wanted = [ranks[i % len(ranks)] for i in range(options.adapters_to_make)]
        made = write_random_adapters(
            f"{root}/{number}", cfg, wanted, seed=options.seed, modules=options.adapter_modules
        )
        names = {f"r{number}-{name}": path for name, path in made.items()}
        modules += [f"{name}={path}" for name, path in names.items()]
        by_ranks[mix] = list(names)
    return replace(options, lora_modules=tuple(modules)), by_ranks


def pages_for(options: BenchOptions) -> int:
    """Rank pages that `room` adapters of the largest rank take."""
    import jax  # lazy: --mesh is set before jax is imported

    rows = 16 if jax.default_backend() == "gpu" else 8  # of a page, as jlora.build has it
    assert options.room is not None
    return options.room * -(-max(max(ranks) for ranks in options.mixes) // rows)


async def run(
    subject: Subject,
    workload: Workload,
    schedule: Schedule,
    results: Results,
    bars: ProgressBars,
    options: BenchOptions,
    started: float,
) -> bool:
    """Measure under a progress bar. Gives whether everything is measured."""
    total, done = len(schedule), len(results.keys)
    bars("measurements", done, total)
    if done >= total:
        return True
    measured = measure(
        subject, workload, schedule, skip=results.keys, others_limit=options.others_limit
    )
    async for one in measured:
        results.add(one)
        done += 1
        bars("measurements", done, total)
        late = options.stop_after and time.monotonic() - started > options.stop_after
        if late and done < total:
            return False
    return True


def device() -> dict[str, Any]:
    """The accelerator that jax found; the model is loaded already."""
    import jax  # lazy: --mesh is set before jax is imported

    return {
        "platform": jax.default_backend(),
        "kind": jax.devices()[0].device_kind,
        "count": jax.device_count(),
    }


def report(results: Results, facts: dict[str, Any], *, complete: bool) -> None:
    """Table and JSON on stdout."""
    rows = summarise(results.done)
    print_table(rows, f"{facts.get('model') or 'server'}, {facts.get('target')}")
    print(json.dumps({**facts, "results": rows, "complete": complete}))


if __name__ == "__main__":
    sys.exit(main())
