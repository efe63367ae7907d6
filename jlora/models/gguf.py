"""Reads a GGUF file as what a Hugging Face checkpoint would hold: config, tokenizer, tensors.

Only what the embedded default needs: architecture `llama` with a byte-level BPE tokenizer. Any
other file is refused by name. Quantised tensors are dequantised; nothing here imports torch.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from jaxtyping import Float
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jlora.errors import ModelError

TENSOR_NAMES: dict[str, str] = {
    r"token_embd\.weight": "model.embed_tokens.weight",
    r"output_norm\.weight": "model.norm.weight",
    r"output\.weight": "lm_head.weight",
    r"blk\.(\d+)\.attn_norm\.weight": r"model.layers.\1.input_layernorm.weight",
    r"blk\.(\d+)\.ffn_norm\.weight": r"model.layers.\1.post_attention_layernorm.weight",
    r"blk\.(\d+)\.attn_([qkv])\.weight": r"model.layers.\1.self_attn.\2_proj.weight",
    r"blk\.(\d+)\.attn_output\.weight": r"model.layers.\1.self_attn.o_proj.weight",
    r"blk\.(\d+)\.ffn_(gate|up|down)\.weight": r"model.layers.\1.mlp.\2_proj.weight",
}
"""GGUF tensor name (a whole-name regex) -> Hugging Face name."""

CONTROL_TOKEN = 3
"""`tokenizer.ggml.token_type` of a special token."""


class GgufCheckpoint:
    """One GGUF file. Opening it reads the metadata; tensors stay on disk until asked for."""

    def __init__(self, path: Path):
        try:
            reader = gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise ModelError(f"{path}: not a readable GGUF file: {error}") from error
        self.path = path
        self._fields = reader.fields
        architecture = self.value("general.architecture")
        if architecture != "llama":
            raise ModelError(
                f"{path}: GGUF architecture {architecture!r} is not supported, only 'llama' is"
            )
        self._tensors = {self._hf_name(tensor.name): tensor for tensor in reader.tensors}

    def value(self, key: str) -> Any:
        """The metadata value of `key` as a Python object; a missing key is an error."""
        if key not in self._fields:
            raise ModelError(f"{self.path}: GGUF metadata has no {key!r}")
        return self._fields[key].contents()

    def names(self) -> list[str]:
        """The tensors' Hugging Face names, in file order."""
        return list(self._tensors)

    def tensor(self, name: str) -> Float[np.ndarray, "..."]:
        """One tensor by its Hugging Face name, dequantised to float32, rows in its order."""
        stored = self._tensors[name]
        rows = gguf.dequantize(stored.data, stored.tensor_type).astype(np.float32, copy=False)
        if name.endswith("q_proj.weight"):
            return unpermute_rope_rows(rows, self.value("llama.attention.head_count"))
        if name.endswith("k_proj.weight"):
            return unpermute_rope_rows(rows, self.value("llama.attention.head_count_kv"))
        return rows

    def config(self) -> dict[str, Any]:
        """config.json in both dialects: transformers 4 (`rope_theta`, `torch_dtype`) and 5."""
        heads = self.value("llama.attention.head_count")
        theta = self.value("llama.rope.freq_base")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.value("llama.vocab_size"),
            "hidden_size": self.value("llama.embedding_length"),
            "intermediate_size": self.value("llama.feed_forward_length"),
            "num_hidden_layers": self.value("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.value("llama.attention.head_count_kv"),
            "head_dim": self.value("llama.embedding_length") // heads,
            "max_position_embeddings": self.value("llama.context_length"),
            # GGUF stores float32: 1e-5 comes back as 9.99999975e-06 unless it is rounded.
            "rms_norm_eps": float(f"{self.value('llama.attention.layer_norm_rms_epsilon'):.6g}"),
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "rope_theta": theta,
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "torch_dtype": "bfloat16",
            "dtype": "bfloat16",
            "use_cache": True,
            **self._token_ids(),
        }

    def generation_config(self) -> dict[str, Any]:
        """generation_config.json: the special token ids."""
        return dict(self._token_ids())

    def tokenizer(self) -> Tokenizer:
        """The tokenizer. GGUF keeps only the name of its pre-tokenizer, not the rule."""
        kind, rule = self.value("tokenizer.ggml.model"), self.value("tokenizer.ggml.pre")
        if (kind, rule) != ("gpt2", "smollm"):
            raise ModelError(
                f"{self.path}: GGUF tokenizer {kind!r} with pre-tokenizer {rule!r} is not "
                "supported, only 'gpt2' with 'smollm' is"
            )
        tokens: list[str] = self.value("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ")) for merge in self.value("tokenizer.ggml.merges")]
        vocab = {token: number for number, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        # No merge holds a digit, yet without Digits the space before a number joins other tokens.
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(
            [AddedToken(token, special=True, normalized=False) for token in self._special_tokens()]
        )
        return tokenizer

    def tokenizer_config(self) -> dict[str, Any]:
        """tokenizer_config.json, with the chat template inside as transformers 4 wants it."""
        tokens = self.value("tokenizer.ggml.tokens")
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[self.value("tokenizer.ggml.bos_token_id")],
            "eos_token": tokens[self.value("tokenizer.ggml.eos_token_id")],
            "unk_token": tokens[self.value("tokenizer.ggml.unknown_token_id")],
            "pad_token": tokens[self.value("tokenizer.ggml.padding_token_id")],
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": self.value("llama.context_length"),
            "chat_template": self.value("tokenizer.chat_template"),
        }

    def _token_ids(self) -> dict[str, int]:
        return {
            "bos_token_id": self.value("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.value("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self.value("tokenizer.ggml.padding_token_id"),
        }

    def _special_tokens(self) -> Iterator[str]:
        kinds = self.value("tokenizer.ggml.token_type")
        for token, kind in zip(self.value("tokenizer.ggml.tokens"), kinds, strict=True):
            if kind == CONTROL_TOKEN:
                yield token

    def _hf_name(self, name: str) -> str:
        for pattern, replacement in TENSOR_NAMES.items():
            if match := re.fullmatch(pattern, name):
                return match.expand(replacement)
        raise ModelError(f"{self.path}: GGUF tensor {name!r} has no place in a Llama checkpoint")


def unpermute_rope_rows(
    rows: Float[np.ndarray, "out in"], heads: int
) -> Float[np.ndarray, "out in"]:
    """Undoes llama.cpp's order of q and k rows: it interleaves the halves of each head.

    In: [a0, b0, a1, b1] of a head of 4.  Out: [a0, a1, b0, b1].
    """
    out, width = rows.shape
    return rows.reshape(heads, out // heads // 2, 2, width).swapaxes(1, 2).reshape(out, width)


def write_checkpoint(
    source: GgufCheckpoint, folder: Path, on_tensor: Callable[[str], None] | None = None
) -> None:
    """Writes `source` into the existing, empty `folder` as a bfloat16 Hugging Face checkpoint."""
    tensors: dict[str, np.ndarray] = {}
    for name in source.names():
        tensors[name] = np.ascontiguousarray(source.tensor(name).astype(ml_dtypes.bfloat16))
        if on_tensor is not None:
            on_tensor(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source.tokenizer().save(str(folder / "tokenizer.json"))
    for file, content in (
        ("config.json", source.config()),
        ("generation_config.json", source.generation_config()),
        ("tokenizer_config.json", source.tokenizer_config()),
    ):
        (folder / file).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    for file in folder.iterdir():
        # safetensors writes 0600, which a server under another user could not read.
        file.chmod(0o644)
