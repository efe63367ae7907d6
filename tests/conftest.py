"""Shared fixtures, and the environment that jax must find: four CPU devices, unless `-m gpu`."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tiny


def pytest_configure(config: pytest.Config) -> None:
    """Runs before any test module is imported, and so before jax is."""
    flags = {"--xla_force_host_platform_device_count": "4"}
    if config.getoption("markexpr", "") != "gpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
        # Hundreds of programs run a few times each: LLVM's optimisations take longer than they save.
        flags["--xla_backend_optimization_level"] = "0"
    for flag, value in flags.items():
        if flag not in os.environ.get("XLA_FLAGS", ""):
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={value}".strip()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def few_shapes() -> Iterator[None]:
    """Engines have one program with LoRA for each number of rows, with room for all ranks: to compile
    them is most of what a test of an engine takes. Not for tests of which program a step takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jlora.engine.config.RANK_ROWS", (1 << 20,))
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny_model(family, **options) -> folder of a tiny random checkpoint, made once a session."""
    made: dict[str, Path] = {}

    def make(family: str, **options: Any) -> Path:
        key = f"{family} {sorted(options.items())}"
        if key not in made:
            made[key] = tiny.make_model(family, tmp_path_factory.mktemp("m") / family, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny_adapter(model_folder, **options) -> folder of a PEFT adapter, made once a session."""
    made: dict[str, Path] = {}

    def make(model: Path, **options: Any) -> Path:
        key = f"{model} {sorted(options.items())}"
        if key not in made:
            made[key] = tiny.make_adapter(model, tmp_path_factory.mktemp("a") / "lora", **options)
        return made[key]

    return make
