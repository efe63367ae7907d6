"""Every kind of adapter, merged: transformers gives the logits that peft gives unmerged."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from jlora import merge
from jlora.models.config import ModelConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tests.models.test_added_tokens import ADDED, FORMS, expected, make_added  # noqa: E402
from tests.models.test_decoder_kinds import KINDS, make_adapter, reference  # noqa: E402
from tests.server.test_added_tokens import give_tokenizer  # noqa: E402


def run(model, adapters, out, *flags):
    argv = ["--model", str(model), "--adapters", *map(str, adapters), "--output", str(out)]
    assert merge.main([*argv, *flags]) == 0
    return out


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit):
        run(*arguments)
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize(
    "family", ["llama_bias", "llama_odd", "phi3"], ids=["untied", "tied", "fused"]
)
def test_the_merged_checkpoint_gives_the_logits_of_the_unmerged_adapter(
    tiny_model, tmp_path, capsys, family, kind
):
    model = tiny_model(family)
    adapter = make_adapter(model, tmp_path / "a", kind)
    if family in ("llama_odd", "phi3") and kind == "lora_bias":
        # this base has no biases: peft's own merge raises too
        error = refused(capsys, model, [adapter], tmp_path / "out")
        assert "has no model.layers.0.mlp.down_proj.bias" in error
        assert "serve the adapter unmerged" in error
        assert not (tmp_path / "out").exists()
        return
    plain, expected = reference(model, None), reference(model, adapter)
    got = reference(run(model, [adapter], tmp_path / "out"), None)
    assert np.abs(expected - plain).max() > 0.5
    size = max(1.0, np.abs(expected).max() / 10)  # the tolerance is for logits of size about 10
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-3 * size)


def test_two_dora_adapters_and_their_biases_join_as_the_weighted_sum_of_what_each_changes(
    tiny_model, tmp_path
):
    model = tiny_model("llama_bias")
    kinds = ["dora", "bias_all"]
    folders = [make_adapter(model, tmp_path / kind, kind) for kind in kinds]
    shares = (0.75, -0.5)
    out = run(model, folders, tmp_path / "out", "--weights", *map(str, shares))
    got, base = (load_file(folder / "model.safetensors") for folder in (out, model))
    expected = dict(base)
    for folder, share in zip(folders, shares, strict=True):
        alone = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        alone = peft.PeftModel.from_pretrained(alone, folder).merge_and_unload()
        for name, tensor in alone.state_dict().items():
            expected[name] = expected[name] + share * (tensor.numpy() - base[name])
    changed = [name for name in base if not np.array_equal(base[name], expected[name])]
    assert any(name.endswith("bias") for name in changed)
    assert any(name.endswith("weight") for name in changed)
    for name in base:
        np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=1e-5, err_msg=name)


def test_dora_is_refused_by_name_where_only_plain_pairs_can_join(tiny_model, tmp_path, capsys):
    model = tiny_model("llama_bias")
    folders = [make_adapter(model, tmp_path / kind, kind) for kind in ("dora", "plain")]
    ties = ["--combination-type", "ties", "--density", "0.5"]
    error = refused(capsys, model, folders, tmp_path / "out", *ties)
    assert (
        "is changed by DoRA, a bias or a trained norm, which combination-type ties cannot" in error
    )
    argv = ["--model", str(model), "--adapters", *map(str, folders)]
    with pytest.raises(SystemExit):
        merge.main([*argv, "--output-adapter", str(tmp_path / "one")])
    assert "cannot be joined to a plain adapter" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["embedding_head_linear", "saved_head"])
@pytest.mark.parametrize("family", ["llama_bias", "llama_odd"], ids=["untied", "tied"])
def test_joined_adapters_of_the_ends_are_an_adapter_that_peft_reads(
    tiny_model, tmp_path, family, kind
):
    model = tiny_model(family)
    folder = make_adapter(model, tmp_path / "a", kind)
    other = make_adapter(model, tmp_path / "b", "plain")
    joined = tmp_path / "joined"
    shares = ["--weights", "0.5", "0.25"]
    out = run(model, [folder, other], tmp_path / "out", *shares, "--output-adapter", str(joined))
    got, expected = reference(model, joined), reference(out, None)
    assert np.abs(expected - reference(model, None)).max() > 0.5
    size = max(1.0, np.abs(expected).max() / 10)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-3 * size)


def test_verify_serves_the_adapters_own_folder_with_the_support_that_it_needs(
    tiny_model, tmp_path, monkeypatch
):
    model = tiny_model("llama_bias")
    folder = make_adapter(model, tmp_path / "a", "dora_embedding_head")
    asked = []
    monkeypatch.setattr(merge, "compare", lambda *args: asked.append(args) or (0.0, 1.0))
    out = run(model, [folder], tmp_path / "out", "--verify")
    assert asked == [(str(model), str(folder), str(out), 4, "full", 0)]


def test_tokens_that_an_adapter_added_come_with_its_tokenizer(tiny_model, tmp_path, capsys):
    model = tiny_model("llama_bias", vocab_size=330)  # its tokenizer has 320
    adapter = make_adapter(model, tmp_path / "a", "tokens")
    data = json.loads((model / "tokenizer.json").read_text())
    text = "<|tool|>"

    def add(number: int) -> None:
        token = {**data["added_tokens"][0], "id": number, "content": text}
        changed = {**data, "added_tokens": [*data["added_tokens"], token]}
        (adapter / "tokenizer.json").write_text(json.dumps(changed))

    add(320)
    out = run(model, [adapter], tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.encode(text, add_special_tokens=False) == [320]
    add(400)
    error = refused(capsys, model, [adapter], tmp_path / "beyond")
    assert "adds '<|tool|>' as token 400, the base has rows for 330 tokens" in error
    (adapter / "tokenizer.json").write_text(json.dumps(data, indent=7))  # other words, same tokens
    out = run(model, [adapter], tmp_path / "same")
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("family", ["llama_bias", "llama_odd"], ids=["untied", "tied"])
def test_a_resized_vocabulary_is_merged_with_its_tokenizer(tiny_model, tmp_path, family, form):
    model = tiny_model(family)
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    adapter = make_added(model, tmp_path / "a", form)
    give_tokenizer(model, adapter, vocab, eos="<|done|>")
    tokens = [5, vocab, 9, vocab + 2, 11, 7, vocab + 1, 8]
    want = expected(model, adapter, tokens)
    out = run(model, [adapter], tmp_path / "out")
    merged = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert merged.config.vocab_size == vocab + ADDED == len(merged.get_input_embeddings().weight)
    with torch.no_grad():
        got = merged(torch.tensor([tokens])).logits[0].numpy()
    size = max(1.0, np.abs(want).max() / 10)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-3 * size)
    assert np.abs(want[:, vocab:]).max() > 0.5
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.encode("<|tool|>", add_special_tokens=False) == [vocab]
    assert tokenizer.eos_token == "<|done|>"
    assert vocab + 2 in ModelConfig.from_folder(out).eos_ids


def test_an_adapter_with_tokens_joins_none_with_others_and_no_plain_adapter(
    tiny_model, tmp_path, capsys
):
    model = tiny_model("llama_bias")
    folders = [make_added(model, tmp_path / form, form) for form in ("saved", "pairs")]
    assert "add tokens of their own" in refused(capsys, model, folders, tmp_path / "out")
    argv = ["--model", str(model), "--adapters", str(folders[0])]
    with pytest.raises(SystemExit):
        merge.main([*argv, "--output-adapter", str(tmp_path / "one")])
    assert "adds 3 tokens: it cannot be joined to a plain adapter" in capsys.readouterr().err
    # beside one without: the other's rows of new tokens are zeros
    plain = make_adapter(model, tmp_path / "plain", "embedding_head_linear")
    out = run(model, [folders[0], plain], tmp_path / "both", "--weights", "1", "0.5")
    assert len(load_file(out / "model.safetensors")["lm_head.weight"]) == 320 + ADDED


def test_verify_knows_the_new_tokens(tiny_model, tmp_path, capsys):
    model = tiny_model("llama_bias")
    adapter = make_added(model, tmp_path / "a", "saved")
    run(model, [adapter], tmp_path / "out", "--verify")
    assert "verified: log-probabilities differ" in capsys.readouterr().out
