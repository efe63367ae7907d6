"""What one request or adapter can do to the others: nothing, however extreme its values are."""

import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jlora.console import memory_plan, size
from jlora.engine.params import SamplingParams
from tests.engine.test_engine_end import Job

pytestmark = pytest.mark.usefixtures("few_shapes")

PROMPT = list(range(20, 57))


@pytest.fixture(scope="module")
def parts(tiny_model, tiny_adapter, tmp_path_factory):
    from jlora.build import build_engine
    from jlora.options import ModelOptions

    folder = tiny_model("llama")
    wild = tmp_path_factory.mktemp("wild") / "lora"
    shutil.copytree(tiny_adapter(folder, r=4, targets=["v_proj"], seed=1), wild)
    values = load_file(wild / "adapter_model.safetensors")
    # Finite, or it would not load; the product of A and B is not.
    save_file({name: x * 1e25 for name, x in values.items()}, wild / "adapter_model.safetensors")
    options = ModelOptions(
        model=str(folder),
        lora_modules=(f"wild={wild}",),
        max_model_len=128,
        max_num_seqs=2,
        max_num_batched_tokens=64,
        kv_cache_memory="72KiB",
        enable_prefix_caching=False,
        max_logprobs=0,
        lora_memory="80pages",
    )
    made = build_engine(options)
    yield made
    made.engine.shutdown(0)


def tokens(parts, prompt=PROMPT, name=None, **params):
    defaults = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
    entry = parts.store.resolve(name, parts.names) if name else None
    return Job(parts.engine, prompt, entry, SamplingParams(**(defaults | params))).tokens


def test_an_adapter_that_overflows_leaves_nothing_in_the_pages_of_the_next_request(parts):
    expected = tokens(parts)
    everything = parts.plan.kv_tokens // parts.engine.max_model_len
    for _ in range(everything + 1):  # every page was its own once
        tokens(parts, prompt=PROMPT * 3, name="wild")
    assert [tokens(parts) for _ in range(3)] == [expected] * 3


def test_extreme_numbers_of_a_request_do_not_stop_the_engine(parts):
    expected = tokens(parts)
    for extreme in (
        {"top_k": 10**30, "temperature": 1.0},
        {"temperature": 1e300},
        {"repetition_penalty": 1e300},
        {"repetition_penalty": 1e-300},
        {"seed": -(2**63), "temperature": 1.0},
        {"logprobs": 0, "prompt_logprobs": 0},
        {"min_tokens": 4, "stop_token_ids": tuple(range(100, 164))},
    ):
        assert tokens(parts, **extreme)
    assert tokens(parts) == expected


def test_all_of_the_adapter_budget_may_hold_adapters(parts):
    assert parts.plan.adapter_page_count > parts.engine.config.max_rank_pages
    assert parts.store.num_pages == parts.plan.adapter_page_count == 80


def test_the_memory_plan_counts_the_copies_of_active_pages(parts):
    """Every set of copies that the steps can hold at once, by what the programs really return."""
    runner, plan = parts.engine.runner, parts.plan
    pools = runner.rank_pages.pools
    copies = [
        program(pools, np.zeros(count, np.int32))
        for count, program in runner.programs._copies.items()
    ]
    assert plan.adapter_copies == sum(leaf.nbytes for leaf in jax.tree.leaves(copies)) > 0
    assert plan.total == sum((plan.weights, plan.adapter_pages, plan.adapter_copies, plan.kv_pages))
    assert f"{size(plan.adapter_copies)} of copies" in memory_plan(plan)


def test_padding_rows_are_greedy_so_that_greedy_steps_draw_nothing(parts):
    trash = np.asarray(parts.engine.runner.slots.floats)[-1]
    assert trash[0] == 0.0  # temperature
