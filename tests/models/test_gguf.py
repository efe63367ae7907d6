"""GGUF reading against transformers' own GGUF loader, and the refusals."""

import json
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from jlora.demo.model import NAME, demo_model_folder, packaged_gguf
from jlora.errors import ModelError
from jlora.models.gguf import GgufCheckpoint, unpermute_rope_rows

TEXTS = [
    "What is the capital of France?",
    "a  12",
    "x\n\n1",
    "3.14159 and 2026-11-23",
    "  leading spaces,\ttabs\r\nand lines\n",
    "naïve café, Straße, 東京, Привет, مرحبا, 👩‍🚀🏴‍☠️",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "def f(x):\n    return x ** 2  # don't, we'll",
    "",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JLORA_CACHE", str(cache))
        return demo_model_folder()


@pytest.fixture(scope="module")
def oracle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the GGUF file, for transformers' own loader."""
    pytest.importorskip("torch", reason="transformers reads GGUF through torch")
    folder = tmp_path_factory.mktemp("gguf")
    (folder / "model.gguf").symlink_to(packaged_gguf())
    return folder


@pytest.mark.slow
def test_tensors_equal_transformers_gguf_loading_within_bf16_rounding(
    folder: Path, oracle_folder: Path
) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(
        oracle_folder, gguf_file="model.gguf", dtype=torch.float32
    ).state_dict()
    theirs.pop("lm_head.weight")  # tied
    ours = load_file(folder / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        expected = theirs[name].numpy()
        assert tensor.dtype == ml_dtypes.bfloat16
        assert np.abs(expected).max() > 0.1
        # 2^-8: half a unit in the last of bfloat16's eight significant bits.
        np.testing.assert_allclose(
            tensor.astype(np.float32), expected, rtol=2**-8, atol=0, err_msg=name
        )


def test_the_converted_model_knows_the_capital_of_france(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert isinstance(loaded, tuple)
    model, info = loaded
    assert not any(info.values()), info
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0]
    answer = out[prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id


def test_tokenizer_equals_transformers_gguf_tokenizer_with_the_digits_rule_restored(
    folder: Path, oracle_folder: Path
) -> None:
    from tokenizers import pre_tokenizers

    ours = AutoTokenizer.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(oracle_folder, gguf_file="model.gguf")
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    assert ours.get_vocab() == theirs.get_vocab()
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids, text
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(
        chat, tokenize=False
    )


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_decode_to_the_text_that_they_came_from(folder: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_digits_are_single_tokens_and_never_join_the_space_before_them(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert tokenizer.tokenize("x\n\n1") == ["x", "ĊĊ", "1"]


def test_special_tokens_are_flagged_and_have_the_ids_of_the_gguf_metadata(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.decode(range(17), skip_special_tokens=True) == ""
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == (
        "PreTrainedTokenizerFast"
    )


def test_config_speaks_both_dialects_and_hides_the_quantised_origin(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100000.0
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert config["rms_norm_eps"] == 1e-5
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def test_files_are_readable_by_other_users(folder: Path) -> None:
    assert folder.name == NAME
    for file in folder.iterdir():
        assert file.stat().st_mode & 0o777 == 0o644, file


def test_unpermuted_rows_undo_llama_cpps_interleaving() -> None:
    rows = np.arange(2 * 8 * 3, dtype=np.float32).reshape(16, 3)
    interleaved = rows.reshape(2, 2, 4, 3).swapaxes(1, 2).reshape(16, 3)
    assert not np.array_equal(interleaved, rows)
    np.testing.assert_array_equal(unpermute_rope_rows(interleaved, heads=2), rows)


def tiny_gguf(path: Path, architecture: str = "llama", tensor: str = "output_norm.weight") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_tensor(tensor, np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'qwen2' is not supported"):
        GgufCheckpoint(tiny_gguf(tmp_path / "m.gguf", architecture="qwen2"))


def test_a_tensor_without_a_place_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_gate_inp\.weight"):
        GgufCheckpoint(tiny_gguf(tmp_path / "m.gguf", tensor="blk.0.ffn_gate_inp.weight"))


def test_an_unknown_pre_tokenizer_is_refused_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'llama-bpe' is not supported"):
        GgufCheckpoint(tiny_gguf(tmp_path / "m.gguf")).tokenizer()


def test_missing_metadata_is_an_error_that_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no 'llama\.attention\.head_count'"):
        GgufCheckpoint(tiny_gguf(tmp_path / "m.gguf")).config()


@pytest.mark.parametrize("size", [0, 3, 20, 100])
def test_a_truncated_file_is_a_model_error(tmp_path: Path, size: int) -> None:
    path = tiny_gguf(tmp_path / "m.gguf")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelError, match="not a readable GGUF file"):
        GgufCheckpoint(cut)
