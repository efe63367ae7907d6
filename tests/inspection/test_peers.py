"""What other systems do with an adapter: each fact is told for the config that it is about."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jlora.inspection.peers import PEFT, SGLANG, VLLM, Facts, elsewhere
from tests.tiny import make_adapter, make_model

PLAIN = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
NAMES = ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",)


def found(changes=None, *, rank=8, names=NAMES, drop=(), **known) -> set[tuple[str, str]]:
    config = {key: v for key, v in (PLAIN | (changes or {})).items() if key not in drop}
    facts = Facts(config=config, names=names, rank=rank, **known)
    return {(verdict.system, verdict.outcome) for verdict in elsewhere(facts)}


def test_a_plain_adapter_is_fine_everywhere():
    assert found() == set()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"use_rslora": True}, {(SGLANG, "wrong")}),
        ({"alpha_pattern": {"q_proj": 3}}, {(SGLANG, "wrong")}),
        ({"rank_pattern": {"q_proj": 3}}, {(SGLANG, "refuses")}),
        ({"target_modules": ".*q_proj"}, {(SGLANG, "refuses")}),
        ({"target_modules": "all-linear"}, set()),
        ({"target_modules": None}, {(SGLANG, "refuses"), (PEFT, "wrong")}),
        ({"use_dora": True}, {(VLLM, "refuses"), (SGLANG, "refuses")}),
        ({"bias": "all"}, {(VLLM, "refuses"), (SGLANG, "wrong")}),
        ({"lora_bias": True}, {(VLLM, "refuses"), (SGLANG, "wrong")}),
        ({"modules_to_save": ["lm_head"]}, {(VLLM, "refuses"), (SGLANG, "wrong")}),
        ({"modules_to_save": ["score"]}, {(SGLANG, "wrong")}),
        ({"trainable_token_indices": [1]}, {(VLLM, "refuses"), (SGLANG, "wrong")}),
        ({"init_lora_weights": "pissa_niter_4"}, {(VLLM, "refuses"), (SGLANG, "wrong")}),
        ({"init_lora_weights": "gaussian"}, set()),
        ({"alora_invocation_tokens": [1]}, {(VLLM, "refuses"), (SGLANG, "wrong")}),
    ],
    ids=lambda value: str(value if isinstance(value, dict) else sorted(value)),
)
def test_each_field_is_told_to_whom_it_matters(changes, expected):
    assert found(changes) == expected


def test_ranks_beyond_vllms_and_missing_fields_are_told():
    assert found(rank=512) == {(VLLM, "needs")}
    assert found(rank=513) == {(VLLM, "refuses")}
    assert found(drop=["lora_alpha"]) == {(VLLM, "refuses"), (SGLANG, "refuses")}
    reasons = [v.reason for v in elsewhere(Facts(config=PLAIN, names=NAMES, rank=100))]
    assert any("--max-lora-rank 128" in reason for reason in reasons)


def test_the_head_of_a_tied_base_and_of_a_large_vocabulary_are_told():
    names = ("base_model.model.lm_head.lora_A.weight",)
    assert found(names=names, tied=False, vocab=1000) == set()
    assert found(names=names, tied=True, vocab=1000) == {(PEFT, "wrong")}
    assert found(names=names, tied=False, vocab=262_144) == {(VLLM, "refuses")}


@pytest.mark.parametrize(
    ("parts", "changes", "expected"),
    [
        (("0.mlp.experts.0.up_proj",), {}, {(PEFT, "refuses")}),
        (("0.mlp.experts.0.up_proj", "0.mlp.experts.0.gate_proj"), {}, {(PEFT, "wrong")}),
        (("0.mlp.experts.0.down_proj",), {}, set()),
        (("0.mlp.experts.0.down_proj", "1.mlp.up_proj"), {}, {(PEFT, "wrong")}),
        (("0.mlp.experts.0.down_proj",), {"use_rslora": True}, {(SGLANG, "wrong")}),
        (
            tuple(f"0.block_sparse_moe.experts.0.{part}" for part in ("w1", "w2", "w3")),
            {"use_rslora": True},
            {(SGLANG, "wrong"), (PEFT, "wrong")},
        ),
    ],
)
def test_what_peft_does_with_a_pair_for_each_expert_is_told(parts, changes, expected):
    """tests/models/test_decoder_experts.py asks peft itself."""
    names = tuple(f"base_model.model.model.layers.{part}.lora_A.weight" for part in parts)
    assert found(changes, names=names) == expected


@pytest.mark.parametrize("broken", ["prefix", "targets"])
def test_peft_itself_does_what_is_told_of_it(tmp_path, broken):
    """Without the prefix nothing is loaded; without target_modules q and v alone are."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = make_model("llama", tmp_path / "base")
    folder = make_adapter(model, tmp_path / "a", writer="numpy")
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    if broken == "prefix":
        tensors = {name.removeprefix("base_model.model."): t for name, t in tensors.items()}
        save_file(tensors, folder / "adapter_model.safetensors")
    else:
        config["target_modules"] = None
        (folder / "adapter_config.json").write_text(json.dumps(config))
    facts = Facts(config=config, names=tuple(tensors), rank=8)
    assert (PEFT, "wrong") in {(v.system, v.outcome) for v in elsewhere(facts)}

    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    wrapped = peft.PeftModel.from_pretrained(base, folder)
    moved = {
        name.rsplit(".", 1)[-1]
        for name, module in wrapped.named_modules()
        if hasattr(module, "get_delta_weight")
        and np.abs(module.get_delta_weight("default").numpy()).max() > 0.01
    }
    assert moved == (set() if broken == "prefix" else {"q_proj", "v_proj"})
