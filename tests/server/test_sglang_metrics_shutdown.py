"""SGLang's /generate, the metrics page, and how a server ends."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import Running
from tests.server.fakes import BASE_TEXT, write_adapter

SAMPLING = {"max_new_tokens": 99, "temperature": 0}


def test_generate_answers_in_sglangs_form(server: Running):
    got = server.post("/generate", {"text": "hello", "sampling_params": SAMPLING}).json()
    assert got["text"] == BASE_TEXT
    meta = got["meta_info"]
    assert meta["finish_reason"]["type"] == "stop"
    assert meta["prompt_tokens"] == len(server.llm.tokenizer.encode("hello"))
    assert meta["completion_tokens"] == len(got["output_ids"])
    short = server.post("/generate", {"text": "hello", "sampling_params": {"max_new_tokens": 2}})
    assert short.json()["meta_info"]["finish_reason"] == {"type": "length", "length": 2}


def test_generate_takes_batches_with_an_adapter_each(server: Running):
    body = {
        "text": ["a", "b", "c"],
        "sampling_params": SAMPLING,
        "lora_path": ["shout", None, "whisper"],
    }
    got = server.post("/generate", body).json()
    assert [one["text"] for one in got] == ["SHOUT SHOUT SHOUT", BASE_TEXT, "whisper, whisper"]
    ids = server.post("/generate", {"input_ids": [[5, 6], [7]], "sampling_params": SAMPLING}).json()
    assert [one["meta_info"]["prompt_tokens"] for one in ids] == [2, 1]
    one = server.post("/generate", {"input_ids": [5, 6], "sampling_params": SAMPLING}).json()
    assert one["text"] == BASE_TEXT


def test_generate_takes_an_empty_lora_path_for_the_base(server: Running):
    none, empty = ({"text": "x", "lora_path": path} for path in (None, ""))
    texts = [server.post("/generate", body).json()["text"] for body in (none, empty)]
    assert texts[0] == texts[1]


def test_generate_streams_the_text_so_far(server: Running):
    body = {"text": "a", "lora_path": "shout", "stream": True, "sampling_params": SAMPLING}
    lines = server.post("/generate", body).text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    texts = [json.loads(line.removeprefix("data: "))["text"] for line in lines[:-1]]
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
    assert texts[-1] == "SHOUT SHOUT SHOUT"


def test_generate_gives_logprobs_of_input_and_output(server: Running):
    body = {
        "input_ids": [5, 6, 7],
        "sampling_params": {"max_new_tokens": 2},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 2,
        "return_text_in_logprobs": True,
    }
    meta = server.post("/generate", body).json()["meta_info"]
    assert [entry[:2] for entry in meta["input_token_logprobs"]] == [
        [None, 5],
        [-0.25, 6],
        [-0.25, 7],
    ]
    assert len(meta["output_token_logprobs"]) == 2
    assert len(meta["output_top_logprobs"][0]) == 2
    assert meta["input_top_logprobs"][0] is None
    del body["logprob_start_len"]
    assert server.post("/generate", body).json()["meta_info"]["input_token_logprobs"] == []


def samples(server: Running) -> dict[tuple[str, ...], float]:
    """(name, label=value, ...) -> value of the metrics page."""
    page = server.get("/metrics").text
    return {
        (one.name, *(f"{k}={v}" for k, v in sorted(one.labels.items()))): one.value
        for family in text_string_to_metric_families(page)
        for one in family.samples
    }


VLLM_NAMES = [
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds_count",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:request_time_per_output_token_seconds_sum",
    "vllm:e2e_request_latency_seconds_count",
    "vllm:request_queue_time_seconds_count",
    "vllm:request_prefill_time_seconds_count",
    "vllm:request_decode_time_seconds_count",
    "vllm:request_prompt_tokens_sum",
    "vllm:request_generation_tokens_sum",
    "vllm:request_params_n_count",
    "vllm:request_params_max_tokens_count",
    "vllm:lora_requests_info",
    "jlora:adapter_requests_total",
    "jlora:adapter_prompt_tokens_total",
    "jlora:adapter_generation_tokens_total",
    "jlora:adapter_load_seconds_count",
    "jlora:adapter_tier_hits_total",
    "jlora:adapter_evictions_total",
    "jlora:adapter_loaded",
]


def test_every_promised_metric_is_there_and_counts(server: Running):
    client = server.client()
    client.completions.create(model="shout", prompt="hello", n=2, max_tokens=5)
    list(client.completions.create(model="tiny", prompt="hello", max_tokens=7, stream=True))
    got = samples(server)
    assert {name for name, *_ in got} >= set(VLLM_NAMES)
    prompt = len(server.llm.tokenizer.encode("hello"))
    model = "model_name=tiny"
    assert got["vllm:generation_tokens_total", model] == 17
    assert got["vllm:prompt_tokens_total", model] == 2 * prompt
    assert got["vllm:request_success_total", "finished_reason=length", model] == 3
    assert got["vllm:time_to_first_token_seconds_count", model] == 3
    assert got["vllm:inter_token_latency_seconds_count", model] == 14
    assert got["jlora:adapter_generation_tokens_total", "adapter=shout", model] == 10
    assert got["jlora:adapter_generation_tokens_total", "adapter=", model] == 7
    assert (
        got["jlora:adapter_requests_total", "adapter=shout", "finished_reason=length", model] == 2
    )
    assert got["jlora:adapter_load_seconds_count", model] == 2
    assert got["jlora:adapter_tier_hits_total", model, "tier=host"] == 2


def test_lora_requests_info_names_running_adapters(server: Running):
    server.engine.hold()
    body = {"model": "shout", "prompt": "x"}
    asking = threading.Thread(target=server.post, args=("/v1/completions", body))
    asking.start()
    server.wait(lambda: server.engine.active)
    (labels,) = [key for key in samples(server) if key[0] == "vllm:lora_requests_info"]
    assert "running_lora_adapters=shout" in labels
    assert "max_lora=4" in labels
    server.engine.go_on()
    asking.join(10)


def test_the_series_of_an_unloaded_adapter_go(server: Running):
    server.client().completions.create(model="shout", prompt="x")
    server.post("/v1/unload_lora_adapter", {"lora_name": "shout"})
    assert not [key for key in samples(server) if "adapter=shout" in key]


def test_the_series_of_an_adapter_that_was_unloaded_in_use_go_with_its_last_request(
    server: Running,
):
    server.client().completions.create(model="shout", prompt="x")
    server.engine.hold()
    body = {"model": "shout", "prompt": "x"}
    asking = [
        threading.Thread(target=server.post, args=("/v1/completions", body)) for _ in range(2)
    ]
    for thread in asking:
        thread.start()
    server.wait(lambda: len(server.engine.active) == 2)
    unloading = threading.Thread(
        target=server.post, args=("/v1/unload_lora_adapter", {"lora_name": "shout"})
    )
    unloading.start()
    server.wait(lambda: "shout" not in server.llm.store)
    assert [key for key in samples(server) if "adapter=shout" in key]
    server.engine.go_on()
    for thread in (*asking, unloading):
        thread.join(10)
    assert not [key for key in samples(server) if "adapter=shout" in key]
    server.post("/v1/load_lora_adapter", {"lora_name": "shout", "lora_path": "shout"})
    server.client().completions.create(model="shout", prompt="x", max_tokens=3)
    key = ("jlora:adapter_generation_tokens_total", "adapter=shout", "model_name=tiny")
    assert samples(server)[key] == 3


def test_a_request_that_is_cut_off_counts_as_aborted(server: Running):
    server.engine.pace = 0.02
    body = {"model": "tiny", "prompt": "x", "stream": True, "ignore_eos": True, "max_tokens": 200}
    with httpx.stream("POST", server.url + "/v1/completions", json=body) as got:
        next(got.iter_lines())
    key = ("vllm:request_success_total", "finished_reason=abort", "model_name=tiny")
    server.wait(lambda: samples(server)[key] == 1)


def test_version_and_readiness(server: Running):
    assert server.get("/version").json() == {"version": "1.2.3"}
    assert server.get("/ready").json() == {"ready": True}
    server.server._service.draining = True
    assert server.get("/ready").status_code == 503
    assert server.get("/health").status_code == 200
    assert server.post("/v1/completions", {"prompt": "x"}).status_code == 503


def test_stopping_lets_running_streams_end(server: Running):
    server.engine.pace = 0.01
    got: list[str] = []

    def read() -> None:
        body = {"model": "shout", "prompt": "x", "stream": True, "max_tokens": 99}
        with httpx.stream("POST", server.url + "/v1/completions", json=body) as reply:
            got.extend(line for line in reply.iter_lines() if line)

    reading = threading.Thread(target=read)
    reading.start()
    server.wait(lambda: server.engine.active)
    server.stop()
    reading.join(10)
    assert got[-1] == "data: [DONE]"
    assert "".join(json.loads(x[6:])["choices"][0]["text"] for x in got[:-1]) == "SHOUT SHOUT SHOUT"
    with pytest.raises(httpx.ConnectError):
        server.get("/health")


def test_stopping_cuts_what_outlives_the_timeout(launch: Callable[..., Running]):
    server = launch(shutdown_timeout=1.0)
    server.engine.hold()
    body = {"model": "shout", "prompt": "x"}

    got: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: got.append(server.post("/v1/completions", body)))
    asking.start()
    server.wait(lambda: server.engine.active)
    begun = time.monotonic()
    server.stop()
    assert time.monotonic() - begun < 8
    server.wait(lambda: not server.engine.active)
    asking.join(10)
    assert got[0].json()["choices"][0]["finish_reason"] == "abort"


def test_a_second_signal_cuts_what_still_runs(launch: Callable[..., Running]):
    server = launch(shutdown_timeout=60.0)
    server.engine.hold()
    got: list[httpx.Response] = []
    body = {"model": "shout", "prompt": "x"}
    asking = threading.Thread(target=lambda: got.append(server.post("/v1/completions", body)))
    asking.start()
    server.wait(lambda: server.engine.active)
    server.server.handle_exit(signal.SIGINT, None)
    asking.join(0.5)
    assert not got
    server.server.handle_exit(signal.SIGINT, None)
    asking.join(10)
    assert got[0].json()["choices"][0]["finish_reason"] == "abort"
    server.thread.join(10)
    assert not server.thread.is_alive()
    assert not server.server.force_exit


PROGRAM = """
import sys
from jlora import serve
from jlora.llm import LLM
from jlora.tokenizer import Tokenizer
from tests.server.fakes import fake_llm

tokenizer = Tokenizer.from_folder(sys.argv.pop(1))

def load(options, progress=None):
    llm = fake_llm(tokenizer)
    llm.engine.pace = 0.02
    for module in options.adapters:
        llm.store.load(module.name, module.path)
    return llm

LLM.load = load
sys.exit(serve.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_program_with_status_0_after_its_streams(
    tokenizer_folder: Path, tmp_path: Path, number: int
):
    folder = write_adapter(tmp_path / "shout", "SHOUT SHOUT SHOUT")
    flags = ["--port", "0", "--lora-modules", f"shout={folder}", "--enable-lora"]
    command = [sys.executable, "-c", PROGRAM, str(tokenizer_folder), *flags]
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": os.getcwd(), "JLORA_API_KEY": "k"}
    program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert program.stdout is not None
    try:
        shown: list[str] = []
        while not (shown and shown[-1].startswith("Try: curl")):
            line = program.stdout.readline()
            assert line, shown
            shown.append(line)
        assert shown[1] == "Models: tiny, tiny-alias, shout\n"
        url = shown[0].removeprefix("Listening on ").strip()
        body = {"model": "shout", "prompt": "x", "stream": True, "max_tokens": 99}
        headers = {"authorization": "Bearer k"}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers) as reply:
            lines = (line for line in reply.iter_lines() if line)
            texts = [next(lines)]
            program.send_signal(number)
            texts += list(lines)
        assert texts[-1] == "data: [DONE]"
        assert program.wait(20) == 0
    finally:
        program.kill()
