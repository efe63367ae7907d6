"""Module patterns: `re` is the oracle on patterns that are small enough to be safe in it."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora.adapters.pattern import MAX_LENGTH, Pattern, PatternTable
from jlora.errors import AdapterError

NAMES = [
    f"model.layers.{layer}.{part}"
    for layer in (0, 1, 12)
    for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
]


def peft_matches(key: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", name) is not None


@pytest.mark.parametrize(
    "key",
    [
        "q_proj",
        "proj",
        "self_attn.q_proj",
        "model.layers.0.self_attn.q_proj",
        "^model.layers.0.self_attn.q_proj",
        "^layers.0.self_attn.q_proj",
        r".*\.q_proj",
        r"layers\.(0|1)\..*_proj",
        r"layers\.[0-9]+\.mlp\.(up|down)_proj",
        r"layers\.(?:1[0-9]|2[0-3])\.mlp\.\w+",
        r"layers\.\d{1,2}\.self_attn\.[qk]_proj$",
        r"layers\.\d{2}\.self_attn\.[^q]_proj",
        r"(q|k)_proj|up_proj",
        r".+?\.1\..*",
        r"",
        r"x*",
    ],
)
def test_keys_match_as_in_peft(key: str) -> None:
    pattern = Pattern(key)
    assert [pattern.matches(n) for n in NAMES] == [peft_matches(key, n) for n in NAMES]


ATOMS = st.sampled_from(["a", "b", r"\.", ".", "[ab]", "[^a]", r"\d", "1", r"\w", "^", "$", "_"])
KEYS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda items: f"({'|'.join(items)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{0,2}", "{1,}", "*?"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=6,
)


@settings(max_examples=600, deadline=None)
@given(KEYS, st.text("ab.1_", max_size=8))
def test_any_supported_key_matches_as_in_re(key: str, name: str) -> None:
    assert Pattern(key).matches(name) == peft_matches(key, name)


@settings(max_examples=600, deadline=None)
@given(st.text(r"ab.|()[]{}*+?^$\12-,:", max_size=8), st.text("ab.1-", max_size=6))
def test_any_text_is_refused_or_matches_as_in_re(key: str, name: str) -> None:
    try:
        pattern = Pattern(key)
    except ValueError:
        return
    assert pattern.matches(name) == peft_matches(key, name)


@pytest.mark.parametrize(
    "key",
    [
        r"(?=q)q_proj",
        r"(a)\1",
        r"(?i)Q_PROJ",
        r"(?P<x>a)",
        r"a++",
        "(",
        ")",
        "[a",
        "*a",
        "a{",
        "a{99999}",
        "a{3,2}",
        "(" * 40 + "a" + ")" * 40,
        "((((a{64}){64}){64}){64})",
        "(" * 20 + "){64}" * 20,
        "a" * (MAX_LENGTH + 1),
        r"\bq_proj",
    ],
)
def test_keys_beyond_the_subset_are_refused_by_name(key: str) -> None:
    with pytest.raises(AdapterError, match="rank_pattern key"):
        PatternTable("rank_pattern", {key: 1})


@pytest.mark.parametrize(
    "key", ["(a+)+b", "(a|aa)+b", "(.*)*.*.*.*.*b", "(.*,){20}b", "(a?){30}a{30}"]
)
def test_hostile_keys_take_bounded_time(key: str) -> None:
    """A hang would be the failure: `re` needs longer than the universe has for most of these."""
    table = PatternTable("rank_pattern", {key: 1})
    assert table.find("a" * 60) in (key, None)


def test_too_many_patterns_are_refused() -> None:
    with pytest.raises(AdapterError, match="5000 patterns"):
        PatternTable("rank_pattern", {str(i): 1 for i in range(5000)})


def test_the_first_key_in_file_order_wins() -> None:
    table = PatternTable("rank_pattern", {r".*q_proj": 1, "q_proj": 2})
    assert table.find("model.layers.0.self_attn.q_proj") == r".*q_proj"
    assert table.find("model.layers.0.self_attn.v_proj") is None
