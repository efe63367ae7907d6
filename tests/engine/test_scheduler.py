"""The scheduler's rules one by one, on small workloads with a fake device."""

import itertools
from dataclasses import replace
from typing import Any

import pytest

from jlora.engine.config import EngineConfig
from jlora.engine.pages import KVPages
from jlora.engine.params import SamplingParams
from jlora.engine.scheduler import Scheduler
from jlora.engine.sequence import Sequence, Status
from jlora.errors import ParameterError
from tests.engine.fakes import Entry, Loop, Request, Store, alone, next_token

LONG = SamplingParams(max_tokens=None, ignore_eos=True)


def make(num_pages: int = 100, pipelined: bool = True, rank_pages: int = 8, **fields: Any) -> Loop:
    fields = {"max_model_len": 64, "page_size": 4, "prefill_block": 4} | fields
    fields.setdefault("max_num_batched_tokens", 16)
    config = EngineConfig(**fields)
    return Loop(config, num_pages=num_pages, rank_pages=rank_pages, pipelined=pipelined)


def new(length: int, max_tokens: int | None = None, first: int = 1) -> Request:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return Request(prompt=[first] * length, params=params)


def chunks(plan: Any) -> list[tuple[str, int, int]]:
    assert plan is not None
    return [(c.seq.request_id, c.start, c.length) for c in (*plan.decodes, *plan.prefills)]


def test_decodes_come_first_then_running_prefills_then_the_queue():
    loop = make()
    loop.add("a", new(3))
    assert chunks(loop.step()) == [("a", 0, 3)]
    loop.add("b", new(20, first=2))
    assert chunks(loop.step()) == [("a", 3, 1), ("b", 0, 16)]
    loop.add("c", new(3, first=3))
    plan = loop.step()
    assert plan is not None
    assert chunks(plan) == [("a", 4, 1), ("b", 16, 4), ("c", 0, 3)]
    assert [c.samples for c in plan.prefills] == [True, True]
    assert plan.prefill_tokens == 8


def test_the_next_step_is_planned_before_the_token_of_the_last_is_known():
    loop = make()
    seq = loop.add("a", new(3))
    loop.step()
    assert (seq.in_flight, len(seq.tokens), seq.num_computed) == (1, 3, 3)
    loop.step()  # planned position 3 from the unread token, then read it
    assert (seq.in_flight, len(seq.tokens), seq.num_computed) == (1, 4, 4)


def test_no_step_is_planned_beyond_max_tokens_although_the_last_token_is_unread():
    loop = make()
    loop.add("a", new(3, max_tokens=2))
    assert chunks(loop.step()) == [("a", 0, 3)]
    assert chunks(loop.step()) == [("a", 3, 1)]
    assert loop.step() is None
    assert loop.finished == ["a"]
    loop.check_empty()


def test_generation_stops_when_the_context_is_full():
    loop = make(max_model_len=8)
    seq = loop.add("a", new(5))
    loop.run()
    assert (len(seq.tokens), seq.finish_reason) == (8, "length")


def test_a_sequence_that_ended_keeps_its_pages_until_its_extra_step_is_read():
    prompt, last = [1, 2, 3], next_token(None, [1, 2, 3])
    loop = make()
    params = SamplingParams(max_tokens=None, ignore_eos=True, stop_token_ids=(last,))
    seq = loop.add("a", Request(prompt=prompt, params=params))
    loop.step()
    loop.step()  # reads the stop token while one more step is in flight
    assert seq.finished
    assert (seq.finish_reason, seq.stop_reason) == ("stop", last)
    assert loop.finished == ["a"]
    assert loop.pages.num_used == 1
    loop.step()
    assert seq.output == [last]
    loop.check_empty()


def test_an_abort_in_flight_frees_slot_and_pages_with_its_last_step():
    loop = make()
    entry = Entry("x")
    seq = loop.add("a", new(5), entry)
    loop.step()
    assert loop.scheduler.abort("a") is seq
    assert (seq.finish_reason, entry.in_flight) == ("abort", 1)
    loop.finished.append("a")
    loop.step()
    loop.check_empty()
    assert entry.in_flight == 0
    assert loop.scheduler.abort("a") is None
    assert loop.scheduler.abort("never seen") is None


def test_an_abort_of_a_waiting_request_is_immediate():
    loop = make(max_num_seqs=1)
    loop.add("a", new(5, max_tokens=2))
    loop.add("b", new(5), Entry("x"))
    loop.step()
    assert loop.scheduler.abort("b") is not None
    loop.finished.append("b")
    assert loop.sequences["b"].adapter.in_flight == 0
    loop.run()


def test_a_large_request_is_never_overtaken_by_smaller_ones_behind_it():
    loop = make(num_pages=17, max_num_seqs=8)
    loop.add("running", new(20))
    loop.step()
    loop.add("large", new(60, max_tokens=2, first=2))
    for i in range(5):
        loop.add(f"small{i}", new(3, max_tokens=2, first=3))
    loop.run()
    assert loop.started["large"] < min(loop.started[f"small{i}"] for i in range(5))


def test_when_pages_run_out_the_last_arrived_goes_back_to_the_front_and_loses_nothing():
    loop = make(num_pages=17, max_num_seqs=4)
    first, second = loop.add("a", new(10)), loop.add("b", new(10, first=2))
    loop.add("waits", new(60, max_tokens=2, first=3))
    while not second.preemptions:
        loop.step()
    assert loop.scheduler.preemptions == 1
    assert loop.scheduler.waiting[0] is second
    known = len(second.tokens)
    assert known > 10
    assert (second.slot, second.pages, second.num_computed) == (None, [], 0)
    loop.run()
    assert first.preemptions == 0
    assert (len(first.tokens), len(second.tokens)) == (64, 64)
    assert loop.started["waits"] > loop.started["b"]


def test_a_preempted_sequence_can_still_end_with_the_token_that_was_in_flight():
    loop = make(num_pages=6, max_model_len=20, max_num_seqs=2)
    loop.add("a", new(8))
    seq = loop.add("b", new(7, max_tokens=2, first=2))
    while seq.status is not Status.FINISHED:
        loop.step()
    assert seq.preemptions in (0, 1)
    loop.run()
    assert seq.num_output == 2


def test_an_equal_prompt_hits_the_prefix_cache_but_its_last_token_is_computed():
    loop = make()
    for name in ("a", "b"):
        loop.add(name, new(8, max_tokens=1))
        loop.run()
    assert loop.sequences["b"].num_cached == 4
    assert (loop.pages.queries, loop.pages.hits) == (16, 4)
    assert chunks(next(p for p in reversed(loop.plans) if p)) == [("b", 4, 4)]


def test_the_prefix_cache_is_not_shared_between_adapters_or_after_a_reload():
    loop = make()
    old, other = Entry("x", uid="content-1"), Entry("y")
    for i, entry in enumerate([old, other, None, Entry("x", uid="content-2")]):
        loop.add(str(i), new(9, max_tokens=1), entry)
        loop.run()
        assert loop.sequences[str(i)].num_cached == 0
    loop.add("again", new(9, max_tokens=1), old)
    loop.run()
    assert loop.sequences["again"].num_cached == 8


def test_scoring_computes_every_prompt_token_and_samples_nothing():
    loop = make()
    loop.add("warm", new(12, max_tokens=1))
    loop.run()
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    seq = loop.add("score", Request(prompt=[1] * 12, params=params))
    plan = loop.step()
    assert chunks(plan) == [("score", 0, 12)]
    assert plan is not None
    assert not plan.prefills[0].samples
    loop.run()
    assert (seq.finish_reason, seq.output, seq.num_cached) == ("length", [], 0)


def test_min_tokens_holds_back_end_of_sequence_and_stop_tokens():
    params = SamplingParams(max_tokens=9, min_tokens=6, stop_token_ids=tuple(range(13)))
    loop = make()
    seq = loop.add("a", Request(prompt=[1, 2], params=params))
    loop.run()
    assert (seq.num_output, seq.stop_reason) == (6, seq.tokens[-1])


def test_a_request_whose_adapter_is_still_read_does_not_hold_up_others():
    loop = make()
    loop.add("cold", new(3, max_tokens=1), Entry("cold", loads_at=6))
    loop.add("base", new(3, max_tokens=1))
    loop.run()
    assert loop.started == {"base": 1, "cold": 6}


def test_a_broken_adapter_ends_its_requests_even_when_no_slot_is_free():
    loop = make(max_num_seqs=1)
    loop.add("a", new(3))
    loop.step()
    seq = loop.add("b", new(3), Entry("broken", fails=True))
    loop.step()
    assert (seq.finish_reason, seq.error) == ("error", "broken is broken")
    assert "b" in loop.finished


@pytest.mark.parametrize("page", [8, 16])
def test_an_adapter_too_large_for_any_step_is_refused_with_the_numbers(page: int):
    loop = make(rank_page_buckets=(2,), rank_page=page)
    seq = loop.add("a", new(3), Entry("huge", rank=33))
    loop.run()
    assert seq.finish_reason == "error"
    assert "rank 33" in str(seq.error)
    assert f"{2 * page} at most (2 pages of {page} ranks)" in str(seq.error)


def test_max_loras_and_rank_pages_bound_a_step_but_others_pass_the_blocked_one():
    loop = make(max_loras=2, rank_page_buckets=(4,))
    x, y, z = Entry("x"), Entry("y", rank=40), Entry("z")
    for name, entry in [("x", x), ("y", y), ("z", z), ("base", None), ("x2", x)]:
        loop.add(name, new(2, max_tokens=3), entry)
    plan = loop.step()
    assert plan is not None
    assert [c.seq.request_id for c in plan.prefills] == ["x", "y", "base", "x2"]
    assert [p.entry for p in plan.placements] == [x, y]
    loop.run()
    assert loop.started["z"] > 1


def hot(loop: Loop, count: int, each: int = 2) -> list[Entry]:
    """Adapters that never end by themselves."""
    entries = [Entry(f"hot{i}") for i in range(count)]
    for i, entry in enumerate(entries):
        for j in range(each):
            loop.add(f"hot{i}.{j}", Request(prompt=[1, 2, 3 + j], params=LONG), entry)
    loop.step()
    return entries


WAIT = 5


@pytest.mark.parametrize("max_loras", [1, 2, 4])
@pytest.mark.parametrize("cold", [1, 3, 7])
def test_a_cold_adapter_gets_in_within_the_bound(max_loras: int, cold: int):
    loop = make(
        max_loras=max_loras, max_adapter_wait=WAIT, max_model_len=2000, num_pages=2000,
        max_num_batched_tokens=64, max_num_seqs=32,
    )  # fmt: skip
    hot(loop, max_loras)
    for i in range(cold):
        loop.add(f"cold{i}", Request(prompt=[5, 6, 7], params=LONG), Entry(f"cold{i}"))
    arrived = loop.tick
    for _ in range(60):
        loop.step()
    order = sorted(range(cold), key=lambda i: loop.started[f"cold{i}"])
    assert order == list(range(cold)), "first come, first served"
    for i in range(cold):
        waited = loop.started[f"cold{i}"] - arrived
        bound = (2 + i // max_loras) * (WAIT + 1) + i + 1  # in steps
        assert waited <= bound, (i, waited)
    # Those that made room are not forgotten either.
    produced = {name: seq.num_output for name, seq in loop.sequences.items()}
    for _ in range(100):
        loop.step()
    assert all(seq.num_output > produced[name] for name, seq in loop.sequences.items())


def test_a_cold_adapter_needing_most_rank_pages_gets_them_all():
    loop = make(
        max_loras=4, rank_page_buckets=(4,), rank_pages=4, max_adapter_wait=WAIT,
        max_model_len=2000, num_pages=2000,
    )  # fmt: skip
    hot(loop, 4, each=1)
    loop.add("wide", Request(prompt=[5], params=LONG), Entry("wide", rank=60))
    arrived = loop.tick
    while "wide" not in loop.started:
        loop.step()
    assert loop.started["wide"] - arrived <= 2 * WAIT + 2
    assert len(loop.scheduler.running_adapters) == 1


def test_room_on_the_device_counts_as_well_as_room_in_the_step():
    loop = make(
        max_loras=8, rank_page_buckets=(8,), rank_pages=2, max_adapter_wait=WAIT,
        max_model_len=2000, num_pages=2000,
    )  # fmt: skip
    hot(loop, 2, each=1)
    loop.add("cold", Request(prompt=[5], params=LONG), Entry("cold"))
    arrived = loop.tick
    while "cold" not in loop.started:
        loop.step()
    assert loop.started["cold"] - arrived <= 2 * WAIT + 2


def test_an_adapter_that_drains_in_time_is_not_preempted():
    loop = make(max_loras=1, max_adapter_wait=WAIT)
    entry = Entry("x")
    for i in range(3):
        loop.add(f"first{i}", new(2, max_tokens=8), entry)
    loop.step()
    loop.add("cold", new(2, max_tokens=2), Entry("cold"))
    for _ in range(7):  # the cold one has the claim: x takes no more
        loop.step()
    loop.add("late", new(2, max_tokens=2), entry)
    loop.run()
    assert loop.scheduler.preemptions == 0
    assert loop.started["cold"] < loop.started["late"]


def test_other_running_adapters_go_on_taking_requests_while_one_drains():
    loop = make(max_loras=2, max_adapter_wait=WAIT, max_model_len=200, num_pages=500)
    oldest, other = hot(loop, 2, each=1)
    loop.add("cold", Request(prompt=[5], params=LONG), Entry("cold"))
    for _ in range(7):
        loop.step()
    loop.add("for oldest", new(2, max_tokens=1), oldest)
    loop.add("for other", new(2, max_tokens=1, first=2), other)
    loop.step()
    assert "for other" in loop.started
    assert "for oldest" not in loop.started


def test_a_flood_for_one_adapter_does_not_keep_others_out():
    loop = make(max_loras=1, max_adapter_wait=WAIT, max_num_seqs=4)
    flood = Entry("flood")
    for i in range(400):
        if i == 30:
            loop.add("cold", new(3, max_tokens=2), Entry("cold"))
        loop.add(f"flood{i}", new(3, max_tokens=4), flood)
        loop.step()
        if "cold" in loop.started:
            break
    turn = loop.started["cold"] - loop.started["flood29"]  # the one that arrived just before
    assert turn <= 2 * WAIT + 2


def test_a_long_prefill_is_not_rotated_away_before_its_first_token():
    loop = make(
        max_loras=1, max_adapter_wait=0, max_model_len=110, num_pages=90,
        enable_prefix_caching=False,
    )  # fmt: skip
    for name in ("x", "y", "z"):
        loop.add(name, Request(prompt=[1] * 100, params=LONG), Entry(name))
    loop.run(limit=2000)
    assert all(len(seq.tokens) == 110 for seq in loop.sequences.values())


def test_requests_that_can_never_run_are_refused_at_once():
    loop = make(max_model_len=16, max_logprobs=5)
    loop.add("a", new(3))
    for request, param in [
        (new(0), "prompt"),
        (new(16), "prompt"),
        (replace(new(3), params=SamplingParams(logprobs=6)), "logprobs"),
    ]:
        with pytest.raises(ParameterError) as caught:
            loop.scheduler.add(
                Sequence(request_id="b", prompt=request.prompt, params=request.params)
            )
        assert caught.value.param == param
    with pytest.raises(ParameterError, match="in use"):
        loop.scheduler.add(Sequence(request_id="a", prompt=[1], params=SamplingParams()))
    assert loop.scheduler.unfinished == 1


def test_a_pool_that_cannot_hold_one_full_sequence_is_refused():
    config = EngineConfig(max_model_len=64, page_size=4)
    with pytest.raises(ParameterError, match="17 are needed"):
        Scheduler(config, KVPages(16, 4), Store(4))


def test_nobody_takes_the_pages_of_a_preempted_sequence_before_it():
    loop = make(num_pages=17, max_num_seqs=4)
    first, second = loop.add("a", new(10)), loop.add("b", new(10, first=2))
    while loop.pages.num_free > 2:
        loop.step()
    loop.add("small", new(2, max_tokens=2, first=3))
    while not second.preemptions:
        loop.step()
    assert not first.finished
    while "small" not in loop.started:
        loop.step()
    assert first.finished
    loop.run()


def test_a_rotated_sequence_waits_for_its_token_in_flight_before_it_runs_again():
    """Room for the claim needs two adapters preempted, and then one of them fits beside it."""
    loop = make(
        max_loras=4, rank_page_buckets=(4,), rank_pages=8, max_adapter_wait=WAIT, num_pages=200,
    )  # fmt: skip
    for name, rank in [("narrow", 16), ("broad", 48)]:
        loop.add(name, new(3, first=rank), Entry(name, rank=rank))
        loop.step()
    loop.add("cold", new(3, first=5), Entry("cold", rank=48))
    while "cold" not in loop.started:
        loop.step()
    narrow = loop.sequences["narrow"]
    assert narrow.preemptions == 1
    assert narrow.status is Status.WAITING
    loop.step()
    assert narrow.status is Status.RUNNING
    loop.run()
    request = new(3, first=16)
    assert narrow.output == alone(request, "uid-narrow", 64)[0]


def test_a_smaller_adapter_does_not_steal_the_room_that_the_claim_waits_for():
    loop = make(max_loras=4, rank_page_buckets=(4,), max_adapter_wait=WAIT, num_pages=200)
    loop.add("ends", new(3, max_tokens=8), Entry("a", rank=32))
    loop.add("stays", new(3, first=2), Entry("b", rank=32))
    loop.step()
    loop.add("wide", new(3, max_tokens=3, first=3), Entry("wide", rank=64))
    loop.add("narrow", new(3, max_tokens=3, first=4), Entry("narrow", rank=32))
    loop.run()
    assert loop.started["wide"] < loop.started["narrow"]
    assert loop.started["wide"] - 1 <= 2 * WAIT + 2


def test_an_adapter_runs_for_the_whole_wait_before_it_is_rotated_away():
    loop = make(max_loras=1, max_adapter_wait=WAIT, max_model_len=400, num_pages=500)
    for i in range(3):
        loop.add(str(i), Request(prompt=[1, 2, i], params=LONG), Entry(str(i)))
    for _ in range(60):
        loop.step()
    ran = [plan.adapters[0].name for plan in loop.plans if plan is not None and plan.adapters]
    runs = [len(list(group)) for _, group in itertools.groupby(ran)]
    assert len(runs) > 5
    assert min(runs[:-1]) >= WAIT
