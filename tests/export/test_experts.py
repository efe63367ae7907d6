"""Adapters on routers and experts: merged for good and in place, joined, taken from a tuned model."""

import json
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from jlora import inspect, merge

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tests import experts  # noqa: E402  (imports torch and peft)
from tests.export.test_kinds import run  # noqa: E402
from tests.models.test_decoder_lora import reference  # noqa: E402

FAMILIES = ("mixtral", "qwen3_moe")


def make(model: Any, folder: Any, dialect: str, **options: Any) -> tuple[Any, Any]:
    """(an adapter's folder, the one that peft reads in its place)."""
    if dialect == experts.EACH:
        made = experts.make_each(model, folder, **options)
        return made, made
    stacked = experts.make_stacked(model, folder, **options)
    if dialect == experts.STACKED:
        return stacked, stacked
    return experts.turn(model, stacked, folder.with_name("turned")), stacked


@pytest.mark.parametrize("dialect", experts.DIALECTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_checkpoint_gives_the_logits_of_the_unmerged_adapter(
    tiny_model, tmp_path, family, dialect
):
    model = tiny_model(family)
    adapter, known = make(model, tmp_path / "a", dialect, seed=3)
    plain, expected = reference(model, None), reference(model, known)
    got = reference(run(model, [adapter], tmp_path / "out"), None)
    assert np.abs(expected - plain).max() > 1
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_taken_from_a_merged_model_gives_its_logits_back(
    tiny_model, tmp_path, capsys, family
):
    model = tiny_model(family)
    adapter, _ = make(model, tmp_path / "a", experts.EACH, seed=4)
    tuned, back = run(model, [adapter], tmp_path / "out"), tmp_path / "back"
    argv = ["--extract", str(model), str(tuned), "--rank", "4", "--output", str(back), "--verify"]
    assert merge.main(argv) == 0
    assert "gate_proj" in (shown := capsys.readouterr().out) or "experts.w1" in shown
    expected = reference(tuned, None)
    assert np.abs(expected - reference(model, None)).max() > 1
    np.testing.assert_allclose(reference(model, back), expected, rtol=0, atol=1e-3)


def test_of_experts_that_were_tuned_in_part_peft_takes_the_extracted_adapter_too(
    tiny_model, tmp_path
):
    model = tiny_model("mixtral")
    some = ("model.layers.1.block_sparse_moe.experts.2.w3",)
    adapter, _ = make(model, tmp_path / "a", experts.EACH, targets=some, r=2, effect=4)
    tuned = run(model, [adapter], tmp_path / "out")
    argv = ["--extract", str(model), str(tuned), "--rank", "2", "--output", str(tmp_path / "back")]
    assert merge.main(argv) == 0
    expected = reference(tuned, None)
    assert np.abs(expected - reference(model, None)).max() > 0.5
    np.testing.assert_allclose(reference(model, tmp_path / "back"), expected, rtol=0, atol=1e-3)


def test_joined_adapters_of_two_dialects_are_an_adapter_that_peft_reads(tiny_model, tmp_path):
    model = tiny_model("mixtral")
    each, _ = make(model, tmp_path / "a", experts.EACH, seed=1)
    turned, _ = make(model, tmp_path / "b", experts.TURNED, seed=2)
    joined, shares = tmp_path / "joined", ["--weights", "0.5", "0.75"]
    out = run(model, [each, turned], tmp_path / "out", *shares, "--output-adapter", str(joined))
    expected = reference(out, None)
    assert np.abs(expected - reference(model, None)).max() > 1
    np.testing.assert_allclose(reference(model, joined), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dialect", experts.DIALECTS)
def test_inspect_tells_the_norms_of_experts_with_and_without_the_base(
    tiny_model, tmp_path, capsys, dialect
):
    model = tiny_model("mixtral")
    adapter, _ = make(model, tmp_path / "a", dialect, seed=3)
    out, base = run(model, [adapter], tmp_path / "out"), load_file(model / "model.safetensors")
    capsys.readouterr()
    merged = load_file(out / "model.safetensors")
    want = [
        sum(
            float(np.sum((merged[name] - base[name]) ** 2))
            for name in base
            if f"layers.{layer}.block_sparse_moe.experts." in name and name.endswith("w2.weight")
        )
        ** 0.5
        for layer in (0, 1)
    ]
    assert inspect.main([str(adapter), "--model", str(model), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in report["projections"]}
    assert rows["experts.w2"]["modules"] == 10
    np.testing.assert_allclose(rows["experts.w2"]["norms"], want, rtol=1e-4)
    assert {"gate", "experts.w1", "experts.w3"} <= rows.keys()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "nowhere"})
    )
    assert inspect.main([str(adapter), "--json"]) == 0
    unbound = {row["name"]: row for row in json.loads(capsys.readouterr().out)["projections"]}
    name = "w2" if dialect == experts.EACH else "down_proj"
    np.testing.assert_allclose(unbound[name]["norms"], want, rtol=1e-4)
