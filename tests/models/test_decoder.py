"""The decoder against transformers: logits of size about 10 within 1e-3, for every family and mesh."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jlora.models.config import ModelConfig
from tests.models.steps import Piece, Steps
from tests.tiny import ON_ONE, model_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-3
RNG = np.random.default_rng(11)
FIRST, SECOND, THIRD = (RNG.integers(4, 320, n).tolist() for n in (44, 17, 37))


def reference(folder, tokens):
    """Logits [T, V] of transformers in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def assert_equal(ours, theirs):
    assert np.abs(theirs).max() > 5
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("family", "tp"), ON_ONE)
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
        ("phi3", {"sliding_window": None}),
        ("phi4_mini", {"partial_rotary_factor": 1.0, "rope_scaling": None}),
        ("phi4_mini", {"rope_scaling": None}),
        ("mixtral", {"num_experts_per_tok": 1}),
        ("qwen3_moe", {"norm_topk_prob": True}),
        ("gemma2", {"sliding_window": 400}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"query_pre_attn_scalar": 24}),
        ("gemma3", {"sliding_window": 400}),
        ("gemma3", {"sliding_window_pattern": 2}),
        ("gemma3", {"rope_scaling": None}),
        ("gemma3", {"rope_local_base_freq": 1e6}),
    ],
)
def test_what_a_config_asks_for_changes_the_logits_by_more_than_the_tolerance(
    tiny_model, tmp_path, family, without
):
    """So that parity with transformers says something about it."""
    folder = tiny_model(family)
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text()) | without
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    difference = np.abs(reference(folder, FIRST) - reference(tmp_path, FIRST))
    assert difference.max() > 100 * TOLERANCE


@pytest.mark.parametrize("tp", [1, 2])
def test_longrope_takes_the_long_factors_where_texts_may_outgrow_pretraining(tiny_model, tp):
    """As transformers does for a text that has; the same engine keeps to them for short texts."""
    folder = tiny_model("phi4_mini")
    text = RNG.integers(4, 320, 120).tolist()
    cfg = ModelConfig.from_folder(folder)
    assert (cfg.default_context, cfg.rope.long) == (96, False)
    steps = Steps(folder, tp, decode=1, prefill=64, max_len=128, texts=2)
    parts = [steps.run(prefills=[Piece(0, at, text[at : at + 48])])[0] for at in (0, 48)] + [
        steps.run([Piece(0, at, text[at : at + 1])])[0] for at in range(96, 120)
    ]
    expected = reference(folder, text)
    assert_equal(np.concatenate(parts), expected)
    short = Steps(folder, tp, decode=0, prefill=96, max_len=96, texts=1)
    (ours,) = short.run(prefills=[Piece(0, 0, text[:96])])
    assert_equal(ours, reference(folder, text[:96]))
    assert np.abs(ours - expected[:96]).max() > 100 * TOLERANCE


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("family", ["gemma2", "gemma3", "phi3", "mixtral"])
def test_greedy_text_past_the_window_equals_what_transformers_generates(tiny_model, family, tp):
    folder = tiny_model(family)
    steps = Steps(folder, tp, decode=1, prefill=16, texts=1)
    text = SECOND[:13]
    (scores,) = steps.run(prefills=[Piece(0, 0, text)])
    for _ in range(24):
        text = [*text, int(scores[-1].argmax())]
        (scores,) = steps.run([Piece(0, len(text) - 1, text[-1:])])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0}
    theirs = model.generate(torch.tensor([SECOND[:13]]), **options)
    assert theirs[0].tolist() == text


def test_the_text_part_of_a_model_that_also_sees_is_read_from_both_namings(tmp_path):
    """Logits of text equal the whole model's; its vision tower stays unread."""
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    text = model_config("gemma3") | {"vocab_size": 320, "image_token_index": 300}
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**text),
        vision_config={"hidden_size": 16, "image_size": 28, "patch_size": 14, **small},
        mm_tokens_per_image=1,
        image_token_index=300,
    )
    torch.manual_seed(3)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.3 if "norm" in name else 1.3 * parameter.shape[-1] ** -0.5)
        expected = model(torch.tensor([SECOND])).logits[0].numpy()
    model.save_pretrained(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    assert {name.split(".")[0] for name in tensors} > {"vision_tower", "multi_modal_projector"}
    old, new = "language_model.model.", "model.language_model."
    for number, (have, want) in enumerate([(old, new), (new, old)]):
        folder = shutil.copytree(tmp_path / "saved", tmp_path / str(number))
        renamed = {name.replace(have, want): tensor for name, tensor in tensors.items()}
        save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
        (ours,) = Steps(folder, 2, decode=0, prefill=32).run(prefills=[Piece(0, 0, SECOND)])
        assert_equal(ours, expected)


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_logits_stay_close_to_float32(tiny_model, family, dtype):
    folder = tiny_model(family)
    steps = Steps(folder, 2, decode=0, prefill=48, dtype=dtype)
    (ours,) = steps.run(prefills=[Piece(0, 0, FIRST[:40])])
    expected = reference(folder, FIRST[:40])
    error = np.abs(ours - expected).max() / np.abs(expected).max()
    assert error < {"bfloat16": 0.05, "float16": 0.01}[dtype]
