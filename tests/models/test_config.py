"""ModelConfig against transformers' own config objects, masks and rope functions."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from jlora.errors import ModelError
from jlora.models.config import FUSED, GROUPS, ModelConfig, group_of, rope_frequencies
from tests.tiny import FAMILIES, model_config, model_shapes

transformers = pytest.importorskip("transformers")


def load(family, **overrides):
    return ModelConfig.from_dict(model_config(family, **overrides))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dialect", [4, 5])
def test_facts_equal_those_of_transformers(tiny_model, family, dialect):
    folder = tiny_model(family, dialect=dialect, dtype="bfloat16")
    ours, theirs = ModelConfig.from_folder(folder), transformers.AutoConfig.from_pretrained(folder)
    assert ours.name == family
    assert [ours.architecture] == theirs.architectures
    assert ours.dtype == str(theirs.dtype).removeprefix("torch.") == "bfloat16"
    for mine, name in {
        "vocab": "vocab_size",
        "embed": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "mlp": "intermediate_size",
        "norm_eps": "rms_norm_eps",
        "max_positions": "max_position_embeddings",
        "tied": "tie_word_embeddings",
        "bos_id": "bos_token_id",
    }.items():
        assert getattr(ours, mine) == getattr(theirs, name), name
    default_head_dim = theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or default_head_dim)
    assert ours.eos_ids == (theirs.eos_token_id,)
    rope = theirs.rope_parameters
    ropes = [(ours.rope, rope.get("full_attention", rope))]
    if ours.local_rope is not None:
        ropes.append((ours.local_rope, rope["sliding_attention"]))
    for mine, parameters in ropes:
        assert mine.theta == parameters["rope_theta"]
        assert mine.kind == parameters["rope_type"]


@pytest.mark.parametrize("family", FAMILIES)
def test_both_dialects_give_the_same_config(family):
    assert load(family, dialect=4) == load(family, dialect=5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_that_transformers_has_saved_reads_the_same(tmp_path, tiny_model, family):
    folder = tiny_model(family)
    transformers.AutoConfig.from_pretrained(folder).save_pretrained(str(tmp_path / family))
    saved, written = (ModelConfig.from_folder(path) for path in (tmp_path / family, folder))
    assert dataclasses.replace(saved, dtype="float32") == written


@pytest.mark.parametrize("family", FAMILIES)
def test_projection_shapes_are_those_of_the_tensors(family):
    config = model_config(family)
    cfg, shapes = ModelConfig.from_dict(config), model_shapes(config)
    for projection in cfg.modules_of(0):
        module = (
            "mlp" if "gate" in projection or projection in ("up_proj", "down_proj") else "self_attn"
        )
        name = f"model.layers.0.{module}.{projection}"
        assert cfg.shape(projection) == shapes[f"{name}.weight"][::-1]
        group = group_of(FUSED.get(projection, [projection])[0])
        assert cfg.bias(group) == (f"{name}.bias" in shapes)
    assert [group_of(part) for parts in GROUPS.values() for part in parts] == [
        "qkv", "qkv", "qkv", "o", "gate_up", "gate_up", "down",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "overrides", "windows"),
    [
        ("phi3", {}, (16, 16)),
        ("phi4_mini", {}, (None, None)),
        ("gemma2", {}, (16, None)),
        ("gemma3", {}, (16, 16, None)),
        ("gemma3", {"sliding_window_pattern": 2}, (16, None, 16)),
        (
            "gemma3",
            {"layer_types": ["full_attention"] * 2 + ["sliding_attention"]},
            (None, None, 16),
        ),
        ("llama", {}, (None, None)),
        ("mistral", {}, (16, 16)),
        ("mistral", {"sliding_window": None}, (None, None)),
        ("qwen2", {}, (None, None)),
        ("qwen2", {"sliding_window": None}, (None, None)),
        ("qwen2_window", {}, (None, 16)),
        ("qwen2_window", {"max_window_layers": 0}, (16, 16)),
        ("qwen2_window", {"max_window_layers": 28}, (None, None)),
        ("qwen2_window", {"layer_types": ["sliding_attention", "full_attention"]}, (16, None)),
        ("qwen2", {"layer_types": ["full_attention"] * 2}, (None, None)),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
            (None, 9),
        ),
    ],
)
def test_windows_are_those_that_transformers_applies(family, overrides, windows):
    config = model_config(family, **overrides)
    assert ModelConfig.from_dict(config).windows == windows
    theirs = transformers.AutoConfig.for_model(**config)
    if family != "llama":
        types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 2
        sliding = [theirs.sliding_window if t == "sliding_attention" else None for t in types]
        assert tuple(sliding) == windows


ROPES = {
    "default": None,
    "linear": {"type": "linear", "factor": 2.5},
    "llama31": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama32": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama3_without_original": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn_betas": {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 24.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn_attention_factor": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 4096,
        "attention_factor": 1.25,
    },
    "yarn_mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
    },
}


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1000000])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kind", ROPES)
def test_rope_frequencies_equal_those_of_transformers(kind, head_dim, theta):
    pytest.importorskip("torch")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = model_config(
        "llama",
        rope_scaling=ROPES[kind],
        rope_theta=theta,
        head_dim=head_dim,
        max_position_embeddings=131072,
    )
    ours = ModelConfig.from_dict(config)
    theirs = transformers.AutoConfig.for_model(**config)
    functions = ROPE_INIT_FUNCTIONS | {
        "default": LlamaRotaryEmbedding.compute_default_rope_parameters
    }
    frequencies, scaling = functions[ours.rope.kind](theirs, device="cpu")
    mine, my_scaling = rope_frequencies(ours.rope, ours.head_dim, ours.max_positions)
    assert mine.dtype == np.float32
    np.testing.assert_allclose(mine, frequencies.numpy(), rtol=5e-7, atol=0)
    assert my_scaling == pytest.approx(scaling, rel=1e-12)


@pytest.mark.parametrize("original", [64, 96])
@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
def test_longrope_frequencies_equal_those_of_transformers(kind, original):
    pytest.importorskip("torch")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = model_config("phi4_mini", original_max_position_embeddings=original)
    config["rope_scaling"] = config["rope_scaling"] | {"type": kind}
    ours = ModelConfig.from_dict(config)
    # transformers adds the length itself for the types that it lists; "su" is not one of them.
    scaling_of_theirs = config["rope_scaling"] | {"original_max_position_embeddings": original}
    theirs = transformers.AutoConfig.for_model(**(config | {"rope_scaling": scaling_of_theirs}))
    assert (ours.default_context, ours.for_context(original).rope.long) == (original, False)
    for length in (original, original + 1):
        frequencies, scaling = ROPE_INIT_FUNCTIONS["longrope"](theirs, "cpu", seq_len=length)
        mine, my_scaling = rope_frequencies(ours.for_context(length).rope, 16, ours.max_positions)
        np.testing.assert_allclose(mine, frequencies.numpy(), rtol=5e-7, atol=0)
        assert my_scaling == pytest.approx(scaling, rel=1e-12)


def test_code_beside_a_checkpoint_that_transformers_would_not_run_either_is_no_reason_to_refuse():
    auto_map = {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    assert load("phi3", auto_map=auto_map) == load("phi3")


def test_generation_config_decides_what_ends_a_text():
    config = model_config("llama")
    assert ModelConfig.from_dict(config, {"eos_token_id": [2, 7, 7]}).eos_ids == (2, 7)
    assert ModelConfig.from_dict(config, {}).eos_ids == (2,)
    assert ModelConfig.from_dict(config | {"eos_token_id": [5, 6]}).eos_ids == (5, 6)
    assert ModelConfig.from_dict(config | {"eos_token_id": None}).eos_ids == ()
    assert ModelConfig.from_dict(config | {"bos_token_id": None}).bos_id is None


def test_absent_keys_mean_what_they_mean_to_transformers():
    for model_type in (
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "phi3",
        "mixtral",
        "qwen3_moe",
        "gemma2",
        "gemma3_text",
    ):
        theirs = transformers.AutoConfig.for_model(model_type)
        config = {
            "model_type": model_type,
            "vocab_size": theirs.vocab_size,
            "hidden_size": 4096,
            "intermediate_size": 64,
            "num_hidden_layers": 30,
            "num_attention_heads": 32,
        }
        ours, theirs = ModelConfig.from_dict(config), transformers.AutoConfig.for_model(**config)
        assert ours.kv_heads == theirs.num_key_value_heads
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or 128)
        assert ours.max_positions == theirs.max_position_embeddings
        assert ours.norm_eps == theirs.rms_norm_eps
        assert ours.tied == theirs.tie_word_embeddings
        assert ours.bos_id == theirs.bos_token_id
        rope = theirs.rope_parameters
        assert ours.rope.theta == rope.get("full_attention", rope)["rope_theta"]
        types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 30
        window = getattr(theirs, "sliding_window", None)
        sliding = [window if kind == "sliding_attention" else None for kind in types]
        assert ours.windows == tuple(sliding)
        cap = getattr(theirs, "attn_logit_softcapping", None)
        assert ours.attention_softcap == cap
        assert ours.logits_softcap == getattr(theirs, "final_logit_softcapping", None)
        assert ours.dtype == "float32"


def test_a_hub_cache_folder_is_named_after_its_repository(tmp_path):
    folder = tmp_path / "models--org--some-model" / "snapshots" / "abc123"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model_config("llama")))
    assert ModelConfig.from_folder(folder).name == "org/some-model"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"architectures": ["GPTNeoXForCausalLM"]}, "'GPTNeoXForCausalLM' is not supported; supported are Llama"),
        ({"architectures": ["Qwen2MoeForCausalLM"]}, "Qwen2MoeForCausalLM"),
        ({"architectures": None, "model_type": "mamba"}, "model_type 'mamba'"),
        ({"architectures": [], "model_type": []}, "not supported"),
        ({"architectures": ["A", "B"]}, "not supported"),
        ({"architectures": ["A\nB"]}, "'A\\nB' is not supported"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers must be at most 4096, got 1000"),
        ({"hidden_size": 10**400}, "hidden_size must be at most"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a positive number"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "remote code"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "'gptq'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "x"}}, "factor must be"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("nan")}}, "factor must be"),
        ({"rope_scaling": [1]}, "rope_scaling must be"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"hidden_size": 64.5}, "hidden_size must be a positive integer, got 64.5"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"head_dim": 7}, "even"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "mixes windows"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_by_name_in_one_line(overrides, words):
    with pytest.raises(ModelError) as caught:
        load("llama", **overrides)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "overrides", "words"),
    [
        (
            "phi3",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
            "needs long_factor",
        ),
        (
            "phi3",
            {"rope_scaling": {"type": "su", "short_factor": [1], "long_factor": [1]}},
            "list of 8",
        ),
        ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor 1.5"),
        ("phi3", {"partial_rotary_factor": 0.45}, "turns 7 dimensions"),
        (
            "phi3",
            {"auto_map": {"AutoModelForCausalLM": "modeling_x.OtherForCausalLM"}},
            "remote code",
        ),
        ("mixtral", {"num_experts_per_tok": 6}, "num_experts_per_tok 6 is more than 5"),
        ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers"),
        ("qwen2_window", {"max_window_layers": []}, "max_window_layers must be an integer"),
        ("qwen2_window", {"max_window_layers": -1}, "max_window_layers must be an integer"),
        ("qwen3", {"layer_types": [[], {}]}, "layer_types must name"),
        ("gemma2", {"hidden_activation": "relu"}, "hidden_activation is 'relu'"),
        ("gemma2", {"sliding_window": None}, "sliding_window"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("gemma3", {"rope_local_base_freq": "low"}, "rope_local_base_freq"),
    ],
)
def test_what_a_family_alone_can_ask_for_is_refused_by_name_too(family, overrides, words):
    with pytest.raises(ModelError, match=words):
        load(family, **overrides)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "is missing"), ("{", "not readable JSON"), ("[]", "JSON object"), ("\xff", "JSON")],
)
def test_a_broken_folder_is_a_model_error(tmp_path, content, words):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError, match=words):
        ModelConfig.from_folder(tmp_path)
    with pytest.raises(ModelError, match="not a folder"):
        ModelConfig.from_folder(tmp_path / "nowhere")


def test_reading_a_config_imports_no_jax():
    code = "import sys, jlora.models.config; assert not {'jax', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
