"""Rules of the adapter store for host memory and background reads. No jax."""

import dataclasses
import threading
import time
from typing import Any

import pytest

from jlora.adapters.store import UPLOADS
from jlora.errors import AdapterError
from tests.adapters.fakes import Disk, Fake, eventually, placed

# ---- host memory ----------------------------------------------------------------------------


def test_host_copies_beyond_max_cpu_loras_fall_back_to_disk_and_return(
    make: Any, disk: Disk
) -> None:
    store = make(max_cpu_loras=2)
    a, b, c = (store.load(name, f"/{name}") for name in "abc")
    assert [e.tier for e in (a, b, c)] == ["disk", "host", "host"]
    store.prefetch(a)
    eventually(lambda: a.tier == "host")
    assert [e.tier for e in (a, b, c)] == ["host", "disk", "host"]
    assert disk.reads == ["/a", "/b", "/c", "/a"]
    assert store.counters().evictions["host"] == 2


def test_host_bytes_are_never_exceeded(make: Any) -> None:
    store = make(host_bytes=250)
    for name in "abcdef":
        store.load(name, f"/{name}")
        assert store.counters().host_bytes <= 250


def test_an_adapter_over_the_host_budget_is_refused_with_the_numbers(make: Any) -> None:
    with pytest.raises(AdapterError, match="100 bytes of host memory are needed, 99 are there"):
        make(host_bytes=99).load("a", "/a")


def test_a_copy_that_waiting_requests_need_stays_until_it_has_its_pages(make: Any) -> None:
    store = make(max_cpu_loras=1)
    a, b = store.load("a", "/a"), store.load("b", "/b")
    store.acquire(b)
    store.acquire(a)
    store.prefetch(a)
    time.sleep(0.02)
    assert (a.tier, b.tier) == ("loading", "host")  # a waits for memory
    assert not store.host_ready(a)
    placed(store, b)
    placed(store, a, keep=[b])
    assert (a.tier, b.tier) == ("device", "device")
    store.release(a)
    store.release(b)


def test_reading_in_the_background_blocks_nobody(make: Any, disk: Disk) -> None:
    changes = threading.Event()
    store = make(max_cpu_loras=1, on_change=changes.set)
    a, b = store.load("a", "/a"), store.load("b", "/b")
    placed(store, b)
    disk.go.clear()
    store.prefetch(a)
    assert a.tier == "loading"
    assert not store.host_ready(a)
    assert store.place(a, []) is None
    assert store.place(b, []) is not None
    assert store.resolve("a", ["base"]) is a
    assert len(store.adapters()) == 2
    disk.go.set()
    assert changes.wait(10)
    assert store.host_ready(a)


def test_asking_for_readiness_begins_the_read(make: Any) -> None:
    store = make(max_cpu_loras=1)
    a = store.load("a", "/a")
    store.load("b", "/b")
    assert a.tier == "disk"
    eventually(lambda: store.host_ready(a))


def test_a_failed_background_read_sets_the_error_and_is_tried_again_by_later_requests(
    make: Any, disk: Disk
) -> None:
    store = make(max_cpu_loras=1)
    a = store.load("a", "/a")
    store.load("b", "/b")
    disk.broken.add("/a")
    store.acquire(a)
    store.prefetch(a)
    eventually(lambda: a.error is not None)
    assert "Loading lora a failed: /a is broken" in a.error
    reads = len(disk.reads)
    assert not store.host_ready(a)  # not read again and again
    time.sleep(0.02)
    assert len(disk.reads) == reads
    store.release(a)
    disk.broken.clear()
    store.acquire(a)
    assert a.error is None
    eventually(lambda: store.host_ready(a))
    store.release(a)


def test_a_crash_in_reading_is_an_error_of_that_adapter_alone(make: Any, disk: Disk) -> None:
    store = make(max_cpu_loras=1, workers=1)
    a, b = store.load("a", "/a"), store.load("b", "/b")
    disk.crash.add("/a")
    store.prefetch(a)
    eventually(lambda: a.error is not None)
    eventually(lambda: store.host_ready(b))


def test_an_evicted_adapter_whose_folder_changed_gets_a_new_uid_and_generation(
    make: Any, disk: Disk
) -> None:
    store = make(max_cpu_loras=1)
    a = store.load("a", "/a")
    store.load("b", "/b")
    generation = a.generation
    disk.folders["/a"] = Fake(uid="uid-new", pages=2, rank=20, chat_template="T")
    store.prefetch(a)
    eventually(lambda: a.tier == "host")
    # Only the engine's thread changes the identity, between two steps.
    assert (a.uid, a.generation) == ("uid-a", generation)
    assert store.host_ready(a)
    assert (a.uid, a.pages, a.rank, a.chat_template) == ("uid-new", 2, 20, "T")
    assert a.generation > generation
    assert len(placed(store, a)) == 2
    assert store.take_forgotten() == ["uid-a"]


def test_changed_content_that_no_longer_fits_is_an_error(make: Any, disk: Disk) -> None:
    store = make(max_cpu_loras=1)
    a = store.load("a", "/a")
    store.load("b", "/b")
    disk.folders["/a"] = Fake(uid="uid-new", pages=99)
    store.prefetch(a)
    eventually(lambda: a.error is not None)
    assert "99 device rank pages are needed, 4 are there" in a.error
    assert (a.uid, a.pages, a.tier) == ("uid-a", 1, "disk")


def test_requests_count_by_the_tier_in_which_they_found_their_adapter(make: Any) -> None:
    store = make(max_cpu_loras=1)
    a, b = store.load("a", "/a"), store.load("b", "/b")
    for entry in (a, b):
        store.acquire(entry)
    placed(store, b)
    store.acquire(b)
    assert store.counters().hits == {"device": 1, "host": 1, "disk": 1}
    for entry in (a, b, b):
        store.release(entry)


# ---- uploads --------------------------------------------------------------------------------


class Uploader:
    """Counts copies on their way to the device, and can hold them up."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.begun: list[str] = []
        self.broken = False

    def __call__(self, staged: Fake) -> Fake:
        self.begun.append(staged.uid)
        assert self.go.wait(10)
        if self.broken:
            raise RuntimeError("the device is full")
        return dataclasses.replace(staged, bound=99)


def test_an_adapter_is_ready_when_its_copy_is_on_the_device_and_placed_as_that_copy(
    make: Any,
) -> None:
    changes, upload = threading.Event(), Uploader()
    store = make(upload=upload, on_change=changes.set)
    a = store.load("a", "/a")
    store.acquire(a)
    assert not store.host_ready(a)
    assert not store.host_ready(a)  # asked again, copied once
    upload.go.set()
    assert changes.wait(10)
    eventually(lambda: store.host_ready(a))
    placement = store.place(a, [])
    assert placement is not None
    assert placement.staged.bound == 99
    assert upload.begun == ["uid-a"]
    assert store.host_ready(a)  # it has its pages
    store.release(a)


def test_a_few_copies_at_a_time_are_on_their_way_and_the_others_follow(make: Any) -> None:
    upload = Uploader()
    store = make(upload=upload, num_pages=6)
    entries = [store.load(name, f"/{name}") for name in "abcdef"]
    for entry in entries:
        store.acquire(entry)
        assert not store.host_ready(entry)
    upload.go.set()
    for entry in entries[:UPLOADS]:
        eventually(lambda entry=entry: store.host_ready(entry))
    assert not any(store.host_ready(entry) for entry in entries[UPLOADS:])
    for entry in entries:
        assert placed(store, entry)
        store.release(entry)
    assert upload.begun == [f"uid-{name}" for name in "abcdef"]


def test_a_copy_that_nobody_waits_for_any_more_is_dropped(make: Any) -> None:
    upload = Uploader()
    upload.go.set()
    store = make(upload=upload)
    a = store.load("a", "/a")
    for _ in range(2):
        store.acquire(a)
        eventually(lambda: store.host_ready(a))
        store.release(a)
    assert upload.begun == ["uid-a", "uid-a"]


def test_a_copy_that_fails_is_its_own_requests_error(make: Any) -> None:
    upload = Uploader()
    upload.broken = True
    upload.go.set()
    store = make(upload=upload)
    a, b = store.load("a", "/a"), store.load("b", "/b")
    store.acquire(a)
    store.host_ready(a)
    eventually(lambda: a.error is not None)
    assert "Loading lora a failed: no copy on the device: the device is full" in a.error
    assert not store.host_ready(a)
    store.release(a)
    upload.broken = False
    store.acquire(b)
    eventually(lambda: store.host_ready(b))
    store.release(b)
    store.acquire(a)  # a new request tries again
    eventually(lambda: store.host_ready(a))
    store.release(a)


def test_an_unload_while_the_copy_is_made_leaves_nothing_behind(make: Any) -> None:
    upload = Uploader()
    store = make(upload=upload)
    a = store.load("a", "/a")
    store.acquire(a)
    assert not store.host_ready(a)
    drain = store.unload("a")
    store.release(a)
    assert drain.done
    upload.go.set()
    again = store.load("a", "/b")
    store.acquire(again)
    eventually(lambda: store.host_ready(again))
    placement = store.place(again, [])
    assert placement is not None
    assert placement.staged.uid == "uid-b"
    store.release(again)
