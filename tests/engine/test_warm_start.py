"""A second start takes every program from the cache, and serves the same."""

from pathlib import Path
from typing import Any

import pytest

from jlora import build as building
from jlora.engine.programs import Programs
from jlora.engine.steps import Steps
from jlora.options import ModelOptions
from tests.engine.test_engine import PROMPTS, Adapters, Job


@pytest.fixture(scope="module")
def adapters(tiny_model, tiny_adapter) -> Adapters:
    return Adapters(tiny_model, tiny_adapter)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(building, "persist_programs", lambda: tmp_path / "programs")
    return tmp_path / "programs"


def generate(adapters: Adapters, **options: Any) -> None:
    """Builds an engine of few programs and checks what it generates."""
    least = {"max_num_seqs": 1, "max_num_batched_tokens": 32, "max_loras": 1, "max_model_len": 64}
    model = ModelOptions(
        model=str(adapters.folder), lora_modules=(f"r8={adapters.paths['r8']}",), **least, **options
    )
    parts = building.build_engine(model)
    try:
        for name in (None, "r8"):
            assert Job(parts, PROMPTS[2], name).tokens == adapters.greedy(name, PROMPTS[2])
    finally:
        parts.engine.shutdown(0)


def refuse(*_: Any) -> None:
    raise AssertionError("lowered")


@pytest.mark.parametrize("mesh", [1, 2])
def test_a_second_start_lowers_nothing_and_generates_the_same(adapters, folder, monkeypatch, mesh):
    generate(adapters, mesh=mesh)
    entries = sorted(folder.iterdir())
    monkeypatch.setattr(Steps, "lower", refuse)
    for name in ("_lower_copy", "_lower_sample", "_lower_score"):
        monkeypatch.setattr(Programs, name, refuse)
    generate(adapters, mesh=mesh)
    assert sorted(folder.iterdir()) == entries


def test_damaged_entries_are_compiled_again_and_replaced(adapters, folder, monkeypatch):
    generate(adapters)
    whole = sorted(folder.iterdir())
    for path, damaged in zip(whole, (b"", b"no pickle", whole[2].read_bytes()[:500]), strict=False):
        path.write_bytes(damaged)
    generate(adapters)
    assert sorted(folder.iterdir()) == whole
    monkeypatch.setattr(Steps, "lower", refuse)
    generate(adapters)
