"""Adapters with tokens of their own over HTTP: their tokenizer, their vocabulary, and nobody else's."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlora.errors import AdapterError
from jlora.llm import LLM
from jlora.options import ModelOptions
from tests.models.test_added_tokens import ADDED, make_added
from tests.models.test_decoder_kinds import make_adapter
from tests.server.conftest import Running, start

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("few_shapes")

NEW = 12
TEXTS = ("<|tool|>", "<|answer|>", "<|done|>")
CHAT = [{"role": "user", "content": "call <|tool|>"}]


def give_tokenizer(model: Path, adapter: Path, vocab: int, eos: str | None = None) -> None:
    """The base's tokenizer with new tokens from `vocab` on, as a trainer saves it."""
    data = json.loads((model / "tokenizer.json").read_text())
    plain = {**data["added_tokens"][0], "special": False}
    size = len(data["model"]["vocab"])  # numbers go on from there, whatever the file says
    names = [*(f"<|unused{number}|>" for number in range(size, vocab)), *TEXTS]
    data["added_tokens"] += [
        {**plain, "id": size + number, "content": text} for number, text in enumerate(names)
    ]
    (adapter / "tokenizer.json").write_text(json.dumps(data))
    config = json.loads((model / "tokenizer_config.json").read_text())
    config |= {"eos_token": eos} if eos else {}
    (adapter / "tokenizer_config.json").write_text(json.dumps(config))


@dataclass
class Made:
    model: Path
    vocab: int
    paths: dict[str, Path]

    def oracle(self, name: str | None) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        added = {None: 0, "other": 0, "one": 1}.get(name, ADDED)
        if added:
            model.resize_token_embeddings(self.vocab + added, mean_resizing=False)
        return peft.PeftModel.from_pretrained(model, self.paths[name]) if name else model

    def greedy(self, name: str | None, prompt: list[int]) -> list[int]:
        model, ids = self.oracle(name), list(prompt)
        with torch.no_grad():
            for _ in range(NEW):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prompt) :]


@pytest.fixture(scope="module", params=[("llama", 1), ("llama_odd", 2)], ids=["untied", "tied"])
def setting(request, tiny_model: Callable[..., Path], tmp_path_factory) -> Iterator[Any]:
    family, mesh = request.param
    model, root = tiny_model(family), tmp_path_factory.mktemp("added")
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    paths = {
        "saved": make_added(model, root / "saved", "saved"),
        "pairs": make_added(model, root / "pairs", "pairs"),
        "other": make_adapter(model, root / "other", "dora_embedding_head"),
    }
    for name in ("saved", "pairs"):
        give_tokenizer(model, paths[name], vocab)
    made = Made(model, vocab, paths)
    paths["stops"] = shutil.copytree(paths["saved"], root / "stops")
    end = made.greedy("saved", [5, 6, vocab])[3]
    (paths["stops"] / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    options = ModelOptions(
        model=str(model),
        served_model_name=("tiny",),
        lora_modules=tuple(f"{name}={path}" for name, path in paths.items()),
        max_model_len=128,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        mesh=mesh,
    )
    with LLM.load(options) as llm:
        running = start(llm, root, lora_dir=(str(root),))
        yield running, made, root
        running.stop()


def complete(live: Running, name: str | None, prompt: Any, **body: Any) -> dict[str, Any]:
    given = live.post(
        "/v1/completions",
        {"model": name or "tiny", "prompt": prompt, "max_tokens": NEW, "temperature": 0,
         "ignore_eos": True, "return_token_ids": True, **body},
    )  # fmt: skip
    assert given.status_code == 200, given.text
    return given.json()["choices"][0]


def test_tokens_of_an_adapter_are_generated_as_peft_does_beside_others(setting) -> None:
    live, made, _ = setting
    vocab, new = made.vocab, set()
    for name in ("saved", "pairs"):
        for prompt in ([5, 6, vocab], [vocab + 2, 9, 40, vocab + 1, 8], [7, 8, 9]):
            want = made.greedy(name, prompt)
            assert complete(live, name, prompt)["token_ids"] == want
            new |= {token for token in want if token >= vocab}
    assert new, "an adapter that never says its own tokens proves nothing"
    for name in (None, "other"):
        assert complete(live, name, [7, 8, 9])["token_ids"] == made.greedy(name, [7, 8, 9])


def test_nobody_else_may_name_or_sample_them(setting) -> None:
    live, made, _ = setting
    vocab = made.vocab
    body = {"max_tokens": 2, "temperature": 0}
    for name, prompt in (("tiny", [vocab]), ("other", [vocab]), ("saved", [vocab + ADDED])):
        bad = live.post("/v1/completions", {"model": name, "prompt": prompt, **body})
        assert bad.status_code == 400
        assert "is outside the vocabulary" in bad.text
    bias = {"model": "tiny", "prompt": [5], "logit_bias": {str(vocab): 100}, **body}
    assert live.post("/v1/completions", bias).status_code == 400
    hot = [
        complete(live, name, [5, 6], temperature=50.0, max_tokens=100, seed=seed)["token_ids"]
        for name in (None, "other")
        for seed in range(4)
    ]
    assert max(token for tokens in hot for token in tokens) < vocab
    own = [
        complete(live, "saved", [5, 6], temperature=50.0, max_tokens=100, seed=s) for s in (1, 2, 3)
    ]
    assert max(token for choice in own for token in choice["token_ids"]) >= vocab


def test_its_text_goes_through_its_tokenizer(setting) -> None:
    live, made, _ = setting
    vocab, text = made.vocab, "call <|tool|> now"

    def tokens(name: str, **body: Any) -> list[int]:
        return live.post("/tokenize", {"model": name, **body}).json()["tokens"]

    assert vocab in tokens("saved", prompt=text)
    assert max(tokens("tiny", prompt=text)) < vocab
    assert vocab in tokens("saved", messages=CHAT)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(made.paths["saved"])
    assert tokens("saved", prompt=text) == tokenizer(text)["input_ids"]
    for prompt in (text, tokenizer(text)["input_ids"]):
        got = complete(live, "saved", prompt, skip_special_tokens=False)
        assert got["token_ids"] == made.greedy("saved", tokenizer(text)["input_ids"])
        assert got["text"] == tokenizer.decode(got["token_ids"])
    hot = [
        complete(live, "saved", [5, 6], temperature=50.0, max_tokens=100, seed=seed)
        for seed in range(1, 6)
    ]
    said = [token - vocab for choice in hot for token in choice["token_ids"] if token >= vocab]
    assert said
    assert TEXTS[said[0]] in "".join(choice["text"] for choice in hot)
    back = live.post("/detokenize", {"model": "saved", "tokens": [vocab, vocab + 1]})
    assert back.json()["prompt"] == "<|tool|><|answer|>"
    assert live.post("/detokenize", {"model": "tiny", "tokens": [vocab]}).status_code == 400
    chat = {"model": "saved", "messages": CHAT, "max_tokens": 3, "temperature": 0}
    used = live.post("/v1/chat/completions", chat).json()["usage"]["prompt_tokens"]
    assert used == len(tokens("saved", messages=CHAT))
    plain = live.post("/generate", {"text": text, "lora_path": "saved",
                                    "sampling_params": {"max_new_tokens": 3, "temperature": 0}})  # fmt: skip
    assert plain.json()["meta_info"]["prompt_tokens"] == len(tokenizer(text)["input_ids"])


def test_its_own_end_token_ends_its_text_and_no_other(setting) -> None:
    live, made, _ = setting
    prompt = [5, 6, made.vocab]
    want = made.greedy("saved", prompt)
    ended = complete(live, "stops", prompt, ignore_eos=False)
    assert ended["finish_reason"] == "stop"
    assert ended["token_ids"] == want[: want.index(want[3]) + 1]
    assert complete(live, "saved", prompt)["token_ids"] == want


def test_one_that_needs_more_room_than_there_is_is_refused_with_the_flag(setting) -> None:
    live, made, root = setting
    make_added(made.model, root / "four", "saved", added=4)
    loaded = live.post(
        "/v1/load_lora_adapter", {"lora_name": "four", "lora_path": str(root / "four")}
    )
    assert loaded.status_code == 400
    told = "adds 4 tokens, this engine has room for 3: start it with --lora-extra-vocab-size 4"
    assert told in loaded.text
    made.paths["one"] = make_added(made.model, root / "one", "saved", added=1)
    loaded = live.post(
        "/v1/load_lora_adapter", {"lora_name": "one", "lora_path": str(root / "one")}
    )
    assert loaded.status_code == 200
    prompt = [5, made.vocab, 9]
    assert complete(live, "one", prompt)["token_ids"] == made.greedy("one", prompt)
    beyond = {"model": "one", "prompt": [made.vocab + 1], "max_tokens": 1}
    assert live.post("/v1/completions", beyond).status_code == 400


def test_a_tokenizer_with_tokens_beyond_the_rows_is_refused(setting) -> None:
    live, made, root = setting
    folder = make_added(made.model, root / "short", "saved", added=1)
    give_tokenizer(made.model, folder, made.vocab)
    loaded = live.post("/v1/load_lora_adapter", {"lora_name": "short", "lora_path": str(folder)})
    assert loaded.status_code == 400
    assert f"adds '<|answer|>' as token {made.vocab + 1}, but there are rows" in loaded.text


def test_it_cannot_be_mixed_or_merged_in_place(setting) -> None:
    live, _, _ = setting
    mixed = live.post("/v1/completions", {"model": "saved*0.5+other*0.5", "prompt": [5]})
    assert mixed.status_code == 400
    assert "adds 3 tokens, which mean nothing to the others" in mixed.text
    merged = live.post("/v1/adapters/saved/merge", {})
    assert merged.status_code == 400
    assert "python -m jlora.merge writes a checkpoint that has them" in merged.text


def test_prompt_scores_are_those_of_its_own_vocabulary(setting) -> None:
    live, made, _ = setting
    llm, prompt = live.llm, [5, made.vocab, 9, made.vocab + 2, 11]
    with torch.no_grad():
        want = made.oracle("saved")(torch.tensor([prompt])).logits[0].log_softmax(-1).numpy()
    given = live.post(
        "/v1/completions",
        {"model": "saved", "prompt": prompt, "max_tokens": 1, "prompt_logprobs": 0},
    ).json()["choices"][0]["prompt_logprobs"]
    got = [entry[str(token)]["logprob"] for entry, token in zip(given[1:], prompt[1:], strict=True)]
    np.testing.assert_allclose(got, want[np.arange(4), prompt[1:]], rtol=0, atol=2e-3)
    assert llm.vocab_of(None) == made.vocab


def test_an_engine_without_room_says_what_to_start_it_with(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    folder = make_added(model, tmp_path / "a", "trainable_tokens")
    options: dict[str, Any] = {"max_model_len": 64, "max_num_seqs": 1, "max_num_batched_tokens": 32}
    told = r"adds 3 tokens, this engine has room for 0: start it with --lora-extra-vocab-size 3"
    with LLM(model=str(model), **options) as llm, pytest.raises(AdapterError, match=told):
        llm.store.load("a", folder)
