"""`python -m jlora.bench`: the load is what it says, figures are right, mistakes are one line."""

import asyncio
import json
import os
import signal
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlora import bench
from jlora.adapters.peft import read_adapter
from jlora.benchmark.adapters import write_random_adapter, write_random_adapters
from jlora.benchmark.load import Run, Timing, Workload, closed_loop, run_of, time_request
from jlora.benchmark.options import BenchOptions
from jlora.benchmark.rounds import Measurement, Schedule, measure, summarise
from jlora.benchmark.targets import HttpTarget
from jlora.errors import ParameterError
from jlora.llm import LLM
from jlora.models.config import ModelConfig
from jlora.tokenizer import Tokenizer
from tests import tiny
from tests.server.conftest import Running, start
from tests.server.fakes import fake_llm, write_adapter


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    """A real server on a fake engine, with the adapters `shout` and `whisper`."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tiny.make_tokenizer(folder)
    with fake_llm(Tokenizer.from_folder(folder)) as llm:
        for name in ("shout", "whisper"):
            llm.store.load(name, write_adapter(tmp_path / name, name))
        running = start(llm, tmp_path)
        yield running
        running.stop()


class FakeTarget:
    """Gives tokens in bursts of two and remembers what it saw."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, tuple[int, ...]]] = []
        self.in_flight = 0
        self.peak = 0

    async def generate(self, model: str, prompt: list[int], max_tokens: int) -> AsyncIterator[int]:
        self.seen.append((model, tuple(prompt)))
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        for _ in range(max_tokens // 2):
            await asyncio.sleep(0)
            yield 2
        self.in_flight -= 1


def run_at(tok_s: float) -> Run:
    return Run(
        tok_s=tok_s, ttft_p50=1, ttft_p99=2, itl_p50=tok_s, itl_p99=4, tokens=10, seconds=1.0
    )


# ---- random adapters ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama_odd", "qwen3"])
def test_a_random_adapter_binds_every_projection_at_its_rank(
    tiny_model: Callable[..., Path], tmp_path: Path, family: str
):
    cfg = ModelConfig.from_folder(tiny_model(family))
    adapter = read_adapter(str(write_random_adapter(tmp_path / "r", cfg, rank=24)), cfg)
    assert {pair.a.shape[0] for pair in adapter.weights.values()} == {24}
    assert len(adapter.weights) == 7 * cfg.layers


def test_random_adapters_load_in_peft_and_change_the_answer(
    tiny_model: Callable[..., Path], tmp_path: Path
):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    folder = tiny_model("llama")
    made = write_random_adapters(tmp_path, ModelConfig.from_folder(folder), [4, 16])
    assert list(made) == ["random-0", "random-1"]
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        plain = base(ids).logits
        model = peft.PeftModel.from_pretrained(base, made["random-0"], adapter_name="random-0")
        model.load_adapter(made["random-1"], adapter_name="random-1")
        logits = []
        for name, rank in (("random-0", 4), ("random-1", 16)):
            model.set_adapter(name)
            assert model.peft_config[name].r == rank
            logits.append(model(ids).logits)
    assert (logits[0] - plain).abs().max() > 0.1
    assert (logits[1] - plain).abs().max() > 0.1
    assert (logits[1] - logits[0]).abs().max() > 0.1


# ---- the load ----------------------------------------------------------------------------------


def test_prompts_are_distinct_and_come_again_for_the_same_label():
    load = Workload(input_len=8, output_len=4, vocab=100, seed=3)
    first, again = load.prompts(20, 0, 8, "base"), load.prompts(20, 0, 8, "base")
    assert first == again
    others = load.prompts(20, 1, 8, "base") + load.prompts(20, 0, 8, "one")
    other_seed = Workload(input_len=8, output_len=4, vocab=100, seed=4)
    every = first + others + other_seed.prompts(20, 0, 8, "base")
    assert len({tuple(prompt) for prompt in every}) == 80
    assert all(len(prompt) == 8 and max(prompt) < 100 for prompt in every)


def test_a_closed_loop_keeps_its_clients_busy_and_sends_each_prompt_once():
    target = FakeTarget()
    prompts = [[i] for i in range(20)]
    run = asyncio.run(closed_loop(target, ["a", "b", "c"], prompts, output_len=6, concurrency=4))
    assert target.peak == 4
    assert sorted(prompt for _, prompt in target.seen) == [(i,) for i in range(20)]
    assert Counter(model for model, _ in target.seen) == {"a": 7, "b": 7, "c": 6}
    assert run.tokens == 120
    assert run.tok_s == pytest.approx(120 / run.seconds)


def test_tokens_that_come_together_have_no_gap():
    timing = asyncio.run(time_request(FakeTarget(), "a", [1], 6))
    assert timing.tokens == 6
    assert len(timing.gaps) == 5
    assert [gap == 0 for gap in timing.gaps] == [True, False, True, False, True]


def test_percentiles_are_numpys_over_all_requests():
    rng = np.random.default_rng(0)
    timings = [
        Timing(first=f, gaps=g.tolist(), tokens=5)
        for f, g in zip(rng.random(30), rng.random((30, 4)), strict=True)
    ]
    run = run_of(timings, 2.0)
    assert run.tok_s == 75
    assert run.ttft_p99 == pytest.approx(1e3 * np.percentile([t.first for t in timings], 99))
    assert run.itl_p50 == pytest.approx(1e3 * np.percentile([t.gaps for t in timings], 50))


def test_cases_take_turns_and_rounds_alternate_their_order():
    cases = {"base": ["b"], "one": ["x"], "mixed": ["x", "y"]}
    schedule = Schedule(cases=cases, concurrency=[1, 8], num_prompts=None, repeats=2)
    steps = list(schedule.steps())
    assert steps[:4] == [(0, 1, "base"), (0, 1, "one"), (0, 1, "mixed"), (0, 8, "base")]
    assert steps[6:9] == [(1, 1, "mixed"), (1, 1, "one"), (1, 1, "base")]
    assert schedule.requests == 2 * 3 * (6 + 16)


def test_every_model_is_warm_before_anything_is_measured():
    target, done = FakeTarget(), []
    cases = {"base": ["b"], "one": ["x"], "mixed": ["x", "y"]}
    schedule = Schedule(cases=cases, concurrency=[2], num_prompts=4, repeats=1)
    asyncio.run(measure(target, Workload(input_len=4, output_len=4, vocab=9), schedule, done))
    assert [model for model, _ in target.seen[:3]] == ["b", "x", "y"]
    assert len(target.seen) == 3 + schedule.requests
    assert [one.case for one in done] == ["base", "one", "mixed"]


def test_ratios_are_medians_of_ratios_within_a_round():
    """A machine that becomes ten times slower changes no ratio."""
    done = [
        Measurement(round=number, case=case, concurrency=8, run=run_at(speed * share))
        for number, speed in enumerate((100.0, 10.0, 50.0))
        for case, share in (("mixed", 0.5), ("base", 1.0))
    ]
    base, mixed = summarise(done)
    assert (base["case"], mixed["case"]) == ("base", "mixed")
    assert base["ratio_to_base"] == 1
    assert mixed["ratio_to_base"] == 0.5
    assert base["tok_s"] == 50
    assert base["tok_s_rounds"] == [100, 10, 50]


def test_without_base_there_is_no_ratio():
    (row,) = summarise([Measurement(round=0, case="one", concurrency=1, run=run_at(5))])
    assert row["ratio_to_base"] is None


# ---- over HTTP ---------------------------------------------------------------------------------


def test_over_http_every_token_is_counted(server: Running):
    async def go() -> tuple[Timing, str | None]:
        async with HttpTarget(f"{server.url}/v1", concurrency=2) as target:
            return await time_request(target, "shout", [5, 6, 7], 20), await target.version()

    timing, version = asyncio.run(go())
    assert timing.tokens == 20
    assert len(timing.gaps) == 19
    assert 0 < timing.first < 10
    assert version == "1.2.3"
    (request,) = server.engine.requests
    assert request.prompt == [5, 6, 7]
    assert request.params.ignore_eos
    assert request.params.temperature == 0


def test_the_command_loads_a_server_and_ends_with_json(
    server: Running, capsys: pytest.CaptureFixture[str]
):
    argv = ["--base-url", server.url, "--models", "tiny,shout,whisper", "--concurrency", "1", "3"]
    argv += ["--num-prompts", "6", "--random-input-len", "8", "--random-output-len", "5"]
    assert bench.main([*argv, "--repeats", "2", "--vocab-size", "300"]) == 0
    out = capsys.readouterr().out.splitlines()
    document = json.loads(out[-1])
    rows = [(row["concurrency"], row["case"], row["tokens"]) for row in document["results"]]
    assert rows == [(n, case, 30) for n in (1, 3) for case in ("base", "one", "mixed")]
    assert document["complete"]
    assert document["server_version"] == "1.2.3"
    assert {"jax", "jlora", "python"} == set(document["versions"])
    assert document["command"].startswith("python -m jlora.bench --base-url")
    assert document["workload"]["random_output_len"] == 5
    names = Counter(request.adapter and request.adapter.name for request in server.engine.requests)
    # 4 measurements of base and of one adapter, of 6 requests; mixed shares them; one warm-up each
    assert names == {None: 25, "shout": 37, "whisper": 13}


def test_ctrl_c_prints_what_is_done(
    server: Running, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    real, calls = bench.measure, threading.Event()

    async def cut(target: Any, workload: Any, schedule: Any, done: list, on: Any) -> None:
        first = Schedule(cases={"base": ["tiny"]}, concurrency=[1], num_prompts=1, repeats=1)
        await real(target, workload, first, done, on)
        calls.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure", cut)
    argv = ["--base-url", server.url, "--models", "tiny,shout", "--vocab-size", "300"]
    assert bench.main([*argv, "--random-output-len", "4"]) == 130
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert calls.is_set()
    assert not document["complete"]
    assert [row["case"] for row in document["results"]] == ["base"]


def test_a_servers_refusal_is_one_line(server: Running, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        bench.main(["--base-url", server.url, "--models", "nobody", "--vocab-size", "300"])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("jlora.bench: error: nobody: the server answered 404: ")


# ---- in process --------------------------------------------------------------------------------


@pytest.fixture
def devices_are_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' own process has imported jax already."""
    monkeypatch.setattr(bench, "prepare_devices", lambda mesh: None)


@pytest.mark.usefixtures("devices_are_ready")
def test_in_process_with_random_adapters(
    tiny_model: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    argv = ["--model", str(tiny_model("llama")), "--max-num-seqs", "2", "--max-model-len", "64"]
    argv += ["--max-loras", "3", "--max-num-batched-tokens", "32"]
    argv += ["--random-adapters", "3", "--ranks", "4,24", "--concurrency", "2", "--repeats", "1"]
    assert bench.main([*argv, "--random-input-len", "10", "--random-output-len", "6"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["case"] for row in document["results"]] == ["base", "one", "mixed"]
    assert [row["tokens"] for row in document["results"]] == [36, 36, 36]
    assert document["models"][1:] == ["random-0", "random-1", "random-2"]
    assert document["device"]["platform"] == "cpu"
    assert list(tmp_path.iterdir()) == []  # the adapters are gone


@pytest.mark.usefixtures("devices_are_ready")
@pytest.mark.parametrize("measured", [0, 1])
def test_a_second_ctrl_c_does_not_stop_the_engines_end_half_way(
    measured: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """A thread that still runs jax when the process ends makes it abort."""
    tiny.make_tokenizer(tmp_path)
    llm, real = fake_llm(Tokenizer.from_folder(tmp_path)), bench.measure
    shutdown, ended = llm.engine.shutdown, []

    async def cut(target: Any, workload: Any, schedule: Any, done: list, on: Any) -> None:
        first = Schedule(cases={"base": ["tiny"]}, concurrency=[1], num_prompts=1, repeats=1)
        if measured:
            await real(target, workload, first, done, on)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(10)

    def slow_shutdown(timeout: float) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        shutdown(timeout)
        ended.append(timeout)

    monkeypatch.setattr(bench, "measure", cut)
    monkeypatch.setattr(llm.engine, "shutdown", slow_shutdown)
    monkeypatch.setattr(LLM, "load", lambda options, progress=None: llm)
    handler = signal.getsignal(signal.SIGINT)
    assert bench.main(["--random-output-len", "4", "--vocab-size", "99"]) == 130
    assert ended
    assert signal.getsignal(signal.SIGINT) is handler
    out = capsys.readouterr().out.splitlines()
    assert len(json.loads(out[-1])["results"]) == 1 if measured else not out


@pytest.mark.usefixtures("devices_are_ready")
@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--nope"], "--nope"),
        (["--concurrency", "0"], "concurrency"),
        (["--concurrency", "2", "2"], "concurrency"),
        (["--concurrency", "x"], "--concurrency"),
        (["--cases", "base,two"], "'two'"),
        (["--ranks", "8,x"], "'x'"),
        (["--ranks", "0"], "'0'"),
        (["--repeats", "0"], "repeats"),
        (["--random-output-len", "0"], "random_output_len"),
        (["--models", "a,b"], "models"),
        (["--base-url", "http://127.0.0.1:9"], "models"),
        (["--base-url", "http://127.0.0.1:9", "--models", "a"], "cannot talk to"),
        (["--base-url", "127.0.0.1", "--models", "a"], "cannot talk to"),
        (["--base-url", "http://h", "--models", "a", "--model", "/m"], "--model"),
        (["--base-url", "http://h", "--models", "a", "--cases", "mixed"], "needs an adapter"),
        (["--model", "/there/is/no/such/folder"], "/there/is/no/such/folder"),
    ],
)
def test_a_users_mistake_is_one_line(
    argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stop:
        bench.main(argv)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    (error,) = [line for line in captured.err.splitlines() if line.strip()]
    assert error.startswith("jlora.bench: error: ")
    assert says in error
    assert captured.out == ""


def test_the_cases_are_those_that_there_are_models_for():
    options = BenchOptions()
    assert list(options.schedule(["b"]).cases) == ["base"]
    assert options.schedule(["b", "x", "y"]).cases == {
        "base": ["b"],
        "one": ["x"],
        "mixed": ["x", "y"],
    }
    with pytest.raises(ParameterError, match="vocab_size"):
        BenchOptions(vocab_size=500).workload(300)
