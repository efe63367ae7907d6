"""The tiny checkpoints are real: transformers and peft load them whole, and their effects are large."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.tiny import FAMILIES, make_adapter

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

IDS = np.random.default_rng(3).integers(4, 320, (1, 40))


def _logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(IDS)).logits.numpy()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dialect", [4, 5])
def test_transformers_loads_every_family_whole_and_logits_are_about_ten(
    tiny_model, family, dialect
):
    folder = tiny_model(family, dialect=dialect, shards=dialect - 3)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        output_loading_info=True,
        experts_implementation="eager",  # others want experts of even width
    )
    assert not any(info.values()), info
    assert 5 < np.abs(_logits(model)).max() < 30


@pytest.mark.parametrize("options", [{}, {"rslora": True, "r": 5, "alpha": 7.5, "layers": [1]}])
def test_peft_loads_an_adapter_whole_and_its_effect_is_large(tiny_model, tmp_path, options):
    folder = tiny_model("llama")
    adapter = make_adapter(folder, tmp_path / "a", **options)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = _logits(base)
    model = peft.PeftModel.from_pretrained(base, adapter)
    assert np.abs(_logits(model) - before).max() > 1


def test_the_adapter_written_with_numpy_equals_the_one_that_peft_writes(tiny_model, tmp_path):
    options = {
        "r": 4,
        "alpha": 6,
        "rslora": True,
        "targets": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 6},
        "alpha_pattern": {"layers.0.mlp.down_proj": 3},
        "dtype": "bfloat16",
    }
    mine, theirs = (
        make_adapter(tiny_model("qwen3"), tmp_path / writer, writer=writer, **options)
        for writer in ("numpy", "peft")
    )
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (mine, theirs))
    assert a.keys() == b.keys()
    assert len(a) == 8
    for key in a:
        assert a[key].dtype == b[key].dtype
        np.testing.assert_array_equal(a[key], b[key])
    a, b = (json.loads((folder / "adapter_config.json").read_text()) for folder in (mine, theirs))
    for config in (a, b):
        config["target_modules"].sort()
    assert a.items() <= b.items()


def test_the_tokenizer_round_trips_and_renders_a_chat(tiny_model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model("llama"))
    text = "the fox: 12 über 你好 🦊"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) == 320
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_token_id] == [2]
