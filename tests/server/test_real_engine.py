"""The server on the real engine and a tiny checkpoint: what clients get equals transformers and PEFT."""

import asyncio
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from jlora.llm import LLM
from jlora.options import ModelOptions
from tests.server.conftest import Running, start

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

NEW = 12
RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(4, 320, length).tolist() for length in (5, 23, 40)]


class Oracle:
    """Transformers with PEFT adapters, in float32."""

    def __init__(self, folder: Path, adapters: dict[str, Path]):
        base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        (first, path), *others = adapters.items()
        self.model = peft.PeftModel.from_pretrained(base, path, adapter_name=first)
        for name, other in others:
            self.model.load_adapter(other, adapter_name=name)

    def logits(self, name: str | None, ids: list[int]) -> Any:
        """[T, V] for the base model (None) or an adapter."""
        with torch.no_grad():
            if name is None:
                with self.model.disable_adapter():
                    return self.model(torch.tensor([ids])).logits[0]
            self.model.set_adapter(name)
            return self.model(torch.tensor([ids])).logits[0]

    def greedy(self, name: str | None, prompt: list[int]) -> list[int]:
        ids = list(prompt)
        for _ in range(NEW):
            ids.append(int(self.logits(name, ids)[-1].argmax()))
        return ids[len(prompt) :]

    def scores(self, name: str | None, ids: list[int]) -> list[float]:
        """Log-probability of every token but the first."""
        table = torch.log_softmax(self.logits(name, ids), -1)
        return [float(table[i, token]) for i, token in enumerate(ids[1:])]


@pytest.fixture(scope="module")
def folders(tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path]) -> dict[str, Path]:
    model = tiny_model("llama")
    return {
        "model": model,
        "r4": tiny_adapter(model, r=4, targets=["q_proj", "v_proj"], seed=1),
        "r24": tiny_adapter(model, r=24, alpha=12, rslora=True, seed=3),
    }


@pytest.fixture(scope="module")
def oracle(folders: dict[str, Path]) -> Oracle:
    return Oracle(folders["model"], {name: folders[name] for name in ("r4", "r24")})


@pytest.fixture(scope="module")
def live(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    options = ModelOptions(
        model=str(folders["model"]),
        served_model_name=("tiny",),
        lora_modules=tuple(f"{name}={folders[name]}" for name in ("r4", "r24")),
        max_model_len=128,
        max_num_seqs=4,
        max_num_batched_tokens=64,
    )
    root = tmp_path_factory.mktemp("root")
    with LLM.load(options) as llm:
        running = start(llm, root, lora_dir=(str(root),))
        yield running
        running.stop()


def ids_of(live: Running, **body: Any) -> list[int]:
    got = live.client().completions.create(
        max_tokens=NEW,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
        **body,
    )
    return got.choices[0].model_extra["token_ids"]


@pytest.mark.parametrize("name", [None, "r4", "r24"])
def test_greedy_tokens_over_http_equal_peft(live: Running, oracle: Oracle, name: str | None):
    for prompt in PROMPTS:
        want = oracle.greedy(name, prompt)
        assert ids_of(live, model=name or "tiny", prompt=prompt) == want
    assert oracle.greedy("r4", PROMPTS[0]) != oracle.greedy(None, PROMPTS[0])


def test_a_mix_of_adapters_over_http_equals_peft(live: Running, oracle: Oracle):
    weights = {"r4": 0.7, "r24": -0.4}
    oracle.model.add_weighted_adapter(
        [*weights], [*weights.values()], "mix", combination_type="cat"
    )
    want = oracle.greedy("mix", PROMPTS[1])
    oracle.model.delete_adapter("mix")
    assert want != oracle.greedy("r4", PROMPTS[1])
    assert ids_of(live, model="r4*0.7+r24*-0.4", prompt=PROMPTS[1]) == want
    body = {"prompt": PROMPTS[1], "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
    given = live.post("/v1/completions", body | {"model": weights, "return_token_ids": True})
    assert given.json()["choices"][0]["token_ids"] == want
    for model, status, told in (
        ("r4*0.7+nobody*0.3", 404, "There are: tiny, r4, r24"),
        ("r4+r4", 400, "twice"),
        ({"r4": "much"}, 400, "model"),
        ({}, 400, "model"),
    ):
        bad = live.post("/v1/completions", body | {"model": model})
        assert bad.status_code == status
        assert told in bad.text
    listed = [card["id"] for card in live.get("/v1/models").json()["data"]]
    assert listed == ["tiny", "r4", "r24"]


def test_an_adapter_is_merged_and_unmerged_over_http(live: Running, oracle: Oracle):
    def merged() -> list[str]:
        data = live.get("/v1/adapters").json()["data"]
        return [facts["name"] for facts in data if facts["merged"]]

    assert live.post("/v1/adapters/nobody/merge", {}).status_code == 404
    assert live.post("/v1/adapters/tiny/merge", {}).status_code == 404
    assert live.post("/v1/adapters/r4/unmerge", {}).status_code == 409
    assert live.post("/v1/adapters/r24/merge", {}).json()["merged"] is True
    try:
        assert merged() == ["r24"]
        want = oracle.greedy("r24", PROMPTS[0])
        assert ids_of(live, model="r24", prompt=PROMPTS[0]) == want
        for other in ("tiny", "r4"):
            refused = live.post("/v1/completions", {"model": other, "prompt": PROMPTS[0]})
            assert refused.status_code == 409
            assert "'r24' is merged" in refused.json()["error"]["message"]
        assert live.post("/v1/adapters/r4/merge", {}).status_code == 409
        assert live.post("/v1/unload_lora_adapter", {"lora_name": "r24"}).status_code == 409
        again = {"lora_name": "r24", "lora_path": "copy-r24", "load_inplace": True}
        assert live.post("/v1/load_lora_adapter", again).status_code == 409
    finally:
        assert live.post("/v1/adapters/r24/unmerge", {}).json()["unmerged"] is True
    assert merged() == []
    assert ids_of(live, model="tiny", prompt=PROMPTS[0]) == oracle.greedy(None, PROMPTS[0])


@pytest.mark.parametrize("name", [None, "r24"])
def test_echoed_scores_equal_transformers(live: Running, oracle: Oracle, name: str | None):
    """What lm-eval reads, within 1e-3; and the adapter's scores are far from the base model's."""
    for prompt in PROMPTS:
        got = live.client().completions.create(
            model=name or "tiny", prompt=prompt, echo=True, max_tokens=0, logprobs=1
        )
        scores = got.choices[0].logprobs.token_logprobs
        assert scores[0] is None
        assert scores[1:] == pytest.approx(oracle.scores(name, prompt), abs=1e-3)
    delta = np.subtract(oracle.scores("r24", PROMPTS[2]), oracle.scores(None, PROMPTS[2]))
    assert np.abs(delta).max() > 1


def test_generated_logprobs_equal_transformers(live: Running, oracle: Oracle):
    got = live.client().completions.create(
        model="r24",
        prompt=PROMPTS[1],
        max_tokens=4,
        temperature=0,
        logprobs=5,
        extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
    )
    logprobs = got.choices[0].logprobs
    ids = [int(token.removeprefix("token_id:")) for token in logprobs.tokens]
    table = torch.log_softmax(oracle.logits("r24", PROMPTS[1] + ids), -1)
    for i, (token, top) in enumerate(zip(ids, logprobs.top_logprobs, strict=True)):
        row = table[len(PROMPTS[1]) - 1 + i]
        assert logprobs.token_logprobs[i] == pytest.approx(float(row[token]), abs=1e-3)
        best = {f"token_id:{int(t)}": float(v) for v, t in zip(*row.topk(5), strict=True)}
        assert top == pytest.approx(best, abs=1e-3)


def test_chat_goes_through_the_template_to_the_adapter(live: Running, oracle: Oracle):
    messages: list[Any] = [{"role": "user", "content": "hello there"}]
    prompt = live.llm.tokenizer.encode_chat(messages)
    got = live.client().chat.completions.create(
        model="tiny:r4",
        messages=messages,
        max_tokens=NEW,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    want = oracle.greedy("r4", prompt)
    assert got.choices[0].model_extra["token_ids"] == want
    assert got.usage.prompt_tokens == len(prompt)


def test_streams_of_many_adapters_are_right_while_others_come_and_go(
    live: Running, oracle: Oracle, folders: dict[str, Path]
):
    for name in ("r4", "r24"):
        shutil.copytree(folders[name], live.adapters / f"copy-{name}", dirs_exist_ok=True)
    want = {name: oracle.greedy(name, PROMPTS[1]) for name in (None, "r4", "r24")}
    compiled = live.llm.engine.compiled_shapes  # type: ignore[attr-defined]

    async def both() -> None:
        client = live.async_client()

        async def read(name: str | None) -> None:
            stream = await client.completions.create(
                model=name or "tiny",
                prompt=PROMPTS[1],
                max_tokens=NEW,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
            chunks = [chunk.choices[0] async for chunk in stream]
            ids = [i for chunk in chunks for i in chunk.model_extra["token_ids"]]
            assert ids == want[name]

        async def churn() -> None:
            for name in ("r4", "r24", "r4"):
                body = {"lora_name": "guest", "lora_path": f"copy-{name}"}
                await client.post("load_lora_adapter", cast_to=str, body=body)
                got = await client.completions.create(
                    model="guest",
                    prompt=PROMPTS[1],
                    max_tokens=NEW,
                    temperature=0,
                    extra_body={"ignore_eos": True, "return_token_ids": True},
                )
                assert got.choices[0].model_extra["token_ids"] == want[name]
                text = await client.post(
                    "unload_lora_adapter", cast_to=str, body={"lora_name": "guest"}
                )
                assert "Freed 0 bytes of host" not in text

        await asyncio.gather(churn(), *(read(name) for name in [None, "r4", "r24"] * 4))

    asyncio.run(both())
    assert live.llm.engine.compiled_shapes == compiled  # type: ignore[attr-defined]


def test_a_seed_repeats_and_seeds_differ(live: Running):
    def sample(seed: int) -> str:
        got = live.client().completions.create(
            model="r4", prompt=PROMPTS[0], seed=seed, temperature=1.5, max_tokens=24
        )
        return got.choices[0].text

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_a_repeated_prompt_reports_cached_tokens_and_another_adapter_none(live: Running):
    prompt = RNG.integers(4, 320, 50).tolist()

    def cached(model: str) -> int:
        got = live.client().completions.create(model=model, prompt=prompt, max_tokens=2)
        return got.usage.prompt_tokens_details.cached_tokens

    assert cached("r4") == 0
    assert cached("r4") >= 32
    assert cached("r24") == 0


def test_a_client_that_leaves_frees_its_slot_and_pages(live: Running):
    body = {
        "model": "r4",
        "prompt": PROMPTS[2],
        "stream": True,
        "max_tokens": 80,
        "ignore_eos": True,
    }
    with httpx.stream("POST", f"{live.url}/v1/completions", json=body) as got:
        next(got.iter_lines())
    live.wait(lambda: live.llm.engine.stats().running == 0)
    assert live.llm.engine.stats().kv_usage == 0
    assert all(entry["in_flight"] == 0 for entry in live.llm.store.adapters())


def test_the_metrics_page_reads_the_real_engine(live: Running):
    page = live.get("/metrics").text
    assert "vllm:prefix_cache_queries_total" in page
    (count,) = [x for x in page.splitlines() if "request_queue_time_seconds_count" in x]
    assert float(count.split()[-1]) > 0
    assert 'jlora:adapter_tier_hits_total{model_name="tiny",tier="device"}' in page
