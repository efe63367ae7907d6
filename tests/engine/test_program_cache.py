"""Kept programs run as compiled ones do, and are never taken for those of another engine."""

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jlora.adapters.pool import RankPages
from jlora.engine import program_cache
from jlora.engine.config import EngineConfig, buckets
from jlora.engine.program_cache import UNUSED_DAYS, ProgramCache
from jlora.engine.programs import Programs
from jlora.engine.sampler import Kind, empty_slots
from jlora.models.config import ModelConfig
from jlora.models.weights import abstract_decoder
from jlora.sharding import Layout, make_mesh, sharding


def refuse(*_: Any) -> None:
    raise AssertionError("lowered")


def test_a_program_that_xlas_own_cache_knows_is_kept_whole(tmp_path):
    """A CPU program from there lacks functions when serialised: it loads, and fails when it runs."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path / "xla"),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in settings}
    mesh, x = make_mesh(1), np.arange(64, dtype=np.float32).reshape(8, 8)

    def lower() -> jax.stages.Lowered:
        return jax.jit(lambda x: jnp.where(x > 9, jnp.sort(x @ x, 0), jnp.cumsum(x, 1))).lower(x)

    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        expected = lower().compile()(x)
        assert list((tmp_path / "xla").iterdir())
        cache = ProgramCache(tmp_path / "programs", mesh)
        with cache.compiling():
            cache.compile("f", lower())
        assert jnp.array_equal(cache.load("f", refuse)(x), expected)  # type: ignore[arg-type]
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_a_folder_that_cannot_be_written_only_costs_time(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    cache = ProgramCache(tmp_path / "file" / "programs", make_mesh(1))
    assert not cache.has("f")
    assert cache.compile("f", jax.jit(lambda x: x + 1).lower(1))(1) == 2
    cache.prune()


class Enough(Exception):
    """Raised instead of compiling."""


def entries(cfg: ModelConfig, mesh: int = 1, **options: Any) -> dict[str, set[Path]]:
    """What an engine of this kind reads, by the first word of the programs' names."""
    layout, devices, rows = Layout(cfg, mesh), make_mesh(mesh), options.pop("rows", 2)
    dtype = np.dtype(options.pop("dtype", "float32"))
    pages = options.pop("pages", 3)
    given: dict[str, Any] = {"copy_pages": True, "split": True, "kinds": (Kind.ANY,)} | options
    programs = Programs(
        abstract_decoder(layout, dtype, copy_head=True),
        layout,
        devices,
        given.pop("max_logprobs", 5),
        folder=Path("/programs"),
        **given,
    )
    found: dict[str, set[Path]] = {}

    def record(jobs: Any, _: Any) -> None:
        cache = ProgramCache(Path("/programs"), devices)
        for job in jobs:
            found.setdefault(job.name.split()[0], set()).add(cache._path(job.name))
        raise Enough

    programs._run_all = record  # type: ignore[method-assign]
    config = EngineConfig(max_model_len=64, max_num_seqs=rows, max_num_batched_tokens=32)
    place = sharding(devices)
    page = jnp.zeros((4, 2, 16, 8), device=place)
    kv, slots = [(page, page)] * cfg.layers, empty_slots(rows, cfg.vocab_rows)
    pools, slots = RankPages(cfg, layout, devices, pages, dtype).pools, jax.device_put(slots, place)
    with pytest.raises(Enough):
        programs.compile_all(buckets(config), pools, kv, slots)
    return found


def test_engines_that_differ_in_anything_share_no_step(tiny_model, monkeypatch):
    cfg = ModelConfig.from_folder(tiny_model("llama"))
    rope = dataclasses.replace(cfg.rope, theta=cfg.rope.theta * 2)
    kinds = [
        entries(cfg),
        entries(cfg, mesh=2),
        entries(cfg, dtype="float16"),
        entries(cfg, split=False),
        entries(cfg, copy_pages=False),
        entries(cfg, rows=3),
        entries(cfg, pages=4),
        entries(dataclasses.replace(cfg, norm_eps=cfg.norm_eps * 2)),
        entries(dataclasses.replace(cfg, rope=rope)),
        entries(dataclasses.replace(cfg, windows=(8,) * cfg.layers)),
        entries(dataclasses.replace(cfg, activation="gelu_tanh")),
    ]
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --xla_cpu_enable_fast_math=true")
        kinds.append(entries(cfg))
    for name in ("_sources", "_versions", "_machine"):
        with monkeypatch.context() as patch:
            patch.setattr(program_cache, name, lambda: "another")
            kinds.append(entries(cfg))
    steps = [found["step"] for found in kinds]
    assert len(set.union(*steps)) == sum(map(len, steps))
    assert entries(dataclasses.replace(cfg, name="moved")) == entries(cfg) == kinds[0]


@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_how_much_memory_jax_takes_is_no_part_of_a_name(tiny_model, monkeypatch, name):
    cfg = ModelConfig.from_folder(tiny_model("llama"))
    before = entries(cfg)
    monkeypatch.setenv(name, "0.5")
    assert entries(cfg) == before


def test_sampling_is_shared_by_models_of_one_vocabulary_and_by_nothing_else(tiny_model):
    cfg = ModelConfig.from_folder(tiny_model("llama"))
    own = entries(cfg)["sample"]
    assert entries(dataclasses.replace(cfg, norm_eps=1.0))["sample"] == own
    others = [
        entries(cfg, max_logprobs=6)["sample"],
        entries(cfg, rows=3)["sample"],
        entries(cfg, kinds=(Kind.GREEDY,))["sample"],
        entries(dataclasses.replace(cfg, vocab=cfg.vocab + 64))["sample"],
    ]
    assert all(own.isdisjoint(other) for other in others)


def test_every_source_file_is_part_of_the_key():
    files = set(program_cache._files())
    root = Path(program_cache.__file__).parents[2]
    assert files == {*(root / "jlora").rglob("*.py"), *(root / "kernels_pallas").rglob("*.py")}
    assert len(files) > 80


def test_entries_that_nobody_uses_any_more_are_deleted(tmp_path):
    for name, days in (("old", UNUSED_DAYS + 1), ("used", UNUSED_DAYS - 1)):
        (tmp_path / name).write_text("entry")
        then = time.time() - days * 86400
        os.utime(tmp_path / name, (then, then))
    ProgramCache(tmp_path, make_mesh(1)).prune()
    assert [path.name for path in tmp_path.iterdir()] == ["used"]
