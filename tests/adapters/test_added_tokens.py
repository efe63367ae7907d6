"""Adapters that add tokens: what is refused, and what an adapter without a base's rows lacks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlora.adapter_text import AdapterTexts
from jlora.adapters.peft import read_adapter, required_support
from jlora.errors import AdapterError
from jlora.models.base import BaseWeights
from jlora.models.config import ModelConfig
from jlora.tokenizer import Tokenizer
from tests.adapters.folders import CFG, PREFIX, config, refused, tensors, write

EMBED, HEAD = f"{PREFIX}embed_tokens", "base_model.model.lm_head"
V, D = CFG.vocab, CFG.embed
SAVED: dict[str, Any] = {"modules_to_save": ["embed_tokens", "lm_head"]}
TOKENS: dict[str, Any] = {"trainable_token_indices": {"embed_tokens": [V], "lm_head": [V]}}


def rows(count: int, value: float = 1.0) -> np.ndarray:
    return np.full((count, D), value, np.float32)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, np.ndarray], str]] = {
    "no head": (
        {"modules_to_save": ["embed_tokens"]},
        {f"{EMBED}.weight": rows(V + 2)},
        f"adds tokens {V} to {V + 1}, but has no rows of lm_head for them",
    ),
    "no embedding": (
        {"modules_to_save": ["lm_head"]},
        {f"{HEAD}.weight": rows(V + 2)},
        f"adds tokens {V} to {V + 1}, but has no rows of embed_tokens",
    ),
    "ends of two sizes": (
        SAVED,
        {f"{EMBED}.weight": rows(V + 2), f"{HEAD}.weight": rows(V + 3)},
        f"is [{V + 2}, 64], expected [{V + 3}, 64]",
    ),
    "fewer rows than the base": (
        SAVED,
        {f"{EMBED}.weight": rows(V - 5), f"{HEAD}.weight": rows(V - 5)},
        f"is [{V - 5}, 64], expected [{V}, 64]",
    ),
    "rows of another width": (
        SAVED,
        {f"{EMBED}.weight": np.ones((V + 1, 80)), f"{HEAD}.weight": np.ones((V + 1, 80))},
        f"expected [{V + 1}, 64]",
    ),
    "a pair of the old size": (
        {"target_modules": ["q_proj", "v_proj", "lm_head"]},
        {
            f"{HEAD}.lora_A.weight": rows(4),
            f"{HEAD}.lora_B.weight": np.ones((V, 4)),
            f"{HEAD}.base_layer.weight": rows(V + 1),
            f"{EMBED}.weight": rows(V + 1),
        },
        f"expected [r, 64] and [{V + 1}, r]",
    ),
    "a token far beyond": (
        {"trainable_token_indices": {"embed_tokens": [2**30], "lm_head": [2**30]}},
        {
            f"{end}.token_adapter.trainable_tokens_delta": rows(1)
            for end in (EMBED, HEAD)
        },
        f"names token {2**30}, beyond the {V + 1}",
    ),
    "a token without a row of the head": (
        {"trainable_token_indices": [V]},
        {f"{EMBED}.token_adapter.trainable_tokens_delta": rows(1)},
        "has no rows of lm_head",
    ),
    "two copies": (
        {"target_modules": ["q_proj", "v_proj", "embed_tokens"]},
        {
            f"{EMBED}.lora_embedding_A": np.ones((4, V)),
            f"{EMBED}.lora_embedding_B": np.ones((D, 4)),
            f"{EMBED}.base_layer.weight": rows(V),
            f"{EMBED}.weight": rows(V),
        },
        "two copies of its weight",
    ),
    "an original of a layer": (
        {},
        {f"{PREFIX}layers.0.self_attn.q_proj.original_module.weight": rows(64)},
        "is a weight of the base itself",
    ),
    "without the base": (
        SAVED,
        {f"{EMBED}.weight": rows(V + 1), f"{HEAD}.weight": rows(V + 1)},
        "relative to the base's own weights",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_rows_that_do_not_make_a_vocabulary_are_refused(tmp_path: Path, case: str) -> None:
    changes, arrays, reason = REFUSED[case]
    refused(write(tmp_path, config(**changes), tensors() | arrays), reason)


@pytest.fixture(scope="module")
def base(tiny_model) -> tuple[Path, ModelConfig, BaseWeights]:
    folder = tiny_model("llama")
    cfg = ModelConfig.from_folder(folder)
    return folder, cfg, BaseWeights(folder, cfg)


def test_two_different_weights_of_one_module_are_refused(base, tmp_path: Path) -> None:
    both = {
        f"{end}{form}.weight": rows(V + 1)
        for end in (EMBED, HEAD)
        for form in ("", ".modules_to_save")
    }
    both[f"{HEAD}.modules_to_save.weight"] = rows(V + 1, 2.0)
    folder = write(tmp_path, config(**SAVED), tensors() | both)
    with pytest.raises(AdapterError, match="two different weights of one module"):
        read_adapter(folder, *base[1:])


def test_rows_that_are_the_bases_own_cost_no_ranks(base, tmp_path: Path) -> None:
    _, cfg, weights = base
    ends = {
        f"{key}.weight": np.concatenate([weights.weight(-1, name), rows(2)])
        for key, name in ((EMBED, "embed_tokens"), (HEAD, "lm_head"))
    }
    folder = write(tmp_path, config(), tensors() | ends)
    adapter = read_adapter(folder, cfg, weights)
    needed = required_support(folder, cfg)
    assert (needed.support, needed.added_tokens) == ({"vocabulary"}, 2)
    assert (adapter.added_tokens, adapter.support) == (2, {"vocabulary"})
    for name in ("embed_tokens", "lm_head"):
        pair = adapter.weights[-1, name]
        assert pair.rank == 2
        table = pair.a.T @ pair.b.T if name == "embed_tokens" else pair.b @ pair.a
        np.testing.assert_array_equal(table, np.concatenate([np.zeros((V, D)), rows(2)]))


def tokenizer_folder(base: Path, folder: Path, **files: Any) -> Path:
    folder.mkdir()
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text)
    return folder


BAD_FILES: dict[str, tuple[dict[str, Any], str]] = {
    "no tokenizer": ({"tokenizer": "{}"}, "not a tokenizer"),
    "cut off": ({"tokenizer": '{"model": '}, "not a tokenizer"),
    "config a list": ({"tokenizer_config": []}, "expected an object"),
    "numbers that are none": ({"added_tokens": {"<a>": "320"}}, "must hold numbers"),
    "a gap": ({"added_tokens": {"<a>": 325}}, "added to the base's tokenizer it is 320"),
    "beyond the rows": ({"added_tokens": {"<a>": 320, "<b>": 321, "<c>": 322}}, "there are rows for 322"),
    "an end that is none": ({"generation_config": {"eos_token_id": [2, 322]}}, "from 0 to 321"),
    "an end of text": ({"generation_config": {"eos_token_id": "</s>"}}, "from 0 to 321"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(BAD_FILES))
def test_files_of_text_that_mean_nothing_are_refused(base, tmp_path: Path, case: str) -> None:
    files, reason = BAD_FILES[case]
    texts = AdapterTexts(Tokenizer.from_folder(base[0]))
    folder = tokenizer_folder(base[0], tmp_path / "a", **files)
    with pytest.raises(AdapterError) as error:
        texts.read(folder, V + 2)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_new_tokens_is_the_bases(base, tmp_path: Path) -> None:
    own = Tokenizer.from_folder(base[0])
    texts = AdapterTexts(own)
    data = json.loads((base[0] / "tokenizer.json").read_text())
    config = json.loads((base[0] / "tokenizer_config.json").read_text())
    same = tokenizer_folder(base[0], tmp_path / "a", tokenizer=data, tokenizer_config=config)
    text = texts.read(same, V)
    assert (text.tokenizer, text.eos_ids) == (None, ())
    assert texts.read(tmp_path, V).tokenizer is None
    # another end token of the same vocabulary ends its answers, and needs no tokenizer
    config["eos_token"] = "<|im_start|>"
    ends = texts.read(tokenizer_folder(base[0], tmp_path / "b", tokenizer_config=config), V)
    assert (ends.tokenizer, ends.eos_ids) == (None, (3,))


def test_added_tokens_of_a_slow_tokenizer_are_added_to_the_bases(base, tmp_path: Path) -> None:
    texts = AdapterTexts(Tokenizer.from_folder(base[0]))
    special = {"additional_special_tokens": ["<b>"], "eos_token": {"content": "<b>"}}
    folder = tokenizer_folder(
        base[0], tmp_path / "a", added_tokens={"<b>": 321, "<a>": 320}, special_tokens_map=special
    )
    text = texts.read(folder, V + 2)
    assert text.tokenizer is not None
    assert text.tokenizer.encode("<a>x<b>", add_special_tokens=False)[::2] == [320, 321]
    assert (text.eos_ids, text.tokenizer.special_ids >= {321}) == ((321,), True)
    assert 320 not in text.tokenizer.special_ids
