"""KV pages: references, the prefix tree and eviction; a random walk against a content oracle."""

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jlora.engine.pages import KVPages


def fill(pages: KVPages, uid: str | None, tokens: list[int]) -> list[int]:
    """Allocate, compute and publish a whole sequence."""
    got = pages.allocate(pages.pages_for(len(tokens)))
    assert got is not None
    pages.publish(uid, tokens, got, 0, len(tokens))
    return got


def test_page_0_is_never_given_out_and_allocation_is_all_or_nothing():
    pages = KVPages(4, 2)
    assert pages.allocate(4) is None
    assert pages.num_free == 3
    got = pages.allocate(3)
    assert got is not None
    assert sorted(got) == [1, 2, 3]
    assert pages.allocate(1) is None
    assert pages.usage == 1
    pages.check()


def test_a_match_never_covers_the_last_token_and_respects_max_tokens():
    pages = KVPages(20, 2)
    held = fill(pages, None, [1, 2, 3, 4, 5, 6])
    assert pages.match(None, [1, 2, 3, 4, 5, 6]) == held[:2]
    assert pages.match(None, [1, 2, 3, 4, 5, 6, 7]) == held
    assert pages.match(None, [1, 2, 3, 4, 5, 6, 7], max_tokens=3) == held[:1]
    assert pages.match(None, [1, 2, 3, 4, 5, 6, 7], max_tokens=0) == []
    assert pages.match(None, [1, 2, 3, 4, 5, 6], max_tokens=6) == held[:2]
    assert pages.match(None, [1, 2]) == []
    assert pages.match(None, [1, 9, 3, 4, 5]) == []


def test_only_full_pages_are_published():
    pages = KVPages(20, 4)
    tokens = [1, 2, 3, 4, 5, 6]
    held = fill(pages, None, tokens)
    assert pages.match(None, [*tokens, 7, 8, 9]) == held[:1]
    pages.publish(None, [*tokens, 7, 8], held, 6, 8)
    assert pages.match(None, [*tokens, 7, 8, 9]) == held


def test_the_same_tokens_of_two_adapters_are_different_pages():
    pages = KVPages(20, 2)
    for uid in (None, "x", "y"):
        assert pages.match(uid, [1, 2, 3]) == []
        fill(pages, uid, [1, 2, 3])
    assert len({pages.match(uid, [1, 2, 3])[0] for uid in (None, "x", "y")}) == 3


def test_a_shared_page_is_free_only_after_its_last_holder():
    pages = KVPages(3, 2)
    first = fill(pages, None, [1, 2])
    assert pages.match(None, [1, 2, 3]) == first
    pages.free(first)
    assert pages.num_used == 1
    pages.free(first)
    assert pages.num_used == 0
    with pytest.raises(AssertionError, match="twice"):
        pages.free(first)


def test_freed_pages_stay_findable_until_room_is_needed_oldest_and_ends_first():
    pages = KVPages(6, 2)
    old, new = fill(pages, None, [1, 1, 2, 2]), fill(pages, None, [3, 3, 4, 4])
    pages.free(old)
    pages.free(new)
    assert pages.num_free == 5
    assert pages.allocate(1) is not None  # the one that was always empty
    assert pages.allocate(1) == [old[1]]  # the end of the oldest
    assert pages.match(None, [1, 1, 2, 2, 0]) == old[:1]
    assert pages.match(None, [3, 3, 4, 4, 0]) == new
    pages.check()


def test_two_sequences_that_computed_the_same_prefix_can_both_go_on_from_it():
    pages = KVPages(20, 2)
    one, two = fill(pages, None, [1, 2]), fill(pages, None, [1, 2])
    more = pages.allocate(1)
    assert more is not None
    pages.publish(None, [1, 2, 3, 4], two + more, 2, 4)
    assert pages.match(None, [1, 2, 3, 4, 5]) == one + more
    pages.check()


def test_what_follows_an_evicted_page_is_forgotten_with_it():
    pages = KVPages(5, 2)
    one, two = fill(pages, None, [1, 2]), fill(pages, None, [1, 2])
    more = pages.allocate(1)
    assert more is not None
    pages.publish(None, [1, 2, 3, 4], two + more, 2, 4)  # a child of `one`
    pages.free(one)
    assert pages.allocate(2) is not None  # evicts `one`
    pages.check()
    assert pages.match(None, [1, 2, 3, 4, 5]) == []
    pages.publish(None, [1, 2, 3, 4, 5, 6], two + more, 4, 4)
    pages.free(two + more)
    assert pages.num_free == 2
    pages.check()


def test_drop_forgets_one_adapter_and_leaves_held_pages_with_their_holders():
    pages = KVPages(9, 2)
    held, other = fill(pages, "x", [1, 2]), fill(pages, "y", [1, 2])
    pages.free(fill(pages, "x", [3, 4]))
    pages.drop("x")
    pages.drop("never seen")
    pages.check()
    assert pages.match("x", [1, 2, 0]) == pages.match("x", [3, 4, 0]) == []
    assert pages.match("y", [1, 2, 0]) == other
    more = pages.allocate(1)
    assert more is not None
    pages.publish("x", [1, 2, 3, 4], held + more, 2, 4)  # nobody could find it: no error
    pages.free(held + more)
    assert pages.num_used == 1
    pages.check()


def test_without_prefix_caching_nothing_is_found_or_counted():
    pages = KVPages(9, 2, enable_prefix_caching=False)
    fill(pages, None, [1, 2])
    pages.count_lookup(10, 5)
    assert pages.match(None, [1, 2, 3]) == []
    assert (pages.queries, pages.hits) == (0, 0)


@dataclass(eq=False)
class Holder:
    uid: str | None
    tokens: list[int]
    pages: list[int]


class PagesMachine(RuleBasedStateMachine):
    """Sequences come, grow, and go; `content` says what was last written to each page."""

    def __init__(self):
        super().__init__()
        self.pages = KVPages(8, 2)
        self.holders: list[Holder] = []
        self.content: dict[int, tuple] = {}

    def write(self, holder: Holder, start: int) -> None:
        for i in range(start // 2, len(holder.tokens) // 2):
            self.content[holder.pages[i]] = (holder.uid, tuple(holder.tokens[: 2 * i + 2]))
        self.pages.publish(holder.uid, holder.tokens, holder.pages, start, len(holder.tokens))

    @rule(
        uid=st.sampled_from([None, "x", "y"]),
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9),
    )
    def begin(self, uid: str | None, tokens: list[int]):
        found = self.pages.match(uid, tokens)
        assert 2 * len(found) < len(tokens)
        for i, page in enumerate(found):
            assert self.content[page] == (uid, tuple(tokens[: 2 * i + 2])), "a wrong hit"
        got = self.pages.allocate(self.pages.pages_for(len(tokens)) - len(found))
        if got is None:
            self.pages.free(found)
            return
        holder = Holder(uid, tokens, found + got)
        self.holders.append(holder)
        self.write(holder, 2 * len(found))

    @precondition(lambda self: self.holders)
    @rule(which=st.integers(0, 99), token=st.integers(0, 1))
    def grow(self, which: int, token: int):
        holder = self.holders[which % len(self.holders)]
        if len(holder.tokens) == 2 * len(holder.pages):
            got = self.pages.allocate(1)
            if got is None:
                return
            holder.pages += got
        holder.tokens = [*holder.tokens, token]
        self.write(holder, len(holder.tokens) - 1)

    @precondition(lambda self: self.holders)
    @rule(which=st.integers(0, 99))
    def end(self, which: int):
        self.pages.free(self.holders.pop(which % len(self.holders)).pages)

    @rule(uid=st.sampled_from([None, "x", "y"]))
    def drop(self, uid: str | None):
        self.pages.drop(uid)
        assert self.pages.match(uid, [0] * 9) == self.pages.match(uid, [1] * 9) == []

    @invariant()
    def nothing_leaks_and_no_adapters_share(self):
        self.pages.check()
        held: dict[int, set[str | None]] = {}
        for holder in self.holders:
            for page in holder.pages:
                held.setdefault(page, set()).add(holder.uid)
        assert 0 not in held
        assert len(held) == self.pages.num_used
        assert all(len(uids) == 1 for uids in held.values())


TestPagesMachine = PagesMachine.TestCase
TestPagesMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
