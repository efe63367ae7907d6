"""A server whose engine has failed tells its clients, says why in the log and ends with status 1."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx

from tests.server.conftest import Running
from tests.server.test_sglang_metrics_shutdown import PROGRAM

BODY = {"prompt": "x", "stream": True, "max_tokens": 200, "ignore_eos": True}

FAILING = """
    import threading
    submit = llm.engine.submit

    def submit_and_fail(*request):
        submit(*request)
        threading.Timer(0.3, llm.engine.fail, ["RuntimeError: the device fell over"]).start()

    llm.engine.submit = submit_and_fail
    return llm
"""


def test_running_requests_get_an_error_and_the_server_stops_by_itself(server: Running):
    server.engine.hold()
    got: list[httpx.Response] = []
    body = {**BODY, "model": "shout"}
    asking = [
        threading.Thread(target=lambda s=s: got.append(server.post("/v1/completions", {**body, "stream": s})))
        for s in (False, True)
    ]  # fmt: skip
    for thread in asking:
        thread.start()
    server.wait(lambda: len(server.engine.active) == 2)
    server.engine.fail("RuntimeError: the device fell over")
    for thread in asking:
        thread.join(10)
    assert [reply.status_code for reply in got] == [500, 500]
    assert all("the device fell over" in reply.json()["error"]["message"] for reply in got)
    server.thread.join(15)
    assert not server.thread.is_alive()
    assert server.server.failure == "RuntimeError: the device fell over"
    assert server.llm.store.adapters()[0]["in_flight"] == 0


def test_the_program_ends_with_status_1_and_the_cause_in_its_log(tokenizer_folder: Path):
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.replace("    return llm\n", FAILING), str(tokenizer_folder),
         "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    try:
        assert program.stdout is not None
        assert program.stderr is not None
        url = program.stdout.readline().removeprefix("Listening on ").strip()
        with httpx.stream("POST", f"{url}/v1/completions", json=BODY, timeout=30) as reply:
            lines: list[Any] = [line for line in reply.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        error = json.loads(lines[-2].removeprefix("data: "))["error"]
        assert "the device fell over" in error["message"]
        begun = time.monotonic()
        assert program.wait(20) == 1
        assert time.monotonic() - begun < 10, "it does not wait for the shutdown timeout"
        (line,) = [line for line in program.stderr.read().splitlines() if "CRITICAL" in line]
        assert "the device fell over" in line
    finally:
        program.kill()
