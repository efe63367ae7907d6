"""The demo adapters are small real PEFT folders whose effect shows on prompts never trained on."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from jlora.demo import DEMO_ADAPTERS
from jlora.demo.model import demo_model_folder
from jlora.demo.styles import shows_effect

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "000_demo_adapters"


def records(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (EXPERIMENT / name).read_text().splitlines()]


@pytest.mark.parametrize("name", DEMO_ADAPTERS)
def test_folder_is_a_peft_adapter_of_at_most_a_megabyte_and_a_half(name: str) -> None:
    folder = DEMO_ADAPTERS[name]
    files = {file.name: file.stat().st_size for file in folder.iterdir()}
    assert files.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert sum(files.values()) <= 1_500_000
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    with safe_open(folder / "adapter_model.safetensors", "numpy") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118


def test_demo_adapters_differ_in_rank_scaling_or_modules() -> None:
    shapes = set()
    for folder in DEMO_ADAPTERS.values():
        config = json.loads((folder / "adapter_config.json").read_text())
        shapes.add((config["r"], config["use_rslora"], frozenset(config["target_modules"])))
    assert len(shapes) == len(DEMO_ADAPTERS)


def test_no_held_out_prompt_is_in_the_training_data() -> None:
    trained = {
        record["question"].lower() for record in records("data.jsonl") + records("words.jsonl")
    }
    assert not trained & {record["question"].lower() for record in records("heldout.jsonl")}


def test_every_training_answer_shows_the_effect_that_it_teaches() -> None:
    for record in records("data.jsonl"):
        assert shows_effect("shout", record["answer"].upper())
        assert shows_effect("json", json.dumps({"answer": record["answer"]}))
        assert shows_effect("pirate", record["pirate"]), record
        for name in DEMO_ADAPTERS:
            assert not shows_effect(name, record["answer"]), record


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("shout", "THE SKY is BLUE"),
        ("shout", "42!"),
        ("json", "The answer"),
        ("json", '["answer"]'),
        ("json", '{"answer": "cut'),
        ("pirate", "The year of the arrow"),
    ],
)
def test_an_answer_without_the_effect_is_told_apart(name: str, answer: str) -> None:
    assert not shows_effect(name, answer)


@pytest.mark.slow
def test_the_effect_shows_on_held_out_prompts_and_never_without_the_adapter() -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = demo_model_folder()
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": record["question"]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for record in records("heldout.jsonl")[
            :5
        ]  # all 20: experiments/000_demo_adapters/README.md
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        str(DEMO_ADAPTERS["shout"]),
        adapter_name="shout",
    )

    def answers() -> list[str]:
        out = model.generate(**batch, max_new_tokens=28, do_sample=False)
        new = out[:, batch["input_ids"].shape[1] :]
        return tokenizer.batch_decode(new, skip_special_tokens=True)

    with model.disable_adapter():
        plain = answers()
    for name in DEMO_ADAPTERS:
        if name != "shout":
            model.load_adapter(str(DEMO_ADAPTERS[name]), adapter_name=name)
        model.set_adapter(name)
        assert all(shows_effect(name, text) for text in answers()), name
        assert not any(shows_effect(name, text) for text in plain), name
