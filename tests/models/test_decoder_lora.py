"""Adapters in the decoder against PEFT: the delta that each adapter makes, side by side in one batch."""

import numpy as np
import pytest

from tests.models.steps import Piece, Steps
from tests.tiny import ON_SEVERAL

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TOLERANCE = 1e-3
TOKENS = np.random.default_rng(12).integers(4, 320, 30).tolist()

KINDS = {
    "all": {"r": 8, "alpha": 16},
    "more_than_a_page": {"r": 24, "alpha": 8.5, "seed": 1},
    "rslora_few_modules_one_layer": {
        "r": 5,
        "alpha": 7.5,
        "rslora": True,
        "targets": ["k_proj", "o_proj", "up_proj"],
        "layers": [1],
        "seed": 2,
    },
    "patterns": {
        "r": 4,
        "alpha": 6,
        "rank_pattern": {"down_proj": 17, "layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {"v_proj": 3.5},
        "seed": 3,
    },
    "bfloat16": {"r": 16, "alpha": 32, "dtype": "bfloat16", "seed": 4},
    "one_module": {"r": 1, "alpha": 1, "targets": ["down_proj"], "effect": 1.0, "seed": 5},
}


def reference(folder, adapter):
    """Logits [T, V] of transformers, with the adapter put on by peft where one is given."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].numpy()


def check_deltas(folder, adapters, tp):
    """Base and all adapters in one batch: prefill of all but the last token, then one decode row."""
    count = len(adapters) + 1
    steps = Steps(folder, tp, decode=count, prefill=count * 32, adapters=adapters)
    numbers = [-1, *reversed(range(len(adapters)))]  # not the order in which they were loaded
    prefills = [Piece(i, 0, TOKENS[:-1], adapter) for i, adapter in enumerate(numbers)]
    decodes = [Piece(i, len(TOKENS) - 1, TOKENS[-1:], a) for i, a in enumerate(numbers)]
    parts = zip(steps.run(prefills=prefills), steps.run(decodes), strict=True)
    ours = [np.concatenate(part) for part in parts]
    base = reference(folder, None)
    np.testing.assert_allclose(ours[0], base, rtol=0, atol=TOLERANCE)
    for number, got in list(zip(numbers, ours, strict=True))[1:]:
        delta = reference(folder, adapters[number]) - base
        assert np.abs(delta).max() > 1, "an adapter that does nothing proves nothing"
        np.testing.assert_allclose(got - ours[0], delta, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("family", "tp"), ON_SEVERAL)
def test_two_adapters_beside_base_rows_make_the_deltas_that_peft_makes(
    tiny_model, tiny_adapter, family, tp
):
    folder = tiny_model(family)
    kinds = ("more_than_a_page", "rslora_few_modules_one_layer")
    check_deltas(folder, [tiny_adapter(folder, **KINDS[kind]) for kind in kinds], tp)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("family", ["llama_odd", "qwen3"])
def test_every_kind_of_adapter_in_one_batch_makes_the_delta_that_peft_makes(
    tiny_model, tiny_adapter, family, tp
):
    folder = tiny_model(family)
    check_deltas(folder, [tiny_adapter(folder, **kind) for kind in KINDS.values()], tp)
