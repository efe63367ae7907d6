"""Adapters that add tokens, in every form in which PEFT writes them, beside others in one batch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models.steps import Piece, Steps
from tests.models.test_decoder_kinds import ALL, make_adapter, move_trained, reference

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TOLERANCE = 1e-3
ADDED = 3

FORMS: dict[str, dict[str, Any]] = {
    "saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "saved_embedding": {"modules_to_save": ["embed_tokens"]},
    "resized_only": {},
    "pairs": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "dora_pairs": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_dora": True},
    "trainable_tokens": {"trainable_token_indices": [5, -3, -2, -1]},
    "trainable_tokens_alone": {"trainable_token_indices": [-3, -2, -1]},
}


def make_added(model_folder: Path, folder: Path, form: str, added: int = ADDED) -> Path:
    """A folder that peft wrote after `resize_token_embeddings`, what is trained moved at random, as
    are the new rows."""
    torch.manual_seed(len(form))
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    vocab = model.config.vocab_size
    model.resize_token_embeddings(vocab + added, mean_resizing=False)
    embed, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    with torch.no_grad():
        for end in (embed,) if head is embed else (embed, head):
            end[vocab:] = end[:vocab].std() * torch.randn_like(end[vocab:])
    options: dict[str, Any] = {"r": 4, "target_modules": ALL, **FORMS[form]}
    if (tokens := options.get("trainable_token_indices")) is not None:
        options["trainable_token_indices"] = [t % (vocab + added) for t in tokens]
    if form == "trainable_tokens_alone" and head is not embed:  # the head needs rows too
        index = options["trainable_token_indices"]
        options["trainable_token_indices"] = {"embed_tokens": index, "lm_head": index}
    model = peft.get_peft_model(model, peft.LoraConfig(**options))
    move_trained(model)
    model.save_pretrained(folder, save_embedding_layers=not form.endswith("alone"))
    return folder


def expected(
    model_folder: Path, adapter: Path, tokens: list[int], added: int = ADDED
) -> np.ndarray:
    """Logits [T, V + added] of peft on a base that was resized first."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, attn_implementation="eager"
    )
    model.resize_token_embeddings(model.config.vocab_size + added, mean_resizing=False)
    model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


@pytest.mark.parametrize(
    ("family", "tp"),
    [("llama_bias", 1), ("llama_bias", 2), ("llama_odd", 1), ("llama_odd", 4), ("gemma2", 2)],
)
def test_every_form_in_one_batch_makes_the_logits_that_peft_makes(tiny_model, tmp_path, family, tp):
    model = tiny_model(family)
    forms = sorted(FORMS)
    folders = [make_added(model, tmp_path / form, form) for form in forms]
    folders.append(make_adapter(model, tmp_path / "plain", "embedding_head_linear"))
    folders.append(make_added(model, tmp_path / "fewer", "saved", added=1))
    count = len(folders) + 1
    vocab = reference(model, None).shape[1]
    rng = np.random.default_rng(4)
    texts = [rng.integers(4, vocab, 30).tolist() for _ in range(count)]
    for text in texts[:-3]:
        text[3:12:3] = [vocab, vocab + 1, vocab + 2]
    texts[-2][5] = vocab
    # the last two are the plain adapter and the base, before them the one that adds fewer
    order = [*range(len(forms)), len(folders) - 1, len(folders) - 2, -1]
    texts = [*texts[: len(forms)], texts[-2], texts[-3], texts[-1]]
    texts[len(forms) + 1] = rng.integers(4, vocab, 30).tolist()
    steps = Steps(
        model, tp, decode=count, prefill=count * 32, adapters=folders, texts=count, max_len=40
    )
    pieces = [
        Piece(i, 0, text[:-1], a) for i, (text, a) in enumerate(zip(texts, order, strict=True))
    ]
    last = [
        Piece(i, 29, text[-1:], a) for i, (text, a) in enumerate(zip(texts, order, strict=True))
    ]
    first, then = steps.run(prefills=pieces), steps.run(last)
    got = [np.concatenate(both) for both in zip(first, then, strict=True)]
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for index, (name, text) in enumerate(
        zip([*forms, "fewer", "plain", "base"], texts, strict=True)
    ):
        added = {"fewer": 1, "plain": 0, "base": 0}.get(name, ADDED)
        if added:
            want = expected(model, folders[order[index]], text, added)
        elif name == "plain":
            with torch.no_grad():
                tuned = peft.PeftModel.from_pretrained(base, folders[order[index]])
                want = tuned(torch.tensor([text])).logits[0].numpy()
            base = tuned.unload()
        else:
            with torch.no_grad():
                want = base(torch.tensor([text])).logits[0].numpy()
        assert want.shape[1] == vocab + added
        size = TOLERANCE * max(1.0, np.abs(want).max() / 10)
        np.testing.assert_allclose(
            got[index][:, : vocab + added], want, rtol=0, atol=size, err_msg=name
        )
        assert np.isneginf(got[index][:, vocab + added :]).all(), name
        if added == ADDED:
            best = want.argmax(-1) >= vocab
            assert best.any() or np.abs(want[:, vocab:]).max() > 1, "new tokens must matter"
