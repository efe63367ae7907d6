"""Rules of the adapter store for names, unloads, reloads and device pages. No jax."""

from typing import Any

import pytest

from jlora.errors import AdapterError, AdapterNotFound, UnknownModelError
from tests.adapters.fakes import Disk, Fake, placed

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


def test_adapters_loaded_together_are_listed_in_the_order_given(make: Any, disk: Disk) -> None:
    store = make()
    entries = store.load_all([("b", "/b", False), ("a", "/a", True), ("c", "/a", False)])
    assert [entry.name for entry in entries] == ["b", "a", "c"]
    assert [facts["name"] for facts in store.adapters()] == ["b", "a", "c"]
    assert [entry.pinned for entry in entries] == [False, True, False]
    assert sorted(disk.reads) == ["/a", "/a", "/b"]


def test_the_first_of_several_that_fails_is_named_and_those_before_it_stay(make: Any) -> None:
    store = make()
    with pytest.raises(AdapterNotFound, match="Loading lora x failed: No adapter found for /none"):
        store.load_all([("a", "/a", False), ("x", "/none", False), ("y", "/none", False)])
    assert [facts["name"] for facts in store.adapters()] == ["a"]


def test_a_bad_name_among_several_is_refused_before_anything_is_read(make: Any, disk: Disk) -> None:
    store = make()
    store.load("a", "/a")
    for name, words in (("a", "already been loaded"), ("base", "served base"), ("x/y", "name")):
        with pytest.raises(AdapterError, match=words):
            store.load_all([("b", "/b", False), (name, "/b", False)])
    with pytest.raises(AdapterError, match="'b' has already been loaded"):
        store.load_all([("b", "/b", False), ("b", "/a", False)])
    assert disk.reads[0] == "/a"
    assert "x/y" not in store


def test_an_adapter_that_no_step_can_hold_is_refused_though_the_device_has_room(
    make: Any, disk: Disk
) -> None:
    store = make(num_pages=8, max_adapter_pages=2)
    disk.folders["/large"] = Fake("large", pages=3, rank=48)
    with pytest.raises(AdapterError, match="rank 48 takes 3 device rank pages, a step holds 2"):
        store.load("large", "/large")
    assert store.adapters() == []


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
