"""The way back: an adapter out of the difference of two checkpoints, loaded by peft and by jlora."""

import json
import stat

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jlora import merge
from jlora.adapters.peft import read_adapter
from jlora.models.config import ModelConfig
from tests.tiny import make_adapter, make_model

IDS = [[5, 9, 100, 42, 7, 250, 3, 66]]


@pytest.fixture
def base(tmp_path):
    return make_model("llama_tied", tmp_path / "base")


def merged(base, tmp_path, **options):
    adapter = make_adapter(base, tmp_path / "lora", **options)
    out = tmp_path / "tuned"
    argv = ["--model", str(base), "--adapters", str(adapter), "--output", str(out)]
    assert merge.main(argv) == 0
    return adapter, out


def run(base, tuned, out, *flags):
    argv = ["--extract", str(base), str(tuned), "--output", str(out), *map(str, flags)]
    assert merge.main(argv) == 0
    return out


def changed(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_merged_adapter_comes_back_and_peft_gives_the_tuned_models_logits(base, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    _, tuned = merged(base, tmp_path, r=6)
    out = run(base, tuned, tmp_path / "out", "--rank", 6)

    def logits(model):
        with torch.no_grad():
            return model.eval()(torch.tensor(IDS)).logits.numpy()

    def load(folder):
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")

    plain, expected = logits(load(base)), logits(load(tuned))
    got = logits(peft.PeftModel.from_pretrained(load(base), out))
    assert np.abs(expected - plain).max() > 1
    assert np.abs(got - expected).max() < 1e-3


def test_the_error_of_each_module_is_that_of_the_best_approximation(base, tmp_path, capsys):
    adapter, tuned = merged(base, tmp_path, r=16)
    capsys.readouterr()
    out = run(base, tuned, tmp_path / "out", "--rank", 4)
    shown = capsys.readouterr().out
    cfg = ModelConfig.from_folder(base)
    whole, cut = read_adapter(adapter, cfg), read_adapter(out, cfg)
    assert cut.rank == 4
    assert cut.weights.keys() == whole.weights.keys()
    for place, pair in whole.weights.items():
        delta = pair.scaling * (pair.b @ pair.a)
        values = np.linalg.svd(delta, compute_uv=False)
        least = np.linalg.norm(values[4:]) / np.linalg.norm(values)
        mine = cut.weights[place]
        error = np.linalg.norm(delta - mine.b @ mine.a) / np.linalg.norm(delta)
        np.testing.assert_allclose(error, least, rtol=1e-3)
        assert f"{least:.2%}" in shown


def test_modules_that_do_not_differ_are_left_out_and_the_files_are_readable(base, tmp_path):
    _, tuned = merged(base, tmp_path, r=4, targets=["q_proj", "down_proj"], layers=[1])
    out = run(base, tuned, tmp_path / "out")  # rank 32 by default
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (32, 32)
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert config["layers_to_transform"] == [1]
    assert {stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()} == {0o644}


def test_modules_that_are_no_rectangle_of_layers_and_names_are_named_in_full(base, tmp_path):
    tuned = make_model("llama_tied", tmp_path / "tuned")
    odd = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"]

    def edit(tensors):
        for name in odd:
            tensors[name] = tensors[name] * 1.5

    changed(tuned, edit)
    out = run(base, tuned, tmp_path / "out", "--rank", 8)
    adapter = read_adapter(out, ModelConfig.from_folder(base))
    assert sorted(adapter.weights) == [(0, "q_proj"), (1, "up_proj")]


def test_what_no_lora_can_hold_is_named_with_its_size(base, tmp_path, capsys):
    _, tuned = merged(base, tmp_path, r=4)

    def edit(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.25
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 1.5

    changed(tuned, edit)
    config = json.loads((tuned / "config.json").read_text())
    config |= {"tie_word_embeddings": False, "rope_theta": 5e5}
    (tuned / "config.json").write_text(json.dumps(config))
    run(base, tuned, tmp_path / "out", "--rank", 4)
    error = capsys.readouterr().err
    assert "2 tensors differ that LoRA cannot hold" in error
    assert "lm_head.weight (50.00% of its norm), model.norm.weight (25.00%" in error
    assert "config.json differs in rope" in error


def test_missing_extra_and_misshaped_tensors_are_refused_by_name(base, tmp_path, capsys):
    tuned = make_model("llama_bias", tmp_path / "wider", tie_word_embeddings=True, vocab_size=330)
    with pytest.raises(SystemExit) as stopped:
        run(base, tuned, tmp_path / "out")
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1
    assert "model.embed_tokens.weight is [330, 64], the base's is [320, 64]" in error
    assert "14 not in the base: model.layers.0.mlp.down_proj.bias" in error
    with pytest.raises(SystemExit):
        run(tuned, base, tmp_path / "out")
    assert "14 missing: model.layers.0." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_equal_checkpoints_hold_no_adapter(base, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(base, base, tmp_path / "out")
    assert "no linear of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_tuned_models_chat_template_comes_along_and_verify_compares(base, tmp_path, capsys):
    _, tuned = merged(base, tmp_path, r=4)
    (tuned / "chat_template.jinja").write_text("{{ 'tuned' }}")
    out = run(base, tuned, tmp_path / "out", "--rank", 4, "--dtype", "bfloat16", "--verify")
    assert (out / "chat_template.jinja").read_text() == "{{ 'tuned' }}"
    assert {t.dtype.name for t in load_file(out / "adapter_model.safetensors").values()} == {
        "bfloat16"
    }
    line = capsys.readouterr().out.splitlines()[-1]
    difference, effect = line.split(" by ")[1].split()[0], line.split()[-1]
    assert float(difference) < 0.1 < 1 < float(effect)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--extract", "a"], "takes two folders"),
        (["--extract", "a", "b", "--adapters", "c"], "takes no --adapters"),
        (["--extract", "a", "b", "--rank", "0"], "at least 1"),
        (["--rank", "4", "--model", "a", "--adapters", "b"], "--rank is for --extract"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(tmp_path, capsys, flags, reason):
    with pytest.raises(SystemExit) as stopped:
        merge.main([*flags, "--output", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert reason in error
    assert error.count("\n") == 1
