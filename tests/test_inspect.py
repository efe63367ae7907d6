"""`python -m jlora.inspect`: norms against peft's own deltas, and what it says of bad folders."""

import json
import sys

import numpy as np
import pytest

from jlora import inspect
from tests.tiny import make_adapter, make_model


@pytest.fixture
def model(tmp_path):
    return make_model("llama", tmp_path / "base")


def report(capsys, *argv) -> dict:
    assert inspect.main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_norms_and_shares_equal_those_of_pefts_deltas(model, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    folder = make_adapter(
        model, tmp_path / "a", r=4, rank_pattern={"q_proj": 8}, alpha_pattern={"up_proj": 2.5}
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    wrapped = peft.PeftModel.from_pretrained(base, folder)
    projections = {row["name"]: row for row in report(capsys, folder)["projections"]}
    assert len(projections) == 7
    for name, row in projections.items():
        block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        for layer in range(2):
            module = getattr(getattr(wrapped.base_model.model.model.layers[layer], block), name)
            delta = torch.linalg.norm(module.get_delta_weight("default")).item()
            whole = torch.linalg.norm(module.base_layer.weight).item()
            np.testing.assert_allclose(row["norms"][layer], delta, rtol=1e-4)
            np.testing.assert_allclose(row["shares"][layer], delta / whole, rtol=1e-4)
    assert projections["q_proj"]["ranks"] == [8]
    assert projections["up_proj"]["scalings"] == [2.5 / 4]


def test_the_table_names_each_projection_that_is_touched_and_no_other(model, tmp_path, capsys):
    folder = make_adapter(model, tmp_path / "a", targets=["q_proj", "down_proj"], layers=[1])
    assert inspect.main([str(folder), "--model", str(model)]) == 0
    out = capsys.readouterr().out
    assert "q_proj" in out
    assert "down_proj" in out
    assert "v_proj" not in out
    assert "2 modules bound" in out


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ([], "an adapter is needed"),
        (["nowhere", "--model", "nowhere"], "is no folder here"),
    ],
)
def test_a_mistake_is_one_line(argv, reason, capsys):
    with pytest.raises(SystemExit) as stopped:
        inspect.main(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert reason in error
    assert error.count("\n") == 1


def test_what_would_be_refused_is_told_with_the_same_reason_and_with_all_that_is_known(
    model, tmp_path, capsys
):
    folder = make_adapter(model, tmp_path / "a", r=4, targets=["q_proj"])
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"kasa_config": {"beta": 1}, "use_rslora": True})
    )
    capsys.readouterr()  # what transformers printed
    for flags in ([], ["--json"]):
        with pytest.raises(SystemExit) as stopped:
            inspect.main([str(folder), "--model", str(model), *flags])
        assert stopped.value.code == 2
        shown = capsys.readouterr()
        assert "KaSA (kasa_config) is not supported" in shown.err
        assert shown.err.count("\n") == 1
        if flags:
            report = json.loads(shown.out)
            assert "KaSA" in report["refused"]
            assert report["rank"] == 4
            told = {(v["system"].split()[0], v["outcome"]) for v in report["elsewhere"]}
            assert told == {("vLLM", "refuses"), ("SGLang", "wrong")}
        else:
            assert "SGLang" in shown.out


def test_dora_is_measured_as_peft_merges_it(model, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    targets = ["q_proj", "embed_tokens"]
    config = peft.LoraConfig(r=4, target_modules=targets, use_dora=True, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(base, config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path / "a")
    layers = wrapped.base_model.model.model.layers
    modules = [layer.self_attn.q_proj for layer in layers]
    modules.append(wrapped.base_model.model.model.embed_tokens)
    before = [module.base_layer.weight.detach().clone() for module in modules]
    wrapped.merge_adapter()
    expected = [
        torch.linalg.norm(module.base_layer.weight.detach() - old).item()
        for module, old in zip(modules, before, strict=True)
    ]
    query, embed = report(capsys, tmp_path / "a", "--model", model)["projections"]
    assert (query["name"], query["dora"], embed["name"]) == ("q_proj", True, "embed_tokens")
    assert embed["numbers"] == [-1]
    np.testing.assert_allclose([*query["norms"], *embed["norms"]], expected, rtol=1e-4)
    shares = [e / torch.linalg.norm(old).item() for e, old in zip(expected, before, strict=True)]
    np.testing.assert_allclose([*query["shares"], *embed["shares"]], shares, rtol=1e-4)


def test_trained_norms_and_added_tokens_are_told(model, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    old = [layer.input_layernorm.weight.detach().clone() for layer in base.model.layers]
    base.resize_token_embeddings(base.config.vocab_size + 2, mean_resizing=False)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["input_layernorm"])
    wrapped = peft.get_peft_model(base, config)
    new = [layer.input_layernorm.weight for layer in wrapped.base_model.model.model.layers]
    with torch.no_grad():
        for tensor in new:
            tensor.add_(torch.randn_like(tensor))
    wrapped.save_pretrained(tmp_path / "a")
    told = report(capsys, tmp_path / "a", "--model", model)
    assert told["added_tokens"] == 2
    rows = {row["name"]: row for row in told["projections"]}
    assert sorted(rows) == ["embed_tokens", "input_layernorm", "lm_head", "q_proj"]
    assert [rows[name]["ranks"] for name in ("embed_tokens", "lm_head")] == [[2], [2]]
    norm = rows["input_layernorm"]
    moved = [torch.linalg.norm(a - b).item() for a, b in zip(new, old, strict=True)]
    np.testing.assert_allclose(norm["norms"], moved, rtol=1e-5)
    whole = [torch.linalg.norm(b).item() for b in old]
    np.testing.assert_allclose(norm["shares"], np.divide(moved, whole), rtol=1e-5)
    assert (norm["parameters"], norm["biases"], norm["ranks"]) == (2 * 64, 0, [])
    assert inspect.main([str(tmp_path / "a"), "--model", str(model)]) == 0
    assert "adds 2 tokens" in capsys.readouterr().out


def test_without_a_base_the_norms_are_told_and_that_nothing_was_checked(model, tmp_path, capsys):
    folder = make_adapter(model, tmp_path / "a", r=4, alpha_pattern={"up_proj": 2.5})
    bound = report(capsys, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "org/name"})
    )
    free = report(capsys, folder)
    assert (free["model"], free["uid"], free["refused"]) == (None, None, None)
    known = {row["name"]: row for row in bound["projections"]}
    assert known.keys() == {row["name"] for row in free["projections"]}
    for row in free["projections"]:
        same = known[row["name"]]
        assert row["shares"] == []
        assert row["scalings"] == same["scalings"]
        np.testing.assert_allclose(row["norms"], same["norms"], rtol=1e-5)
    assert inspect.main([str(folder)]) == 0
    assert "give --model BASE" in capsys.readouterr().out


@pytest.mark.parametrize("bound", [True, False])
def test_garbled_weights_are_refused_and_the_config_is_still_told(model, tmp_path, capsys, bound):
    folder = make_adapter(model, tmp_path / "a", rslora=True)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    if not bound:
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = None
        (folder / "adapter_config.json").write_text(json.dumps(config))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        inspect.main([str(folder), "--json"])
    shown = capsys.readouterr()
    assert "is not a safetensors file or is truncated" in shown.err
    assert "truncated" in json.loads(shown.out)["refused"]


def test_a_torch_file_is_told_without_a_base(model, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    load = pytest.importorskip("safetensors.torch").load_file
    folder = make_adapter(model, tmp_path / "a", r=4)
    expected = report(capsys, folder)["projections"]
    weights = folder / "adapter_model.safetensors"
    torch.save(load(weights), folder / "adapter_model.bin")
    weights.unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (folder / "adapter_config.json").write_text(json.dumps(config))
    got = {row["name"]: row["norms"] for row in report(capsys, folder)["projections"]}
    assert got.keys() == {row["name"] for row in expected}
    for row in expected:
        np.testing.assert_allclose(got[row["name"]], row["norms"], rtol=1e-5)


@pytest.mark.parametrize("bound", [True, False])
def test_a_plot_is_a_picture_and_overwrites_nothing(model, tmp_path, capsys, bound):
    pytest.importorskip("matplotlib")
    folder = make_adapter(model, tmp_path / "a", targets=["q_proj", "up_proj"])
    if not bound:
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = None
        (folder / "adapter_config.json").write_text(json.dumps(config))
    picture = tmp_path / "norms.png"
    assert inspect.main([str(folder), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    for path, reason in (
        (picture, "exists"),
        (tmp_path / "norms.txt", ".png"),
        (tmp_path / "nowhere" / "norms.png", "cannot be written"),
    ):
        with pytest.raises(SystemExit):
            inspect.main([str(folder), "--plot", str(path)])
        error = capsys.readouterr().err
        assert reason in error
        assert error.count("\n") == 1


def test_without_matplotlib_the_plot_is_one_line_with_what_to_install(
    model, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = make_adapter(model, tmp_path / "a", targets=["q_proj"])
    capsys.readouterr()  # what transformers printed
    with pytest.raises(SystemExit):
        inspect.main([str(folder), "--plot", str(tmp_path / "norms.png")])
    error = capsys.readouterr().err
    assert "pip install 'jlora[plot]'" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "norms.png").exists()
