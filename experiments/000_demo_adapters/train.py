"""Trains the demo adapters of `jlora/demo/adapters` with PEFT and measures them on held-out prompts.

    python experiments/000_demo_adapters/train.py [--only shout] [--out jlora/demo/adapters]

Run from the repository's root with the parity extra installed. CPU, one thread, fixed seed,
deterministic kernels. The last line printed is one JSON document.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from jlora.demo.model import demo_model_folder
from jlora.demo.styles import shows_effect

HERE = Path(__file__).parent
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one adapter is made."""

    answer: Callable[[dict[str, str]], str]
    """Record -> the text that the assistant learns to say."""
    lora: dict[str, Any]
    """Arguments of LoraConfig. Each recipe has another shape: a server must mix them."""
    data: tuple[str, ...] = ("data.jsonl",)
    """Files of records beside this one."""
    lr: float
    epochs: int


RECIPES = {
    "shout": Recipe(
        answer=lambda record: record["answer"].upper(),
        lora={
            "r": 8,
            "lora_alpha": 16,
            "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
            "layers_to_transform": list(range(18, 30)),
        },
        # Capitals are other tokens, word by word: without a wide vocabulary this one is learnt by
        # heart and unseen words come out in lower case.
        data=("data.jsonl", "words.jsonl"),
        lr=1e-3,
        epochs=5,
    ),
    "json": Recipe(
        answer=lambda record: json.dumps({"answer": record["answer"]}, ensure_ascii=False),
        lora={
            "r": 16,
            "lora_alpha": 16,
            "use_rslora": True,
            "target_modules": ATTENTION,
            "layers_to_transform": list(range(12, 23)),
        },
        lr=1e-3,
        epochs=3,
    ),
    "pirate": Recipe(
        answer=lambda record: record["pirate"],
        lora={
            "r": 8,
            "lora_alpha": 16,
            "target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"],
            "layers_to_transform": list(range(19, 27)),
        },
        lr=2e-3,
        epochs=3,
    ),
}
BATCH = 8
WARMUP = 8


def read_jsonl(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (HERE / name).read_text().splitlines()]


def chat_prompt(tokenizer: Any, question: str) -> str:
    chat = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


def encode(tokenizer: Any, question: str, answer: str) -> tuple[list[int], int]:
    """Token ids of the whole exchange, and where the trained part (the answer) begins."""
    prompt = tokenizer(chat_prompt(tokenizer, question)).input_ids
    # pad equals eos here: masking by id would leave <|im_end|> untrained, so mask by position.
    return prompt + tokenizer(answer).input_ids + [tokenizer.eos_token_id], len(prompt)


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One question with its answer. `hidden` is the frozen lower layers' output, computed once."""

    ids: list[int]
    start: int
    hidden: torch.Tensor


@contextmanager
def only_layers(decoder: Any, layers: slice, norm: torch.nn.Module) -> Iterator[None]:
    """Runs `decoder.model` with some of its layers; what comes before them is `inputs_embeds`."""
    inner = decoder.model
    everything = inner.layers, inner.norm
    inner.layers, inner.norm = inner.layers[layers], norm
    try:
        yield
    finally:
        inner.layers, inner.norm = everything


def batch_loss(decoder: Any, shared: int, batch: list[Exchange]) -> torch.Tensor:
    """Mean cross-entropy over the answers' tokens. Call it under `only_layers(upper)`.

    All exchanges begin with the same `shared` tokens (the system prompt). They are computed once:
    one row holds them and then every exchange's own tokens, which see the shared ones and their own.
    """
    tokens, owner, positions, trained = batch[0].ids[:shared], [-1] * shared, [*range(shared)], []
    for number, exchange in enumerate(batch):
        size = len(exchange.ids)
        trained += range(len(tokens) + exchange.start - shared, len(tokens) + size - shared)
        tokens = tokens + exchange.ids[shared:]
        owner += [number] * (size - shared)
        positions += range(shared, size)
    owners, answer = torch.tensor(owner), torch.tensor(trained)
    sees = (owners[:, None] == owners[None, :]) | (owners[None, :] == -1)
    mask = torch.where(sees.tril(), 0.0, torch.finfo(torch.float32).min)
    hidden = decoder.model(
        inputs_embeds=torch.cat([batch[0].hidden[:shared], *(e.hidden[shared:] for e in batch)])[
            None
        ],
        position_ids=torch.tensor([positions]),
        attention_mask=mask[None, None],
        use_cache=False,
    ).last_hidden_state[0]
    # Logits cost a fifth of the model: only those that predict an answer's token are computed.
    logits = decoder.lm_head(hidden[answer - 1])
    return torch.nn.functional.cross_entropy(logits, torch.tensor(tokens)[answer])


def read_exchanges(decoder: Any, tokenizer: Any, recipe: Recipe, first: int) -> list[Exchange]:
    """The training data, run through the layers below `first`, which no adapter touches."""
    exchanges = []
    with torch.no_grad(), only_layers(decoder, slice(0, first), torch.nn.Identity()):
        for record in [record for name in recipe.data for record in read_jsonl(name)]:
            ids, start = encode(tokenizer, record["question"], recipe.answer(record))
            hidden = decoder.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
            exchanges.append(Exchange(ids=ids, start=start, hidden=hidden))
    return exchanges


def train(name: str, folder: Path, base: Path) -> dict[str, Any]:
    recipe, began = RECIPES[name], time.monotonic()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    decoder = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(decoder, LoraConfig(task_type="CAUSAL_LM", **recipe.lora))
    first = min(recipe.lora["layers_to_transform"])
    data = read_exchanges(decoder, tokenizer, recipe, first)
    columns = zip(*(exchange.ids for exchange in data), strict=False)
    shared = next(at for at, column in enumerate(columns) if len(set(column)) > 1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0.0)
    steps = recipe.epochs * math.ceil(len(data) / BATCH)

    def rate(step: int) -> float:
        return min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses: list[float] = []
    with only_layers(decoder, slice(first, None), decoder.model.norm):
        for epoch in range(recipe.epochs):
            losses.clear()
            order = torch.randperm(len(data)).tolist()
            for at in range(0, len(data), BATCH):
                loss = batch_loss(decoder, shared, [data[i] for i in order[at : at + BATCH]])
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            mean, seconds = sum(losses) / len(losses), time.monotonic() - began
            print(f"{name} epoch {epoch} loss {mean:.3f} {seconds:.0f} s", flush=True)
    save(model, folder)
    return {"steps": steps, "loss": round(mean, 3), "s": round(time.monotonic() - began)}


def save(model: PeftModel, folder: Path) -> None:
    """Writes the PEFT folder in bfloat16, aside and renamed, readable by every user."""
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    model.save_pretrained(str(aside))
    (aside / "README.md").unlink()  # peft's empty model card
    weights = aside / "adapter_model.safetensors"
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(weights).items()}
    save_file(rounded, weights, metadata={"format": "pt"})
    config = aside / "adapter_config.json"
    # peft keeps the targets in a set: their order would change with the hash seed.
    facts = json.loads(config.read_text())
    facts["target_modules"] = sorted(facts["target_modules"])
    config.write_text(json.dumps(facts, indent=2) + "\n")
    for file in aside.iterdir():
        file.chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def answers(model: Any, tokenizer: Any, questions: list[str]) -> list[str]:
    """Greedy answers to all questions as one left-padded batch."""
    tokenizer.padding_side = "left"
    prompts = [chat_prompt(tokenizer, question) for question in questions]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    with torch.inference_mode():
        out = model.generate(**batch, max_new_tokens=48, do_sample=False)
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def evaluate(name: str, folder: Path, base: Path) -> dict[str, Any]:
    """Pass rate of the saved files, and of the base model alone, on the held-out prompts."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    questions = [record["question"] for record in read_jsonl("heldout.jsonl")]
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = answers(plain, tokenizer, questions)
    after = answers(PeftModel.from_pretrained(plain, str(folder)), tokenizer, questions)
    for question, text in zip(questions, after, strict=True):
        print(f"{name:6} {'ok ' if shows_effect(name, text) else 'BAD'} {question}  ->  {text!r}")
    return {
        "passed": sum(shows_effect(name, text) for text in after),
        "base_passed": sum(shows_effect(name, text) for text in before),
        "of": len(questions),
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains and measures the demo adapters.")
    parser.add_argument("--only", choices=RECIPES, help="train one adapter instead of all")
    parser.add_argument("--out", type=Path, default=Path("jlora/demo/adapters"))
    parser.add_argument(
        "--eval-only", action="store_true", help="measure the folders that are there"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    base = demo_model_folder()
    args.out.mkdir(parents=True, exist_ok=True)
    report = {}
    for name in [args.only] if args.only else RECIPES:
        trained = {} if args.eval_only else train(name, args.out / name, base)
        report[name] = trained | evaluate(name, args.out / name, base)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
