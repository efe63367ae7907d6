"""The systems that a benchmark compares compute the same: merged in place equals unmerged, base in
steps with LoRA equals base, and afterwards the weights are the base's again.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest

from jlora.benchmark.adapters import write_random_adapters
from jlora.benchmark.merged import MergedTarget
from jlora.benchmark.rounds import Case
from jlora.benchmark.subjects import EngineSubject
from jlora.engine.params import SamplingParams
from jlora.llm import LLM
from jlora.models.config import ModelConfig

pytestmark = pytest.mark.usefixtures("few_shapes")

PROMPT = [5, 9, 77, 41, 230, 8, 8, 150, 3, 12]


def scores(llm: LLM, model: str) -> np.ndarray:
    """Log-probability of each prompt token."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    stream = llm.stream([PROMPT], params, adapter=llm.resolve(model))
    for _ in stream:
        pass
    stream.close()
    found = stream.choices[0].prompt_logprobs
    assert found is not None
    return np.array([entry.logprob for entry in found if entry is not None])


@pytest.fixture(scope="module")
def adapters(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory):
    """A model whose head is its embedding, as SmolLM2's, and adapters of ranks 4 and 24."""
    folder = tiny_model("llama_odd")
    made = write_random_adapters(
        tmp_path_factory.mktemp("adapters"), ModelConfig.from_folder(folder), [4, 24]
    )
    return folder, {name: str(path) for name, path in made.items()}


def test_merged_in_place_equals_unmerged_and_leaves_the_base_as_it_was(adapters):
    folder, folders = adapters
    modules = tuple(f"{name}={path}" for name, path in folders.items())
    llm = LLM(
        str(folder),
        lora_modules=modules,
        enable_prefix_caching=False,
        max_loras=1,
        max_num_seqs=1,
        max_model_len=64,
        max_num_batched_tokens=16,
    )
    base_name = llm.names[0]
    with llm:
        base = scores(llm, base_name)
        unmerged = {name: scores(llm, name) for name in folders}

        async def compare() -> None:
            subject = EngineSubject(llm, folders)
            async with subject.target(Case(system="compiled", models=(base_name,))):
                compiled = await asyncio.to_thread(scores, llm, base_name)
            np.testing.assert_allclose(compiled, base, atol=1e-4)

            case = Case(system="merged", adapters=2, models=tuple(folders))
            async with subject.target(case):
                merge = subject._in_place(case)
                for name in (*folders, *folders):
                    merge.switch(name)
                    merged = await asyncio.to_thread(scores, llm, base_name)
                    assert np.abs(unmerged[name] - base).max() > 0.1
                    np.testing.assert_allclose(merged, unmerged[name], atol=1e-3)
            assert subject.counters()["switches"] == 5  # four, and back
            assert subject.counters()["switch_seconds"] > 0

        asyncio.run(compare())
        np.testing.assert_allclose(scores(llm, base_name), base, atol=1e-4)


class Slow:
    """Remembers which weights each request met."""

    def __init__(self) -> None:
        self.weights: str = ""
        self.met: list[tuple[str, str]] = []
        self.running = 0
        self.switches: list[str] = []

    def switch(self, name: str) -> None:
        assert self.running == 0, "weights change under a running request"
        self.switches.append(name)
        self.weights = name

    async def generate(self, model: str, prompt: list[int], max_tokens: int) -> AsyncIterator[int]:
        self.running += 1
        self.met.append((self.weights, chr(prompt[0])))
        for _ in range(max_tokens):
            await asyncio.sleep(0.001)
            yield 1
        self.running -= 1


def test_every_request_meets_its_own_adapter_and_nobody_starves():
    inner = Slow()
    target = MergedTarget(inner, "base", inner.switch)

    async def request(model: str) -> None:
        async for _ in target.generate(model, [ord(model)], 3):
            pass

    async def client(models: str) -> None:
        for model in models:
            await request(model)

    async def go() -> None:
        # "a" always has somebody: b and c come to their turn all the same.
        await asyncio.wait_for(
            asyncio.gather(*(client(models) for models in ("a" * 30, "a" * 30, "bcb", "cbc"))), 30
        )

    asyncio.run(go())
    assert all(weights == model for weights, model in inner.met)
    assert Counter(model for _, model in inner.met) == {"a": 60, "b": 3, "c": 3}
    assert len(inner.switches) <= 13
    assert inner.switches[0] == "a"


def test_a_switch_that_fails_fails_the_requests_that_wait():
    def broken(name: str) -> None:
        raise OSError("no such adapter")

    async def go() -> None:
        async for _ in MergedTarget(Slow(), "base", broken).generate("a", [97], 2):
            pass

    with pytest.raises(RuntimeError, match="merging a failed"):
        asyncio.run(asyncio.wait_for(go(), 10))
