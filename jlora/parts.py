"""A loaded model in parts: what `jlora.build` makes and `LLM` stands on. No jax."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jlora.adapters.store import AdapterEntry, AdapterStore
from jlora.engine.params import SamplingParams
from jlora.engine.sequence import Event
from jlora.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]
"""Called as `progress(what, done, total)` while something long is going on."""


class EngineLike(Protocol):
    """What the text layer needs of `jlora.engine.engine.Engine`."""

    @property
    def max_model_len(self) -> int: ...

    def check(
        self, prompt: Sequence[int], params: SamplingParams, adapter: AdapterEntry | None = None
    ) -> None: ...

    def submit(
        self,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        adapter: AdapterEntry | None,
        on_event: Callable[[Event], None],
        bell: Callable[[], None] | None = None,
    ) -> None: ...

    def abort(self, request_id: str) -> Any: ...

    def stats(self) -> Any: ...

    @property
    def merged(self) -> AdapterEntry | None: ...

    def shutdown(self, timeout: float) -> None: ...

    @property
    def ready(self) -> bool: ...

    @property
    def failure(self) -> str | None: ...


class InPlaceLike(Protocol):
    """What `LLM` needs of `jlora.in_place.InPlace`."""

    def merge(self, entry: AdapterEntry) -> None: ...

    def unmerge(self, entry: AdapterEntry) -> None: ...


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on each device, for the start-up message."""

    weights: int
    adapter_pages: int
    adapter_page_count: int
    adapter_page_rows: int
    adapter_projections: tuple[str, ...]
    """Dense projections that the pages hold, in the layers' order."""
    adapter_copies: int
    """Copies of the pages that recent steps used; on a CPU, where steps read no pools."""
    kv_pages: int
    kv_page_count: int
    kv_tokens: int

    @property
    def total(self) -> int:
        return self.weights + self.adapter_pages + self.adapter_copies + self.kv_pages


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A loaded model: everything that `LLM` stands on."""

    engine: EngineLike
    store: AdapterStore[Any]
    tokenizer: Tokenizer
    names: tuple[str, ...]
    """Names of the base model; the first is the one shown."""
    path: str
    vocab: int
    """Token ids that the model can take."""
    in_place: InPlaceLike | None = None
    """Merges an adapter into the weights and takes it out again."""
    plan: MemoryPlan | None = None
