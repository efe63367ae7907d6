"""Sampling parameters: vLLM's defaults, and an error that names the field for every wrong value."""

import math
from typing import Any

import pytest

from jlora.engine.params import SamplingParams
from jlora.errors import ParameterError

WRONG: list[tuple[str, Any]] = [
    ("n", 0), ("n", 1.0), ("n", True),
    ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf),
    ("temperature", "1"),
    ("top_p", 0.0), ("top_p", 1.01), ("top_p", math.nan),
    ("top_k", -2), ("top_k", 1.5),
    ("min_p", -0.1), ("min_p", 1.1), ("min_p", math.nan),
    ("presence_penalty", 2.1), ("presence_penalty", -2.1), ("frequency_penalty", math.nan),
    ("repetition_penalty", 0.0), ("repetition_penalty", -1.0), ("repetition_penalty", math.inf),
    ("seed", 1.5), ("seed", 2**63), ("seed", True),
    ("stop", ("",)), ("stop", (1,)), ("stop", 3),
    ("stop_token_ids", (-1,)), ("stop_token_ids", ("a",)), ("stop_token_ids", 7),
    ("stop_token_ids", tuple(range(65))),
    ("ignore_eos", 1), ("skip_special_tokens", "no"), ("include_stop_str_in_output", None),
    ("max_tokens", -1), ("max_tokens", 0), ("max_tokens", 2.0),
    ("min_tokens", -1), ("min_tokens", 17),
    ("logprobs", -1), ("prompt_logprobs", -1), ("logprobs", True),
    ("logit_bias", {-1: 1.0}), ("logit_bias", {"a": 1.0}), ("logit_bias", {1: math.nan}),
    ("logit_bias", {1: math.inf}), ("logit_bias", dict.fromkeys(range(513), 1.0)),
    ("logit_bias", [1]),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_wrong_value_is_an_error_that_names_the_field(field: str, value: Any):
    with pytest.raises(ParameterError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field
    assert field in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_defaults_are_vllms():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k) == (1, 1.0, 1.0, 0)
    assert (params.max_tokens, params.min_tokens, params.seed) == (16, 0, None)
    assert (params.stop, params.stop_token_ids, params.skip_special_tokens) == ((), (), True)


def test_lists_become_tuples_one_string_a_tuple_and_seed_minus_one_no_seed():
    params = SamplingParams(stop="x", stop_token_ids=[1, 2], seed=-1)  # pyright: ignore
    assert (params.stop, params.stop_token_ids, params.seed) == (("x",), (1, 2), None)


def test_logit_bias_is_clamped_and_tiny_temperatures_are_raised():
    params = SamplingParams(temperature=1e-7, logit_bias={1: 500.0, 2: -500.0, 3: 1.5})
    assert params.temperature == 0.01
    assert params.logit_bias == {1: 100.0, 2: -100.0, 3: 1.5}


def test_greedy_allows_one_answer_only():
    assert SamplingParams(temperature=0).greedy
    with pytest.raises(ParameterError) as caught:
        SamplingParams(temperature=0, n=2)
    assert caught.value.param == "n"


def test_max_tokens_0_is_for_scoring():
    assert SamplingParams(max_tokens=0, prompt_logprobs=0).scores_only
    assert not SamplingParams(max_tokens=None).scores_only


def test_integers_are_numbers():
    assert SamplingParams(temperature=1, top_p=1, min_p=0, presence_penalty=-2).top_p == 1
