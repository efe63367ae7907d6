"""An engine for some projections only generates with adapters of these as PEFT does."""

import pytest

from jlora.console import memory_plan
from tests.engine.test_engine import NEW, PROMPTS, SMALL, Adapters, Job

pytest.importorskip("torch")
pytest.importorskip("peft")

pytestmark = pytest.mark.usefixtures("few_shapes")


@pytest.mark.parametrize("mesh", [1, 2])
def test_adapters_of_two_projections_give_pefts_tokens_in_an_engine_for_them(
    tiny_model, tiny_adapter, mesh
):
    from jlora.build import build_engine
    from jlora.options import ModelOptions

    oracle = Adapters(tiny_model, tiny_adapter)
    other = tiny_adapter(oracle.folder, r=12, targets=["k_proj", "v_proj"], seed=9)
    oracle.paths = {"r4": oracle.paths["r4"], "other": other}
    parts = build_engine(
        ModelOptions(
            model=str(oracle.folder),
            lora_modules=tuple(f"{name}={path}" for name, path in oracle.paths.items()),
            lora_target_modules=("q_proj", "v_proj"),
            mesh=mesh,
            **SMALL,
        )
    )
    try:
        names = (None, "r4", "other")
        jobs = [Job(parts, prompt, name) for name, prompt in zip(names, PROMPTS, strict=False)]
        for job in jobs:
            assert job.done.wait(120)
        assert parts.plan is not None
        plan = memory_plan(parts.plan)
        assert "rank rows for q_proj, k_proj, v_proj)" in plan
    finally:
        parts.engine.shutdown(0)
    for name, prompt, job in zip(names, PROMPTS, jobs, strict=False):
        assert len(job.tokens) == NEW
        assert job.tokens == oracle.greedy(name, prompt), name
        assert name is None or job.tokens != oracle.greedy(None, prompt), "no effect, no proof"
