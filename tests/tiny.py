"""Tiny random checkpoints and PEFT adapters for tests: real folders, made in milliseconds, no downloads.

Written with numpy, independently of jlora's own tables, so that they serve on a Python without
torch too; tests/test_tiny.py shows that transformers and peft take them without a complaint.
Logits are of size about 10 and an adapter moves them by more than 1.
"""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tests.families import FAMILIES as FAMILIES
from tests.families import ON_ONE as ON_ONE
from tests.families import ON_SEVERAL as ON_SEVERAL
from tests.families import VOCAB as VOCAB
from tests.families import model_config as model_config

TEXT = "the quick brown fox jumps over the lazy dog and asks what is the capital of France? Paris. "

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def make_model(
    family: str,
    folder: str | Path,
    *,
    dialect: int = 4,
    shards: int = 1,
    dtype: str = "float32",
    seed: int = 0,
    tokenizer: bool = True,
    **overrides: Any,
) -> Path:
    """Writes a tiny random checkpoint; `overrides` are keys of config.json. Returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    config = model_config(family, dialect=dialect, dtype=dtype, **overrides)
    _write_json(folder / "config.json", config)
    eos = config["eos_token_id"]
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": eos})
    rng = np.random.default_rng(seed)
    tensors = {
        name: (_random(rng, name, shape) - ("gemma" in family and "norm" in name)).astype(
            DTYPES[dtype]
        )
        for name, shape in model_shapes(config).items()
    }
    write_tensors(folder, tensors, shards)
    if tokenizer:
        make_tokenizer(folder)
    return folder


def model_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that transformers expects for a config."""
    embed, mlp, heads = (
        config[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")
    )
    head_dim = config.get("head_dim") or embed // heads
    q, kv = heads * head_dim, config["num_key_value_heads"] * head_dim
    llama, qwen2 = config["model_type"] == "llama", config["model_type"] == "qwen2"
    gemma = config["model_type"].startswith("gemma")
    attention_bias = llama and config.get("attention_bias", False)
    mlp_bias = llama and config.get("mlp_bias", False)
    linear = {  # module: (out, in, bias)
        "self_attn.q_proj": (q, embed, attention_bias or qwen2),
        "self_attn.k_proj": (kv, embed, attention_bias or qwen2),
        "self_attn.v_proj": (kv, embed, attention_bias or qwen2),
        "self_attn.o_proj": (embed, q, attention_bias),
        "mlp.gate_proj": (mlp, embed, mlp_bias),
        "mlp.up_proj": (mlp, embed, mlp_bias),
        "mlp.down_proj": (embed, mlp, mlp_bias),
    }
    if config["model_type"] == "phi3":
        del linear["self_attn.q_proj"], linear["self_attn.k_proj"], linear["self_attn.v_proj"]
        del linear["mlp.gate_proj"], linear["mlp.up_proj"]
        linear |= {
            "self_attn.qkv_proj": (q + 2 * kv, embed, False),
            "mlp.gate_up_proj": (2 * mlp, embed, False),
        }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], embed),
        "model.norm.weight": (embed,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], embed)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (embed,)
        shapes[prefix + "post_attention_layernorm.weight"] = (embed,)
        if gemma:
            shapes[prefix + "pre_feedforward_layernorm.weight"] = (embed,)
            shapes[prefix + "post_feedforward_layernorm.weight"] = (embed,)
        if config["model_type"] in ("qwen3", "qwen3_moe", "gemma3_text"):
            shapes[prefix + "self_attn.q_norm.weight"] = (head_dim,)
            shapes[prefix + "self_attn.k_norm.weight"] = (head_dim,)
        sparse = _expert_shapes(config, layer)
        shapes |= {prefix + name: shape for name, shape in sparse.items()}
        for module, (rows, columns, bias) in linear.items():
            if sparse and module.startswith("mlp."):
                continue
            shapes[f"{prefix}{module}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{module}.bias"] = (rows,)
    return shapes


def _expert_shapes(config: dict[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a sparse MLP; none where the layer is dense."""
    embed = config["hidden_size"]
    if config["model_type"] == "mixtral":
        block, count, mlp = "block_sparse_moe", "num_local_experts", config["intermediate_size"]
        gate, up, down = "w1", "w3", "w2"
    elif (
        config["model_type"] == "qwen3_moe"
        and layer not in config.get("mlp_only_layers", [])
        and (layer + 1) % config.get("decoder_sparse_step", 1) == 0
    ):
        block, count, mlp = "mlp", "num_experts", config["moe_intermediate_size"]
        gate, up, down = "gate_proj", "up_proj", "down_proj"
    else:
        return {}
    shapes: dict[str, tuple[int, ...]] = {f"{block}.gate.weight": (config[count], embed)}
    for expert in range(config[count]):
        here = f"{block}.experts.{expert}"
        shapes[f"{here}.{gate}.weight"] = shapes[f"{here}.{up}.weight"] = (mlp, embed)
        shapes[f"{here}.{down}.weight"] = (embed, mlp)
    return shapes


def _random(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values that keep activations near 1 and make logits of size about 10."""
    normal = rng.standard_normal(shape, dtype=np.float32)
    if "norm" in name:
        return 1 + 0.3 * normal
    if name.endswith("bias"):
        return 0.5 * normal
    scale = 3.5 if "embed_tokens" in name or "lm_head" in name else 1.3
    return scale * normal / np.float32(np.sqrt(shape[1]))


def write_tensors(folder: Path, tensors: dict[str, np.ndarray], shards: int = 1) -> None:
    """model.safetensors, or `shards` files with an index as transformers names them."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[shard::shards]
        weight_map |= dict.fromkeys(mine, file)
        save_file({name: tensors[name] for name in mine}, folder / file, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of `VOCAB` tokens with a ChatML template; 1 is bos, 2 is eos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = ["<|pad|>", "<|bos|>", "<|im_end|>", "<|im_start|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|bos|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|pad|>",
            "chat_template": TEMPLATE,
            "clean_up_tokenization_spaces": False,
        },
    )


FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}
"""Where a model has its projections fused, and an adapter's targets with them."""

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_adapter(
    model: str | Path,
    folder: str | Path,
    *,
    r: int = 8,
    alpha: float = 16,
    targets: tuple[str, ...] | list[str] = ALL,
    rslora: bool = False,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    layers: list[int] | None = None,
    dtype: str = "float32",
    seed: int = 0,
    effect: float = 0.5,
    writer: str | None = None,
) -> Path:
    """Writes a PEFT LoRA folder whose delta is about `effect` times each weight in size.

    `writer` "peft" saves it with peft itself, "numpy" writes the same bytes of tensors and the
    same config keys; None: peft where torch is installed. Returns the folder.
    """
    model, folder = Path(model), Path(folder)
    if json.loads((model / "config.json").read_text())["model_type"] == "phi3":
        targets = list(dict.fromkeys(FUSED.get(name, name) for name in targets))
    config = adapter_config(
        model,
        targets,
        r=r,
        lora_alpha=alpha,
        use_rslora=rslora,
        rank_pattern=rank_pattern or {},
        alpha_pattern=alpha_pattern or {},
        layers_to_transform=layers,
    )
    made = _adapter_tensors(model, config, seed, effect)
    # experts have no adapters: a target that only they have is none
    config["target_modules"] = [
        target for target in targets if any(f".{target}." in name for name in made)
    ]
    tensors = {name: value.astype(DTYPES[dtype]) for name, value in made.items()}
    writer = writer or ("peft" if find_spec("torch") and find_spec("peft") else "numpy")
    if writer == "peft":
        _save_with_peft(model, folder, config, tensors, dtype)
    else:
        write_adapter(folder, config, tensors)
    return folder


def adapter_config(
    model: Path, targets: tuple[str, ...] | list[str], **more: Any
) -> dict[str, Any]:
    """An adapter_config.json as peft writes it; `more` are its keys."""
    plain = {"lora_dropout": 0.0, "bias": "none", "init_lora_weights": True}
    return (
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(model),
            "target_modules": list(targets),
            "inference_mode": True,
        }
        | plain
        | more
    )


def write_adapter(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """An adapter's folder, without peft."""
    folder.mkdir(parents=True)
    _write_json(folder / "adapter_config.json", config)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def _adapter_tensors(
    model: Path, config: dict[str, Any], seed: int, effect: float
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed + 1000)
    base = json.loads((model / "config.json").read_text())
    tensors = {}
    for name, shape in model_shapes(base).items():
        module = name.removesuffix(".weight")
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        wanted = name != module and module.rsplit(".", 1)[-1] in config["target_modules"]
        allowed = config["layers_to_transform"]
        if not wanted or layer is None or (allowed and int(layer[1]) not in allowed):
            continue
        if "moe" in base["model_type"] and ".mlp." in name:
            continue  # peft takes gate_proj there for the experts', in dense layers too
        if ".experts." in name:
            continue
        rank = pattern_value(config["rank_pattern"], module, config["r"])
        alpha = pattern_value(config["alpha_pattern"], module, config["lora_alpha"])
        scaling = alpha / (rank**0.5 if config["use_rslora"] else rank)
        rows, columns = shape
        a = rng.standard_normal((rank, columns), dtype=np.float32) / np.sqrt(columns)
        b = rng.standard_normal((rows, rank), dtype=np.float32) * effect / np.sqrt(rank)
        key = f"base_model.model.{module}"
        tensors[f"{key}.lora_A.weight"] = a.astype(np.float32)
        tensors[f"{key}.lora_B.weight"] = (b / scaling).astype(np.float32)
    return tensors


def pattern_value(pattern: dict[str, Any], module: str, default: Any) -> Any:
    """peft's rule for rank_pattern and alpha_pattern: the first key that matches the name's end."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _save_with_peft(
    model: Path, folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], dtype: str
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    options = {key: value for key, value in config.items() if key != "peft_type"}
    peft_model = get_peft_model(base, LoraConfig(**options))
    peft_model = peft_model.to(getattr(torch, dtype))
    state = {
        key: torch.from_numpy(value.astype(np.float32)).to(getattr(torch, dtype))
        for key, value in tensors.items()
    }
    result = set_peft_model_state_dict(peft_model, state)
    assert not result.unexpected_keys, result.unexpected_keys
    peft_model.save_pretrained(str(folder))


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
