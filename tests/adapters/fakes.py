"""Fakes of the disk and of staging, for tests of the adapter store. No jax."""

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

from jlora.adapters.store import AdapterEntry, AdapterStore
from jlora.errors import AdapterError, AdapterNotFound


@dataclasses.dataclass(frozen=True)
class Fake:
    """Both what `read` and what `stage` return."""

    uid: str
    pages: int = 1
    nbytes: int = 100
    rank: int = 8
    modules: tuple[str, ...] = ("q_proj",)
    base_model: str | None = None
    chat_template: str | None = None
    bound: int = 2
    scalings: tuple[float, ...] = (2.0,)
    added_tokens: int = 0
    tokenizer: Any | None = None
    eos_ids: tuple[int, ...] = ()


def staged(adapter: Any) -> Fake:
    return adapter


class Disk:
    """Folders that tests can change, break, and hold up."""

    def __init__(self) -> None:
        self.folders: dict[str, Fake] = {}
        self.broken: set[str] = set()
        self.crash: set[str] = set()
        self.reads: list[str] = []
        self.go = threading.Event()
        self.go.set()

    def read(self, path: str) -> Any:
        assert self.go.wait(10)
        self.reads.append(path)
        assert path not in self.crash, "a bug of ours"
        if path in self.broken:
            raise AdapterError(f"{path} is broken")
        if path not in self.folders:
            raise AdapterNotFound(f"No adapter found for {path}")
        return self.folders[path]


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)


def placed(store: AdapterStore, entry: AdapterEntry, keep: Any = ()) -> tuple[int, ...]:
    eventually(lambda: store.host_ready(entry))
    placement = store.place(entry, keep)
    assert placement is not None
    assert placement.staged is None or placement.staged.uid == entry.uid
    return placement.pages
