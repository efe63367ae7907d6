"""`python -m jlora.bench`: base, merged and unmerged adapters compared under a load.

In process (`--model` or `--shape` and all options of a model) or against any OpenAI-compatible
server (`--base-url --models`). The last line of stdout is one JSON document; `--out` keeps each
measurement, and a run that was cut goes on where it was. Several `--config` that agree in what an
engine is built from share one, so that its programs compile once: a line of JSON for each, and
`--out 'results/{recipe}.jsonl'` a file.
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

from jlora.benchmark.options import HTTP_VOCAB, BenchOptions, split
from jlora.benchmark.recipes import Recipe, read_recipes, with_adapters
from jlora.benchmark.report import print_table, provenance
from jlora.benchmark.rounds import Schedule, Subject, measure, summarise
from jlora.benchmark.shapes import write_shape
from jlora.benchmark.subjects import EngineSubject, ServerSubject
from jlora.benchmark.targets import HttpTarget
from jlora.benchmark.workload import Workload
from jlora.cli import fail
from jlora.console import ProgressBars, prepare_devices, setup_logging, undisturbed
from jlora.demo.model import demo_model_folder
from jlora.errors import JloraError
from jlora.llm import LLM

PROG = "jlora.bench"
MORE_LEFT = 75
"""Exit status when --stop-after cut the run."""


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    started = time.monotonic()
    try:
        recipes = read_recipes(given, PROG)
    except JloraError as error:
        fail(PROG, error)
    setup_logging("warning")
    facts: dict[str, Any] = provenance(given)
    if len(recipes) > 1:
        facts["recipes"] = [recipe.name for recipe in recipes]
    try:
        options = recipes[0].options
        if options.base_url:
            complete = asyncio.run(over_http(recipes[0], facts, started))
        else:
            prepare_devices(options.mesh)
            complete = in_process(recipes, facts, started)
        status = 0 if complete else MORE_LEFT
    except JloraError as error:
        fail(PROG, error)
    except KeyboardInterrupt:
        status = 130
        if not any(recipe.results.done for recipe in recipes):
            return status
    with undisturbed():
        for recipe in recipes:
            report(recipe, facts, complete=status == 0 or recipe.complete)
    return status


async def over_http(recipe: Recipe, facts: dict[str, Any], started: float) -> bool:
    """Load a server. Gives whether everything is measured."""
    options = recipe.options
    assert options.base_url is not None
    base, *adapters = split(options.models)
    schedule = options.schedule(options.cases(base, {"": adapters}))
    workload = options.workload(HTTP_VOCAB)
    facts |= {"target": options.base_url, "device": None}
    async with HttpTarget(options.base_url, closed=schedule.closed) as target:
        facts["server_version"] = await target.version()
        open_session(recipe, facts)
        with ProgressBars() as bars:
            subject = ServerSubject(target)
            return await run(subject, workload, schedule, recipe, bars, started)


def in_process(recipes: Sequence[Recipe], facts: dict[str, Any], started: float) -> bool:
    """Load a model, then load it, one recipe after the other. Gives whether everything is measured."""
    if all(recipe.complete for recipe in recipes):
        return True  # no model is needed to say so
    todo = [recipe for recipe in recipes if not recipe.complete]
    with ExitStack() as stack:
        bars = stack.enter_context(ProgressBars())
        options, by_ranks = with_models(todo, stack, bars)
        begun = time.monotonic()
        llm = LLM.load(options, progress=bars)
        facts["ready_s"] = round(time.monotonic() - begun, 1)
        stack.callback(undisturbed()(llm.close))
        folders = {str(entry["name"]): str(entry["path"]) for entry in llm.store.adapters()}
        plan = None if llm.parts.plan is None else asdict(llm.parts.plan)
        facts |= {"target": "in process", "device": device(), "plan": plan}
        facts |= {"model": llm.names[0], "adapters": len(folders)}

        async def go() -> bool:
            subject = EngineSubject(llm, folders)
            await subject.settle()
            for recipe, own in zip(todo, by_ranks, strict=True):
                if recipe is not todo[0] and is_late(recipe, started):
                    return False
                own = own or {"": list(folders)}
                schedule = recipe.options.schedule(recipe.options.cases(llm.names[0], own))
                workload = recipe.options.workload(
                    llm.parts.vocab,
                    max_len=llm.engine.max_model_len,
                    count=lambda text: len(llm.tokenizer.encode(text)),
                )
                open_session(recipe, facts)
                if len(todo) > 1:  # else they are placed already
                    await subject.place([name for names in own.values() for name in names])
                if not await run(subject, workload, schedule, recipe, bars, started):
                    return False
            return True

        return asyncio.run(go())


def open_session(recipe: Recipe, facts: dict[str, Any]) -> None:
    """Says in the results where what follows comes from."""
    recipe.results.open_session({**facts, "workload": recipe.options.settings()})


def with_models(
    recipes: Sequence[Recipe], stack: ExitStack, bars: ProgressBars
) -> tuple[BenchOptions, list[dict[str, list[str]]]]:
    """The engine's options, with the shape's folder and the random adapters of all recipes written;
    and the adapters of each recipe by ranks, none where it takes those that are given."""
    options = recipes[0].options
    if options.shape is not None:
        root = stack.enter_context(tempfile.TemporaryDirectory(prefix="jlora-bench-"))
        folder = str(write_shape(options.shape, root))
        options = replace(options, shape=None, model=folder, load_format="dummy")
    by_ranks: list[dict[str, list[str]]] = [{} for _ in recipes]
    if any(recipe.options.adapters_to_make for recipe in recipes):
        # Named, so that the demo's own adapters stay out.
        options = replace(options, model=options.model or str(demo_model_folder(bars)))
        modules, by_ranks = with_adapters(recipes, options.model or "", stack)
        options = replace(options, lora_modules=options.lora_modules + modules)
    if options.room is not None:
        options = replace(options, room=None, lora_memory=f"{pages_for(options)}pages")
    return options, by_ranks


def pages_for(options: BenchOptions) -> int:
    """Rank pages that `room` adapters of the largest rank take."""
    from jlora.device_memory import start_backend  # lazy: --mesh is set before jax is imported

    gpu = start_backend(options.gpu_memory_utilization) == "gpu"
    rows = 16 if gpu else 8  # of a page, as jlora.build has it
    assert options.room is not None
    return options.room * -(-max(max(ranks) for ranks in options.mixes) // rows)


async def run(
    subject: Subject,
    workload: Workload,
    schedule: Schedule,
    recipe: Recipe,
    bars: ProgressBars,
    started: float,
) -> bool:
    """Measure under a progress bar. Gives whether everything is measured."""
    options, results = recipe.options, recipe.results
    what = f"measurements {recipe.name[:3]}".strip()
    total, done, sent = len(schedule), len(schedule.keys & results.keys), 0
    bars(what, done, total)
    if done >= total:
        return True

    def on_request(count: int | None) -> None:
        """Moves the bar within a measurement, so that it can say when it will be over."""
        nonlocal sent
        sent += 1
        bars(what, done + min(0.99, sent / count if count else 0.0), total)

    measured = measure(
        subject,
        workload,
        schedule,
        skip=results.keys,
        others_limit=options.others_limit,
        on_request=on_request,
    )
    async for one in measured:
        results.add(one)
        done, sent = done + 1, 0
        bars(what, done, total)
        if done < total and is_late(recipe, started):
            return False
    return True


def is_late(recipe: Recipe, started: float) -> bool:
    """Whether --stop-after is over."""
    limit = recipe.options.stop_after
    return limit is not None and time.monotonic() - started > limit


def device() -> dict[str, Any]:
    """The accelerator that jax found; the model is loaded already."""
    import jax  # lazy: --mesh is set before jax is imported

    return {
        "platform": jax.default_backend(),
        "kind": jax.devices()[0].device_kind,
        "count": jax.device_count(),
    }


def report(recipe: Recipe, facts: dict[str, Any], *, complete: bool) -> None:
    """Table and JSON on stdout."""
    rows = summarise(recipe.results.done)
    model = facts.get("model") or recipe.options.shape or recipe.options.model or "server"
    print_table(rows, ", ".join(filter(None, (recipe.name, model, facts.get("target")))))
    document = {**facts, "workload": recipe.options.settings(), "results": rows}
    print(json.dumps({**document, "complete": complete}))


if __name__ == "__main__":
    sys.exit(main())
