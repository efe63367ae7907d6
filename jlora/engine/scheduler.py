"""Decides what each step computes: pure host logic, no jax, one thread.

`schedule` may be called for step n+1 before `commit` of step n, so it advances `num_computed` and
`in_flight` itself and never needs a token that is not read yet. The device runs steps in order.
"""

import heapq
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

from jlora.engine.config import EngineConfig
from jlora.engine.pages import KVPages
from jlora.engine.room import AdapterRoom, Store
from jlora.engine.sequence import FinishReason, Sequence, Status
from jlora.errors import ParameterError


class Chunk(NamedTuple):
    """Positions start to start + length of one sequence, computed by one step."""

    seq: Sequence
    start: int
    length: int
    samples: bool
    """The last position's logits give a token."""

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One step. A decode's input token is known unless `start == len(seq.tokens)`; then it is the
    one that its slot sampled in the step before."""

    decodes: list[Chunk]
    prefills: list[Chunk]
    placements: list[Any]
    """Rank pages to write before the step."""
    preempted: list[Sequence]
    """Lost their slot and pages just now; they are waiting again."""
    adapters: list[Any]
    """The different adapters of the step, in order of first appearance."""
    prefill_tokens: int
    """Prefill tokens, each chunk padded to a multiple of prefill_block."""


@dataclass(frozen=True, kw_only=True)
class Committed:
    """What the tokens of a step did."""

    accepted: list[Sequence]
    """Took their token. Others in the step had ended before: their extra token is dropped."""
    finished: list[Sequence]
    """Ended with this step; `finish_reason` is set."""


class Scheduler:
    """First come, first served, with running sequences before waiting ones.

    A step holds one token of every running decode, then the next chunks of running prefills, then
    the first chunks of waiting requests in their order, as far as prefill tokens, slots and KV
    pages go; the first that does not fit ends admission, so a large request is never overtaken for
    being large. A waiting request is passed over only while its adapter is being read or has no
    room: max_loras adapters or max_rank_pages rank pages are running already, or the store has no
    free rank pages.

    No adapter starves: `engine/room.py` has the rule. When room must be made, the sequences of the
    adapter that has been running longest are preempted and the blocked request goes to the front.

    **Preemption.** When KV pages run out, the running sequence that arrived last loses its slot and
    pages and returns to the front of the queue with its tokens; it is admitted again once its step
    in flight is read, and goes on with the same tokens.

    **Ends.** A sequence that turns out to be finished, or is aborted, while a further step is in
    flight keeps its slot, pages and adapter until that step is committed.
    """

    def __init__(
        self,
        config: EngineConfig,
        pages: KVPages,
        store: Store,
        clock: Callable[[], float] = time.monotonic,
    ):
        config.check_num_pages(pages.num_pages)
        assert pages.page_size == config.page_size
        self.config = config
        self.pages = pages
        self.store = store
        self.room = AdapterRoom(config, store)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In order of arrival."""
        self.preemptions = 0
        self._clock = clock
        self._live: dict[str, Sequence] = {}
        self._closing: list[Sequence] = []  # finished, with a step still in flight
        self._ended: list[Sequence] = []
        self._slots = list(range(config.max_num_seqs))
        self._orders = 0
        self._steps = 0  # planned since the start

    @property
    def unfinished(self) -> int:
        """Requests waiting or running."""
        return len(self._live)

    @property
    def running_adapters(self) -> list[Any]:
        """Entries of the adapters that have running sequences."""
        return self.room.running

    @property
    def waiting_adapters(self) -> list[Any]:
        """Entries of the adapters that have waiting requests."""
        return list(
            {id(s.adapter): s.adapter for s in self.waiting if s.adapter is not None}.values()
        )

    def add(self, seq: Sequence) -> None:
        """Queue a request. Its adapter must have been acquired: the scheduler releases it when the
        request ends. Raises ParameterError (and takes nothing over) if it can never run."""
        if seq.request_id in self._live:
            raise ParameterError(
                f"request id {seq.request_id!r} is in use; ids must be unique", param="request_id"
            )
        self.config.check_request(len(seq.prompt), seq.params)
        self._orders += 1
        seq.order = self._orders
        self._live[seq.request_id] = seq
        self.waiting.append(seq)
        if seq.adapter is not None:
            self.store.prefetch(seq.adapter)

    def abort(self, request_id: str) -> Sequence | None:
        """End a request now; None if there is no such request (any more)."""
        seq = self._live.get(request_id)
        if seq is not None:
            self._finish(seq, "abort")
        return seq

    def abandon(self) -> None:
        """The engine ends: give back the adapters that requests still hold."""
        for seq in (*self._live.values(), *self._closing):
            if seq.adapter is not None:
                self.store.release(seq.adapter)
        self._live.clear()
        self._closing.clear()

    def take_ended(self) -> list[Sequence]:
        """Sequences that ended in `schedule`, because their adapter can't be used (`error`)."""
        ended, self._ended = self._ended, []
        return ended

    def schedule(self) -> Plan | None:
        """The next step, or None if nothing can run now."""
        preempted: list[Sequence] = []
        self._fail_unusable()
        self._make_room(preempted)
        rotated = len(preempted)
        decodes = self._decode(preempted)
        prefills: list[Chunk] = []
        budget = self.config.max_num_batched_tokens
        for seq in self.running:
            if seq.prefilling and budget > 0:
                budget -= self._prefill(seq, budget, prefills)
        if len(preempted) == rotated:  # pages just ran out: nobody new may take them
            budget = self._admit(budget, prefills)
        if not decodes and not prefills:
            return None
        self._steps += 1
        chunks = (*decodes, *prefills)
        return Plan(
            decodes=decodes,
            prefills=prefills,
            placements=self.room.take_placements(),
            preempted=preempted,
            adapters=list(
                {
                    id(c.seq.adapter): c.seq.adapter for c in chunks if c.seq.adapter is not None
                }.values()
            ),
            prefill_tokens=self.config.max_num_batched_tokens - budget,
        )

    def commit(self, plan: Plan, sampled: Mapping[str, int]) -> Committed:
        """Take the tokens of the oldest step that is not committed, by request id."""
        accepted: list[Sequence] = []
        finished: list[Sequence] = []
        for chunk in (*plan.decodes, *plan.prefills):
            seq = chunk.seq
            seq.steps -= 1
            seq.in_flight -= chunk.samples
            if seq.finished:
                self._retire_if_idle(seq)
                continue
            if chunk.samples:
                seq.append(sampled[seq.request_id], self.config.max_model_len)
                accepted.append(seq)
            elif seq.params.scores_only and chunk.stop == len(seq.prompt):
                seq.finish_reason = "length"
            if seq.status is Status.RUNNING:  # a preempted one has no pages to publish
                self.pages.publish(seq.cache_uid, seq.tokens, seq.pages, chunk.start, chunk.stop)
            if seq.finish_reason is not None:
                self._finish(seq, seq.finish_reason)
                finished.append(seq)
        return Committed(accepted=accepted, finished=finished)

    # ---- the parts of a step -----------------------------------------------------------------

    def _decode(self, preempted: list[Sequence]) -> list[Chunk]:
        chunks = []
        for seq in list(self.running):
            if (
                seq.status is not Status.RUNNING  # preempted by one before it
                or seq.prefilling
                or seq.in_flight > 1
                or not seq.may_sample(self.config.max_model_len)
                or not self._extend(seq, preempted)
            ):
                continue
            chunks.append(self._chunk(seq, 1))
        return chunks

    def _extend(self, seq: Sequence, preempted: list[Sequence]) -> bool:
        """A page for the next position, from the last arrived if need be; False: not this step."""
        if seq.num_computed < len(seq.pages) * self.config.page_size:
            return True
        while (got := self.pages.allocate(1)) is None:
            if self._closing:
                return False  # the next commit frees pages: cheaper than computing a prompt again
            victim = self.running[-1]
            self._preempt(victim, preempted)
            if victim is seq:
                return False
        seq.pages += got
        return True

    def _prefill(self, seq: Sequence, budget: int, chunks: list[Chunk]) -> int:
        """Add the next chunk of a prompt; returns its padded length."""
        block = self.config.prefill_block
        length = min(seq.prefill_end - seq.num_computed, budget)
        chunks.append(self._chunk(seq, length))
        return -(-length // block) * block

    def _chunk(self, seq: Sequence, length: int) -> Chunk:
        start = seq.num_computed
        samples = start + length >= seq.prefill_end and not seq.params.scores_only
        seq.num_computed += length
        seq.in_flight += samples
        seq.steps += 1
        return Chunk(seq=seq, start=start, length=length, samples=samples)

    # ---- admission ---------------------------------------------------------------------------

    def _admit(self, budget: int, chunks: list[Chunk]) -> int:
        """Start waiting requests in order; returns what is left of the token budget."""
        for seq in list(self.waiting):
            if not self._slots or budget <= 0:
                break
            if seq.steps or not (
                seq.adapter is None or self.room.may_start(seq.adapter, self._steps)
            ):
                continue
            if not self._take_pages(seq):
                break
            if seq.adapter is not None and not self.room.enter(seq.adapter, self._steps):
                self.pages.free(seq.pages)
                seq.pages, seq.num_computed = [], 0
                continue
            self.waiting.remove(seq)
            if seq.queue_seconds is None:
                seq.queue_seconds = self._clock() - seq.arrival
            self._start(seq)
            budget -= self._prefill(seq, budget, chunks)
        return budget

    def _start(self, seq: Sequence) -> None:
        seq.slot = heapq.heappop(self._slots)
        seq.status = Status.RUNNING
        seq.prefill_end = len(seq.tokens)
        if not seq.preemptions:
            seq.num_cached = seq.num_computed
            if seq.params.prompt_logprobs is None:
                self.pages.count_lookup(len(seq.prompt), seq.num_cached)
        insort(self.running, seq, key=attrgetter("order"))

    def _take_pages(self, seq: Sequence) -> bool:
        """All KV pages of the known tokens, cached ones first. One page for each running sequence
        is left free, so that the newcomer does not preempt somebody at the next page's edge."""
        seq.cache_uid = None if seq.adapter is None else seq.adapter.uid
        cached: list[int] = []
        if seq.params.prompt_logprobs is None:  # else every position's logits are wanted
            cached = self.pages.match(seq.cache_uid, seq.tokens)
        new = self.pages.pages_for(len(seq.tokens)) - len(cached)
        got = None
        if new + len(self.running) <= self.pages.num_free:
            got = self.pages.allocate(new)
        if got is None:
            self.pages.free(cached)
            return False
        seq.pages = cached + got
        seq.num_computed = len(cached) * self.config.page_size
        return True

    def _fail_unusable(self) -> None:
        """End the requests whose adapter could not be read or is too large for any step."""
        for entry in self.waiting_adapters:
            if (why := self.room.refusal(entry)) is not None:
                for seq in [seq for seq in self.waiting if seq.adapter is entry]:
                    seq.error = why
                    self._finish(seq, "error")
                    self._ended.append(seq)

    def _make_room(self, preempted: list[Sequence]) -> None:
        """Preempt for an adapter that was blocked too long, and put its request first."""
        waiting = (seq.adapter for seq in self.waiting if seq.adapter is not None)
        entry = self.room.claim(waiting, self._steps)
        if entry is None:
            return
        while not self.room.ready(entry):
            prefilling = [seq.adapter for seq in self.running if seq.prefilling]
            victim = self.room.victim(self._steps, prefilling)
            if victim is None:
                return
            for seq in reversed([seq for seq in self.running if seq.adapter is victim]):
                self._preempt(seq, preempted)
        first = next(seq for seq in self.waiting if seq.adapter is entry)
        self.waiting.remove(first)
        self.waiting.appendleft(first)

    # ---- leaving -----------------------------------------------------------------------------

    def _preempt(self, seq: Sequence, preempted: list[Sequence]) -> None:
        """Back to the front of the queue. What it has in flight writes to its old pages before
        any later step of their next owner does, so they are free at once."""
        self._leave(seq)
        self._free(seq)
        seq.status, seq.num_computed = Status.WAITING, 0
        seq.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(seq)
        preempted.append(seq)

    def _finish(self, seq: Sequence, reason: FinishReason) -> None:
        if seq.status is Status.RUNNING:
            self._leave(seq)
        else:
            self.waiting.remove(seq)
        seq.status, seq.finish_reason = Status.FINISHED, reason
        del self._live[seq.request_id]
        self._closing.append(seq)
        self._retire_if_idle(seq)

    def _leave(self, seq: Sequence) -> None:
        self.running.remove(seq)
        if seq.adapter is not None:
            self.room.leave(seq.adapter)

    def _retire_if_idle(self, seq: Sequence) -> None:
        """Free what a finished sequence holds, unless the device still works on it."""
        if seq.steps:
            return
        self._closing.remove(seq)
        self._free(seq)
        if seq.adapter is not None:
            self.store.release(seq.adapter)

    def _free(self, seq: Sequence) -> None:
        self.pages.free(seq.pages)
        seq.pages = []
        if seq.slot is not None:
            heapq.heappush(self._slots, seq.slot)
            seq.slot = None
