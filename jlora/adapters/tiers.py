"""Room on the two memory tiers: which adapter's copy goes when another one needs its place.

Not thread-safe: the store calls it with its lock held. Pinned adapters are never pushed out of
the device, nor out of host memory while that is their only copy.
"""

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Generic

from jlora.adapters.entry import AdapterEntry, Drain, S, Tier
from jlora.errors import AdapterError


@dataclass(eq=False)
class Record(Generic[S]):
    """The store's private side of an entry: where its copies are."""

    entry: AdapterEntry
    staged: S | None = None
    """The host copy."""
    uploaded: S | None = None
    """The same with copies on the device, waiting for rank pages."""
    uploading: bool = False
    """A worker copies it there."""
    changed: S | None = None
    """A host copy of other content than `entry` says; the engine's thread takes it over."""
    pages: list[int] = field(default_factory=list)
    """Its rank pages on the device."""
    reading: bool = False
    """A worker reads it; its host memory is set aside."""
    wanted: bool = False
    """It waits for a worker and for host memory."""
    used: int = 0
    """Tick of the last use, for LRU order."""
    drain: Drain | None = None
    generations: tuple[int, ...] = ()
    """Those of its adapters when a mix was read."""

    @property
    def in_host(self) -> bool:
        """It takes host memory, or is about to."""
        return self.staged is not None or self.changed is not None or self.reading

    @property
    def found(self) -> Tier:
        """The fastest tier that holds a copy."""
        if self.pages:
            return "device"
        return "host" if self.staged is not None or self.changed is not None else "disk"

    def touch(self, tick: int) -> None:
        """A use: now it is the last to be evicted."""
        self.used = tick
        self.entry.last_use = time.time()

    def note(self) -> None:
        """Shows the outside what happened."""
        waits = self.reading or self.wanted
        self.entry.tier = "loading" if self.found == "disk" and waits else self.found


class Tiers(Generic[S]):
    """All adapters' copies, the free rank pages and the budgets."""

    def __init__(
        self,
        num_pages: int,
        max_cpu_loras: int | None,
        host_bytes: int | None,
        max_adapter_pages: int | None = None,
    ):
        self.num_pages, self.max_cpu_loras, self.host_bytes = num_pages, max_cpu_loras, host_bytes
        self.max_adapter_pages = max_adapter_pages
        self.records: dict[AdapterEntry, Record[S]] = {}
        """Draining ones too."""
        self.free = list(range(num_pages, 0, -1))
        """Rank pages without an owner."""
        self.evictions = {"host": 0, "device": 0}

    def check_fits(self, record: Record[S], leaving: Record[S] | None = None) -> None:
        """Every adapter must fit on its tiers beside all pinned ones, else it could never run;
        `leaving`, and those that drain, count while requests hold them, but not as pinned."""
        most = self.max_adapter_pages
        if most is not None and record.entry.pages > most:
            raise AdapterError(
                f"Loading lora {record.entry.name} failed: rank {record.entry.rank} takes "
                f"{record.entry.pages} device rank pages, a step holds {most}; raise --max-loras"
            )
        others = [r for r in self.records.values() if r is not record]
        entries = [r.entry for r in others if r is not leaving or r.entry.in_flight]
        entries.append(record.entry)
        pins = {e for e in entries if e.pinned and (leaving is None or e is not leaving.entry)}
        for what, size, limit in (
            ("device rank pages", lambda entry: entry.pages, self.num_pages),
            ("bytes of host memory", lambda entry: entry.nbytes, self.host_bytes),
            ("adapters in host memory (max_cpu_loras)", lambda entry: 1, self.max_cpu_loras),
        ):
            pinned = sum(size(entry) for entry in pins)
            largest = max((size(entry) for entry in entries if entry not in pins), default=0)
            if limit is not None and pinned + largest > limit:
                raise AdapterError(
                    f"Loading lora {record.entry.name} failed: {size(record.entry)} {what} are "
                    f"needed, {limit} are there; with it, pinned adapters take {pinned} and the "
                    f"largest other one {largest}"
                )

    def make_device_room(self, need: int, keep: Collection[AdapterEntry]) -> bool:
        """Evicts adapters outside of `keep` until `need` pages are free; False, and no change, if
        it can't."""
        victims = [
            record
            for record in self.records.values()
            if record.pages and record.entry not in keep and not record.entry.pinned
        ]
        if len(self.free) + sum(len(record.pages) for record in victims) < need:
            return False
        # Those that no request waits for go first, then the least recently used.
        victims.sort(key=lambda record: (record.entry.in_flight > 0, record.used))
        for record in victims:
            if len(self.free) >= need:
                break
            self.free.extend(record.pages)
            record.pages = []
            self.evictions["device"] += 1
            record.note()
        return True

    def make_host_room(self, nbytes: int) -> bool:
        """Evicts host copies until one more of `nbytes` fits; False, and no change, if it can't."""
        resident = [record for record in self.records.values() if record.in_host]
        count, used = len(resident), sum(record.entry.nbytes for record in resident)
        victims = [
            record
            for record in resident
            if not record.reading
            and (record.pages or (record.entry.in_flight == 0 and not record.entry.pinned))
        ]
        victims.sort(key=lambda record: (record.entry.in_flight > 0, record.used))
        chosen: list[Record[S]] = []

        def full() -> bool:
            over_count = self.max_cpu_loras is not None and count >= self.max_cpu_loras
            return over_count or (self.host_bytes is not None and used + nbytes > self.host_bytes)

        for record in victims:
            if not full():
                break
            chosen.append(record)
            count, used = count - 1, used - record.entry.nbytes
        if full():
            return False
        for record in chosen:
            record.staged = record.changed = None
            self.evictions["host"] += 1
            record.note()
        return True

    def arrive(self, record: Record[S], staged: S | None, error: str | None) -> None:
        """What a worker read, or why it could not. Other content than the entry says waits in
        `record.changed`: the engine's thread takes it over."""
        entry, known = record.entry, record.entry.nbytes
        if staged is not None and staged.uid != entry.uid:
            pages, entry.nbytes, entry.pages = entry.pages, staged.nbytes, staged.pages
            try:
                self.check_fits(record)
                if staged.nbytes > known and not self.make_host_room(staged.nbytes):
                    raise AdapterError(
                        f"Loading lora {entry.name} failed: its new content needs {staged.nbytes} "
                        f"bytes of host memory instead of {known}, which are not free now"
                    )
                record.changed = staged
            except AdapterError as caught:
                staged, error, entry.nbytes = None, str(caught), known
            entry.pages = pages  # until the engine's thread takes the new content over
        if error is not None:
            entry.error = error
        elif record.changed is None:
            record.staged = staged
        if staged is not None:
            entry.chat_template = staged.chat_template

    def check(self) -> None:
        """Asserts the invariants of the tiers; for tests."""
        owned = [page for record in self.records.values() for page in record.pages]
        assert sorted(owned + self.free) == list(range(1, self.num_pages + 1))
        for record in self.records.values():
            assert record.entry.in_flight >= 0
            assert not record.pages or len(record.pages) == record.entry.pages
        in_host = [r.entry for r in self.records.values() if r.in_host]
        assert self.max_cpu_loras is None or len(in_host) <= self.max_cpu_loras
        assert self.host_bytes is None or sum(e.nbytes for e in in_host) <= self.host_bytes
