"""The registry of adapters and their three tiers: folder on disk, host memory, rank pages.

Thread-safe; no jax. Handlers load, unload and resolve; worker threads read; the engine's thread
asks `host_ready` and `place` while it plans a step and never waits for a file. A host copy that a
waiting request needs is not evicted before the request has its rank pages, so cold adapters that
wait for each other cannot push each other out for ever.
"""

import itertools
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic

from jlora.adapters.adapter import Adapter
from jlora.adapters.entry import AdapterEntry as AdapterEntry
from jlora.adapters.entry import Drain as Drain
from jlora.adapters.entry import Placement as Placement
from jlora.adapters.entry import S, StoreCounters, check_name, content_of
from jlora.adapters.entry import allowed_path as allowed_path
from jlora.adapters.mix import canonical, parse_mix
from jlora.adapters.mix import looks_like_mix as looks_like_mix
from jlora.adapters.reader import AdapterReader
from jlora.adapters.tiers import Record, Tiers
from jlora.errors import AdapterError, AdapterNotFound, UnknownModelError

log = logging.getLogger(__name__)

READERS = 8
"""Threads of `load_all`: reading is copying and hashing, which let go of the interpreter's lock."""

UPLOADS = 4
"""Adapters that may lie on the device beside the rank pages, on their way there."""

MAX_MIXES = 64
"""Weighted mixes that are kept; one more pushes out the one that was asked for least recently."""


class AdapterStore(Generic[S]):
    """Adapters by name, and where each one is now."""

    def __init__(
        self,
        *,
        read: Callable[[str], Adapter],
        stage: Callable[[Adapter], S],
        num_pages: int,
        max_adapter_pages: int | None = None,
        max_cpu_loras: int | None = None,
        host_bytes: int | None = None,
        upload: Callable[[S], S] | None = None,
        workers: int = 2,
        reserved: Collection[str] = (),
        page_bytes: int = 0,
        on_change: Callable[[], None] | None = None,
    ):
        """`num_pages` rank pages of `page_bytes` bytes are there, ids 1 to `num_pages`; one
        adapter may take `max_adapter_pages` of them. `upload` copies a staged adapter to the device,
        on a thread of its own, before `place` gives it pages. `reserved` are the base model's names.
        `on_change` is called, on any thread, when an adapter that was being read arrives or
        fails (the engine wakes up)."""
        self._reader = AdapterReader(read, stage)
        self.num_pages, self.page_bytes = num_pages, page_bytes
        self._tiers: Tiers[S] = Tiers(num_pages, max_cpu_loras, host_bytes, max_adapter_pages)
        self._upload = upload
        self.reserved = frozenset(reserved)
        self.on_change = on_change
        self._lock = threading.RLock()
        self._names: dict[str, Record[S]] = {}
        self._mixes: dict[str, Record[S]] = {}  # least recently asked for first
        self._wanted: deque[Record[S]] = deque()  # reads that wait for host memory, in order
        self._generations, self._ticks = itertools.count(1), itertools.count(1)
        self._forgotten: list[str] = []
        self._unloads = 0
        self._hits = {"device": 0, "host": 0, "disk": 0}
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="adapter-read")
        self._uploader = ThreadPoolExecutor(1, thread_name_prefix="adapter-upload")

    # ---- names: any thread -------------------------------------------------------------------

    def load(
        self, name: str, path: str | os.PathLike, *, pinned: bool = False, replace: bool = False
    ) -> AdapterEntry:
        """Reads, checks and registers an adapter, in the caller's thread.

        With `replace` a name may be taken: requests that run keep the old weights, new ones get
        the new. Raises AdapterError or AdapterNotFound; then nothing has changed.
        """
        check_name(name, self.reserved)
        with self._lock:
            self._check_free(name, replace)
        fetched = self._fetch(name, path := os.fspath(path))
        entry = self._enter(name, path, self._names, fetched, pinned=pinned, replace=replace)
        log.info("%s", entry.summary())
        return entry

    def load_all(self, adapters: Sequence[tuple[str, str, bool]]) -> list[AdapterEntry]:
        """`load` for several (name, path, pinned): read side by side, entered in this order. The first
        error ends it; the adapters before are there."""
        for name, _, _ in adapters:
            check_name(name, self.reserved)
            with self._lock:
                self._check_free(name, replace=False)
        entries = []
        with ThreadPoolExecutor(READERS, thread_name_prefix="adapter-read") as readers:
            reads = [readers.submit(self._fetch, name, path) for name, path, _ in adapters]
            try:
                for n, (name, path, pinned) in enumerate(adapters):
                    fetched, reads[n] = reads[n].result(), None  # type: ignore[assignment]
                    entry = self._enter(name, path, self._names, fetched, pinned=pinned)
                    log.info("%s", entry.summary())
                    entries.append(entry)
            except BaseException:  # Ctrl-C: don't read the rest first
                readers.shutdown(wait=False, cancel_futures=True)
                raise
        return entries

    def _fetch(
        self, name: str, path: str, mix: tuple[tuple[AdapterEntry, float], ...] = ()
    ) -> tuple[S, float]:
        """Reads an adapter or a mix: (staged, seconds)."""
        try:
            return self._reader.fetch(path, mix)
        except AdapterNotFound as error:
            raise AdapterNotFound(f"Loading lora {name} failed: {error}") from None
        except (AdapterError, OSError) as error:
            raise AdapterError(f"Loading lora {name} failed: {error}") from None

    def _enter(
        self,
        name: str,
        path: str,
        table: dict[str, Record[S]],
        fetched: tuple[S, float],
        *,
        pinned: bool = False,
        replace: bool = False,
        mix: tuple[tuple[AdapterEntry, float], ...] = (),
    ) -> AdapterEntry:
        """Enters what was read in a table of names."""
        staged, seconds = fetched
        entry = AdapterEntry(
            name=name,
            path=path,
            generation=next(self._generations),
            nbytes=staged.nbytes,
            pinned=pinned,
            mix=mix,
            load_seconds=seconds,
            **content_of(staged),
        )
        record = Record(entry, used=next(self._ticks))
        with self._lock:
            if table is self._names:
                self._check_free(name, replace)
            old = table.get(name)
            self._tiers.check_fits(record, leaving=old)
            if old is not None:
                self._start_drain(old)
            table[name] = self._tiers.records[entry] = record
            if self._tiers.make_host_room(entry.nbytes):  # else it stays on disk until it is wanted
                record.staged = staged
            record.note()
        return entry

    def read(self, entry: AdapterEntry) -> S:
        """The staged adapter anew from its folder, in the caller's thread; no tier changes."""
        return self._reader.fetch(entry.path, entry.mix)[0]

    def unload(self, name: str) -> Drain:
        """The name is gone at once. The Drain is done when no request uses the adapter any more
        and its memory is freed."""
        with self._lock:
            record = self._names.get(name)
            if record is None:
                raise AdapterNotFound(f"The lora adapter '{name}' cannot be found.", "lora_name")
            self._unloads += 1
            return self._start_drain(record)

    def resolve(self, model: str, base_names: Sequence[str]) -> AdapterEntry | None:
        """The adapter that a request's `model` names; None: the base model.

        An exact name comes first, then `base:adapter`, then a mix such as `a*0.7+b*0.3`, which is
        read here if it is a new one. UnknownModelError lists what is there.
        """
        with self._lock:
            if model in base_names:
                return None
            starts = [f"{base}:" for base in base_names if model.startswith(f"{base}:")]
            for name in [model, *(model.removeprefix(start) for start in starts)]:
                if name in self._names:
                    return self._names[name].entry
            there = ", ".join([*base_names, *self._names])
            terms = parse_mix(model, self._names) if looks_like_mix(model) else None
            parts = tuple((self._names[name].entry, weight) for name, weight in terms or ())
        if parts:
            return self._mix(parts)
        shown = model if len(model) <= 200 else f"{model[:200]}..."
        raise UnknownModelError(f"The model `{shown}` does not exist. There are: {there}")

    def _mix(self, parts: tuple[tuple[AdapterEntry, float], ...]) -> AdapterEntry:
        """The entry of a mix; the least recently asked for goes when there are too many."""
        name = canonical([(entry.name, weight) for entry, weight in parts])
        with self._lock:
            record = self._mixes.pop(name, None)
            if record is not None:
                self._mixes[name] = record
                if record.entry.mix == parts and record.generations == tuple(
                    entry.generation for entry, _ in parts
                ):
                    return record.entry
        entry = self._enter(name, name, self._mixes, self._fetch(name, name, parts), mix=parts)
        with self._lock:
            if (record := self._mixes.get(name)) is not None:
                record.generations = tuple(entry.generation for entry, _ in parts)
            while len(self._mixes) > MAX_MIXES:
                self._start_drain(next(iter(self._mixes.values())))
        return entry

    def __contains__(self, name: str) -> bool:
        """Whether an adapter of this name is loaded."""
        with self._lock:
            return name in self._names

    def adapters(self) -> list[dict[str, object]]:
        """One dictionary per loaded adapter, in load order (GET /v1/adapters)."""
        with self._lock:
            return [record.entry.facts() for record in self._names.values()]

    # ---- requests: any thread ----------------------------------------------------------------

    def acquire(self, entry: AdapterEntry) -> None:
        """A request holds `entry` from now on. UnknownModelError if it was unloaded meanwhile."""
        with self._lock:
            record = self._tiers.records.get(entry)
            if record is None or record.drain is not None:
                raise UnknownModelError(f"The model `{entry.name}` was unloaded.")
            if entry.in_flight == 0:
                entry.error = None  # an earlier failure is tried again
            entry.in_flight += 1
            self._hits[record.found] += 1
            record.touch(next(self._ticks))

    def release(self, entry: AdapterEntry) -> None:
        """The end of an acquire."""
        with self._lock:
            record = self._tiers.records[entry]
            assert entry.in_flight > 0, f"{entry.name} is released more often than acquired"
            entry.in_flight -= 1
            record.touch(next(self._ticks))
            if entry.in_flight == 0:
                record.uploaded = None  # nobody waits for it
            if entry.in_flight == 0 and record.drain is not None:
                self._free_record(record)
            self._start_reads()

    # ---- planning: the engine's thread, never blocks -----------------------------------------

    def prefetch(self, entry: AdapterEntry) -> None:
        """Begins to read the adapter on a worker, if it is only on disk. Reads that find no host
        memory wait in order; a failed one is not repeated while its requests are there."""
        with self._lock:
            record = self._tiers.records.get(entry)
            if record is None or record.in_host or record.pages or entry.error is not None:
                return
            if not record.wanted:
                record.wanted = True
                self._wanted.append(record)
                record.note()
            self._start_reads()

    def host_ready(self, entry: AdapterEntry) -> bool:
        """Whether `place` can work on it now; if not, and there is no `entry.error`, it is on its way.
        The engine's thread only: takes over content that changed on disk."""
        with self._lock:
            record = self._tiers.records.get(entry)
            if record is None:
                return False
            self._take_over(record)
            if record.pages or record.uploaded is not None:
                return True
            if record.staged is None:
                self.prefetch(entry)
                return False
            if self._upload is None:
                return True
            self._start_upload(record, record.staged)
            return False

    def place(self, entry: AdapterEntry, keep: Collection[AdapterEntry]) -> Placement[S] | None:
        """Gives `entry` rank pages, evicting the least recently used adapters outside of `keep`.

        `keep` must name all adapters of the steps being planned or not yet committed. None: it is
        not in host memory, or there is no room now; then nothing was evicted.
        """
        with self._lock:
            record = self._tiers.records.get(entry)
            if record is None:
                return None
            record.touch(next(self._ticks))
            if record.pages:
                return Placement(entry=entry, staged=None, pages=())
            self._take_over(record)
            staged = record.staged
            if staged is None or not self._tiers.make_device_room(staged.pages, {entry, *keep}):
                return None
            record.pages = [self._tiers.free.pop() for _ in range(staged.pages)]
            staged, record.uploaded = record.uploaded or staged, None
            record.note()
            self._start_reads()  # its host copy may go now
            return Placement(entry=entry, staged=staged, pages=tuple(record.pages))

    def pages(self, entry: AdapterEntry) -> list[int]:
        """Its rank pages on the device, in rank order; empty if it is not there."""
        with self._lock:
            record = self._tiers.records.get(entry)
            return [] if record is None else list(record.pages)

    def take_forgotten(self) -> list[str]:
        """Uids that no adapter has any more, since the last call: their prefix pages are garbage."""
        with self._lock:
            live = {entry.uid for entry in self._tiers.records}
            gone, self._forgotten = self._forgotten, []
            return [uid for uid in dict.fromkeys(gone) if uid not in live]

    # ---- metrics -----------------------------------------------------------------------------

    def counters(self) -> StoreCounters:
        """A snapshot of the totals."""
        with self._lock:
            return StoreCounters(
                loads=self._reader.loads,
                load_failures=self._reader.failures,
                unloads=self._unloads,
                hits=dict(self._hits),
                evictions=dict(self._tiers.evictions),
                host_bytes=sum(r.entry.nbytes for r in self._tiers.records.values() if r.in_host),
                device_pages=self.num_pages - len(self._tiers.free),
            )

    def take_load_seconds(self) -> list[float]:
        """Durations of the reads since the last call (at most the last 4096)."""
        return self._reader.take_seconds()

    def close(self) -> None:
        """Stops the workers; reads that run are finished, others are dropped."""
        for workers in (self._workers, self._uploader):
            workers.shutdown(wait=True, cancel_futures=True)

    def check(self) -> None:
        """Asserts the invariants; for tests."""
        with self._lock:
            self._tiers.check()
            for entry, record in self._tiers.records.items():
                table = self._mixes if entry.mix else self._names
                assert record.drain is not None or table[entry.name] is record
                assert record.wanted == (record in self._wanted)

    # ---- inside: the lock is held ------------------------------------------------------------

    def _check_free(self, name: str, replace: bool) -> None:
        if name in self._names and not replace:
            raise AdapterError(
                f"The lora adapter '{name}' has already been loaded. If you want to load the "
                "adapter in place, set 'load_inplace' to True.",
                "lora_name",
            )

    def _start_drain(self, record: Record[S]) -> Drain:
        table = self._mixes if record.entry.mix else self._names
        del table[record.entry.name]
        for mix in [
            r for r in self._mixes.values() if any(e is record.entry for e, _ in r.entry.mix)
        ]:
            self._start_drain(mix)  # of which it was a part
        record.entry.pinned = False
        drain = record.drain = Drain(record.entry)
        if record.entry.in_flight == 0:
            self._free_record(record)
        return drain

    def _free_record(self, record: Record[S]) -> None:
        assert record.drain is not None
        host = 0 if record.staged is None and record.changed is None else record.entry.nbytes
        device = len(record.pages) * self.page_bytes
        self._tiers.free.extend(record.pages)
        record.staged, record.changed, record.uploaded, record.pages = None, None, None, []
        del self._tiers.records[record.entry]
        if record.wanted:
            record.wanted = False
            self._wanted.remove(record)
        record.note()
        self._forgotten.append(record.entry.uid)
        record.drain.finish(host, device)
        self._start_reads()

    def _start_reads(self) -> None:
        """Hands waiting reads to the workers, first come first served, while memory lasts."""
        while self._wanted and self._tiers.make_host_room(self._wanted[0].entry.nbytes):
            record = self._wanted.popleft()
            record.wanted, record.reading = False, True
            record.note()
            try:
                self._workers.submit(self._read_in_background, record)
            except RuntimeError:  # closed
                record.reading = False
                record.note()

    def _start_upload(self, record: Record[S], staged: S) -> None:
        """Hands a copy to the uploading thread, unless enough are on their way: the engine asks again."""
        under_way = sum(r.uploading or r.uploaded is not None for r in self._tiers.records.values())
        if record.uploading or record.entry.error is not None or under_way >= UPLOADS:
            return
        record.uploading = True
        try:
            self._uploader.submit(self._upload_in_background, record, staged)
        except RuntimeError:  # closed
            record.uploading = False

    def _take_over(self, record: Record[S]) -> None:
        """Content that changed on disk becomes the entry's: a new uid and a new generation."""
        staged, entry = record.changed, record.entry
        if staged is None:
            return
        self._forgotten.append(entry.uid)
        record.staged, record.changed, record.uploaded = staged, None, None
        entry.generation = next(self._generations)
        for name, value in content_of(staged).items():
            setattr(entry, name, value)
        log.warning("adapter %s: its folder %s has new content", entry.name, entry.path)
        record.note()

    # ---- inside: the lock is not held --------------------------------------------------------

    def _read_in_background(self, record: Record[S]) -> None:
        entry, staged, error = record.entry, None, None
        try:
            staged, entry.load_seconds = self._reader.fetch(entry.path, entry.mix)
        except Exception as caught:  # whatever is wrong with one adapter must not stop a worker
            error = f"Loading lora {entry.name} failed: {caught}"
            log.warning("%s", error, exc_info=not isinstance(caught, AdapterError))
        with self._lock:
            record.reading = False
            if entry in self._tiers.records:
                self._tiers.arrive(record, staged, error)
            record.note()
            self._start_reads()
        if self.on_change is not None:
            self.on_change()

    def _upload_in_background(self, record: Record[S], staged: S) -> None:
        assert self._upload is not None
        entry, uploaded, error = record.entry, None, None
        try:
            uploaded = self._upload(staged)
        except Exception as caught:
            error = f"Loading lora {entry.name} failed: no copy on the device: {caught}"
            log.warning("%s", error, exc_info=True)
        with self._lock:
            record.uploading = False
            if record.staged is staged and entry.in_flight and not record.pages:
                record.uploaded, entry.error = uploaded, error or entry.error
        if self.on_change is not None:
            self.on_change()
