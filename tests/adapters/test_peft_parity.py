"""peft itself writes the folder and says what each module's delta is: `get_delta_weight`."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from jlora.adapters.peft import read_adapter  # noqa: E402
from jlora.errors import AdapterError  # noqa: E402
from jlora.models.config import ModelConfig  # noqa: E402
from tests import tiny  # noqa: E402

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ALL},
    "fractional alpha": {"target_modules": ALL, "lora_alpha": 3.7, "r": 5},
    "rank above a page": {"target_modules": ["q_proj", "down_proj"], "r": 40, "lora_alpha": 20},
    "rslora": {"target_modules": ALL, "use_rslora": True, "r": 9, "lora_alpha": 4},
    "all-linear": {"target_modules": "all-linear"},
    "regex target": {"target_modules": r".*layers\.1\..*\.(q|up)_proj"},
    "full names": {"target_modules": ["model.layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"]},
    "one layer": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    "layer number": {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "excluded": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.v_proj"]},
    "excluded regex": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*v_proj"},
    "patterns": {
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 20, "v_proj$": 7},
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 5, r".*\.down_proj": 2.5},
    },
    "first pattern wins": {
        "target_modules": ["q_proj", "o_proj"],
        "rank_pattern": {r".*o_proj": 3, "o_proj": 6},
        "alpha_pattern": {r"(q|k)_proj": 1.5, "q_proj": 9, "proj": 4},
    },
    "patterns and rslora": {
        "target_modules": ["gate_proj", "v_proj"],
        "use_rslora": True,
        "rank_pattern": {"gate_proj": 17},
        "alpha_pattern": {r"layers.0.mlp.gate_proj": 11, "v_proj": 0.25},
    },
    "a pattern that ends inside a word": {"target_modules": ["q_proj"], "rank_pattern": {"proj": 3}},
}  # fmt: skip


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return lambda: LlamaForCausalLM(config), ModelConfig.from_dict(config.to_dict() | {
        "architectures": ["LlamaForCausalLM"]})  # fmt: skip


def make(llama: Any, options: dict[str, Any], folder: Path, dtype: str = "float32") -> Any:
    """A peft model with non-zero lora_B, saved to `folder`."""
    base, _ = llama
    config = peft.LoraConfig(**({"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM"} | options))
    model = peft.get_peft_model(base(), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
                parameter.data = parameter.data.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return model


def peft_deltas(model: Any) -> dict[tuple[int, str], np.ndarray]:
    deltas = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight") and hasattr(layer, "lora_A"):
            words = name.split(".")
            place = int(words[words.index("layers") + 1]), words[-1]
            deltas[place] = layer.get_delta_weight("default").detach().float().numpy()
    return deltas


def our_deltas(adapter: Any) -> dict[tuple[int, str], np.ndarray]:
    return {
        place: pair.scaling * pair.b.astype(np.float32) @ pair.a.astype(np.float32)
        for place, pair in adapter.weights.items()
    }


@pytest.mark.parametrize("case", sorted(CASES))
def test_each_modules_delta_is_pefts(llama: Any, tmp_path: Path, case: str) -> None:
    model = make(llama, CASES[case], tmp_path)
    want, got = peft_deltas(model), our_deltas(read_adapter(tmp_path, llama[1]))
    assert got.keys() == want.keys()
    for place, delta in want.items():
        assert np.abs(delta).max() > 0.5
        np.testing.assert_allclose(got[place], delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bit_adapters_keep_their_values(llama: Any, tmp_path: Path, dtype: str) -> None:
    model = make(llama, CASES["patterns"], tmp_path, dtype)
    adapter = read_adapter(tmp_path, llama[1])
    assert {pair.a.dtype.name for pair in adapter.weights.values()} == {dtype}
    got = our_deltas(adapter)
    for place, delta in peft_deltas(model).items():
        # peft multiplies in float32 and rounds its result to the adapter's 16 bits
        np.testing.assert_allclose(got[place], delta, rtol=2**-8, atol=1e-5)


def test_an_adapter_saved_under_another_name_loads_from_its_folder(
    llama: Any, tmp_path: Path
) -> None:
    base, cfg = llama
    model = peft.get_peft_model(
        base(), peft.LoraConfig(target_modules=["q_proj"], r=4), adapter_name="mine"
    )
    model.save_pretrained(tmp_path)
    assert read_adapter(tmp_path / "mine", cfg).rank == 4


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "pissa, random": ({"target_modules": ["q_proj"], "init_lora_weights": "pissa_niter_2"}, "cannot be"),
    "alora": ({"target_modules": ["q_proj"], "alora_invocation_tokens": [3]}, "aLoRA"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(REFUSED))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_peft_can_save_and_we_do_not_compute_is_refused_by_name(
    llama: Any, tmp_path: Path, case: str
) -> None:
    options, reason = REFUSED[case]
    make(llama, options, tmp_path)
    with pytest.raises(AdapterError, match=reason):
        read_adapter(tmp_path, llama[1])


def test_an_adapter_of_another_base_model_is_refused_with_both_names(
    llama: Any, tmp_path: Path
) -> None:
    make(llama, {"target_modules": ["q_proj"]}, tmp_path)
    other = ModelConfig.from_dict(tiny.model_config("llama") | {"_name_or_path": "other"})
    with pytest.raises(AdapterError, match=r"another base model\?.*'other'"):
        read_adapter(tmp_path, other)
