"""Adapters that are more than pairs, in the real engine: greedy tokens and scores equal PEFT's."""

from typing import Any

import numpy as np
import pytest

from tests.engine.test_engine import NEW, PROMPTS, SMALL, Job
from tests.models.test_decoder_kinds import make_adapter

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("few_shapes")

KINDS = ("plain", "dora_embedding_head", "lora_bias", "tokens", "norms_and_ends")


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """(model folder, adapter folders by kind)."""
    model = tiny_model("llama_odd")
    root = tmp_path_factory.mktemp("kinds")
    return model, {kind: make_adapter(model, root / kind, kind) for kind in KINDS}


def logprobs(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].log_softmax(-1).numpy()


@pytest.mark.parametrize("mesh", [1, 2])
def test_every_kind_in_one_batch_generates_and_scores_as_peft_does_alone(made, mesh):
    from jlora.build import build_engine
    from jlora.options import ModelOptions

    folder, paths = made
    modules = tuple(f"{kind}={path}" for kind, path in paths.items())
    options: dict[str, Any] = SMALL | {"max_num_seqs": 8, "mesh": mesh, "max_loras": 8}
    parts = build_engine(ModelOptions(model=str(folder), lora_modules=modules, **options))
    try:
        names = (None, *KINDS)
        jobs = [
            Job(parts, prompt, name, logprobs=0, prompt_logprobs=0)
            for name, prompt in zip(names, PROMPTS, strict=True)
        ]
        for job in jobs:
            assert job.done.wait(120)
    finally:
        parts.engine.shutdown(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, prompt, job in zip(names, PROMPTS, jobs, strict=True):
        model = base
        if name is not None:
            fresh = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            model = peft.PeftModel.from_pretrained(fresh, paths[name])
        tokens = [*prompt, *job.tokens]
        want = logprobs(model, tokens)
        at = np.arange(len(tokens) - 1)
        scored = want[at, tokens[1:]]
        if name is not None:
            moved = np.abs(scored - logprobs(base, tokens)[at, tokens[1:]]).max()
            assert moved > 0.5, f"{name}: an adapter that does nothing proves nothing"
        assert len(job.tokens) == NEW
        assert job.tokens == want[len(prompt) - 1 : -1].argmax(-1).tolist(), name
        scored_prompt = [e for event in job.events for e in event.prompt_logprobs or ()]
        got = [entry.logprob for entry in scored_prompt if entry is not None]
        got += [entry.logprob for event in job.events for entry in event.logprobs or ()]
        np.testing.assert_allclose(got, scored, rtol=0, atol=2e-3, err_msg=str(name))
