"""Adapters on routers and experts, in each way that files hold them: the delta that peft makes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from tests import experts  # noqa: E402  (imports torch)
from tests.models.test_decoder_kinds import run  # noqa: E402
from tests.models.test_decoder_lora import TOLERANCE, reference  # noqa: E402

FAMILIES = ("mixtral", "qwen3_moe", "qwen3_moe_step")
ATTENTION = ("q_proj", "o_proj")
PARTS = dict.fromkeys(FAMILIES, ("gate_proj", "up_proj", "down_proj")) | {
    "mixtral": ("w1", "w3", "w2")
}


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """made(family) -> {name: (folder, the delta that peft makes with it)}."""
    known: dict[str, dict[str, tuple[Path, np.ndarray]]] = {}

    def make(family: str) -> dict[str, tuple[Path, np.ndarray]]:
        if family not in known:
            model, root = tiny_model(family), tmp_path_factory.mktemp("experts")
            folders = {
                "each": experts.make_each(model, root / "each", seed=1),
                "each_with_attention": experts.make_each(
                    model, root / "attention", (*ATTENTION, *PARTS[family]), r=20, alpha=10, seed=2
                ),
                "router_alone": experts.make_each(
                    model, root / "router", ("gate",), r=3, effect=1.5
                ),
                "stacked": experts.make_stacked(model, root / "stacked", seed=4),
                "stacked_gate_up": experts.make_stacked(
                    model,
                    root / "gate_up",
                    experts.PARAMETERS[:1],
                    r=5,
                    use_rslora=True,
                    target_modules=["v_proj"],
                ),
                "stacked_down": experts.make_stacked(
                    model,
                    root / "down",
                    experts.PARAMETERS[1:2],
                    rank_pattern={"experts.down_proj": 18},
                    alpha_pattern={"experts.down_proj": 30},
                ),
            }
            base = reference(model, None)
            known[family] = {
                name: (folder, reference(model, folder) - base) for name, folder in folders.items()
            }
            for name in ("stacked", "stacked_gate_up", "stacked_down"):
                folder, delta = known[family][name]
                turned = experts.turn(model, folder, root / f"{name}_turned")
                known[family][f"{name}_turned"] = turned, delta
        return known[family]

    return make


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_dialects_in_one_batch_make_the_deltas_that_peft_makes(tiny_model, made, family, tp):
    adapters = made(family)
    base, *ours = run(tiny_model(family), [folder for folder, _ in adapters.values()], tp)
    np.testing.assert_allclose(base, reference(tiny_model(family), None), rtol=0, atol=TOLERANCE)
    for got, (name, (_, delta)) in zip(ours, adapters.items(), strict=True):
        assert np.abs(delta).max() > 1, f"{name}: an adapter that does nothing proves nothing"
        np.testing.assert_allclose(got - base, delta, rtol=0, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_some_experts_and_some_parts_alone_change_what_their_merged_weights_change(
    tiny_model, tmp_path, family
):
    """peft 0.21 loads none of these right: it drops gate and up without down without an error, refuses
    one of gate and up, scales rsLoRA by 1.41, and needs all experts."""
    model, (gate, up, down) = tiny_model(family), PARTS[family]
    prefix = "block_sparse_moe" if family == "mixtral" else "mlp"
    some = tuple(f"model.layers.0.{prefix}.experts.{e}.{part}" for e, part in ((0, up), (3, down)))
    dense: dict[str, Any] = {"r": 3, "dense": True}
    folders = [
        experts.make_each(model, tmp_path / "rs", (gate, up), **dense, seed=1, use_rslora=True),
        experts.make_each(model, tmp_path / "up", (up,), **dense, seed=2),
        experts.make_each(model, tmp_path / "down", (down, "gate", "k_proj"), **dense, seed=3),
        experts.make_each(model, tmp_path / "some", some, r=18, alpha=18, seed=4, effect=2),
    ]
    base, *ours = run(model, folders, 2)
    for got, folder in zip(ours, folders, strict=True):
        want = reference(experts.merged(model, folder, tmp_path / f"{folder.name}_merged"), None)
        assert np.abs(want - base).max() > 1, f"{folder.name} does nothing"
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE, err_msg=folder.name)


def test_peft_itself_misreads_some_files_with_a_pair_for_each_expert(tiny_model, tmp_path):
    """Why the tests above do not ask it: it turns them into stacks, and loses something."""
    model = tiny_model("mixtral")
    base = reference(model, None)
    rs = experts.make_each(model, tmp_path / "rs", use_rslora=True)
    want = reference(experts.merged(model, rs, tmp_path / "merged"), None)
    assert np.abs(reference(model, rs) - want).max() > 1
    no_down = experts.make_each(model, tmp_path / "no_down", ("w1", "w3"))
    np.testing.assert_array_equal(reference(model, no_down), base)
    with pytest.raises(ValueError, match="without also targeting w1"):
        reference(model, experts.make_each(model, tmp_path / "up", ("w3",)))
