"""Which adapters run: room in the step and on the device, and whose turn it is when there is none.

No adapter starves. A blocked adapter's clock starts when one of its requests is passed over for
room. The longest blocked one, after `max_adapter_wait` steps, has the *claim*: no other blocked
adapter starts, and the adapter that has been running longest takes no new requests, so that it
drains. If that does not do within another `max_adapter_wait`, the longest running adapters that
have run for `max_adapter_wait` or more, and whose prompts are all computed, are preempted until
there is room. So an adapter with k blocked ones before it gets room within about
(2 + k / max_loras) * max_adapter_wait of its turn (and the time of running prefills); each runs for
max_adapter_wait at least, and every sequence gains a token or more whenever it runs. Time is counted
in steps, so that a slow device does not throw requests back before they got anywhere.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Protocol

from jlora.engine.config import EngineConfig


class Store(Protocol):
    """What the engine's host side asks of `AdapterStore`; entries are compared by identity."""

    def prefetch(self, entry: Any) -> None:
        """Begin to read the adapter into host memory, unless it is there or being read."""

    def host_ready(self, entry: Any) -> bool:
        """Whether `place` can work on it now; if not, and it has no `error`, reading has begun."""
        ...

    def place(self, entry: Any, keep: Collection[Any]) -> Any:
        """Rank pages for it, evicting none of `keep`; a Placement, or None if there is no room."""

    def release(self, entry: Any) -> None:
        """Give back the acquisition that came with a sequence."""


@dataclass(eq=False)
class _Active:
    """An adapter with running sequences."""

    entry: Any
    since: int
    running: int = 0


class AdapterRoom:
    """The adapters that have running sequences, and those that are blocked."""

    def __init__(self, config: EngineConfig, store: Store):
        self.config = config
        self.store = store
        self._active: dict[int, _Active] = {}  # by id(entry)
        self._blocked: dict[int, int] = {}  # id(entry) -> the step since which it waits for room
        self._claim: Any = None
        self._placements: list[Any] = []

    @property
    def running(self) -> list[Any]:
        """Entries with running sequences."""
        return [active.entry for active in self._active.values()]

    def take_placements(self) -> list[Any]:
        """What must be written to the device before the next step, oldest first."""
        placements, self._placements = self._placements, []
        return placements

    def refusal(self, entry: Any) -> str | None:
        """Why requests for it can never run, if so."""
        if id(entry) in self._active:
            return None
        if not self.store.host_ready(entry):
            return None if entry.error is None else str(entry.error)
        if entry.pages > self.config.max_rank_pages:
            config = self.config
            return (
                f"the adapter has rank {entry.rank}, this server runs {config.max_rank} at most "
                f"({config.max_rank_pages} pages of {config.rank_page} ranks): start it with a "
                "larger --max-loras"
            )
        return None

    def may_start(self, entry: Any, step: int) -> bool:
        """Whether a waiting request of it may be admitted; notes since when room stands in the way."""
        if id(entry) in self._active:
            return self._claim is None or entry is not self._oldest().entry
        if not self.store.host_ready(entry):
            return False
        claimed = self._claim is not None and self._claim is not entry
        if claimed or not self._fits(entry):
            self._blocked.setdefault(id(entry), step)
            return False
        return True

    def enter(self, entry: Any, step: int) -> bool:
        """One more running sequence of it; False if the device has no rank pages for it now."""
        if id(entry) not in self._active:
            if not self._place(entry):
                self._blocked.setdefault(id(entry), step)
                return False
            self._active[id(entry)] = _Active(entry, step)
            self._blocked.pop(id(entry), None)
            if self._claim is entry:
                self._claim = None
        self._active[id(entry)].running += 1
        return True

    def leave(self, entry: Any) -> None:
        """One running sequence less; after the last one its rank pages may be taken."""
        active = self._active[id(entry)]
        active.running -= 1
        if not active.running:
            del self._active[id(entry)]

    def claim(self, waiting: Iterable[Any], step: int) -> Any:
        """The adapter that room must be made for at any cost now, or None. Called once a step with
        the adapters of all waiting requests; decides who has the claim."""
        self._claim = None
        if not self._blocked:
            return None
        entries = {id(entry): entry for entry in waiting}
        self._blocked = {key: since for key, since in self._blocked.items() if key in entries}
        if not self._blocked:
            return None
        key, since = min(self._blocked.items(), key=lambda item: item[1])
        if step - since < self.config.max_adapter_wait:
            return None
        if not self.store.host_ready(entries[key]):
            del self._blocked[key]  # evicted from the host: it waits for its file, not for room
            return None
        self._claim = entries[key]
        return self._claim if step - since >= 2 * self.config.max_adapter_wait else None

    def ready(self, entry: Any) -> bool:
        """Whether there is room for it; if so it is on the device from the next step on."""
        return self._fits(entry) and self._place(entry)

    def victim(self, step: int, prefilling: Collection[Any]) -> Any:
        """The adapter whose sequences must all be preempted next, or None: none has run enough.

        One of those `prefilling` is spared: preempted there again and again, it would never end.
        """
        oldest = self._oldest() if self._active else None
        if oldest is None or step - oldest.since < self.config.max_adapter_wait:
            return None
        if any(oldest.entry is entry for entry in prefilling):
            return None
        self._blocked[id(oldest.entry)] = step
        return oldest.entry

    def _oldest(self) -> _Active:
        return min(self._active.values(), key=attrgetter("since"))

    def _fits(self, entry: Any) -> bool:
        """Whether it may be in a step beside the running ones, by number and by rank pages."""
        used = sum(active.entry.pages for active in self._active.values())
        return (
            len(self._active) < self.config.max_loras
            and used + entry.pages <= self.config.max_rank_pages
        )

    def _place(self, entry: Any) -> bool:
        # Adapters that left the running ones just now may still be in a dispatched step. Their
        # pages can be taken all the same: the device writes them after that step.
        placement = self.store.place(entry, self.running)
        if placement is None:
            return False
        if placement.pages:  # none: it is on the device already
            self._placements.append(placement)
        return True
