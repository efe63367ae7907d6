"""`python -m jlora.inspect`: norms against peft's own deltas, and what it says of bad folders."""

import json

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


def test_what_would_be_refused_is_refused_here_with_the_same_reason(model, tmp_path, capsys):
    folder = make_adapter(model, tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(SystemExit):
        inspect.main([str(folder), "--model", str(model)])
    assert "DoRA" in capsys.readouterr().err
