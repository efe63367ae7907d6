"""Any sequence of calls, from any threads, keeps the store's books right. No jax."""

import dataclasses
import random
import threading
import time
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jlora.adapters.store import AdapterEntry, AdapterStore
from jlora.errors import AdapterError, AdapterNotFound, UnknownModelError
from tests.adapters.fakes import Disk, Fake, eventually, staged

# ---- many threads, many steps ---------------------------------------------------------------


def test_threads_that_load_unload_and_use_adapters_leave_nothing_behind(
    make: Any, disk: Disk
) -> None:
    store = make(num_pages=3, max_cpu_loras=2)
    failures: list[BaseException] = []

    def user(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(150):
                name = rng.choice("abcdef")
                try:
                    if rng.random() < 0.3:
                        store.load(name, f"/{rng.choice('abcdef')}", replace=rng.random() < 0.7)
                    elif rng.random() < 0.2:
                        store.unload(name)
                    else:
                        entry = store.resolve(name, ["base"])
                        store.acquire(entry)
                        if rng.random() < 0.5 and store.host_ready(entry):
                            store.place(entry, [])
                        store.release(entry)
                except (AdapterError, UnknownModelError):
                    pass
                store.check()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=user, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    drains = [store.unload(facts["name"]) for facts in store.adapters()]
    assert all(drain.wait(10) is not None for drain in drains)
    eventually(lambda: store.counters().host_bytes == 0)
    assert store.counters().device_pages == 0


class StoreMachine(RuleBasedStateMachine):
    """Any sequence of calls keeps the books right, and a needed adapter always gets its pages."""

    @initialize(pages=st.integers(2, 5), cpu=st.none() | st.integers(1, 3))
    def start(self, pages: int, cpu: int | None) -> None:
        self.disk = Disk()
        self.store = AdapterStore(
            read=self.disk.read, stage=staged, num_pages=pages, max_cpu_loras=cpu
        )
        self.held: list[AdapterEntry] = []
        self.drains: list[Any] = []
        for i in range(8):
            self.disk.folders[f"/{i}"] = Fake(uid=f"u{i}", pages=1 + i % 2, nbytes=10 + i)

    @rule(
        name=st.sampled_from("wxyz"),
        path=st.integers(0, 7),
        replace=st.booleans(),
        pin=st.booleans(),
    )
    def load(self, name: str, path: int, replace: bool, pin: bool) -> None:
        try:
            self.store.load(name, f"/{path}", replace=replace, pinned=pin)
        except AdapterError as error:
            assert "already been loaded" in str(error) or "are needed" in str(error)  # noqa: PT017

    @rule(name=st.sampled_from("wxyz"))
    def unload(self, name: str) -> None:
        try:
            self.drains.append(self.store.unload(name))
        except AdapterNotFound:
            assert name not in [facts["name"] for facts in self.store.adapters()]

    @rule(name=st.sampled_from("wxyz"))
    def request(self, name: str) -> None:
        try:
            entry = self.store.resolve(name, ["base"])
        except UnknownModelError:
            return
        assert entry is not None
        self.store.acquire(entry)
        self.held.append(entry)

    @rule(path=st.integers(0, 7), version=st.integers(0, 3))
    def write_folder(self, path: int, version: int) -> None:
        old = self.disk.folders[f"/{path}"]
        self.disk.folders[f"/{path}"] = dataclasses.replace(old, uid=f"u{path}.{version}")

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def run_alone(self, data: Any) -> None:
        entry = data.draw(st.sampled_from(self.held))
        others = [e for e in self.held if e is not entry]
        deadline = time.monotonic() + 2
        while not self.store.host_ready(entry):  # as the scheduler does: place what is ready
            for other in others:
                if self.store.host_ready(other):
                    self.store.place(other, [])
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        placement = self.store.place(entry, [])
        assert placement is not None
        assert len(self.store.pages(entry)) == entry.pages

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def finish(self, data: Any) -> None:
        entry = data.draw(st.sampled_from(self.held))
        self.held.remove(entry)
        self.store.release(entry)

    @invariant()
    def books(self) -> None:
        if hasattr(self, "store"):
            self.store.check()
            for drain in self.drains:
                assert drain.done == (drain.entry not in self.held)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()


StoreMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestAnySequenceOfCalls = StoreMachine.TestCase
