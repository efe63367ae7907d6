"""`python -m jlora.bench`: the load is what it says, figures are right, mistakes are one line."""

import asyncio
import itertools
import json
import os
import signal
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlora import bench
from jlora.adapters.peft import read_adapter
from jlora.benchmark import merged
from jlora.benchmark.adapters import write_random_adapter, write_random_adapters
from jlora.benchmark.load import Run, Timing, closed_loop, open_loop, run_of, time_request
from jlora.benchmark.options import BenchOptions
from jlora.benchmark.report import spread
from jlora.benchmark.rounds import Case, Measurement, Schedule, measure, summarise
from jlora.benchmark.targets import HttpTarget
from jlora.benchmark.workload import Request, Workload
from jlora.console import ProgressBars
from jlora.errors import ParameterError
from jlora.llm import LLM
from jlora.models.config import ModelConfig
from jlora.tokenizer import Tokenizer
from tests import tiny
from tests.server.conftest import Running, start
from tests.server.fakes import fake_llm, write_adapter

pytestmark = pytest.mark.usefixtures("few_shapes")

BASE = Case(system="base", models=("b",))


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


class FakeSubject:
    """One fake target for all cases."""

    def __init__(self) -> None:
        self.fake = FakeTarget()
        self.cases: list[str] = []

    @asynccontextmanager
    async def target(self, case: Case) -> AsyncIterator[FakeTarget]:
        self.cases.append(case.label)
        yield self.fake

    def counters(self) -> dict[str, float]:
        return {"sent": len(self.fake.seen)}

    def gauges(self) -> dict[str, float]:
        return {"rss": 5}


def run_at(tok_s: float) -> Run:
    return Run(
        tok_s=tok_s, req_s=1, ttft_p50=1, ttft_p99=2, itl_p50=tok_s, itl_p99=4, latency_p50=1,
        latency_p99=2, tokens=10, requests=1, seconds=1.0,
    )  # fmt: skip


def jobs(models: list[str], count: int, output_len: int) -> Iterator[tuple[str, Request]]:
    for i in range(count):
        yield (
            models[i % len(models)],
            Request(at=0.01 * i, adapter=0, prompt=[i], output_len=output_len),
        )


def unmerged(*models: str, **given: Any) -> Case:
    return Case(system="unmerged", adapters=len(models), models=models, **given)


async def collect(subject: Any, workload: Workload, schedule: Schedule, **given: Any) -> list:
    return [one async for one in measure(subject, workload, schedule, **given)]


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


def test_a_closed_loop_keeps_its_clients_busy_and_sends_each_prompt_once():
    target = FakeTarget()
    run = asyncio.run(closed_loop(target, jobs(["a", "b", "c"], 20, 6), clients=4))
    assert target.peak == 4
    assert sorted(prompt for _, prompt in target.seen) == [(i,) for i in range(20)]
    assert Counter(model for model, _ in target.seen) == {"a": 7, "b": 7, "c": 6}
    assert (run.tokens, run.requests) == (120, 20)
    assert run.tok_s == pytest.approx(120 / run.seconds)
    assert run.req_s == pytest.approx(20 / run.seconds)


def test_a_closed_loop_ends_after_its_duration_or_its_count():
    target = FakeTarget()
    run = asyncio.run(closed_loop(target, jobs(["a"], 10**6, 2), clients=3, duration=0.2))
    assert 0.2 <= run.seconds < 5
    assert run.requests == len(target.seen) > 10
    run = asyncio.run(closed_loop(target, jobs(["a"], 99, 2), clients=3, count=8, duration=60.0))
    assert run.requests == 8


def test_an_open_loop_sends_at_its_times_and_counts_from_them():
    target = FakeTarget()
    run = asyncio.run(open_loop(target, jobs(["a"], 10**9, 4), duration=0.25))
    assert run.requests == 25  # 100 a second
    assert run.seconds >= 0.24
    late = asyncio.run(time_request(target, "a", [1], 2, arrived=-1.0))
    assert late.first > 1


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
    cases = [BASE, unmerged("x"), unmerged("x", "y")]
    schedule = Schedule(cases=cases, loads=[1, 8], repeats=2)
    steps = [(number, load, case.adapters) for number, load, case in schedule.steps()]
    assert steps[:4] == [(0, 1, 0), (0, 1, 1), (0, 1, 2), (0, 8, 0)]
    assert steps[6:9] == [(1, 1, 2), (1, 1, 1), (1, 1, 0)]
    assert len(schedule) == 12
    assert [schedule.count(load) for load in (1, 8)] == [6, 16]
    assert Schedule(cases=cases, loads=[1], repeats=1, duration=3.0).count(1) is None


def test_every_model_is_warm_before_anything_is_measured():
    subject = FakeSubject()
    cases = [BASE, unmerged("x", "y")]
    schedule = Schedule(cases=cases, loads=[2], num_prompts=4, repeats=2)
    load = Workload(input_len=4, output_len=4, vocab=9)
    done = asyncio.run(collect(subject, load, schedule))
    models = [model for model, _ in subject.fake.seen]
    # The first of all with as many clients as are measured, the others one by one.
    assert models == [*"bb", *"bbbb", *"xyx", *"xyxy", *"xyxy", *"bbbb"]
    assert subject.cases == [case.label for case in (*cases, *reversed(cases))]
    assert [one.seen for one in done] == [{"sent": 4, "rss": 5, "others_cpu": 0, "tries": 1}] * 4


def test_what_is_measured_already_is_skipped():
    subject, load = FakeSubject(), Workload(input_len=4, output_len=4, vocab=9)
    schedule = Schedule(cases=[BASE, unmerged("x")], loads=[2], num_prompts=4, repeats=2)
    every = asyncio.run(collect(subject, load, schedule))
    skip = frozenset(one.key for one in every[:3])
    rest = asyncio.run(collect(subject, load, schedule, skip=skip))
    assert [one.key for one in rest] == [every[3].key]


def test_a_run_that_others_disturb_is_repeated_and_the_calmest_counts():
    subject, load = FakeSubject(), Workload(input_len=4, output_len=4, vocab=9**9)
    busy = iter(
        [0, 10**6, 10**6, 10**6 + 10, 10**6 + 10, 2 * 10**6]
    )  # seconds that others took before and after each run

    def counters() -> dict[str, float]:
        return {"cpu_all": next(busy), "cpu_own": 0.0, "sent": len(subject.fake.seen)}

    subject.counters = counters  # type: ignore[method-assign]
    schedule = Schedule(cases=[BASE], loads=[2], num_prompts=4, repeats=1)
    (one,) = asyncio.run(collect(subject, load, schedule, others_limit=0.1))
    shares = one.seen["others_cpu"] * one.run.seconds * (os.cpu_count() or 1)
    assert shares == pytest.approx(10, rel=0.01)
    assert one.seen["tries"] == 3
    prompts = [prompt for _, prompt in subject.fake.seen[2:]]
    assert len(set(prompts)) == len(prompts) == 12


def test_ratios_are_medians_of_ratios_within_a_round():
    """A machine that becomes ten times slower changes no ratio."""
    done = [
        Measurement(round=number, case=case, load=8, run=run_at(speed * share))
        for number, speed in enumerate((100.0, 10.0, 50.0))
        for case, share in ((BASE, 1.0), (unmerged("x", "y"), 0.5))
    ]
    base, mixed = summarise(done)
    assert (base["system"], mixed["system"], mixed["adapters"]) == ("base", "unmerged", 2)
    assert base["ratio_to_base"] == 1
    assert mixed["ratio_to_base"] == 0.5
    assert mixed["ratio_rounds"] == [0.5, 0.5, 0.5]
    assert base["tok_s"] == 50
    assert base["tok_s_rounds"] == [100, 10, 50]


def test_without_base_there_is_no_ratio():
    (row,) = summarise([Measurement(round=0, case=unmerged("x"), load=1, run=run_at(5))])
    assert row["ratio_to_base"] is None


def test_a_run_that_no_request_came_in_is_no_error():
    base = [Measurement(round=n, case=BASE, load=1, run=run_of([], 1.0)) for n in range(2)]
    (row,) = summarise(base)
    assert (row["tok_s"], row["ratio_to_base"]) == (0, None)
    assert spread(row["tok_s_rounds"]) == "-"


# ---- over HTTP ---------------------------------------------------------------------------------


def test_over_http_every_token_is_counted(server: Running):
    async def go() -> tuple[Timing, str | None]:
        async with HttpTarget(f"{server.url}/v1") as target:
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
    rows = [(row["load"], row["case"], row["tokens"]) for row in document["results"]]
    cases = ("base", "unmerged 1", "unmerged 2 distinct")
    assert rows == [(n, case, 30) for n in (1, 3) for case in cases]
    assert document["complete"]
    assert document["server_version"] == "1.2.3"
    assert {"jax", "jlora", "python"} == set(document["versions"])
    assert document["command"].startswith("python -m jlora.bench --base-url")
    assert document["workload"]["random_output_len"] == 5
    names = Counter(request.adapter and request.adapter.name for request in server.engine.requests)
    # 4 measurements of 6 requests: of base, of one adapter, of both in turn; and the warm-ups
    assert names == {None: 26, "shout": 40, "whisper": 13}


LENGTHS = '{"input_len": 5, "output_len": 2}\n{"input_len": 9, "output_len": 3}\n'


@pytest.mark.parametrize(
    ("flags", "load"),
    [
        (["--arrivals", "poisson", "--rate", "40", "--num-prompts", "6"], 40),
        (["--arrivals", "gamma", "--cv", "3", "--rate", "40", "--duration", "0.3"], 40),
        (["--duration", "0.2", "--concurrency", "2"], 2),
        (["--lengths", "uniform", "--length-range", "2", "6"], 1),
        (["--lengths", "lognormal", "--length-sigma", "0.3"], 1),
        (["--lengths", "file", "--lengths-file", "LENGTHS"], 1),
        (["--popularity", "power", "--power-alpha", "0.3"], 1),
        (["--popularity", "zipf,identical,uniform,distinct", "--zipf-s", "1.1"], 1),
    ],
)
def test_every_axis_of_the_load_reaches_a_server(
    flags: list[str],
    load: float,
    server: Running,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    (tmp_path / "lengths.jsonl").write_text(LENGTHS)
    flags = [str(tmp_path / "lengths.jsonl") if flag == "LENGTHS" else flag for flag in flags]
    argv = ["--base-url", server.url, "--models", "tiny,shout,whisper", "--vocab-size", "300"]
    argv += ["--repeats", "1", "--random-input-len", "6", "--random-output-len", "4"]
    argv += [] if "--rate" in flags or "--concurrency" in flags else ["--concurrency", "1"]
    assert bench.main([*argv, *flags]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    asked = document["workload"]["popularity"][0].split(",")
    assert [row["case"] for row in document["results"]] == [
        "base", "unmerged 1", *(f"unmerged 2 {popularity}" for popularity in asked)
    ]  # fmt: skip
    assert {row["load"] for row in document["results"]} == {load}
    assert all(row["tok_s"] > 0 for row in document["results"])
    sizes = {len(request.prompt) for request in server.engine.requests}
    if "file" in flags:
        assert sizes == {5, 9}
    elif "--lengths" not in flags:
        assert sizes == {6}
    else:
        assert len(sizes) > 1


def test_a_servers_key_is_sent_and_never_kept(
    server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    guarded = start(server.llm, tmp_path, api_key=("secret-key",))
    argv = ["--base-url", guarded.url, "--models", "tiny", "--vocab-size", "300", "--repeats", "1"]
    argv += ["--concurrency", "1", "--num-prompts", "1", "--out", str(tmp_path / "out.jsonl")]
    try:
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        with pytest.raises(SystemExit):
            bench.main(argv)
        monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
        assert bench.main(argv) == 0
    finally:
        guarded.stop()
    assert "secret-key" not in (tmp_path / "out.jsonl").read_text()


def test_the_bar_moves_within_a_measurement(server: Running, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[float, int]] = []

    class Bars(ProgressBars):
        def __call__(self, what: str, done: float, total: int) -> None:
            seen.append((round(done, 2), total))

    monkeypatch.setattr(bench, "ProgressBars", Bars)
    argv = ["--base-url", server.url, "--models", "tiny", "--vocab-size", "300", "--repeats", "2"]
    assert bench.main([*argv, "--concurrency", "1", "--num-prompts", "2"]) == 0
    # At the end of a measurement's last request it waits for what the machine says of it.
    one = [(0.5, 2), (0.99, 2), (1, 2)]
    assert seen == [(0, 2), *one, *((1 + done, total) for done, total in one)]


def test_ctrl_c_keeps_what_is_done_and_a_rerun_goes_on(
    server: Running,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    real = bench.measure

    async def cut(*given: Any, **named: Any) -> AsyncIterator[Measurement]:
        async for one in itertools_async(real(*given, **named), 2):
            yield one
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure", cut)
    argv = ["--base-url", server.url, "--models", "tiny,shout", "--vocab-size", "300"]
    argv += ["--random-output-len", "4", "--concurrency", "1", "--out", str(tmp_path / "o.jsonl")]
    assert bench.main([*argv, "--repeats", "2"]) == 130
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not document["complete"]
    assert [row["case"] for row in document["results"]] == ["base", "unmerged 1"]

    before = len(server.engine.requests)
    monkeypatch.setattr(bench, "measure", real)
    assert bench.main([*argv, "--repeats", "2"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["complete"]
    assert [len(row["tok_s_rounds"]) for row in document["results"]] == [2, 2]
    assert len(server.engine.requests) - before == 2 * (6 + 2)
    assert bench.main([*argv, "--repeats", "2"]) == 0
    assert len(server.engine.requests) - before == 2 * (6 + 2)
    # Other settings are other measurements, in the same file.
    assert bench.main([*argv, "--repeats", "1", "--seed", "5", "--stop-after", "0.001"]) == 75
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert Counter(line["kind"] for line in lines) == {"session": 4, "run": 5}
    assert {"versions", "commit", "command", "device"} <= lines[0].keys()


async def itertools_async(source: AsyncIterator[Any], count: int) -> AsyncIterator[Any]:
    """The first `count` of them."""
    numbers = itertools.count(1)
    async for one in source:
        yield one
        if next(numbers) == count:
            return


def test_a_file_of_something_else_is_not_touched(tmp_path: Path, capsys: Any):
    (tmp_path / "notes.txt").write_text("dear diary\n")
    with pytest.raises(SystemExit) as stop:
        bench.main(["--out", str(tmp_path / "notes.txt")])
    assert stop.value.code == 2
    assert "line 1 is not a benchmark's result" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "dear diary\n"


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
    argv += ["--systems", "base", "compiled", "merged", "unmerged", "--room", "1"]
    threads, add_delta, settled = set(), merged.add_delta, []
    run = bench.run

    async def only_when_settled(subject: Any, *args: Any) -> bool:
        settled.append(subject._engine.settled)
        return await run(subject, *args)

    monkeypatch.setattr(bench, "run", only_when_settled)

    def add(*args: Any) -> Any:
        threads.add(threading.current_thread().name)
        return add_delta(*args)

    monkeypatch.setattr(merged, "add_delta", add)
    assert bench.main([*argv, "--random-input-len", "10", "--random-output-len", "6"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["case"]: row for row in document["results"]}
    one, three = "1 r4,24", "3 distinct r4,24"
    assert list(rows) == [
        "base", "compiled", f"merged {one}", f"merged {three}", f"unmerged {one}",
        f"unmerged {three}",
    ]  # fmt: skip
    assert {row["tokens"] for row in rows.values()} == {36}
    assert rows[f"merged {three}"]["switches"] > rows[f"merged {one}"]["switches"] == 0
    assert rows[f"unmerged {three}"]["evicted_from_device"] > 0
    assert rows[f"unmerged {one}"]["evicted_from_device"] == 0
    assert settled == [True]
    assert threads == {"jlora-engine"}, "between its steps, never beside one"
    assert rows["base"]["rss"] > 1e8
    assert document["plan"]["adapter_page_count"] == 3  # room for one adapter of rank 24
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

    async def cut(subject: Any, workload: Any, schedule: Any, **_: Any) -> AsyncIterator[Any]:
        first = Schedule(cases=schedule.cases[:1], loads=[1], num_prompts=1, repeats=1)
        if measured:
            async for one in real(subject, workload, first):
                yield one
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
        (["--systems", "base,two"], "'two'"),
        (["--systems", "merged", "--base-url", "http://h", "--models", "b,a"], "in process only"),
        (["--popularity", "famous"], "'famous'"),
        (["--arrivals", "poisson", "--duration", "3"], "rate"),
        (["--rate", "3"], "rate"),
        (["--arrivals", "poisson", "--rate", "3"], "--duration"),
        (["--cv", "0"], "cv"),
        (["--lengths", "file"], "lengths_file"),
        (["--length-range", "9", "8"], "length_range"),
        (["--shape", "giant"], "tiny, smollm2-135m"),
        (["--shape", "tiny", "--model", "m"], "exclude"),
        (["--adapter-modules", "head"], "'head'"),
        (["--room", "2", "--lora-memory", "3pages"], "room"),
        (["--room", "0"], "room"),
        (["--adapters", "2", "2"], "adapters_n"),
        (["--shape", "tiny", "--adapters", "3", "--random-adapters", "2"], "adapters_n"),
        (["--ranks", "8,x"], "'x'"),
        (["--ranks", "0"], "'0'"),
        (["--repeats", "0"], "repeats"),
        (["--random-output-len", "0"], "random_output_len"),
        (["--models", "a,b"], "models"),
        (["--base-url", "http://127.0.0.1:9"], "models"),
        (["--base-url", "http://127.0.0.1:9", "--models", "a"], "cannot talk to"),
        (["--base-url", "127.0.0.1", "--models", "a"], "cannot talk to"),
        (["--base-url", "http://h", "--models", "a", "--model", "/m"], "--model"),
        (["--base-url", "http://h", "--models", "a", "--systems", "unmerged"], "need an adapter"),
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


def test_the_cases_are_those_that_there_are_adapters_for():
    assert [case.label for case in BenchOptions().cases("b", {"": []})] == ["base"]
    options = BenchOptions(systems=("base", "unmerged"), popularity=("zipf", "identical"))
    mixes = {"8": ["x", "y"], "16": ["z"]}
    assert [(case.label, case.models) for case in options.cases("b", mixes)] == [
        ("base", ("b",)),
        ("unmerged 1 r8", ("x",)),
        ("unmerged 2 zipf r8", ("x", "y")),
        ("unmerged 2 identical r8", ("x", "y")),
        ("unmerged 1 r16", ("z",)),
    ]
    with pytest.raises(ParameterError, match="vocab_size"):
        BenchOptions(vocab_size=500).workload(300)
