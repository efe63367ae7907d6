"""An adapter's folder is overwritten while a preempted request waits to go on, and nothing else holds
the old weights: host and device have room for one adapter only.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from jlora.adapters.store import AdapterStore
from jlora.engine.config import EngineConfig, buckets
from jlora.engine.engine import Engine
from jlora.engine.params import SamplingParams
from jlora.engine.runner import Result
from jlora.engine.sequence import Event
from tests.adapters.fakes import Disk, Fake, eventually, staged
from tests.engine.test_engine_end import Device

LONG = 300
CONFIG = EngineConfig(max_model_len=512, max_num_seqs=4, max_loras=1, max_adapter_wait=20)


class SlowDevice(Device):
    """Steps take a millisecond, so that requests overlap."""

    def first_run(self) -> bool:
        return False

    def collect(self, pending: Any) -> Result:
        time.sleep(0.001)
        return super().collect(pending)


@dataclass(frozen=True, kw_only=True)
class Parts:
    engine: Engine
    store: Any
    disk: Disk

    def submit(self, name: str, tokens: int) -> list[Event]:
        """The events of a request, as they come."""
        events: list[Event] = []
        params = SamplingParams(max_tokens=tokens)
        entry = self.store.resolve(name, ("base",))
        self.engine.submit(f"{name}{id(events)}", [1, 2, 3], params, entry, events.append)
        return events


@pytest.fixture
def parts() -> Iterator[Parts]:
    disk = Disk()
    disk.folders |= {"a": Fake("old"), "b": Fake("b")}
    store: Any = AdapterStore(
        read=disk.read, stage=staged, num_pages=1, max_cpu_loras=1, on_change=None
    )  # type: ignore[arg-type]
    engine = Engine(
        SlowDevice(),  # type: ignore[arg-type]
        CONFIG,
        store,
        buckets(CONFIG),
        num_pages=200,
        eos_ids=(),
        vocab=100,
    )
    store.on_change = engine.wake
    engine.start()
    for name in ("a", "b"):
        store.load(name, name)
    yield Parts(engine=engine, store=store, disk=disk)
    engine.shutdown()
    store.check()
    store.close()


def ended(events: list[Event]) -> bool:
    return bool(events) and events[-1].finish_reason is not None


def count(events: list[Event]) -> int:
    return sum(len(event.token_ids) for event in events)


def preempt(parts: Parts) -> list[Event]:
    """A long request of a, which a request of b has just pushed off the device."""
    begun = parts.submit("a", LONG)
    eventually(lambda: count(begun) > 5)
    parts.submit("b", LONG)
    eventually(lambda: parts.store.resolve("a", ()).tier != "device")
    return begun


def test_a_request_that_had_begun_ends_with_an_error_and_new_ones_get_the_new_weights(
    parts: Parts,
):
    begun = parts.submit("a", LONG)
    eventually(lambda: count(begun) > 5)
    parts.disk.folders["a"] = Fake("new")
    other = parts.submit("b", LONG)
    eventually(lambda: count(other) > 0)
    waiting = parts.submit("a", 7)
    eventually(lambda: all(map(ended, (begun, other, waiting))))
    assert begun[-1].finish_reason == "error"
    assert "overwritten" in (begun[-1].error or "")
    assert 5 < count(begun) < LONG
    assert (other[-1].finish_reason, count(other)) == ("length", LONG)
    assert (waiting[-1].finish_reason, count(waiting)) == ("length", 7)
    entry = parts.store.resolve("a", ())
    assert (entry.uid, entry.error) == ("new", None)
    eventually(lambda: entry.in_flight == 0)


def test_a_request_whose_adapter_comes_back_unchanged_goes_on(parts: Parts):
    begun = preempt(parts)
    eventually(lambda: ended(begun))
    assert (begun[-1].finish_reason, count(begun)) == ("length", LONG)
    assert parts.engine.stats().preemptions > 0
