"""Engine limits and the shapes that are compiled from them."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlora.engine.config import EngineConfig, buckets, pick
from jlora.engine.params import SamplingParams
from jlora.errors import ParameterError


def make(**fields: Any) -> EngineConfig:
    fields.setdefault("max_model_len", 1024)
    return EngineConfig(**fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_model_len", 0), ("max_num_seqs", 0), ("max_num_seqs", 1.5), ("page_size", True),
        ("max_loras", 0), ("prefill_block", 0), ("max_num_batched_tokens", 100),
        ("max_logprobs", -1), ("max_adapter_wait", -1), ("max_adapter_wait", 0.5),
        ("decode_buckets", (1, 8)), ("decode_buckets", (0, 32)), ("decode_buckets", (8, 31)),
        ("prefill_buckets", ((8, 64),)), ("prefill_buckets", ((32, 256), (8, 60))),
        ("prefill_buckets", ((16, 256),)), ("rank_page_buckets", (0, 8)),
    ],
)  # fmt: skip
def test_a_wrong_limit_is_an_error_that_names_it(field: str, value: Any):
    with pytest.raises(ParameterError) as caught:
        make(**{field: value})
    assert caught.value.param == field


def test_a_pool_must_hold_one_full_sequence_beside_the_trash_page():
    assert make(num_pages=65).num_pages == 65
    with pytest.raises(ParameterError, match="65 are needed"):
        make(num_pages=64)


def test_the_default_shapes_are_few():
    config = make()
    assert config.decode_buckets == (1, 8, 32)
    assert config.prefill_buckets == ((8, 64), (32, 256))
    assert config.rank_page_buckets == (1, 4, 8, 32)
    assert config.max_rank == 512
    assert len(buckets(config)) == len(set(buckets(config))) == 19
    assert make(max_num_seqs=256).decode_buckets == (1, 8, 32, 64, 128, 256)
    assert make(max_num_seqs=1).decode_buckets == (1,)
    small = make(max_num_seqs=4, max_num_batched_tokens=16)
    assert small.prefill_buckets == ((4, 16),)


def test_shapes_can_be_given_and_survive_replace():
    config = make(decode_buckets=(32, 4, 4), prefill_buckets=[(32, 256)], rank_page_buckets=[5])
    assert config.decode_buckets == (4, 32)
    assert len(buckets(config)) == 6
    assert replace(config, seed=1).rank_page_buckets == (5,)


def test_where_padding_pages_are_free_large_steps_have_one_shape_and_no_step_lacks_room():
    fields: dict[str, Any] = {"max_loras": 32, "prefill_block": 64, "max_num_batched_tokens": 2048}
    prefill = ((8, 64), (32, 128), (32, 2048))
    fields |= {"decode_buckets": (8, 32), "prefill_buckets": prefill}
    pages = {}
    for free in (False, True):
        for shape in buckets(make(free_padding=free, **fields)):
            pages.setdefault((free, shape.decode, shape.prefill), []).append(shape.rank_pages)
    assert pages[False, 8, 0] == [0, 1, 4, 8]
    assert pages[True, 8, 0] == [0, 1, 8]
    assert pages[False, 32, 0] == [0, 1, 4, 8, 32, 128]
    assert pages[True, 32, 0] == [0, 1, 8, 32, 128]
    assert pages[False, 32, 2048] == [0, 4, 8, 32, 64, 128]
    assert pages[True, 32, 2048] == pages[True, 32, 128] == [0, 128]
    assert pages[True, 8, 64] == [0, 8]
    many = buckets(make(free_padding=True, **fields | {"max_loras": 256}))
    assert [s.rank_pages for s in many if s.prefill == 2048] == [0, 64, 1024]


@given(
    st.sampled_from([1, 3, 8, 32, 100]),
    st.sampled_from([16, 48, 64, 256]),
    st.integers(1, 9),
    st.data(),
)
def test_pick_gives_the_smallest_shape_that_fits_and_one_always_does(
    seqs: int, tokens: int, loras: int, data: st.DataObject
):
    fields: dict[str, Any] = {"max_loras": loras, "free_padding": data.draw(st.booleans())}
    config = make(max_num_seqs=seqs, max_num_batched_tokens=tokens, **fields)
    shapes = buckets(config)
    rows = data.draw(st.integers(0, seqs))
    prefill = data.draw(st.integers(0, tokens))
    pages = data.draw(st.integers(0, config.max_rank_pages))
    got = pick(shapes, rows, prefill, pages)
    assert got.decode >= rows
    assert got.prefill >= prefill
    assert got.rank_pages >= pages
    assert (got.rank_pages == 0) == (pages == 0), "a step without adapters pays nothing for LoRA"
    for shape in shapes:
        if shape.decode >= rows and shape.prefill >= prefill and shape.rank_pages >= pages:
            assert got.decode + got.prefill <= shape.decode + shape.prefill


def test_a_prompt_must_leave_room_for_a_token_unless_it_is_only_scored():
    config = make(max_model_len=8)
    config.check_request(7, SamplingParams())
    config.check_request(8, SamplingParams(max_tokens=0, prompt_logprobs=1))
    with pytest.raises(ParameterError) as caught:
        config.check_request(8, SamplingParams())
    assert caught.value.param == "prompt"
