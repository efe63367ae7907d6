"""Every kind of adapter that PEFT writes, side by side in one batch: the delta that peft makes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models.steps import Piece, Steps
from tests.tiny import FUSED

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TOLERANCE = 1e-3
TOKENS = np.random.default_rng(12).integers(4, 320, 30).tolist()

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "plain": {"r": 4, "target_modules": ALL},
    "dora": {"r": 4, "target_modules": ALL, "use_dora": True},
    "dora_rslora_patterns": {
        "r": 4,
        "lora_alpha": 5,
        "target_modules": ["q_proj", "o_proj", "up_proj"],
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"up_proj": 20},
        "alpha_pattern": {"o_proj": 3},
    },
    "lora_bias": {"r": 4, "lora_alpha": 12, "target_modules": ALL, "lora_bias": True},
    "bias_all": {"r": 4, "target_modules": ["q_proj", "down_proj"], "bias": "all"},
    "bias_lora_only": {"r": 4, "target_modules": ["v_proj", "o_proj"], "bias": "lora_only"},
    "embedding": {"r": 6, "target_modules": ["embed_tokens"]},
    "head": {"r": 6, "target_modules": ["lm_head"]},
    "embedding_head_linear": {"r": 20, "target_modules": [*ALL, "embed_tokens", "lm_head"]},
    "dora_embedding_head": {
        "r": 4,
        "target_modules": ["q_proj", "embed_tokens", "lm_head"],
        "use_dora": True,
    },
    "saved_head": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved_embedding": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved_linear": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["v_proj"]},
    # peft compares ends of names: these are all norms, those of heads too
    "norms": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "norms_some": {"r": 4, "target_modules": ["down_proj"], "use_dora": True,
                   "modules_to_save": ["post_attention_layernorm", "model.norm"]},
    "norms_and_ends": {"r": 4, "target_modules": ["q_proj", "lm_head"],
                       "modules_to_save": ["embed_tokens", "input_layernorm"]},
    "tokens": {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": TOKENS[:5]},
    "tokens_of_both": {
        "r": 4,
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": TOKENS[:3], "lm_head": [7, 300, 30]},
    },
    "tokens_alone": {"r": 4, "target_modules": ["o_proj"], "layers_to_transform": [0],
                     "trainable_token_indices": [TOKENS[2], 9]},
    "pissa": {"r": 4, "target_modules": ALL, "init_lora_weights": "pissa"},
    "olora": {"r": 4, "lora_alpha": 6, "target_modules": ALL, "init_lora_weights": "olora"},
}  # fmt: skip


def fused(options: dict[str, Any]) -> dict[str, Any]:
    """The same kind for a model whose projections are fused."""
    targets = dict.fromkeys(FUSED.get(name, name) for name in options["target_modules"])
    pattern = {FUSED.get(name, name): r for name, r in options.get("rank_pattern", {}).items()}
    saved = [name.replace("v_proj", "down_proj") for name in options.get("modules_to_save", [])]
    changes = {"rank_pattern": pattern, "modules_to_save": saved or None}
    return options | {"target_modules": list(targets)} | changes


def move_trained(model: Any) -> None:
    """Every trained tensor by random amounts."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.requires_grad:
                near = "magnitude" in name or "tokens_delta" in name or "modules_to_save" in name
                size = float(tensor.abs().mean()) if near else 0.3
                tensor.add_(torch.randn_like(tensor) * 0.5 * size)


def make_adapter(model_folder: Path, folder: Path, kind: str) -> Path:
    """A folder that peft wrote, every trained tensor moved by random amounts."""
    torch.manual_seed(len(kind))
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    options = (
        fused(KINDS[kind]) if hasattr(model.model.layers[0].mlp, "gate_up_proj") else KINDS[kind]
    )
    model = peft.get_peft_model(model, peft.LoraConfig(**options))
    move_trained(model)
    model.save_pretrained(folder)
    return folder


def reference(model_folder: Path, adapter: Path | None) -> np.ndarray:
    """Logits [T, V] of transformers, with the adapter put on by peft where one is given."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, attn_implementation="eager"
    )
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].numpy()


@pytest.fixture(scope="module")
def adapters(tiny_model, tmp_path_factory):
    """adapters(family, kind) -> (folder, the delta that peft makes with it)."""
    made = {}

    def make(family: str, kind: str) -> tuple[Path, np.ndarray]:
        if (family, kind) not in made:
            model = tiny_model(family)
            folder = make_adapter(model, tmp_path_factory.mktemp("k") / kind, kind)
            made[family, kind] = folder, reference(model, folder) - reference(model, None)
        return made[family, kind]

    return make


def run(model: Path, folders: list[Path], tp: int) -> list[np.ndarray]:
    """Logits of the base and of each adapter, all in one batch: prefill, then one decode row."""
    count = len(folders) + 1
    steps = Steps(
        model, tp, decode=count, prefill=count * 32, adapters=folders, texts=count, max_len=40
    )
    numbers = [-1, *reversed(range(len(folders)))]
    prefills = [Piece(i, 0, TOKENS[:-1], adapter) for i, adapter in enumerate(numbers)]
    decodes = [Piece(i, len(TOKENS) - 1, TOKENS[-1:], a) for i, a in enumerate(numbers)]
    parts = zip(steps.run(prefills=prefills), steps.run(decodes), strict=True)
    logits = [np.concatenate(part) for part in parts]
    return [logits[0], *reversed(logits[1:])]


@pytest.mark.parametrize(
    ("family", "tp"),
    [
        ("llama_bias", 1),
        ("llama_bias", 2),
        ("llama_odd", 1),
        ("llama_odd", 2),
        ("qwen2", 4),
        ("qwen3", 4),
        ("gemma3", 2),
        ("phi3", 2),
    ],
)
def test_all_kinds_in_one_batch_make_the_deltas_that_peft_makes(tiny_model, adapters, family, tp):
    kinds = sorted(KINDS)
    made = [adapters(family, kind) for kind in kinds]
    base, *ours = run(tiny_model(family), [folder for folder, _ in made], tp)
    np.testing.assert_allclose(base, reference(tiny_model(family), None), rtol=0, atol=TOLERANCE)
    for kind, got, (_, delta) in zip(kinds, ours, made, strict=True):
        largest = np.abs(delta).max()
        assert largest > 0.5, f"{kind}: an adapter that does nothing proves nothing"
        # the tolerance is for logits of size about 10
        atol = TOLERANCE * max(1.0, np.abs(base + delta).max() / 10)
        np.testing.assert_allclose(got - base, delta, rtol=0, atol=atol, err_msg=kind)
