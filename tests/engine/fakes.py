"""A store, a device and an engine loop without jax, which check every rule while they run.

The device is honest about order: a step runs when it is dispatched, its tokens are seen later.
Each KV entry holds the whole history that it stands for, so any mix-up of pages is noticed.
"""

import time
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from jlora.engine.config import EngineConfig, buckets, pick
from jlora.engine.fill import Tables, fill
from jlora.engine.pages import KVPages
from jlora.engine.params import SamplingParams
from jlora.engine.scheduler import Plan, Scheduler
from jlora.engine.sequence import Sequence, Status
from jlora.shape import Shape

EOS = 0
STEP_SECONDS = 0.1


def next_token(uid: str | None, tokens: list[int], vocab: int = 13) -> int:
    """A model that looks at everything: adapter and all tokens so far."""
    return zlib.crc32(repr((uid, tokens)).encode()) % vocab


@dataclass(eq=False)
class Entry:
    """An adapter as the store hands it out."""

    name: str
    rank: int = 8
    uid: str = ""
    error: str | None = None
    in_flight: int = 0
    loads_at: int = 0
    """Tick at which its file is read."""
    fails: bool = False

    def __post_init__(self) -> None:
        self.uid = self.uid or f"uid-{self.name}"

    @property
    def pages(self) -> int:
        return -(-self.rank // 16)


class Store:
    """Two tiers: the host, where entries arrive after a while, and `num_pages` rank pages."""

    def __init__(self, num_pages: int):
        self.empty = list(range(1, num_pages + 1))
        self.placed: dict[Entry, tuple[int, ...]] = {}  # least recently placed first
        self.asked: set[Entry] = set()
        self.tick = 0

    def prefetch(self, entry: Entry) -> None:
        self.asked.add(entry)

    def host_ready(self, entry: Entry) -> bool:
        self.asked.add(entry)
        ready = self.tick >= entry.loads_at
        if ready and entry.fails:
            entry.error = f"{entry.name} is broken"
        return ready and not entry.fails

    def place(self, entry: Entry, keep: Collection[Entry]) -> Any:
        assert self.host_ready(entry)
        if entry in self.placed:
            return SimpleNamespace(entry=entry, staged=None, pages=())
        evictable = [other for other in self.placed if other not in keep]
        if len(self.empty) + sum(len(self.placed[other]) for other in evictable) < entry.pages:
            return None
        while len(self.empty) < entry.pages:
            self.empty += self.placed.pop(evictable.pop(0))
        pages = tuple(self.empty.pop() for _ in range(entry.pages))
        self.placed[entry] = pages
        return SimpleNamespace(entry=entry, staged=entry, pages=pages)

    def pages(self, entry: Entry) -> list[int]:
        return list(self.placed.get(entry, ()))

    def acquire(self, entry: Entry) -> None:
        entry.in_flight += 1

    def release(self, entry: Entry) -> None:
        entry.in_flight -= 1
        assert entry.in_flight >= 0


@dataclass
class Device:
    """Executes plans in the order of dispatch."""

    page_size: int
    kv: dict[int, dict[int, tuple]] = field(default_factory=lambda: defaultdict(dict))
    rank_pages: dict[int, Any] = field(default_factory=dict)
    slots: dict[int | None, int] = field(default_factory=dict)
    unread: dict[Sequence, list[int]] = field(default_factory=lambda: defaultdict(list))

    def run(self, plan: Plan, store: Any) -> dict[str, int]:
        for placement in plan.placements:
            for page in placement.pages:
                self.rank_pages[page] = placement.entry
        sampled = {}
        for chunk in (*plan.decodes, *plan.prefills):
            seq = chunk.seq
            if seq.adapter is not None:
                pages = store.pages(seq.adapter)
                assert len(pages) == seq.adapter.pages
                assert all(self.rank_pages[page] is seq.adapter for page in pages)
            uid = None if seq.adapter is None else seq.adapter.uid
            tokens = seq.tokens + self.unread[seq]
            assert chunk.stop <= len(tokens)
            if chunk.start >= len(seq.tokens):  # the host does not know the input token
                assert chunk.start == len(seq.tokens)
                assert tokens[chunk.start] == self.slots[seq.slot]
            for position in range(chunk.stop):
                page, offset = divmod(position, self.page_size)
                entry = (uid, tuple(tokens[: position + 1]))
                if position >= chunk.start:
                    self.kv[seq.pages[page]][offset] = entry
                assert self.kv[seq.pages[page]][offset] == entry, "somebody else's KV"
            if chunk.samples:
                token = next_token(uid, tokens[: chunk.stop])
                sampled[seq.request_id] = self.slots[seq.slot] = token
                self.unread[seq].append(token)
        return sampled

    def read(self, plan: Plan) -> None:
        """The host takes the tokens of a step."""
        for chunk in (*plan.decodes, *plan.prefills):
            if chunk.samples:
                self.unread[chunk.seq].pop(0)


@dataclass(frozen=True, kw_only=True)
class Request:
    prompt: list[int]
    params: SamplingParams
    adapter: str | None = None
    arrives: int = 0
    """Step before which it is added."""
    aborted: int | None = None
    """Step before which it is aborted."""


def alone(request: Request, uid: str | None, max_model_len: int) -> tuple[list[int], str]:
    """What a request must give, by a loop that knows no scheduler."""
    tokens, params = list(request.prompt), request.params
    while True:
        made = len(tokens) - len(request.prompt)
        if len(tokens) == max_model_len or made == params.max_tokens:
            return tokens[len(request.prompt) :], "length"
        token = next_token(uid, tokens)
        tokens.append(token)
        ends = (token == EOS and not params.ignore_eos) or token in params.stop_token_ids
        if ends and made + 1 >= params.min_tokens:
            return tokens[len(request.prompt) :], "stop"


class Loop:
    """An engine's loop: one step ahead of the tokens, or not."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        num_pages: int,
        rank_pages: int = 8,
        pipelined: bool = True,
        store: Any = None,
    ):
        self.config, self.pipelined = config, pipelined
        self.shapes = buckets(config)
        self.store = store or Store(rank_pages)
        self.pages = KVPages(num_pages, config.page_size, config.enable_prefix_caching)
        self.tick = 0
        self.scheduler = Scheduler(
            config, self.pages, self.store, clock=lambda: self.tick * STEP_SECONDS
        )
        self.device = Device(config.page_size)
        self.tables = Tables(config.max_num_seqs, self.shapes[0].table)
        self.sequences: dict[str, Sequence] = {}
        self.finished: list[str] = []
        self.plans: list[Plan | None] = []
        self.started: dict[str, int] = {}
        """Tick of each request's first chunk."""
        self._unread: tuple[Plan, dict[str, int]] | None = None

    def add(self, name: str, request: Request, entry: Any = None) -> Sequence:
        if entry is not None:
            self.store.acquire(entry)
        seq = self.sequences[name] = Sequence(
            request_id=name,
            prompt=list(request.prompt),
            params=request.params,
            adapter=entry,
            eos_ids=(EOS,),
            arrival=self.tick * STEP_SECONDS,
        )
        self.scheduler.add(seq)
        return seq

    def step(self) -> Plan | None:
        self.tick += 1
        self.store.tick = self.tick
        plan = self.scheduler.schedule()
        self.finished += [seq.request_id for seq in self.scheduler.take_ended()]
        self.plans.append(plan)
        if plan is not None:
            self.check_plan(plan)
        self.check_memory()
        dispatched = None
        if plan is not None:
            dispatched = plan, self.device.run(plan, self.store)
            for chunk in (*plan.decodes, *plan.prefills):
                self.started.setdefault(chunk.seq.request_id, self.tick)
        if not self.pipelined:
            self._commit(dispatched)
        else:
            if plan is None and self._unread is None:
                self.idle()
            self._commit(self._unread)
            self._unread = dispatched
        self.check_memory()
        return plan

    def run(self, limit: int = 1500) -> None:
        """Step until nothing is left."""
        for _ in range(limit):
            if not self.scheduler.unfinished and self._unread is None:
                return self.check_empty()
            self.step()
        raise AssertionError(f"not ended after {limit} steps: {self.scheduler.waiting}")

    def play(self, requests: Iterable[Request], entries: Mapping[str, Any]) -> None:
        """Add and abort each request at its time, then run to the end."""
        requests = list(requests)
        for step in range(1 + max(max(r.arrives, r.aborted or 0) for r in requests)):
            for i, request in enumerate(requests):
                if request.arrives == step:
                    self.add(
                        f"r{i}", request, entries[request.adapter] if request.adapter else None
                    )
                if request.aborted == step and self.scheduler.abort(f"r{i}") is not None:
                    self.finished.append(f"r{i}")
            self.step()
        self.run()

    def idle(self) -> None:
        """Nothing to do now; a store with threads gets a moment."""
        if not isinstance(self.store, Store):
            time.sleep(0.001)

    def _commit(self, step: tuple[Plan, dict[str, int]] | None) -> None:
        if step is not None:
            plan, sampled = step
            self.device.read(plan)
            done = self.scheduler.commit(plan, sampled)
            assert all(seq.in_flight in (0, 1) for seq in self.scheduler.running)
            self.finished += [seq.request_id for seq in done.finished]

    # ---- the rules ---------------------------------------------------------------------------

    def check_plan(self, plan: Plan) -> None:
        config, chunks = self.config, (*plan.decodes, *plan.prefills)
        assert chunks
        assert len({chunk.seq for chunk in chunks}) == len(chunks)
        assert all(chunk.length == 1 and chunk.samples for chunk in plan.decodes)
        block = config.prefill_block
        padded = sum(-(-chunk.length // block) * block for chunk in plan.prefills)
        assert padded == plan.prefill_tokens <= config.max_num_batched_tokens
        adapters = {chunk.seq.adapter for chunk in chunks} - {None}
        assert adapters == set(plan.adapters)
        assert len(adapters) == len(plan.adapters) <= config.max_loras
        rank_pages = sum(entry.pages for entry in adapters)
        self.check_arrays(plan, pick(self.shapes, len(plan.decodes), padded, rank_pages))
        for chunk in chunks:
            seq = chunk.seq
            assert seq.status is Status.RUNNING
            assert chunk.length > 0
            assert chunk.stop == seq.num_computed <= len(seq.tokens) + seq.in_flight
            assert seq.in_flight <= 2
            limit = seq.params.max_tokens
            assert len(seq.tokens) + seq.in_flight <= config.max_model_len
            assert limit is None or seq.num_output + seq.in_flight <= limit
            if seq.params.prompt_logprobs is not None and seq.request_id not in self.started:
                assert chunk.start == 0, "a prompt token was not computed, so it has no logits"
            assert seq.num_cached < len(seq.prompt)

    def check_arrays(self, plan: Plan, shape: Shape) -> None:
        """The step's arrays say of each chunk, one position after the other, what it is."""
        arrays = {name: np.zeros(size, np.int32) for name, size in shape.sizes().items()}
        for name in ("positions", "adapter", "slots"):
            arrays[name][:] = -1
        rows = fill(plan, shape, arrays, self.tables)
        order = {id(adapter): n for n, adapter in enumerate(plan.adapters)}
        token = row = 0
        sampling = {}
        for chunks, block in ((plan.decodes, 1), (plan.prefills, shape.block)):
            if chunks is plan.prefills:
                token = row = shape.decode
            for chunk in sorted(chunks, key=lambda c: order.get(id(c.seq.adapter), len(order))):
                seq = chunk.seq
                for position in range(chunk.start, chunk.stop):
                    known = position < len(seq.tokens)
                    assert arrays["tokens"][token] == (seq.tokens[position] if known else -1)
                    assert arrays["positions"][token] == position
                    if shape.rank_pages:
                        assert arrays["adapter"][token] == order.get(id(seq.adapter), -1)
                    arrays["positions"][token] = -1
                    token += 1
                last = token - 1
                token += -chunk.length % block
                for _ in range(-(-chunk.length // block)):
                    table = arrays["tables"][row].tolist()
                    assert table == seq.pages + [0] * (len(table) - len(seq.pages))
                    row += 1
                sampler = {name: arrays[name][row - 1] for name in ("slots", "last", "samples")}
                assert sampler == {"slots": seq.slot, "last": last, "samples": chunk.samples}
                arrays["slots"][row - 1] = -1
                if chunk.samples:
                    sampling[row - 1] = chunk
        assert dict(rows) == sampling
        assert (arrays["positions"] == -1).all(), "a padding token has a position"
        assert (arrays["slots"] == -1).all(), "a padding row has a slot"

    def check_memory(self) -> None:
        self.pages.check()
        holders: dict[int, list[Sequence]] = defaultdict(list)
        for seq in self.sequences.values():
            for page in seq.pages:
                holders[page].append(seq)
            assert len(set(seq.pages)) == len(seq.pages)
            assert bool(seq.pages) == (seq.slot is not None)
        for page, seqs in holders.items():
            assert page != 0
            assert len({seq.cache_uid for seq in seqs}) == 1, "two adapters share a page"
        assert len(holders) == self.pages.num_used
        slots = [seq.slot for seq in self.sequences.values() if seq.slot is not None]
        assert len(set(slots)) == len(slots)
        assert all(0 <= slot < self.config.max_num_seqs for slot in slots)

    def check_empty(self) -> None:
        assert self.pages.num_used == 0
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        assert not self.scheduler.running_adapters
        assert all(not seq.adapter.in_flight for seq in self.sequences.values() if seq.adapter)
        assert sorted(self.finished) == sorted(self.sequences), "each request ends exactly once"
        assert all(seq.finish_reason for seq in self.sequences.values())
