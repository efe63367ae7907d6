"""Rules of the adapter store, with fakes for files and staging. No jax."""

import dataclasses
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jlora.adapters.store import AdapterEntry, AdapterStore, allowed_path
from jlora.errors import AdapterError, AdapterNotFound, UnknownModelError


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


# ---- names ----------------------------------------------------------------------------------


def test_a_loaded_adapter_is_listed_with_its_facts(make: Any) -> None:
    store = make()
    entry = store.load("a", "/a", pinned=True)
    (facts,) = store.adapters()
    assert facts["name"] == "a"
    assert (facts["path"], facts["rank"], facts["modules"]) == ("/a", 8, ["q_proj"])
    assert (facts["bytes"], facts["tier"], facts["pinned"]) == (100, "host", True)
    assert (facts["in_flight"], facts["uid"], facts["error"]) == (0, "uid-a", None)
    assert entry.load_seconds >= 0
    assert len(store.take_load_seconds()) == 1
    assert store.take_load_seconds() == []


def test_a_taken_name_is_refused_without_reading(make: Any, disk: Disk) -> None:
    store = make()
    store.load("a", "/a")
    with pytest.raises(AdapterError, match=r"'a' has already been loaded.*'load_inplace' to True"):
        store.load("a", "/b")
    assert disk.reads == ["/a"]


def test_a_base_models_name_is_refused(make: Any) -> None:
    with pytest.raises(AdapterError, match="'base' conflicts with a served base model"):
        make().load("base", "/a")


@pytest.mark.parametrize(
    "name",
    ["", " ", " a", "a ", "a/b", "/a", "..", ".", "a\\b", "base:a", ":", "a\nb", "a\0", "a\x7f",
     "a\u202eb", "x" * 257],
)  # fmt: skip
def test_names_that_could_be_something_else_are_refused(make: Any, name: str) -> None:
    store = make()
    with pytest.raises(AdapterError, match="adapter name"):
        store.load(name, "/a")
    assert store.adapters() == []


@pytest.mark.parametrize("name", ["a", "sql-lora_v1.2", "日本語", "a b", "x" * 256, "a@b", "..."])
def test_ordinary_names_are_taken(make: Any, name: str) -> None:
    assert make().load(name, "/a").name == name


def test_a_missing_folder_is_not_found_and_changes_nothing(make: Any) -> None:
    store = make()
    with pytest.raises(
        AdapterNotFound, match="Loading lora x failed: No adapter found for /nowhere"
    ):
        store.load("x", "/nowhere")
    assert store.adapters() == []
    assert store.counters().load_failures == 1


def test_models_resolve_by_exact_name_then_by_base_and_adapter(make: Any) -> None:
    store = make()
    entry = store.load("a", "/a")
    names = ["org/base", "alias"]
    assert store.resolve("org/base", names) is None
    assert store.resolve("alias", names) is None
    assert store.resolve("a", names) is entry
    assert store.resolve("org/base:a", names) is entry
    assert store.resolve("alias:a", names) is entry
    for unknown in ("b", "alias:b", "other:a", "a:a", "", "alias:", ":a", "A"):
        with pytest.raises(
            UnknownModelError, match=r"does not exist. There are: org/base, alias, a$"
        ):
            store.resolve(unknown, names)


def test_a_base_name_with_a_colon_still_resolves(make: Any) -> None:
    store = make()
    entry = store.load("a", "/a")
    assert store.resolve("llama:8b", ["llama:8b", "llama"]) is None
    assert store.resolve("llama:8b:a", ["llama:8b", "llama"]) is entry


# ---- unload and reload ----------------------------------------------------------------------


def test_unload_of_an_idle_adapter_frees_at_once_and_reports_the_bytes(make: Any) -> None:
    store = make()
    entry = store.load("a", "/a")
    placed(store, entry)
    drain = store.unload("a")
    assert drain.done
    assert (drain.host_bytes, drain.device_bytes, drain.wait(0)) == (100, 1000, 1100)
    assert store.adapters() == []
    assert store.counters().device_pages == 0
    with pytest.raises(AdapterNotFound, match="'a' cannot be found"):
        store.unload("a")


def test_unload_frees_only_after_the_last_request(make: Any) -> None:
    store = make()
    entry = store.load("a", "/a")
    store.acquire(entry)
    store.acquire(entry)
    pages = placed(store, entry)
    drain = store.unload("a")
    with pytest.raises(UnknownModelError):
        store.resolve("a", ["base"])
    with pytest.raises(UnknownModelError, match="was unloaded"):
        store.acquire(entry)
    assert store.adapters() == []
    assert drain.wait(0) is None
    assert store.pages(entry) == list(pages)
    store.release(entry)
    assert not drain.done
    store.release(entry)
    assert drain.wait(0) == 1100
    assert store.pages(entry) == []


def test_a_draining_adapter_can_still_be_placed_for_its_requests(make: Any) -> None:
    store = make(num_pages=1, max_cpu_loras=1)
    a, b = store.load("a", "/a"), store.load("b", "/b")
    store.acquire(a)
    store.unload("a")
    placed(store, a)
    placed(store, b)
    placed(store, a)
    store.release(a)


def test_a_name_is_free_again_while_its_old_adapter_drains(make: Any) -> None:
    store = make()
    old = store.load("a", "/a")
    store.acquire(old)
    drain = store.unload("a")
    new = store.load("a", "/b")
    assert store.resolve("a", ["base"]) is new
    store.release(old)
    assert drain.done
    assert store.resolve("a", ["base"]) is new


def test_reload_gives_new_requests_the_new_weights_and_running_ones_the_old(
    make: Any, disk: Disk
) -> None:
    store = make()
    old = store.load("a", "/a")
    store.acquire(old)
    old_pages = placed(store, old)
    disk.folders["/a"] = Fake(uid="uid-new")
    new = store.load("a", "/a", replace=True)
    assert store.resolve("a", ["base"]) is new
    assert (old.uid, new.uid) == ("uid-a", "uid-new")
    assert new.generation != old.generation
    new_pages = placed(store, new, keep=[old])
    assert not set(old_pages) & set(new_pages)
    store.release(old)
    assert store.pages(old) == []
    assert store.take_forgotten() == ["uid-a"]


def test_a_failed_reload_leaves_the_old_adapter_in_place(make: Any, disk: Disk) -> None:
    store = make()
    entry = store.load("a", "/a")
    disk.broken.add("/a")
    with pytest.raises(AdapterError, match="is broken"):
        store.load("a", "/a", replace=True)
    assert store.resolve("a", ["base"]) is entry


def test_content_under_two_names_is_forgotten_only_with_the_last(make: Any) -> None:
    store = make()
    store.load("x", "/a")
    store.load("y", "/a")
    store.unload("x")
    assert store.take_forgotten() == []
    store.unload("y")
    assert store.take_forgotten() == ["uid-a"]
    assert store.take_forgotten() == []


# ---- device pages ---------------------------------------------------------------------------


def test_placing_again_writes_nothing(make: Any) -> None:
    store = make()
    entry = store.load("a", "/a")
    assert len(placed(store, entry)) == 1
    again = store.place(entry, [])
    assert (again.staged, again.pages) == (None, ())


def test_the_least_recently_used_adapter_outside_of_keep_gives_way(make: Any) -> None:
    store = make(num_pages=3)
    a, b, c, d = (store.load(name, f"/{name}") for name in "abcd")
    for entry in (a, b, c, a):
        placed(store, entry)
    placed(store, d)  # b is the oldest
    assert [e.tier for e in (a, b, c, d)] == ["device", "host", "device", "device"]
    placed(store, b, keep=[c, a])
    assert [e.tier for e in (a, b, c, d)] == ["device", "device", "device", "host"]
    assert store.counters().evictions == {"host": 0, "device": 2}


def test_without_room_nothing_is_evicted(make: Any, disk: Disk) -> None:
    disk.folders["/big"] = Fake(uid="big", pages=3)
    store = make(num_pages=3)
    a, b, big = store.load("a", "/a"), store.load("b", "/b"), store.load("big", "/big")
    placed(store, a)
    placed(store, b)
    assert store.place(big, [a]) is None
    assert a.tier == b.tier == "device"
    assert len(placed(store, big)) == 3


def test_an_adapter_without_waiting_requests_gives_way_first(make: Any) -> None:
    store = make(num_pages=2)
    a, b, c = (store.load(name, f"/{name}") for name in "abc")
    placed(store, a)
    placed(store, b)
    store.acquire(a)
    store.place(b, [])
    store.place(a, [])
    store.place(b, [])  # a is older than b, but a request holds it
    placed(store, c)
    assert (a.tier, b.tier) == ("device", "host")
    store.release(a)


def test_a_pinned_adapter_is_never_evicted(make: Any) -> None:
    store = make(num_pages=2, max_cpu_loras=2)
    a = store.load("a", "/a", pinned=True)
    placed(store, a)
    for name in "bcdef":
        placed(store, store.load(name, f"/{name}"))
        assert a.tier == "device"


def test_an_adapter_over_the_device_budget_is_refused_with_the_numbers(
    make: Any, disk: Disk
) -> None:
    disk.folders["/big"] = Fake(uid="big", pages=5)
    store = make(num_pages=4)
    with pytest.raises(AdapterError, match="5 device rank pages are needed, 4 are there"):
        store.load("big", "/big")
    assert store.adapters() == []


def test_pins_that_would_starve_others_are_refused(make: Any, disk: Disk) -> None:
    disk.folders["/two"] = Fake(uid="two", pages=2)
    store = make(num_pages=3)
    store.load("two", "/two")
    store.load("a", "/a", pinned=True)
    with pytest.raises(AdapterError, match="pinned adapters take 2 and the largest other one 2"):
        store.load("b", "/b", pinned=True)


def test_a_pin_leaves_room_for_an_adapter_that_still_drains(make: Any, disk: Disk) -> None:
    disk.folders["/two"] = Fake(uid="two", pages=2)
    store = make(num_pages=2)
    old = store.load("x", "/two")
    store.acquire(old)
    with pytest.raises(AdapterError, match="pinned adapters take 1 and the largest other one 2"):
        store.load("x", "/a", replace=True, pinned=True)
    store.release(old)
    store.load("x", "/a", replace=True, pinned=True)


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


# ---- paths ----------------------------------------------------------------------------------


def test_a_path_below_a_root_is_allowed_and_made_real(tmp_path: Path) -> None:
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "root")
    want = tmp_path.resolve() / "root" / "a"
    assert allowed_path(tmp_path / "root" / "a", [tmp_path / "root"]) == want
    assert allowed_path(str(tmp_path / "link" / "a"), [tmp_path / "root"]) == want
    assert allowed_path(tmp_path / "root" / "a", ["/nowhere", tmp_path / "link"]) == want


def test_paths_out_of_the_roots_are_refused_before_the_disk_is_asked(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "root-not"
    root.mkdir()
    other.mkdir()
    (root / "link").symlink_to(other)
    for path in (
        other,
        root / "..",
        root / "link",
        "/etc",
        root / ".." / "absent",
        "/",
        "relative",
    ):
        with pytest.raises(AdapterError, match="outside of the folders") as error:
            allowed_path(path, [root])
        assert not isinstance(error.value, AdapterNotFound)


def test_a_missing_folder_below_a_root_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFound, match="No adapter found"):
        allowed_path(tmp_path / "absent", [tmp_path])


def test_a_file_that_links_out_of_the_roots_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "root" / "a"
    folder.mkdir(parents=True)
    (folder / "chat_template.jinja").symlink_to("/etc/passwd")
    with pytest.raises(AdapterError, match=r"chat_template.jinja in .* is a link out"):
        allowed_path(folder, [tmp_path / "root"])


def test_without_roots_run_time_loading_is_off(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="--lora-dir"):
        allowed_path(tmp_path, [])


@pytest.mark.parametrize("path", ["a\0b", "a\nb", "\x1b[31m"])
def test_control_characters_in_a_path_are_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(AdapterError) as error:
        allowed_path(os.path.join(tmp_path, path), [tmp_path])
    assert str(error.value).isprintable()
