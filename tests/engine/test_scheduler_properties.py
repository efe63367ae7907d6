"""Hypothesis drives the scheduler through random workloads; tests/engine/fakes.py checks each step."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from jlora.adapters.store import AdapterStore
from jlora.engine.config import EngineConfig
from jlora.engine.params import SamplingParams
from tests.engine.fakes import Entry, Loop, Request, alone

MAX_LEN = 20
# Shrinking a workload that does not end takes minutes and helps little.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
RANKS = {"a": 8, "b": 8, "c": 16, "d": 30, "e": 48}


@st.composite
def sampling(draw: st.DrawFn) -> SamplingParams:
    limit = draw(st.sampled_from([None, 0, 1, 2, 5, 9, 14]))
    scored = limit == 0 or draw(st.integers(0, 9)) == 0
    return SamplingParams(
        max_tokens=limit,
        prompt_logprobs=1 if scored else None,
        min_tokens=draw(st.integers(0, 3 if limit is None else min(3, limit))),
        ignore_eos=draw(st.booleans()),
        stop_token_ids=draw(st.sampled_from([(), (5,), (3, 7)])),
    )


@st.composite
def requests(draw: st.DrawFn) -> list[Request]:
    shared = draw(st.lists(st.integers(1, 5), min_size=1, max_size=12))
    found = []
    for _ in range(draw(st.integers(1, 12))):
        head = shared[: draw(st.integers(0, len(shared)))]
        tail = draw(st.lists(st.integers(1, 3), min_size=1, max_size=5))
        arrives = draw(st.integers(0, 12))
        aborted = draw(st.one_of(st.none(), st.none(), st.integers(arrives, arrives + 9)))
        found.append(
            Request(
                prompt=head + tail,
                params=draw(sampling()),
                adapter=draw(st.sampled_from([None, *RANKS])),
                arrives=arrives,
                aborted=aborted,
            )
        )
    return found


@st.composite
def configs(draw: st.DrawFn) -> EngineConfig:
    block = draw(st.sampled_from([1, 2, 4]))
    return EngineConfig(
        max_model_len=MAX_LEN,
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=block * draw(st.integers(1, 6)),
        page_size=draw(st.sampled_from([1, 2, 4])),
        max_loras=draw(st.integers(1, 3)),
        prefill_block=block,
        enable_prefix_caching=draw(st.booleans()),
        max_adapter_wait=draw(st.sampled_from([0, 3, 10])),
        rank_page_buckets=(draw(st.integers(3, 6)),),
    )


def adapters(draw: st.DataObject | None = None) -> dict[str, Entry]:
    return {
        name: Entry(name, rank=rank, loads_at=draw.draw(st.integers(0, 20)) if draw else 0)
        for name, rank in RANKS.items()
    }


def tokens_of(loop: Loop) -> dict[str, list[int]]:
    return {name: seq.output for name, seq in loop.sequences.items()}


@settings(max_examples=200, deadline=None, phases=PHASES)
@given(st.data())
def test_every_request_ends_with_the_tokens_that_it_gets_alone_and_nothing_leaks(
    data: st.DataObject,
):
    config, work = data.draw(configs()), data.draw(requests())
    least = MAX_LEN // config.page_size + 1
    loop = Loop(
        config,
        num_pages=least + data.draw(st.sampled_from([0, 1, 5, 100])),
        rank_pages=data.draw(st.integers(3, 8)),
        pipelined=data.draw(st.booleans()),
    )
    loop.play(work, adapters(data))
    for i, request in enumerate(work):
        seq = loop.sequences[f"r{i}"]
        uid = None if request.adapter is None else f"uid-{request.adapter}"
        tokens, reason = alone(request, uid, MAX_LEN)
        if seq.finish_reason == "abort":
            assert seq.output == tokens[: len(seq.output)]
        else:
            assert (seq.output, seq.finish_reason) == (tokens, reason)


@settings(max_examples=60, deadline=None, phases=PHASES)
@given(requests())
def test_tokens_do_not_depend_on_pages_pipelining_chunking_or_company(work: list[Request]):
    work = [replace(request, aborted=None) for request in work]
    plain = EngineConfig(max_model_len=MAX_LEN, page_size=2, max_loras=2, prefill_block=1)
    tight = replace(
        plain, max_num_seqs=4, max_num_batched_tokens=3, decode_buckets=(), prefill_buckets=()
    )
    uncached = replace(plain, enable_prefix_caching=False)
    runs = []
    for config, num_pages, pipelined in [
        (plain, 200, True), (plain, 200, False), (tight, 11, True), (tight, 11, False),
        (uncached, 14, True),
    ]:  # fmt: skip
        loop = Loop(config, num_pages=num_pages, pipelined=pipelined)
        loop.play(work, adapters())
        runs.append(tokens_of(loop))
    solo = {}
    for i, request in enumerate(work):
        loop = Loop(plain, num_pages=200)
        loop.play([replace(request, arrives=0)], adapters())
        solo[f"r{i}"] = loop.sequences["r0"].output
    assert all(run == solo for run in runs)


@settings(max_examples=60, deadline=None, phases=PHASES)
@given(st.data())
def test_a_broken_adapter_fails_its_own_requests_only(data: st.DataObject):
    work = [replace(request, aborted=None) for request in data.draw(requests())]
    entries = adapters(data)
    entries["b"].fails = True
    loop = Loop(data.draw(configs()), num_pages=30, pipelined=data.draw(st.booleans()))
    loop.play(work, entries)
    for i, request in enumerate(work):
        seq = loop.sequences[f"r{i}"]
        assert (seq.finish_reason == "error") == (request.adapter == "b")
        assert seq.error == ("b is broken" if request.adapter == "b" else None)


@settings(max_examples=40, deadline=None, phases=PHASES)
@given(st.data())
def test_the_real_store_and_the_scheduler_agree(data: st.DataObject):
    """Adapters come and go on all three tiers of the real AdapterStore, read by its threads."""
    work = data.draw(requests())
    store: AdapterStore[Any] = AdapterStore(
        read=lambda path: Path(path).name,  # pyright: ignore[reportArgumentType]
        stage=staged,
        num_pages=data.draw(st.integers(3, 7)),
        max_cpu_loras=data.draw(st.sampled_from([1, 2, None])),
    )
    entries = {name: store.load(name, f"/adapters/{name}") for name in RANKS}
    loop = Loop(data.draw(configs()), num_pages=30, store=store)
    loop.play(work, entries)
    for i, request in enumerate(work):
        seq = loop.sequences[f"r{i}"]
        uid = None if request.adapter is None else f"uid-{request.adapter}"
        tokens, _ = alone(request, uid, MAX_LEN)
        assert seq.output == (tokens[: len(seq.output)] if seq.finish_reason == "abort" else tokens)
    store.check()
    drains = [store.unload(name) for name in RANKS]
    assert all(drain.done for drain in drains)
    assert store.counters().device_pages == 0
    store.close()


def staged(name: Any) -> Any:
    """What the pool would stage for the adapter in folder `name`."""
    return SimpleNamespace(
        uid=f"uid-{name}", base_model=None, rank=RANKS[name], modules=("q_proj",), bound=1, scalings=(1.0,),
        chat_template=None, nbytes=100, pages=-(-RANKS[name] // 16), added_tokens=0, tokenizer=None, eos_ids=(),
    )  # fmt: skip
