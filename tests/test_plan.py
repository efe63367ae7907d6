"""`python -m jlora.plan`: counts are transformers' and the pool's own, the floor is what reads and
products allow, and errors against measured runs are shown.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlora import plan
from jlora.adapters.adapter import EVERY
from jlora.adapters.groups import page_bytes
from jlora.benchmark.load import Run
from jlora.benchmark.results import Results
from jlora.benchmark.rounds import Case, Measurement
from jlora.benchmark.shapes import SHAPES, shape_config, write_shape
from jlora.models.config import ModelConfig
from jlora.planning import DEVICES, MEASURED, adapter_parameters, floor, memory, parameters
from jlora.sharding import Layout
from jlora.tokenizer import Tokenizer
from tests import tiny

PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "llama-3.2-1b": 1_235_814_400,
    "llama-2-7b": 6_738_415_616,
    "mistral-7b": 7_241_732_096,
    "llama-3.1-8b": 8_030_261_248,
    "qwen3-8b": 8_190_735_360,
    "llama-3.1-70b": 70_553_706_496,
}
"""As counted in the published checkpoints."""


@pytest.mark.parametrize("shape", PUBLISHED)
def test_shapes_have_the_published_number_of_parameters(shape: str):
    assert parameters(shape_config(shape)).total == PUBLISHED[shape]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_parameters_are_those_of_the_checkpoint(tiny_model: Callable[..., Path], family: str):
    safetensors = pytest.importorskip("safetensors.numpy")
    folder = tiny_model(family)
    count = parameters(ModelConfig.from_folder(folder)).total
    files = [safetensors.load_file(path) for path in folder.glob("*.safetensors")]
    assert count == sum(tensor.size for file in files for tensor in file.values())


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "llama-3.1-70b"])
@pytest.mark.parametrize("rank", [4, 16, 24])
def test_an_adapters_bytes_are_those_of_its_rank_pages(shape: str, rank: int):
    cfg = shape_config(shape)
    for device in (DEVICES["h100"], DEVICES["cpu"]):
        pages = -(-rank // device.page)
        each = page_bytes(Layout(cfg, 1), np.dtype(np.float32), device.page)
        got = memory(cfg, device, adapters=10, rank=rank, dtype="float32")
        assert got.adapter == pages * each
        assert got.adapters == (10 * pages + 1) * each  # and the padding page
    assert adapter_parameters(cfg, rank) * 4 * device.page == rank * each


def test_memory_adds_up_and_says_when_it_does_not_fit():
    cfg, h100 = shape_config("llama-3.1-8b"), DEVICES["h100"]
    got = memory(cfg, h100, adapters=100, rank=16, dtype="bfloat16")
    assert got.weights == 2 * PUBLISHED["llama-3.1-8b"]
    assert got.weights + got.adapters + got.room == int(80e9 * 0.9)
    assert got.kv_token == 2 * 32 * 8 * 128 * 2
    assert got.merged == 100 * got.weights
    huge = memory(shape_config("llama-3.1-70b"), h100, adapters=0, rank=1, dtype="bfloat16")
    assert huge.room < 0
    assert huge.kv_tokens == 0


def test_the_floor_is_reads_over_bandwidth_or_products_over_speed():
    cfg, h100 = shape_config("llama-3.1-8b"), DEVICES["h100"]

    def at(rows: int, active: int = 0) -> float:
        return floor(
            cfg, h100, rows=rows, context=160, active=active, rank=16, dtype="bfloat16"
        ).seconds

    # 15.0 GB of weights and head at 3.1 TB/s, and 32 x 160 tokens of 128 KiB.
    assert at(32) == pytest.approx((15.01e9 + 32 * 160 * 131072) / 3.1e12, rel=0.002)
    assert at(32, 32) - at(32) == pytest.approx(32 * 32 * 2.62e6 / 3.1e12, rel=0.01)
    few, many = (
        floor(cfg, h100, rows=rows, context=160, active=0, rank=1, dtype="bfloat16")
        for rows in (1, 4096)
    )
    assert few.bound == "memory"
    assert many.bound == "compute"
    assert many.seconds == pytest.approx(4096 * 2 * 7.5e9 / 790e12, rel=0.02)


def test_measured_steps_are_shown_with_the_forecasts_error(capsys: pytest.CaptureFixture[str]):
    assert plan.main(["--device", "h100", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    rows = document["measured"]
    assert len(rows) == sum(point.device == "h100" for point in MEASURED)
    for row in rows:
        assert row["error"] == pytest.approx(row["expected_ms"] / row["measured_ms"] - 1)
        assert row["floor_ms"] < row["measured_ms"]
    assert rows[0]["error"] == pytest.approx(0)  # what the forecast is scaled by
    assert any(abs(row["error"]) > 0.01 for row in rows[1:])
    assert document["expected_tok_s"] == pytest.approx(
        document["floor_tok_s"] * document["reached"]
    )


def test_a_device_that_nothing_was_measured_on_gets_no_forecast(
    capsys: pytest.CaptureFixture[str],
):
    assert plan.main(["--device", "a100", "--adapters", "10"]) == 0
    out = capsys.readouterr().out
    assert "no forecast" in out
    assert "16.06 GB" in out


WORK: dict[str, Any] = {
    "shape": "smollm2-135m", "model": None, "arrivals": "closed", "lengths": "fixed", "mesh": 1,
    "dtype": "auto", "random_input_len": 64, "random_output_len": 32, "zipf_s": 1.5,
    "power_alpha": 1.0, "max_num_seqs": 8, "max_loras": 4, "room": None,
    "adapter_modules": ["q_proj", "v_proj"],
}  # fmt: skip


def write_results(path: Path, kind: str, others: float = 0.0, **changes: Any) -> str:
    """A results file of `jlora.bench`: base, four adapters, sixteen of which four run at once."""
    work = WORK | changes
    results = Results(str(path), work)
    plan = dict.fromkeys(("weights", "adapter_pages", "adapter_copies", "kv_pages"), 10**8)
    plan |= {"adapter_page_rows": 8, "adapter_page_count": 4, "kv_tokens": 160, "kv_page_count": 11}
    device = {"kind": kind}
    facts = {"workload": work, "plan": plan, "device": device, "commit": "c"}
    results.open_session(facts | {"model": work["shape"], "adapters": 4})
    run: dict[str, Any] = dict.fromkeys(Run.__dataclass_fields__, 1.0) | {"tok_s": 60.0}
    cases = (
        Case(system="base"),
        Case(system="merged", adapters=2, ranks="16"),
        Case(system="unmerged", adapters=4, ranks="8,16"),
        Case(system="unmerged", adapters=16, ranks="16", popularity="uniform"),
    )
    for case, itl in zip(cases, (100.0, 99.0, 120.0, 90.0), strict=True):
        times: dict[str, Any] = run | {"itl_p50": itl}
        seen = {"rss": 5e8, "others_cpu": others}
        results.add(Measurement(round=0, load=16, case=case, run=Run(**times), seen=seen))
    return str(path)


def against(argv: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert plan.main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["against"]


CPU = ["--model", "smollm2-135m", "--device", "cpu"]


def test_measured_runs_are_compared_with_floor_forecast_and_their_own_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = write_results(tmp_path / "r.jsonl", "cpu")
    found = against([*CPU, "--against", path], capsys)
    base, few, many = found["steps"]
    assert [step["rows"] for step in found["steps"]] == [8, 8, 8]  # no more run at once
    assert [step["active"] for step in found["steps"]] == [0, 4, 4]
    # 538 MB of float32 and 8 x 80 cached tokens at 20.6 GB/s
    assert base["floor"] == pytest.approx(27.5, rel=0.02)
    # q and v of 30 layers: 30 (2 x 576 + 576 + 192) ranks of four adapters
    assert few["floor"] - base["floor"] == pytest.approx(4 * 12 * 57600 * 4 / 20.6e6)
    assert many["floor"] - base["floor"] == pytest.approx(4 * 16 * 57600 * 4 / 20.6e6)
    timed = next(p for p in MEASURED if (p.device, p.rows, p.active) == ("cpu", 8, 0))
    assert base["forecast"] == pytest.approx(timed.step * 1e3, rel=0.01)
    for step, measured in zip(found["steps"], (100, 120, 90), strict=True):
        assert step["measured"] == measured
        assert step["error"] == pytest.approx(step["forecast"] / measured - 1)
        assert step["tok_s_error"] == pytest.approx(step["tok_s_forecast"] / 60 - 1)
    assert base["from_base"] is None
    assert few["from_base"] == pytest.approx(100 * few["floor"] / base["floor"])
    assert few["error_from_base"] == pytest.approx(few["from_base"] / 120 - 1)
    # 64 tokens through 106 million parameters at 91 GFLOP/s, then 32 steps for 8 rows
    each = 2 * 64 * 106.2e6 / 91e9 + 32 * base["forecast"] / 1e3 / 8
    assert base["tok_s_forecast"] == pytest.approx(32 / each, rel=0.01)


def test_a_process_is_compared_byte_by_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write_results(tmp_path / "r.jsonl", "cpu")
    (held,) = against([*CPU, "--against", path], capsys)["memory"]
    cfg = shape_config("smollm2-135m")
    assert held["engine"] == dict.fromkeys(held["engine"], 10**8)
    assert held["computed"]["weights"] == 4 * (PUBLISHED["smollm2-135m"] + 49152 * 576)
    # four pages and the padding page; ten pages of 16 tokens and the one that is never read
    assert held["computed"]["adapter_pages"] == 5 * page_bytes(Layout(cfg, 1), np.dtype("f4"), 8)
    assert held["computed"]["kv_pages"] == 11 * 16 * 2 * 30 * 3 * 64 * 4
    assert held["measured"] == 5e8


@pytest.mark.parametrize(
    ("asked", "own", "groups"),
    [
        (["q_proj", "v_proj"], None, {"qkv"}),
        ([], ["o_proj", "up_proj"], {"o", "gate_up"}),
        (["all"], ["q_proj"], EVERY),
    ],
)
def test_pages_for_some_projections_are_computed_as_the_engine_lays_them_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: Any, own: Any, groups: Any
):
    changes = {"lora_target_modules": asked, "lora_modules": []}
    path = write_results(
        tmp_path / "r.jsonl", "cpu", **changes | ({"adapter_modules": own} if own else {})
    )
    (held,) = against([*CPU, "--against", path], capsys)["memory"]
    layout = Layout(shape_config("smollm2-135m"), 1)
    page = page_bytes(layout, np.dtype("f4"), 8, targets=frozenset(groups))
    assert held["computed"]["adapter_pages"] == 5 * page
    if asked and asked != ["all"]:
        assert plan.main([*CPU, "--adapters", "4", "--rank", "8", "--json",
                          "--lora-target-modules", *asked]) == 0  # fmt: skip
        assert json.loads(capsys.readouterr().out)["adapters"] == 5 * page


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        ("NVIDIA H100 80GB HBM3", {}, "on NVIDIA H100"),
        ("cpu", {"shape": "tiny"}, "of tiny"),
        ("cpu", {"model": "/no/such/folder"}, "which is not here"),
        ("cpu", {"mesh": 2}, "2 devices"),
        ("cpu", {"arrivals": "poisson"}, "memory alone"),
        ("cpu", {"lengths": "uniform"}, "memory alone"),
        ("cpu", {"others": 0.5}, "others took the cores: memory alone"),
    ],
)
def test_runs_of_other_models_devices_and_loads_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, changes: dict[str, Any], why: str
):
    found = against([*CPU, "--against", write_results(tmp_path / "r", kind, **changes)], capsys)
    assert found["steps"] == []
    ((reason, count),) = found["left_out"].items()
    assert why in reason
    assert count == 1
    assert len(found["memory"]) == ("memory" in why)


def test_the_same_shape_on_the_same_card_matches_whatever_the_driver_calls_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Two files in one call; a card's process has its weights elsewhere, so no RSS is shown."""
    files = [
        write_results(tmp_path / "a", "NVIDIA H100 80GB HBM3", shape="llama-3.1-8b"),
        write_results(tmp_path / "b", "cpu"),
    ]
    argv = ["--model", "llama-3.1-8b", "--device", "h100", "--against", *files]
    found = against(argv, capsys)
    assert len(found["steps"]) == 3
    assert found["memory"][0]["measured"] is None
    assert found["memory"][0]["computed"]["weights"] == 2 * PUBLISHED["llama-3.1-8b"]
    assert plan.main(argv) == 0
    out = capsys.readouterr().out
    assert "a: unmerged 4 distinct r8,16" in out
    assert "left out: 1 process on cpu" in out


def test_a_shapes_folder_is_a_model(tmp_path: Path):
    for name in ("tiny", "llama-3.1-8b", "qwen3-8b"):
        folder = write_shape(name, tmp_path)
        assert ModelConfig.from_folder(folder) == shape_config(name)
        tokenizer = Tokenizer.from_folder(folder)
        assert tokenizer.backend.decode(tokenizer.encode("naïve 日本")) == "naïve 日本"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--device", "abacus"], "h200"),
        (["--model", "gpt-9"], "llama-3.1-8b"),
        (["--rank", "0"], "rank"),
        (["--adapters", "-1"], "adapters"),
        (["--utilization", "2"], "utilization"),
        (["--bandwidth-gb", "0"], "bandwidth_gb"),
        (["--against", "/no/such/file"], "there is no such file"),
    ],
)
def test_a_users_mistake_is_one_line(argv: list[str], says: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        plan.main(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("jlora.plan: error: ")
    assert error.count("\n") == 1
    assert says in error
