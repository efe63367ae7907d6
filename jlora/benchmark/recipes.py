"""Recipes that one engine measures, one after the other: reading them, and the adapters of all."""

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from jlora.benchmark.adapters import write_random_adapters
from jlora.benchmark.options import BenchOptions
from jlora.benchmark.results import Results
from jlora.cli import parse
from jlora.errors import ParameterError
from jlora.models.config import PROJECTIONS, ModelConfig
from jlora.options import ModelOptions

BY_NAME = "{recipe}"
"""Stands in --out for the name of the config file."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What one config file (or flags alone) asks to measure, and what of it is measured already."""

    name: str
    """Of the config file, without its suffix; "" for flags alone."""
    options: BenchOptions
    results: Results

    @property
    def complete(self) -> bool:
        """Whether nothing is left to measure, as far as that can be told without the model."""
        options = self.options
        if options.base_url or not options.adapters_to_make:
            return False
        made = {mix: [""] * options.adapters_to_make for mix in ranks_of(options)}
        return options.schedule(options.cases("", made)).keys <= self.results.keys


def ranks_of(options: BenchOptions) -> dict[str, list[int]]:
    """The ranks of each value of `ranks`."""
    return dict(zip(options.ranks, options.mixes, strict=True))


def read_recipes(argv: Sequence[str], prog: str) -> list[Recipe]:
    """One for each --config; flags count for all. Exits with one line when something is wrong."""
    files = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    files.add_argument("--config", action="append", default=[])
    found, flags = files.parse_known_args(argv)
    if not found.config:
        options = parse(BenchOptions, argv, prog=prog, accepted=("--enable-lora",))
        return [Recipe(name="", options=options, results=Results(options.out, options.settings()))]
    recipes = []
    for path in found.config:
        own = ["--config", path, *flags]
        options = parse(BenchOptions, own, prog=prog, accepted=("--enable-lora",))
        name = Path(path).stem
        if options.out is not None:
            options = replace(options, out=options.out.replace(BY_NAME, name))
        results = Results(options.out, options.settings())
        recipes.append(Recipe(name=name, options=options, results=results))
    if len(recipes) > 1:
        _check_together(recipes)
    return recipes


def _check_together(recipes: Sequence[Recipe]) -> None:
    first, *others = recipes
    if any(recipe.options.base_url for recipe in recipes):
        raise ParameterError(
            "config: several recipes run in process only, one at a server", "config"
        )
    for other in others:
        if differ := differences(first.options, other.options):
            raise ParameterError(
                f"config: {first.name} and {other.name} need different engines, for they differ in "
                f"{', '.join(differ)}; run them one by one",
                "config",
            )
    files = [recipe.options.out for recipe in recipes if recipe.options.out is not None]
    if len(set(files)) < len(files):
        raise ParameterError(f"out: write {BY_NAME} in it, or recipes share a file", "out")


def engine_facts(options: BenchOptions) -> dict[str, Any]:
    """What an engine is built from. Recipes that agree in it can share one."""
    found = {field.name: getattr(options, field.name) for field in fields(ModelOptions)}
    targets = options.lora_target_modules
    if not targets and options.adapters_to_make and not options.lora_modules:
        targets = options.adapter_modules  # rank pages hold what the adapters change
    every = any(name.startswith("all") for name in targets)
    found["lora_target_modules"] = set(PROJECTIONS if every else targets)
    found["shape"] = options.shape
    if options.room is not None:
        found["room"] = options.room, max(max(ranks) for ranks in options.mixes)
    return found


def differences(one: BenchOptions, other: BenchOptions) -> list[str]:
    """The options for which two recipes need engines of their own."""
    a, b = engine_facts(one), engine_facts(other)
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def with_adapters(
    recipes: Sequence[Recipe], model: str, stack: ExitStack
) -> tuple[tuple[str, ...], list[dict[str, list[str]]]]:
    """Writes the random adapters of all recipes, those that several ask for once. Gives
    --lora-modules, and for each recipe its adapters by their ranks."""
    cfg = ModelConfig.from_folder(model)
    wanted: dict[tuple[Any, ...], int] = {}
    for recipe in recipes:
        for ranks in recipe.options.mixes:
            kind = _kind(recipe.options, ranks)
            wanted[kind] = max(wanted.get(kind, 0), recipe.options.adapters_to_make)
    root = stack.enter_context(tempfile.TemporaryDirectory(prefix="jlora-bench-"))
    names: dict[tuple[Any, ...], list[str]] = {}
    modules: list[str] = []
    for number, (kind, count) in enumerate(wanted.items()):
        ranks, projections, seed = kind
        made = write_random_adapters(
            f"{root}/{number}",
            cfg,
            [ranks[i % len(ranks)] for i in range(count)],
            seed=seed,
            modules=projections,
        )
        names[kind] = [f"r{number}-{name}" for name in made]
        modules += [f"r{number}-{name}={path}" for name, path in made.items()]
    own = [
        {
            mix: names[_kind(recipe.options, ranks)][: recipe.options.adapters_to_make]
            for mix, ranks in ranks_of(recipe.options).items()
        }
        for recipe in recipes
    ]
    return tuple(modules), own


def _kind(options: BenchOptions, ranks: Sequence[int]) -> tuple[Any, ...]:
    return tuple(ranks), options.adapter_modules, options.seed
