"""Models by name alone: shapes for random weights, so that a benchmark needs no checkpoint.

Facts from the models' published config.json; `tiny` is ours, for tests of the harness itself.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jlora.errors import ParameterError
from jlora.models.config import ModelConfig


def _config(
    embed: int, mlp: int, layers: int, heads: tuple[int, int], vocab: int, **more: Any
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": embed,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


_LLAMA3 = {"rope_theta": 500000.0, "max_position_embeddings": 131072}
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 128,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
}

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _config(64, 96, 2, (4, 2), 512, tie_word_embeddings=True),
    "smollm2-135m": _config(576, 1536, 30, (9, 3), 49152, tie_word_embeddings=True, rope_theta=1e5),
    "llama-3.2-1b": _config(
        2048, 8192, 16, (32, 8), 128256, tie_word_embeddings=True, head_dim=64, **_LLAMA3
    ),
    "llama-2-7b": _config(4096, 11008, 32, (32, 32), 32000, max_position_embeddings=4096),
    "mistral-7b": _config(4096, 14336, 32, (32, 8), 32000, max_position_embeddings=32768),
    "llama-3.1-8b": _config(4096, 14336, 32, (32, 8), 128256, **_LLAMA3),
    "qwen3-8b": _config(4096, 12288, 36, (32, 8), 151936, **_QWEN3),
    "llama-3.1-70b": _config(8192, 28672, 80, (64, 8), 128256, **_LLAMA3),
}
"""Name -> config.json."""


def shape_config(name: str) -> ModelConfig:
    """The facts of a named shape. ParameterError that lists the names."""
    if name not in SHAPES:
        raise ParameterError(f"shape {name!r} is not one of {', '.join(SHAPES)}", "shape")
    return ModelConfig.from_dict(SHAPES[name] | {"_name_or_path": name})


def model_config(model: str) -> ModelConfig:
    """The facts of a named shape, of a model folder, or of a config.json. ParameterError for others."""
    path = Path(model)
    if model in SHAPES:
        return shape_config(model)
    if path.exists():
        return ModelConfig.from_folder(path.parent if path.is_file() else path)
    raise ParameterError(
        f"model {model!r} is no folder, and no shape: {', '.join(SHAPES)}", "model"
    )


def write_shape(name: str, root: str | Path) -> Path:
    """A model folder without weights, for --load-format dummy: config.json and a tokenizer of bytes."""
    shape_config(name)
    folder = Path(root) / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[name], indent=2))
    special = ["<pad>", "<s>", "</s>"]
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
