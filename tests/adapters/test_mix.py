"""Weighted mixes: how they are named, what they add up to, and when they are made anew."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlora.adapters.adapter import Adapter, LoraWeights, OutputVectors
from jlora.adapters.mix import canonical, mixed, parse_mix
from jlora.errors import AdapterError, UnknownModelError
from tests.adapters.fakes import Disk

KNOWN = ("a", "b", "qwen-2.5", "e")


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("a*0.7+b*0.3", (("a", 0.7), ("b", 0.3))),
        ("a+b", (("a", 1.0), ("b", 1.0))),
        ("a*-0.5", (("a", -0.5),)),
        (" a * 2 ", None),
        ("a*1e-3+b*+2", (("a", 0.001), ("b", 2.0))),
        ("qwen-2.5*.5+a", (("qwen-2.5", 0.5), ("a", 1.0))),
        ("a*0.5+c*0.5", None),
        ("a+", None),
        ("a**2", None),
        ("", None),
    ],
)
def test_a_mix_is_names_and_weights_of_known_adapters_or_no_mix(text: str, terms: Any) -> None:
    assert parse_mix(text, KNOWN) == terms


@given(st.dictionaries(st.sampled_from(KNOWN), st.floats(-1e5, 1e5), min_size=1))
def test_every_mix_is_read_back_from_its_one_spelling(weights: dict[str, float]) -> None:
    terms = tuple(weights.items())
    read = parse_mix(canonical(terms), KNOWN)
    assert read is not None
    assert [name for name, _ in read] == list(weights)
    np.testing.assert_allclose([w for _, w in read], list(weights.values()), rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "reason"), [("a+a*2", "twice"), ("a*1e9", "between"), ("+".join("a" * 17), "at most")]
)
def test_a_mix_that_makes_no_sense_is_refused(text: str, reason: str) -> None:
    with pytest.raises(AdapterError, match=reason):
        parse_mix(text, KNOWN)


def random_adapter(seed: int, rank: int, **more: Any) -> Adapter:
    rng = np.random.default_rng(seed)
    pair = LoraWeights(
        a=rng.standard_normal((rank, 6)).astype(np.float32),
        b=rng.standard_normal((5, rank)).astype(np.float32),
        rank=rank,
        scaling=0.5 * seed,
    )
    return Adapter(
        uid=str(seed), path=str(seed), base_model=None, rank=rank, weights={(0, "q_proj"): pair},
        chat_template=None, **more,
    )  # fmt: skip


def test_a_mix_is_the_weighted_sum_of_the_deltas_and_of_the_biases() -> None:
    place = (0, "q_proj")
    bias = np.arange(5, dtype=np.float32)
    one = random_adapter(1, 2, vectors={place: OutputVectors(offset=bias)})
    two = random_adapter(2, 3)
    mix = mixed("m", [one, two], [0.7, -0.2])

    def delta(adapter: Adapter) -> np.ndarray:
        pair = adapter.weights[place]
        return pair.scaling * pair.b @ pair.a

    np.testing.assert_allclose(delta(mix), 0.7 * delta(one) - 0.2 * delta(two), atol=1e-5)
    offset = mix.vectors[place].offset
    assert offset is not None
    np.testing.assert_allclose(offset, np.float32(0.7) * bias)
    assert mix.rank == 5
    assert mix.uid != mixed("m", [one, two], [0.7, -0.3]).uid


def test_a_dora_adapter_cannot_be_mixed() -> None:
    scaled = random_adapter(
        1, 2, vectors={(0, "q_proj"): OutputVectors(scale=np.ones(5, np.float32))}
    )
    with pytest.raises(AdapterError, match="DoRA"):
        mixed("m", [scaled, random_adapter(2, 2)], [1, 1])


class TestInTheStore:
    """The store makes a mix when it is first asked for, from adapters that it knows."""

    @pytest.fixture
    def store(self, make: Any, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.setattr(
            "jlora.adapters.reader.mixed",
            lambda name, parts, weights: type(parts[0])(uid=f"{name} {[p.uid for p in parts]}"),
        )
        store = make()
        for name in ("a", "b"):
            store.load(name, f"/{name}")
        return store

    def test_a_mix_is_read_once_and_not_listed(self, store: Any, disk: Disk) -> None:
        entry = store.resolve("a*0.70+b*.3", ["base"])
        assert entry.name == "a*0.7+b*0.3"
        reads = len(disk.reads)
        assert store.resolve("a*0.7+b*0.3", ["base"]) is entry
        assert len(disk.reads) == reads
        assert [facts["name"] for facts in store.adapters()] == ["a", "b"]
        store.check()

    def test_a_mix_with_an_unknown_adapter_is_an_unknown_model(self, store: Any) -> None:
        with pytest.raises(UnknownModelError, match="There are: base, a, b"):
            store.resolve("a*0.7+c*0.3", ["base"])

    def test_a_reload_of_a_part_makes_the_mix_anew(self, store: Any, disk: Disk) -> None:
        old = store.resolve("a+b", ["base"])
        disk.folders["/a"] = type(disk.folders["/a"])("new")
        store.load("a", "/a", replace=True)
        new = store.resolve("a+b", ["base"])
        assert new is not old
        assert "new" in new.uid
        store.check()

    def test_an_unload_of_a_part_unloads_the_mix(self, store: Any) -> None:
        store.resolve("a+b", ["base"])
        store.unload("b")
        with pytest.raises(UnknownModelError):
            store.resolve("a+b", ["base"])
        store.check()

    def test_only_so_many_mixes_are_kept(self, store: Any) -> None:
        for i in range(80):
            store.resolve(f"a*{i}", ["base"])
        store.check()
        assert len(store._mixes) == 64
