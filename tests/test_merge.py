"""Merged checkpoints against peft's own merges, loaded by transformers."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from jlora import merge
from jlora.adapters.peft import read_adapter
from jlora.export.changes import lora_changes
from jlora.export.checkpoint import merge_checkpoint
from jlora.export.combine import Recipe, combine
from jlora.export.options import MergeOptions
from jlora.models.config import ModelConfig
from tests.tiny import make_adapter, make_model

IDS = [[5, 9, 100, 42, 7, 250, 3, 66]]


@pytest.fixture
def parts(tmp_path):
    model = make_model("llama_tied", tmp_path / "base")
    a = make_adapter(model, tmp_path / "a", r=8, alpha=12, seed=1)
    b = make_adapter(model, tmp_path / "b", r=8, alpha=16, targets=["q_proj", "down_proj"], seed=2)
    return model, a, b


def run(parts, tmp_path, *flags, adapters=1):
    model, *folders = parts
    chosen = [str(folder) for folder in folders[:adapters]]
    argv = ["--model", str(model), "--adapters", *chosen, "--output", str(tmp_path / "out"), *flags]
    assert merge.main(argv) == 0
    return tmp_path / "out"


def logits(model) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.float().numpy()


def loaded(folder):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def wrapped(parts, *names):
    peft = pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(loaded(parts[0]), parts[1], adapter_name="a")
    for name, folder in zip(names, parts[2:], strict=True):
        model.load_adapter(str(folder), adapter_name=name)
    return model.eval()


def test_a_merged_checkpoint_gives_transformers_the_logits_of_pefts_adapter(parts, tmp_path):
    base, expected = logits(loaded(parts[0])), logits(wrapped(parts[:2]))
    got = logits(loaded(run(parts, tmp_path)))
    assert np.abs(expected - base).max() > 1
    assert np.abs(got - expected).max() < 1e-3


def test_a_merge_into_fused_projections_gives_transformers_pefts_logits_and_verifies(tmp_path):
    model = make_model("phi3", tmp_path / "base")
    parts = model, make_adapter(model, tmp_path / "a", r=8, alpha=12, seed=1)
    base, expected = logits(loaded(parts[0])), logits(wrapped(parts))
    got = logits(loaded(run(parts, tmp_path, "--verify")))
    assert np.abs(expected - base).max() > 1
    assert np.abs(got - expected).max() < 1e-3


@pytest.mark.parametrize("combination", ["cat", "linear"])
def test_combined_adapters_equal_pefts_add_weighted_adapter(parts, tmp_path, combination):
    flags = ("--weights", "0.7", "-0.4", "--combination-type", combination)
    got = logits(loaded(run(parts, tmp_path, *flags, adapters=2)))
    model = wrapped(parts, "b")
    model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "both", combination_type=combination)
    model.set_adapter("both")
    expected = logits(model)
    only_one = tmp_path / "one"
    only_one.mkdir()
    one = logits(loaded(run(parts, only_one, "--weights", "0.7")))
    assert np.abs(expected - one).max() > 0.3  # the second adapter matters
    assert np.abs(got - expected).max() < 1e-3


def test_linear_refuses_adapters_of_different_ranks(parts, tmp_path, capsys):
    model, a, _ = parts
    other = make_adapter(model, tmp_path / "r4", r=4, seed=3)
    with pytest.raises(SystemExit) as stopped:
        run((model, a, other), tmp_path, "--combination-type", "linear", adapters=2)
    assert stopped.value.code == 2
    assert "ranks [4, 8]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_shards_hold_every_tensor_once_and_config_and_tokenizer_come_along(parts, tmp_path):
    out = run(parts, tmp_path, "--max-shard-size", "40KB", "--dtype", "bfloat16")
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 3
    assert set(index) == set(load_file(parts[0] / "model.safetensors"))
    for file in set(index.values()):
        tensors = load_file(out / file)
        assert {name for name in index if index[name] == file} == set(tensors)
        assert {tensor.dtype.name for tensor in tensors.values()} == {"bfloat16"}
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (out / "tokenizer.json").read_bytes() == (parts[0] / "tokenizer.json").read_bytes()


def test_only_the_adapters_tensors_change_and_the_rest_stays_bit_for_bit(parts, tmp_path):
    model, _, b = parts
    out = run((model, b), tmp_path)
    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {
        f"model.layers.{layer}.{module}.weight"
        for layer in range(2)
        for module in ("self_attn.q_proj", "mlp.down_proj")
    }


def test_an_existing_output_is_never_touched(parts, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(SystemExit):
        run(parts, tmp_path)
    assert "exists" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["precious"]


def test_ctrl_c_leaves_nothing_half_made(parts, tmp_path):
    model, a, _ = parts
    before = set(tmp_path.iterdir())

    def interrupted(done, total):
        if done == 5:
            raise KeyboardInterrupt

    cfg = ModelConfig.from_folder(model)
    changes = lora_changes(combine([read_adapter(a, cfg)], [1.0], Recipe()))
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoint(model, changes, tmp_path / "out", progress=interrupted)
    assert set(tmp_path.iterdir()) == before


def test_values_that_float16_cannot_hold_are_refused_by_name(parts, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(parts, tmp_path, "--dtype", "float16", "--weights", "1e7")
    error = capsys.readouterr().err
    assert "model.layers.0" in error
    assert "bfloat16" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--weights", "1", "2"], "2 weights for 1 adapters"),
        (["--combination-type", "average"], "invalid choice"),
        (["--max-shard-size", "many"], "is not a size"),
    ],
)
def test_a_wrong_flag_is_one_line(parts, tmp_path, capsys, flags, reason):
    with pytest.raises(SystemExit) as stopped:
        run(parts, tmp_path, *flags)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert reason in error
    assert error.count("\n") == 1


def test_verify_compares_the_result_with_the_unmerged_adapter(parts, tmp_path):
    run(parts, tmp_path, "--weights", "0.7", "0.5", adapters=2)
    options = MergeOptions(
        model=str(parts[0]),
        adapters=(str(parts[1]), str(parts[2])),
        weights=(0.7, 0.5),
        output=str(tmp_path / "out"),
    )
    difference, effect = merge.verify(options)
    assert effect > 0.3
    assert difference < 1e-3
    wrong = MergeOptions(model=options.model, adapters=options.adapters[:1], output=options.output)
    assert merge.verify(wrong)[0] > 0.1
