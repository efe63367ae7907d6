"""The real engine on tiny checkpoints: greedy tokens equal transformers and PEFT, whatever the batch.

One engine is shared by the tests of a configuration; compiled programs are shared through a cache.
"""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlora.engine.params import SamplingParams
from jlora.engine.sequence import Event, TokenLogprobs

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

RNG = np.random.default_rng(5)
PROMPTS = [RNG.integers(4, 320, n).tolist() for n in (5, 16, 23, 37, 9, 61)]
NEW = 12
SMALL: dict[str, Any] = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 64}


class Adapters:
    """A tiny model, three adapters of different ranks, and what PEFT generates with each."""

    def __init__(self, tiny_model, tiny_adapter, family="llama"):
        self.folder: Path = tiny_model(family)
        self.paths = {
            "r4": tiny_adapter(self.folder, r=4, targets=["q_proj", "v_proj"], seed=1),
            "r8": tiny_adapter(self.folder, r=8, seed=2),
            "r24": tiny_adapter(self.folder, r=24, alpha=12, rslora=True, seed=3),
        }
        self._model = self._fresh()
        self._made: dict = {}

    def _fresh(self):
        return transformers.AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)

    def greedy(self, name, prompt, new=NEW):
        """Tokens that transformers (None) or PEFT (an adapter's name) generates."""
        key = (name, tuple(prompt), new)
        if key not in self._made:
            model = self._model
            if name is not None:
                # a base of its own: peft's unload() leaves modules_to_save in the model
                model = peft.PeftModel.from_pretrained(self._fresh(), self.paths[name])
            with torch.no_grad():
                out = model.generate(
                    input_ids=torch.tensor([prompt]),
                    attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                    max_new_tokens=new,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )
            self._made[key] = out[0, len(prompt) :].tolist()
        return self._made[key]


@pytest.fixture(scope="module")
def adapters(tiny_model, tiny_adapter):
    return Adapters(tiny_model, tiny_adapter)


@pytest.fixture(scope="module")
def build(adapters):
    """build(**options) -> parts of a started engine, one for each distinct configuration."""
    from jlora.build import build_engine
    from jlora.options import ModelOptions

    made: dict = {}

    def get(**given):
        options: dict[str, Any] = SMALL | given
        key = tuple(sorted(options.items()))
        if key not in made:
            modules = tuple(f"{name}={path}" for name, path in adapters.paths.items())
            made[key] = build_engine(
                ModelOptions(model=str(adapters.folder), lora_modules=modules, **options)
            )
        return made[key]

    yield get
    for parts in made.values():
        parts.engine.shutdown(0)


class Job:
    """One request: collects its events."""

    def __init__(self, parts, prompt, name=None, request_id=None, **params):
        self.events: list[Event] = []
        self.done = threading.Event()
        self.id = request_id or f"job{id(self)}"
        defaults = {"temperature": 0.0, "max_tokens": NEW, "ignore_eos": True}
        adapter = parts.store.resolve(name, parts.names) if name else None
        parts.engine.submit(
            self.id, prompt, SamplingParams(**(defaults | params)), adapter, self._take
        )

    def _take(self, event):
        self.events.append(event)
        if event.finish_reason is not None:
            self.done.set()

    @property
    def tokens(self):
        assert self.done.wait(120), "the request did not end"
        return [token for event in self.events for token in event.token_ids]

    @property
    def logprobs(self):
        assert self.done.wait(120)
        return [entry for event in self.events for entry in event.logprobs or []]

    @property
    def reason(self):
        assert self.done.wait(120)
        return self.events[-1].finish_reason


def prompt_scores(event: Event) -> list[TokenLogprobs]:
    """The entries of all prompt tokens but the first, which has none."""
    scores = event.prompt_logprobs
    assert scores is not None
    assert scores[0] is None
    return [entry for entry in scores[1:] if entry is not None]


MIX = [(PROMPTS[i % len(PROMPTS)], name) for i, name in enumerate((None, "r4", "r8", "r24") * 3)]


@pytest.mark.parametrize("mesh", [1, 2, 4])
def test_mixed_batches_generate_what_transformers_and_peft_generate(build, adapters, mesh):
    parts = build(mesh=mesh)
    jobs = [Job(parts, prompt, name) for prompt, name in MIX]
    for job, (prompt, name) in zip(jobs, MIX, strict=True):
        assert job.tokens == adapters.greedy(name, prompt)
    texts = {tuple(adapters.greedy(name, PROMPTS[0])) for name in (None, "r4", "r8", "r24")}
    assert len(texts) == 4, "the adapters must change the text, or a dropped one would not show"


def test_steps_that_are_padded_to_whole_row_blocks_generate_the_same(build, adapters, monkeypatch):
    from jlora import build as builds

    cpu = replace(builds._PLATFORMS["cpu"], whole_blocks=True, prefill_buckets=((16, 16),))
    monkeypatch.setitem(builds._PLATFORMS, "cpu", cpu)
    parts = build(max_num_seqs=3, max_num_batched_tokens=100)
    assert parts.engine.config.decode_buckets == (1, 8)
    assert parts.engine.config.prefill_buckets == ((16, 112),)
    jobs = [Job(parts, prompt, name) for prompt, name in MIX]
    for job, (prompt, name) in zip(jobs, MIX, strict=True):
        assert job.tokens == adapters.greedy(name, prompt)


def test_a_weighted_mix_generates_what_peft_generates_with_the_concatenated_adapter(
    build, adapters, tmp_path
):
    weights = {"r4": 0.7, "r24": -0.4}
    fresh = transformers.AutoModelForCausalLM.from_pretrained(adapters.folder, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(fresh, adapters.paths["r4"], adapter_name="r4")
    model.load_adapter(adapters.paths["r24"], adapter_name="r24")
    model.add_weighted_adapter([*weights], [*weights.values()], "mix", combination_type="cat")
    model.set_adapter("mix")
    parts = build()
    jobs = [Job(parts, prompt, "r4*0.7+r24*-0.4") for prompt in PROMPTS]
    beside = Job(parts, PROMPTS[0], "r24")
    for prompt, job in zip(PROMPTS, jobs, strict=True):
        with torch.no_grad():
            scores = model(torch.tensor([[*prompt, *job.tokens]])).logits[0]
        assert job.tokens == scores[len(prompt) - 1 : -1].argmax(-1).tolist()
        assert job.tokens != adapters.greedy("r4", prompt)
    assert beside.tokens == adapters.greedy("r24", PROMPTS[0])


def test_a_request_alone_generates_the_same_as_in_a_batch(build, adapters):
    parts = build()
    for prompt, name in MIX[:4]:
        assert Job(parts, prompt, name).tokens == adapters.greedy(name, prompt)


def test_prefix_hits_do_not_change_the_text(build, adapters):
    parts = build()
    before = parts.engine.stats().prefix_hits
    long = PROMPTS[5]
    for name in (None, "r8", None, "r8", "r24"):
        assert Job(parts, long, name).tokens == adapters.greedy(name, long)
    again = Job(parts, long, "r8")
    assert again.tokens == adapters.greedy("r8", long)
    assert again.events[-1].num_cached_tokens == 48
    assert parts.engine.stats().prefix_hits > before


def test_without_the_prefix_cache_the_text_is_the_same(build, adapters):
    parts = build(enable_prefix_caching=False)
    for _ in range(2):
        job = Job(parts, PROMPTS[5], "r8")
        assert job.tokens == adapters.greedy("r8", PROMPTS[5])
        assert job.events[-1].num_cached_tokens == 0


def test_prompts_in_chunks_give_the_same_text(build, adapters):
    parts = build(max_num_batched_tokens=16)
    jobs = [Job(parts, prompt, name) for prompt, name in MIX]
    for job, (prompt, name) in zip(jobs, MIX, strict=True):
        assert job.tokens == adapters.greedy(name, prompt)


def test_preempted_requests_lose_nothing(build, adapters):
    parts = build(kv_cache_memory="72KiB", enable_prefix_caching=False)
    assert parts.plan.kv_tokens < 2 * parts.engine.max_model_len
    new = 40
    mix = [(PROMPTS[3], name) for name in (None, "r4", "r8", "r24")]
    jobs = [Job(parts, prompt, name, max_tokens=new) for prompt, name in mix]
    for job, (prompt, name) in zip(jobs, mix, strict=True):
        assert job.tokens == adapters.greedy(name, prompt, new)
    assert parts.engine.stats().preemptions > 0


def test_nothing_compiles_after_ready_while_adapters_of_new_ranks_load_and_mix(
    build, adapters, tiny_adapter, caplog
):
    import jax

    parts = build()
    extra = tiny_adapter(adapters.folder, r=40, seed=9)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        parts.store.load("r40", extra)
        jobs = [Job(parts, prompt, name) for prompt, name in [*MIX, (PROMPTS[2], "r40")]]
        jobs.append(Job(parts, PROMPTS[1], None, temperature=1.0, top_p=0.5, logprobs=3))
        jobs.append(Job(parts, PROMPTS[1], None, prompt_logprobs=2, presence_penalty=1.0))
        assert all(job.tokens for job in jobs)
        parts.store.unload("r40").wait(30)
    compiled = [r.message for r in caplog.records if "Finished XLA compilation" in r.message]
    assert compiled == []


def test_abort_frees_pages_and_adapter(build):
    parts = build()
    entry = parts.store.resolve("r8", parts.names)
    job = Job(parts, PROMPTS[0], "r8", max_tokens=100)
    while not job.events:
        job.done.wait(0.01)
    parts.engine.abort(job.id)
    assert job.reason == "abort"
    for _ in range(200):
        if entry.in_flight == 0 and parts.engine.stats().kv_usage == 0:
            break
        job.done.clear()
        job.done.wait(0.01)
    assert entry.in_flight == 0
    assert parts.engine.stats().kv_usage == 0


def test_logprobs_are_those_of_transformers(build, adapters):
    parts = build()
    prompt = PROMPTS[3]
    job = Job(parts, prompt, None, logprobs=5, prompt_logprobs=3)
    with torch.no_grad():
        ids = torch.tensor([prompt + job.tokens])
        theirs = adapters._model(ids).logits[0].log_softmax(-1).numpy()
    for at, entry in enumerate(job.logprobs, start=len(prompt) - 1):
        assert abs(entry.logprob - theirs[at, entry.token]) < 1e-3
        assert list(entry.top) == np.argsort(-theirs[at])[:5].tolist()
        assert entry.rank == 1
    scores = prompt_scores(job.events[0])
    assert len(scores) == len(prompt) - 1
    for at, entry in enumerate(scores):
        assert entry.token == prompt[at + 1]
        assert abs(entry.logprob - theirs[at, entry.token]) < 1e-3
        assert entry.rank == 1 + int((theirs[at] > theirs[at, entry.token]).sum())
        assert len(entry.top) == 3


def test_a_scored_prompt_in_chunks_has_an_entry_for_every_token(build):
    parts = build(max_num_batched_tokens=16)
    job = Job(parts, PROMPTS[5], "r8", max_tokens=0, prompt_logprobs=0)
    assert job.reason == "length"
    scores = prompt_scores(job.events[-1])
    assert [entry.token for entry in scores] == PROMPTS[5][1:]


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch(build):
    parts = build()
    asked = {"temperature": 1.0, "seed": 7, "top_p": 0.9}
    alone = Job(parts, PROMPTS[2], "r8", **asked).tokens
    jobs = [Job(parts, prompt, name) for prompt, name in MIX[:5]]
    jobs.append(Job(parts, PROMPTS[2], "r8", **asked))
    other = Job(parts, PROMPTS[2], "r8", **(asked | {"seed": 8})).tokens
    assert jobs[-1].tokens == alone
    assert other != alone


def test_top_k_1_and_tiny_top_p_are_greedy(build, adapters):
    parts = build()
    expected = adapters.greedy("r4", PROMPTS[0])
    assert Job(parts, PROMPTS[0], "r4", temperature=2.0, top_k=1).tokens == expected
    assert Job(parts, PROMPTS[0], "r4", temperature=2.0, top_p=1e-6).tokens == expected
    assert Job(parts, PROMPTS[0], "r4", temperature=2.0, min_p=1.0).tokens == expected


def test_logit_bias_forces_and_forbids_tokens(build, adapters):
    parts = build()
    assert Job(parts, PROMPTS[0], None, logit_bias={77: 100.0}).tokens == [77] * NEW
    first = adapters.greedy(None, PROMPTS[0])[0]
    assert Job(parts, PROMPTS[0], None, logit_bias={first: -100.0}).tokens[0] != first


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty_equals_that_of_transformers(build, adapters, penalty):
    parts = build()
    prompt = PROMPTS[2]
    with torch.no_grad():
        out = adapters._model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW,
            do_sample=False,
            repetition_penalty=penalty,
            eos_token_id=None,
            pad_token_id=0,
        )
    expected = out[0, len(prompt) :].tolist()
    assert Job(parts, prompt, None, repetition_penalty=penalty).tokens == expected


def test_frequency_and_presence_penalties_take_what_openai_says_off_each_logit(build, adapters):
    parts = build()
    prompt, tokens = PROMPTS[4], []
    with torch.no_grad():
        for _ in range(NEW):
            logits = adapters._model(torch.tensor([prompt + tokens])).logits[0, -1].numpy().copy()
            counts = np.bincount(tokens, minlength=len(logits)) if tokens else np.zeros(len(logits))
            logits -= 1.5 * counts + 1.25 * (counts > 0)
            tokens.append(int(logits.argmax()))
    asked = {"frequency_penalty": 1.5, "presence_penalty": 1.25}
    assert Job(parts, prompt, None, **asked).tokens == tokens


def test_min_tokens_holds_back_the_stop_token(build, adapters):
    parts = build()
    first = adapters.greedy(None, PROMPTS[0])[0]
    assert Job(parts, PROMPTS[0], None, stop_token_ids=(first,)).tokens == [first]
    held = Job(parts, PROMPTS[0], None, stop_token_ids=(first,), min_tokens=3)
    assert first not in held.tokens[:3]
    assert len(held.tokens) >= 3


def test_samples_follow_the_distribution(build, adapters):
    parts = build()
    prompt = PROMPTS[0]
    with torch.no_grad():
        logits = adapters._model(torch.tensor([prompt])).logits[0, -1]
        expected = (logits / 4.0).softmax(-1).numpy()
    jobs = [
        Job(parts, prompt, None, temperature=4.0, seed=seed, max_tokens=1) for seed in range(400)
    ]
    drawn = np.bincount([job.tokens[0] for job in jobs], minlength=len(expected)) / len(jobs)
    likely = np.argsort(-expected)[:3]
    spread = np.sqrt(expected[likely] * (1 - expected[likely]) / len(jobs))
    assert np.all(np.abs(drawn[likely] - expected[likely]) < 5 * spread)
