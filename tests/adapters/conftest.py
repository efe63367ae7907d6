"""Fixtures of the store tests: a fake disk with folders /a to /f, and a maker of stores on it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jlora.adapters.store import AdapterStore
from tests.adapters.fakes import Disk, Fake, staged


@pytest.fixture
def disk() -> Disk:
    disk = Disk()
    for name in "abcdef":
        disk.folders[f"/{name}"] = Fake(uid=f"uid-{name}")
    return disk


@pytest.fixture
def make(disk: Disk) -> Iterator[Callable[..., AdapterStore]]:
    stores: list[AdapterStore] = []

    def build(**options: Any) -> AdapterStore:
        options = {"num_pages": 4, "page_bytes": 1000, "reserved": ("base",)} | options
        stores.append(AdapterStore(read=disk.read, stage=staged, **options))
        return stores[-1]

    yield build
    disk.go.set()
    for store in stores:
        store.check()
        store.close()
