"""The decoder against transformers: logits of size about 10 within 1e-3, for every family and mesh."""

import json

import numpy as np
import pytest

from tests.models.steps import Piece, Steps
from tests.tiny import FAMILIES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-3
RNG = np.random.default_rng(11)
FIRST, SECOND, THIRD = (RNG.integers(4, 320, n).tolist() for n in (44, 17, 37))


def reference(folder, tokens):
    """Logits [T, V] of transformers in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def assert_equal(ours, theirs):
    assert np.abs(theirs).max() > 5
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_and_decode_rows_in_shared_steps_equal_transformers_full_pass(
    tiny_model, family, tp
):
    """Three texts: prefilled whole or in two chunks, then decoded beside another's prefill."""
    folder = tiny_model(family)
    steps = Steps(folder, tp, decode=2, prefill=64)
    a, b = steps.run(prefills=[Piece(0, 0, FIRST[:40]), Piece(1, 0, SECOND[:13])])
    first, second, third = [a], [b], []
    for at in range(4):
        chunk = {0: [Piece(5, 0, THIRD[:19])], 2: [Piece(5, 19, THIRD[19:])]}.get(at, [])
        decodes = [Piece(0, 40 + at, [FIRST[40 + at]]), Piece(1, 13 + at, [SECOND[13 + at]])]
        a, b, *c = steps.run(decodes, chunk)
        first.append(a)
        second.append(b)
        third += c
    for tokens, parts in ((FIRST, first), (SECOND, second), (THIRD, third)):
        assert_equal(np.concatenate(parts), reference(folder, tokens))


@pytest.mark.parametrize("tp", [1, 2])
def test_a_tied_head_without_its_copy_gives_the_same_logits(tiny_model, tp):
    folder = tiny_model("llama_odd")
    steps = Steps(folder, tp, decode=0, prefill=48, copy_head=False)
    (ours,) = steps.run(prefills=[Piece(0, 0, FIRST[:40])])
    assert_equal(ours, reference(folder, FIRST[:40]))


@pytest.mark.parametrize(
    ("family", "without"),
    [
        ("mistral", {"sliding_window": None}),
        ("qwen2_window", {"use_sliding_window": False}),
        ("llama31", {"rope_scaling": None, "rope_parameters": None}),
        ("llama_linear", {"rope_scaling": None}),
        ("llama_yarn", {"rope_scaling": None}),
    ],
)
def test_windows_and_rope_scalings_change_the_logits_by_more_than_the_tolerance(
    tiny_model, tmp_path, family, without
):
    """So that parity with transformers says something about them."""
    folder = tiny_model(family)
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text()) | without
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    difference = np.abs(reference(folder, FIRST) - reference(tmp_path, FIRST))
    assert difference.max() > 100 * TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_logits_stay_close_to_float32(tiny_model, dtype):
    folder = tiny_model("qwen3")
    steps = Steps(folder, 2, decode=0, prefill=48, dtype=dtype)
    (ours,) = steps.run(prefills=[Piece(0, 0, FIRST[:40])])
    expected = reference(folder, FIRST[:40])
    error = np.abs(ours - expected).max() / np.abs(expected).max()
    assert error < {"bfloat16": 0.05, "float16": 0.01}[dtype]
