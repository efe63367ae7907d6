"""Adapters on routers and experts in the real engine: greedy tokens and scores equal PEFT's."""

from typing import Any

import numpy as np
import pytest

from jlora.errors import AdapterError
from tests.engine.test_engine import NEW, PROMPTS, SMALL, Job
from tests.engine.test_engine_kinds import logprobs
from tests.engine.test_in_place import weights

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("few_shapes")

from tests import experts  # noqa: E402  (imports torch and peft)


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """(model folder, adapter folders by name, those that peft reads in their place)."""
    model, root = tiny_model("qwen3_moe"), tmp_path_factory.mktemp("experts")
    stacked = experts.make_stacked(model, root / "stacked", r=12, seed=1, target_modules=["q_proj"])
    folders = {
        "each": experts.make_each(model, root / "each", seed=2),
        "stacked": stacked,
        "turned": experts.turn(model, stacked, root / "turned"),
        "attention": experts.make_each(model, root / "attention", ("q_proj", "v_proj"), seed=3),
    }
    return model, folders, folders | {"turned": stacked}


def options(model: Any, modules: dict[str, Any], **given: Any) -> Any:
    from jlora.options import ModelOptions

    named = tuple(f"{name}={path}" for name, path in modules.items())
    return ModelOptions(model=str(model), lora_modules=named, **(SMALL | given))


def check_in_place(parts: Any, name: str, prompt: list[int], expected: list[int]) -> None:
    """Merged it gives the same text, and the base comes back bit for bit."""
    entry, before = parts.store.resolve(name, parts.names), weights(parts)
    parts.in_place.merge(entry)
    assert weights(parts) != before
    assert Job(parts, prompt, name).tokens == expected
    parts.in_place.unmerge(entry)
    assert weights(parts) == before


@pytest.mark.parametrize("mesh", [1, 2])
def test_every_dialect_in_one_batch_generates_and_scores_as_peft_does_alone(made, mesh):
    from jlora.build import build_engine

    folder, paths, read_by_peft = made
    parts = build_engine(options(folder, paths, mesh=mesh, max_num_seqs=8))
    try:
        jobs = {
            name: Job(parts, prompt, name, logprobs=0, prompt_logprobs=0)
            for name, prompt in zip((None, *paths), PROMPTS, strict=False)
        }
        for job in jobs.values():
            assert job.done.wait(120)
        for name, prompt in zip((None, *paths), PROMPTS, strict=False):
            if name in ("each", "turned"):
                check_in_place(parts, name, prompt, jobs[name].tokens)
    finally:
        parts.engine.shutdown(0)
    for (name, job), prompt in zip(jobs.items(), PROMPTS, strict=False):
        model = fresh(folder)
        if name is not None:
            model = peft.PeftModel.from_pretrained(model, read_by_peft[name])
        check_scores(job, prompt, model, None if name is None else fresh(folder), str(name))


def fresh(folder: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )


def check_scores(job: Job, prompt: list[int], model: Any, base: Any, name: str) -> None:
    """The greedy tokens and all scores of `model`, which must be far from those of `base`, if given."""
    tokens = [*prompt, *job.tokens]
    at, want = np.arange(len(tokens) - 1), logprobs(model, tokens)
    scored = want[at, tokens[1:]]
    if base is not None:
        plain = logprobs(base, tokens)[at, tokens[1:]]
        assert np.abs(scored - plain).max() > 0.5, f"{name} does nothing"
    assert len(job.tokens) == NEW
    assert job.tokens == want[len(prompt) - 1 : -1].argmax(-1).tolist(), name
    entries = [e for event in job.events for e in event.prompt_logprobs or ()]
    got = [entry.logprob for entry in entries if entry is not None]
    got += [entry.logprob for event in job.events for entry in event.logprobs or ()]
    np.testing.assert_allclose(got, scored, rtol=0, atol=2e-3, err_msg=name)


def mixed_by_peft(folder: Any, terms: dict[Any, float]) -> Any:
    """The base plus, for each term, its weight times what peft's merge changes in each parameter."""
    base, changed = fresh(folder).state_dict(), fresh(folder)
    total = {name: value.clone() for name, value in base.items()}
    for path, weight in terms.items():
        merged = peft.PeftModel.from_pretrained(fresh(folder), path).merge_and_unload().state_dict()
        assert merged.keys() == base.keys()
        for name, value in merged.items():
            total[name] += weight * (value - base[name])
    changed.load_state_dict(total)
    return changed


def test_a_mix_of_expert_adapters_is_the_weighted_sum_of_what_peft_merges_for_each(made):
    """Of two dialects; and of one on experts with one on attention alone."""
    from jlora.build import build_engine

    folder, paths, read_by_peft = made
    mixes = ({"each": 0.6, "turned": -0.8}, {"attention": 1.0, "stacked": 0.5})
    names = ["+".join(f"{name}*{weight}" for name, weight in mix.items()) for mix in mixes]
    parts = build_engine(options(folder, paths))
    try:
        asked = list(zip(names, PROMPTS, strict=False))
        jobs = [Job(parts, prompt, name, logprobs=0, prompt_logprobs=0) for name, prompt in asked]
        for job in jobs:
            assert job.done.wait(120)
    finally:
        parts.engine.shutdown(0)
    for (name, prompt), job, mix in zip(asked, jobs, mixes, strict=True):
        want = mixed_by_peft(folder, {read_by_peft[part]: weight for part, weight in mix.items()})
        check_scores(job, prompt, want, fresh(folder), name)


def test_only_an_engine_that_needs_them_has_pages_for_experts(made):
    from jlora.build import build_engine

    folder, paths, _ = made
    few: dict[str, Any] = {"max_num_seqs": 1, "max_loras": 1, "lora_memory": "2pages"}
    parts = build_engine(options(folder, {"attention": paths["attention"]}, **few))
    try:
        assert parts.plan is not None
        plain = parts.plan.adapter_pages
        with pytest.raises(
            AdapterError, match="start it with --lora-support experts, or with such"
        ):
            parts.store.load("each", str(paths["each"]))
    finally:
        parts.engine.shutdown(0)
    parts = build_engine(options(folder, {"each": paths["each"]}, **few))
    try:
        entry = parts.store.resolve("each", parts.names)
        assert entry is not None
        assert {"experts.up_proj", "gate"} <= set(entry.modules)
        assert parts.plan is not None
        page = parts.plan.adapter_pages // 3
        # 7 experts, 2 sparse layers, pages of 8 ranks in float32: gate and up, then down
        experts_only = 2 * 8 * 4 * (7 * (2 * 64 + 2 * 41 + 41 + 64) + 64 + 7)
        assert page == plain // 3 + experts_only
    finally:
        parts.engine.shutdown(0)
