"""Merged checkpoints as files: tied ends, types, what is copied, all compared with transformers."""

import json
import stat

import numpy as np
import pytest
from safetensors.numpy import load_file

from jlora.errors import ModelError
from jlora.export import checkpoint
from jlora.export.changes import EMBED, HEAD, LoraChange
from jlora.export.checkpoint import merge_checkpoint
from jlora.export.svd import Pair
from tests.tiny import VOCAB, make_model, model_config

IDS = [[5, 9, 100, 42, 7, 250, 3, 66]]


def delta(rows, columns, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((4, columns), dtype=np.float32)
    b = rng.standard_normal((rows, 4), dtype=np.float32) * np.float32(0.2)
    return LoraChange(pair=Pair(a=a, b=b))


def loaded(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def logits(model) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


@pytest.mark.parametrize("ends", [[HEAD], [EMBED], [EMBED, HEAD]], ids=["head", "embed", "both"])
def test_a_tied_base_is_untied_where_its_ends_change_apart(tmp_path, ends):
    """The oracle is transformers' model with both ends set by hand; peft's own merge changes both."""
    torch = pytest.importorskip("torch")
    base = make_model("llama_tied", tmp_path / "base")
    changes = {name: delta(VOCAB, 64, seed) for seed, name in enumerate(ends)}
    makes = {name: (lambda change=change: change) for name, change in changes.items()}
    merge_checkpoint(base, makes, tmp_path / "out")
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )

    model = loaded(base)
    plain = logits(model)
    weight = model.model.embed_tokens.weight.detach().clone()
    new = {
        name: torch.from_numpy(changes[name].rows(weight.numpy(), 0)) if name in changes else weight
        for name in (EMBED, HEAD)
    }
    model.model.embed_tokens.weight = torch.nn.Parameter(new[EMBED])
    model.lm_head.weight = torch.nn.Parameter(new[HEAD].clone())
    expected, got = logits(model), logits(loaded(tmp_path / "out"))
    assert np.abs(expected - plain).max() > 1
    assert np.abs(got - expected).max() < 1e-4


def test_a_tied_base_stays_tied_where_no_end_changes(tmp_path):
    base = make_model("llama_tied", tmp_path / "base")
    merge_checkpoint(base, {}, tmp_path / "out")
    assert HEAD not in load_file(tmp_path / "out" / "model.safetensors")
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_a_change_of_a_tensor_that_the_base_lacks_is_refused_by_name(tmp_path):
    base = make_model("llama", tmp_path / "base")
    bias = "model.layers.0.self_attn.q_proj.bias"
    with pytest.raises(ModelError, match=bias):
        merge_checkpoint(base, {bias: lambda: delta(64, 64)}, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("block", [1, 700, 1 << 24])
def test_the_size_of_a_block_changes_nothing(tmp_path, monkeypatch, block):
    monkeypatch.setattr(checkpoint, "BLOCK", block)
    base = make_model("llama", tmp_path / "base", dtype="bfloat16")
    name = "model.layers.1.mlp.up_proj.weight"
    change = delta(96, 64)
    assert change.pair is not None
    merge_checkpoint(base, {name: lambda: change}, tmp_path / "out")
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "out"))
    assert before.keys() == after.keys()
    for other in before.keys() - {name}:
        assert np.array_equal(before[other].view(np.uint16), after[other].view(np.uint16))
    expected = before[name].astype(np.float32) + change.pair.b @ change.pair.a
    np.testing.assert_allclose(after[name].astype(np.float32), expected, rtol=2**-8, atol=1e-6)


def test_all_files_but_weights_and_adapters_come_along_readable_for_all(tmp_path):
    base = make_model("llama", tmp_path / "base")
    more = {
        "special_tokens_map.json": "{}",
        "chat_template.jinja": "{{ 1 }}",
        "additional_chat_templates/tool.jinja": "{{ 2 }}",
        "LICENSE": "x",
    }
    left = {
        "pytorch_model.bin": "x",
        "pytorch_model.bin.index.json": "{}",
        "consolidated.00.pth": "x",
        "adapter_config.json": "{}",
        "original/params.json": "{}",
    }
    for name, text in (more | left).items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(text)
        (base / name).chmod(0o600)
    merge_checkpoint(base, {}, tmp_path / "out")
    found = {
        str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*") if f.is_file()
    }
    assert found == more.keys() | {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    modes = {stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / "out").rglob("*") if f.is_file()}
    assert modes == {0o644}


@pytest.mark.parametrize("where", ["tokenizer_config", "file", "both"])
def test_transformers_takes_the_adapters_chat_template(tmp_path, where):
    transformers = pytest.importorskip("transformers")
    base = make_model("llama", tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text())
    if where != "tokenizer_config":
        (base / "chat_template.jinja").write_text("base")
    if where == "file":
        del config["chat_template"]
        (base / "tokenizer_config.json").write_text(json.dumps(config))
    merge_checkpoint(base, {}, tmp_path / "out", chat_template="adapter")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == "adapter"
    saved = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert saved.get("chat_template", "adapter") == "adapter"


def test_a_model_that_also_sees_keeps_its_names_and_other_parts(tmp_path):
    """Merged, then loaded by transformers: the text part changed, the vision part bit for bit there."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.Gemma3Config(
        text_config=model_config("gemma3") | {"image_token_index": 300},
        vision_config={"hidden_size": 16, "image_size": 28, "patch_size": 14, **small},
        mm_tokens_per_image=1,
        image_token_index=300,
    )
    torch.manual_seed(3)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "base")
    query = "model.layers.0.self_attn.q_proj.weight"
    heads = model.model.language_model.layers[0].self_attn.q_proj.weight.shape[0]
    parts = {query: delta(heads, 64), HEAD: delta(VOCAB, 64, 1)}
    makes = {name: (lambda change=change: change) for name, change in parts.items()}
    merge_checkpoint(tmp_path / "base", makes, tmp_path / "out")

    plain = logits(model)
    with torch.no_grad():
        weight = model.model.language_model.layers[0].self_attn.q_proj.weight
        weight.copy_(torch.from_numpy(parts[query].rows(weight.numpy(), 0)))
        head = model.model.language_model.embed_tokens.weight.clone().numpy()
        model.lm_head.weight = torch.nn.Parameter(torch.from_numpy(parts[HEAD].rows(head, 0)))
    expected = logits(model)
    merged = transformers.Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert np.abs(expected - plain).max() > 1
    assert np.abs(logits(merged) - expected).max() < 1e-4
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("base", "out"))
    assert after.keys() - before.keys() == {"language_model.lm_head.weight"}
    assert before.keys() <= after.keys()
    for name in before:
        if name.startswith("vision_tower"):
            assert np.array_equal(before[name], after[name])
