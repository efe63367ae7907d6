"""The engine on the GPU in float32: the tokens that transformers and PEFT generate on the CPU."""

import pytest

from tests.engine.test_engine import MIX, PROMPTS, Adapters, Job, build  # noqa: F401

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def adapters(tiny_model, tiny_adapter):
    return Adapters(tiny_model, tiny_adapter)


@pytest.mark.parametrize("mesh", [1, 2])
def test_mixed_batches_on_gpus_generate_what_transformers_and_peft_generate(build, adapters, mesh):  # noqa: F811
    import jax

    assert jax.default_backend() == "gpu"
    if len(jax.devices()) < mesh:
        pytest.skip(f"needs {mesh} GPUs")
    parts = build(dtype="float32", max_num_batched_tokens=64, max_num_seqs=8, mesh=mesh)
    jobs = [Job(parts, prompt, name) for prompt, name in MIX]
    for job, (prompt, name) in zip(jobs, MIX, strict=True):
        assert job.tokens == adapters.greedy(name, prompt)


def test_each_alone_on_the_gpu_equals_the_mixed_batch(build, adapters):  # noqa: F811
    parts = build(dtype="float32", max_num_batched_tokens=64, max_num_seqs=8, mesh=1)
    for name in (None, "r4", "r8", "r24"):
        assert Job(parts, PROMPTS[5], name).tokens == adapters.greedy(name, PROMPTS[5])
