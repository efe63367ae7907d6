"""A step that is cut into programs computes what the model computes, wherever it may be cut."""

import dataclasses

import pytest

from jlora.engine.config import EngineConfig, buckets
from jlora.engine.flat_model import FlatModel
from jlora.engine.steps import Steps
from jlora.models.config import ModelConfig
from jlora.models.weights import abstract_decoder
from jlora.sharding import Layout, make_mesh
from tests.engine.test_engine import NEW, PROMPTS, SMALL, Adapters, Job

SHAPES = buckets(
    EngineConfig(max_model_len=64, max_num_seqs=8, max_num_batched_tokens=32, prefill_block=16)
)


def stretches(cfg: ModelConfig, *, split: bool = True) -> list[range]:
    layout = Layout(cfg, 1)
    abstract = abstract_decoder(layout, "float32", copy_head=True)  # type: ignore[arg-type]
    mesh = make_mesh(1)
    return Steps(FlatModel(abstract, mesh), cfg, mesh, split=split).stretches


def windows(cfg: ModelConfig, *pattern: int | None) -> ModelConfig:
    return dataclasses.replace(cfg, layers=len(pattern), windows=pattern)


def test_stretches_are_alike_in_windows_and_weights(tiny_model):
    cfg = ModelConfig.from_folder(tiny_model("llama"))
    none = [None] * 30
    assert [len(stretch) for stretch in stretches(windows(cfg, *none))] == [10, 10, 10]
    assert [len(stretch) for stretch in stretches(windows(cfg, *none[:7]))] == [7]
    assert [len(stretch) for stretch in stretches(windows(cfg, *none), split=False)] == [30]
    # every third layer sees everything: two stretches of three, not three of two
    assert [len(stretch) for stretch in stretches(windows(cfg, 8, 8, None, 8, 8, None))] == [3, 3]
    assert [len(stretch) for stretch in stretches(windows(cfg, 8, 8, 8, None))] == [4]
    # a dense layer between sparse ones
    cfg = ModelConfig.from_folder(tiny_model("qwen3_moe"))
    assert [cfg.is_sparse(n) for n in range(3)] == [True, False, True]
    assert [len(stretch) for stretch in stretches(cfg)] == [3]


def test_shapes_of_equal_rows_share_the_ends_unless_adapters_reach_them(tiny_model):
    cfg = ModelConfig.from_folder(tiny_model("llama"))
    layout, mesh = Layout(cfg, 1), make_mesh(1)
    flat = FlatModel(abstract_decoder(layout, "float32", copy_head=True), mesh)  # type: ignore[arg-type]
    steps = Steps(flat, cfg, mesh, split=True)
    sizes = {(shape.decode, shape.prefill) for shape in SHAPES}
    for pools, ends in (([{}] * cfg.layers, len(sizes)), ([{}] * cfg.layers + [{"head": 0}], 0)):
        parts = [part for shape in SHAPES for part in steps.parts(shape, pools)]  # type: ignore[arg-type]
        assert len(SHAPES) > len(sizes)
        count = {name: len({p for p in parts if p[0] == name}) for name in ("first", "layers")}
        assert count == {"first": ends or len(SHAPES), "layers": len(SHAPES)}


@pytest.mark.parametrize("mesh", [1, 2])
def test_layers_of_several_windows_in_stretches_generate_as_transformers_and_peft_do(
    tiny_model, tiny_adapter, mesh
):
    from jlora.build import build_engine
    from jlora.options import ModelOptions

    windowed = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    options = windowed | {"num_hidden_layers": 6, "layer_types": kinds}
    oracle = Adapters(lambda _: tiny_model("qwen3", **options), tiny_adapter)
    assert len(stretches(ModelConfig.from_folder(oracle.folder))) == 2
    modules = tuple(f"{name}={path}" for name, path in oracle.paths.items())
    options = SMALL | {"mesh": mesh, "model": str(oracle.folder)}
    parts = build_engine(ModelOptions(lora_modules=modules, **options))
    try:
        names = (None, *oracle.paths)
        jobs = [Job(parts, PROMPTS[3], name) for name in names]
        got = [job.tokens for job in jobs]
    finally:
        parts.engine.shutdown(0)
    assert got == [oracle.greedy(name, PROMPTS[3]) for name in names]
    assert len({tuple(tokens) for tokens in got}) == len(names), "adapters that do nothing"
    assert all(len(tokens) == NEW for tokens in got)
