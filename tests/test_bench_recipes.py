"""Several recipes in one engine: which can, what each leaves behind, and how experiments use that."""

import json
import os
import runpy
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import all as experiments_all
from experiments import common
from jlora import bench
from jlora.benchmark import report
from jlora.benchmark.load import run_of
from jlora.benchmark.options import BenchOptions
from jlora.benchmark.recipes import differences, read_recipes
from jlora.benchmark.results import Results, read_groups
from jlora.benchmark.rounds import Case, Measurement
from jlora.llm import LLM

pytestmark = pytest.mark.usefixtures("few_shapes")

ENGINE = """
max_num_seqs = 2
max_model_len = 64
max_num_batched_tokens = 32
max_loras = 2
repeats = 1
concurrency = [2]
random_input_len = 8
random_output_len = 4
"""


def write(path: Path, text: str) -> str:
    path.write_text(ENGINE + text)
    return str(path)


@pytest.fixture
def two(tiny_model: Callable[..., Path], tmp_path: Path) -> list[str]:
    """Flags of two recipes of one engine, the second with more adapters of the same kind."""
    model = f'model = "{tiny_model("llama")}"\n'
    first = write(tmp_path / "first.toml", model + 'ranks = ["8"]\nadapters_n = [1]')
    second = write(tmp_path / "second.toml", model + 'ranks = ["8", "4,8"]\nadapters_n = [3]')
    return ["--config", first, "--config", second, "--out", str(tmp_path / "{recipe}.jsonl")]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[LLM]:
    """The engines that `bench.main` builds; the tests' own process has imported jax already."""
    monkeypatch.setattr(bench, "prepare_devices", lambda mesh: None)
    built, load = [], LLM.load

    def counted(options: Any, *, progress: Any = None) -> LLM:
        built.append(load(options, progress=progress))
        return built[-1]

    monkeypatch.setattr(LLM, "load", counted)
    return built


def test_two_recipes_take_turns_in_one_engine_and_leave_a_file_each(
    two: list[str], loads: list[LLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert bench.main(two) == 0
    assert len(loads) == 1
    assert len(loads[0].store.adapters()) == 6  # three of rank 8 for both, three of 4 and 8
    documents = [
        json.loads(line) for line in capsys.readouterr().out.splitlines() if line[0] == "{"
    ]
    assert [[row["case"] for row in one["results"]] for one in documents] == [
        ["base", "unmerged 1 r8"],
        ["base", "unmerged 3 distinct r8", "unmerged 3 distinct r4,8"],
    ]
    first, second = (read_groups(tmp_path / f"{name}.jsonl") for name in ("first", "second"))
    assert first[0].session["recipes"] == ["first", "second"]
    assert first[0].session["workload"]["adapters_n"] == [1]
    assert second[0].session["workload"]["adapters_n"] == [3]
    # What was measured together is what it would have measured alone: nothing is left of it.
    assert bench.main(two) == 0
    alone = [text for text in two if "second" not in text]
    assert bench.main([*alone[:2], *alone[-2:]]) == 0
    assert len(loads) == 1, "everything is measured: no model is needed"


def test_stop_after_holds_between_recipes_and_the_next_call_goes_on(
    two: list[str], loads: list[LLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for expected in (75, 75, 75, 75, 0):  # two measurements and three, the last ends it
        assert bench.main([*two, "--stop-after", "0.001"]) == expected
    runs = [
        [json.loads(line)["kind"] for line in (tmp_path / f"{name}.jsonl").open()].count("run")
        for name in ("first", "second")
    ]
    assert runs == [2, 3]
    *_, second = capsys.readouterr().out.splitlines()
    assert json.loads(second)["complete"]


def test_adapters_of_the_next_recipe_are_placed_while_there_is_room(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    loads: list[LLM],
    monkeypatch: pytest.MonkeyPatch,
):
    model = f'model = "{tiny_model("llama")}"\nlora_memory = "2pages"\nsystems = ["base"]\n'
    paths = [
        write(tmp_path / "first.toml", model + 'ranks = ["8"]\nrandom_adapters = 2'),
        write(tmp_path / "second.toml", model + 'ranks = ["4"]\nrandom_adapters = 3'),
    ]
    found, run = [], bench.run

    async def seen(*args: Any) -> bool:
        on = [e["name"] for e in loads[0].store.adapters() if e["tier"] == "device"]
        found.append(on)
        return await run(*args)

    monkeypatch.setattr(bench, "run", seen)
    assert bench.main([text for path in paths for text in ("--config", path)]) == 0
    assert found == [["r0-random-0", "r0-random-1"], ["r1-random-0", "r1-random-1"]]


@pytest.mark.parametrize(
    ("one", "other", "differ"),
    [
        ({"adapters_n": (1,)}, {"adapters_n": (2,), "ranks": ("64",), "repeats": 5}, []),
        ({}, {"max_loras": 3}, ["max_loras"]),
        ({"shape": "tiny"}, {"shape": "llama-3.1-8b"}, ["shape"]),
        ({"adapters_n": (1,), "room": 2}, {"adapters_n": (3,), "room": 2}, []),
        ({"room": 2, "ranks": ("8",)}, {"room": 2, "ranks": ("16",)}, ["room"]),
        # Rank pages hold what the adapters change, unless they are told to hold everything.
        ({"adapters_n": (1,)}, {"adapters_n": (1,), "lora_target_modules": ("all",)}, []),
        (
            {"adapters_n": (1,)},
            {"adapters_n": (1,), "adapter_modules": ("q_proj",)},
            ["lora_target_modules"],
        ),
        (
            {"adapters_n": (1,)},
            {"adapters_n": (1,), "adapter_modules": ("q_proj",), "lora_target_modules": ("all",)},
            [],
        ),
    ],
)
def test_recipes_share_an_engine_if_they_agree_in_what_it_is_built_from(
    one: dict[str, Any], other: dict[str, Any], differ: list[str]
):
    assert differences(BenchOptions(**one), BenchOptions(**other)) == differ


@pytest.mark.parametrize(
    ("second", "flags", "says"),
    [
        ("max_loras = 4", [], "max_loras"),
        ('base_url = "http://h"\nmodels = ["a"]', [], "one at a server"),
        ("", ["--out", "same.jsonl"], "{recipe}"),
    ],
)
def test_recipes_that_cannot_be_together_are_refused_in_one_line(
    second: str, flags: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    text = ENGINE.replace("max_loras = 2", "")
    (tmp_path / "first.toml").write_text(text + ("max_loras = 2" if "loras" in second else ""))
    (tmp_path / "second.toml").write_text(text + second)
    argv = ["--config", str(tmp_path / "first.toml"), "--config", str(tmp_path / "second.toml")]
    with pytest.raises(SystemExit) as stop:
        bench.main([*argv, *flags])
    assert stop.value.code == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("jlora.bench: error: ")
    assert says in error


def test_flags_win_over_every_recipe(tmp_path: Path):
    paths = [write(tmp_path / f"{name}.toml", "") for name in "ab"]
    recipes = read_recipes(["--config", paths[0], "--repeats", "7", "--config", paths[1]], "x")
    assert [(one.name, one.options.repeats) for one in recipes] == [("a", 7), ("b", 7)]


# ---- experiments.all -----------------------------------------------------------------------------


def test_experiments_of_a_gpu_need_few_engines():
    names = experiments_all.folders(["002", "001", "003", "005", "008", "004", "006"], "h200")
    assert [one.names for one in experiments_all.processes(names, "h200")] == [
        (
            "002_lora_tax", "001_merged_vs_unmerged", "005_popularity", "004_rank", "006_churn",
        ),
        ("003_adapter_scaling",),
        ("008_memory",),
    ]  # fmt: skip


def test_without_names_a_scale_runs_what_it_has_recipes_for():
    assert experiments_all.folders([], "h200x2") == ["007_tensor_parallel"]
    assert len(experiments_all.folders([], "smoke")) == 9
    for name, scales in experiments_all.WITHOUT_RECIPES.items():
        own = runpy.run_path(str(common.ROOT / "experiments" / name / "run.py"))["SCALES"]
        assert set(scales) == set(own)
    with pytest.raises(SystemExit, match="'00'"):
        experiments_all.folders(["00"], "cpu")


def test_time_that_is_left_is_what_the_next_process_gets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    now, commands = [0.0], []

    def run(command: list[str]) -> int:
        commands.append(command)
        now[0] += 60
        return 0

    monkeypatch.setattr(experiments_all, "run", run)
    monkeypatch.setattr(experiments_all.time, "monotonic", lambda: now[0])
    argv = ["002", "003", "008", "--scale", "h100", "--stop-after", "100", "--out", str(tmp_path)]
    assert experiments_all.main([*argv, "--no-plots"]) == 75
    assert [command[-1] for command in commands] == ["100", "40"]
    assert str(tmp_path / "{recipe}.jsonl") in commands[0]
    assert "exit 0, 60 s" in capsys.readouterr().out


def test_as_many_processes_run_at_once_as_jobs_says_and_none_after_one_that_ctrl_c_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    both, begun = threading.Barrier(2), []

    def run(command: list[str]) -> int:
        begun.append(command)
        both.wait(20)  # BrokenBarrierError if one ran by itself
        return 130

    monkeypatch.setattr(experiments_all, "run", run)
    argv = ["002", "003", "008", "--scale", "h100", "--jobs", "2", "--out", str(tmp_path)]
    assert experiments_all.main([*argv, "--no-plots"]) == 130
    assert len(begun) == 2
    with pytest.raises(SystemExit):
        experiments_all.main(["002", "--jobs", "0"])


def test_a_child_that_ctrl_c_ends_says_so_itself(monkeypatch: pytest.MonkeyPatch):
    """subprocess.run would kill it after a quarter of a second."""
    script = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: (time.sleep(1), sys.exit(130)))\n"
        "os.kill(os.getppid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT)\n"
        "time.sleep(20)"
    )
    assert common.run([sys.executable, "-c", script]) == 130


def test_outside_of_a_checkout_the_environment_names_the_commit(
    monkeypatch: pytest.MonkeyPatch,
):
    def no_git(*_: Any, **__: Any) -> Any:
        raise OSError

    monkeypatch.setattr(report.subprocess, "run", no_git)
    monkeypatch.delitem(os.environ, "JLORA_COMMIT", raising=False)
    assert report.commit() is None
    monkeypatch.setenv("JLORA_COMMIT", "abc")
    assert report.commit() == "abc"


def test_a_disturbed_first_round_does_not_change_the_order_of_the_cases(tmp_path: Path):
    results = Results(str(tmp_path / "r.jsonl"), {})
    results.open_session({"commit": "c"})
    base, one = Case(system="base"), Case(system="unmerged", adapters=1)
    for number, case, others in ((0, base, 0.5), (0, one, 0.0), (1, one, 0.0), (1, base, 0.0)):
        seen = {"others_cpu": others}
        results.add(Measurement(round=number, load=1, case=case, run=run_of([], 1.0), seen=seen))
    (group,) = read_groups(tmp_path / "r.jsonl")
    assert [row["case"] for row in group.rows] == ["base", "unmerged 1"]
    assert [len(row["tok_s_rounds"]) for row in group.rows] == [1, 2]
