"""jlora against vLLM-CPU: one machine, one client, one set of adapters, alternating rounds.

`python experiments/002_vllm_cpu/run.py --vllm-python /tmp/vllm-venv/bin/python`: each round starts
every server in turn, alone on the machine, and loads it with `jlora.bench --base-url`.
Writes results.json beside itself and prints one table.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jlora.benchmark.adapters import write_random_adapters
from jlora.benchmark.report import commit, cpu_name
from jlora.demo.model import demo_model_folder
from jlora.models.config import ModelConfig

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RANKS = (8, 16, 32, 8)
CASES = ("base", "one", "mixed")
READY_SECONDS = 400


@dataclass(frozen=True, kw_only=True)
class Server:
    """How to start one server."""

    name: str
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)
    every: int = 1
    """Takes part in each round whose number divides by this."""


def servers(args: argparse.Namespace, model: Path, adapters: dict[str, Path]) -> list[Server]:
    """jlora and vLLM in both types, with the same adapters, seats and context."""
    modules = [f"{name}={path}" for name, path in adapters.items()]
    common = ["--host", "127.0.0.1", "--max-model-len", "2048", "--max-num-seqs", "32"]
    common += ["--max-loras", str(len(RANKS)), "--lora-modules", *modules]
    ours = [sys.executable, "-m", "jlora.serve", "--model", str(model), "--mesh", "1"]
    found = [Server(name="jlora", command=[*ours, "--served-model-name", "base", *common])]
    # Its `vllm` command looks for a package named vllm; the CPU build is vllm-cpu.
    theirs = [args.vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    theirs += ["--served-model-name", "base", "--enable-lora", "--max-lora-rank", str(max(RANKS))]
    env = {
        "VLLM_CPU_OMP_THREADS_BIND": "0-1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    for dtype in args.vllm_dtypes:
        command = [*theirs, *(["--dtype", dtype] if dtype != "auto" else []), *common]
        every = 1 if dtype == "auto" else args.other_every
        name = f"vllm {'bf16 (default)' if dtype == 'auto' else dtype}"
        found.append(Server(name=name, command=command, env=env, every=every))
    return found


@contextmanager
def running(server: Server, logs: Path) -> Iterator[tuple[str, int, float]]:
    """A server that answers: its address, its process group, and the seconds that it took to start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = logs / f"{server.name.split(' (')[0].replace(' ', '-')}.log"
    env = os.environ | server.env | {"PYTHONPATH": str(ROOT)}
    start = time.monotonic()
    with log.open("a") as file:
        process = subprocess.Popen(
            [*server.command, "--port", str(port)],
            cwd=logs,
            env=env,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            while not _healthy(url):
                if process.poll() is not None or time.monotonic() - start > READY_SECONDS:
                    sys.exit(f"{server.name} did not start; see {log}")
                time.sleep(0.2)
            yield url, process.pid, time.monotonic() - start
        finally:
            _end(process)


def _healthy(url: str) -> bool:
    try:
        return urllib.request.urlopen(f"{url}/health", timeout=5).status == 200
    except (urllib.error.URLError, OSError):
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a server and the processes that it started: they share its session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(30)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue


def load(url: str, models: Sequence[str], args: argparse.Namespace, number: int) -> dict[str, Any]:
    """One pass of the client; the seed makes each round's prompts new, and equal for all servers."""
    passes = []
    for clients in args.concurrency:
        command = [sys.executable, "-m", "jlora.bench", "--base-url", url]
        command += ["--models", ",".join(models), "--cases", *CASES]
        command += ["--concurrency", str(clients), "--repeats", "1"]
        command += ["--num-prompts", str(max(len(RANKS), args.waves * clients))]
        command += ["--vocab-size", "49000", "--seed", str(number)]
        command += ["--random-output-len", str(args.output_len)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        passes.append(json.loads(done.stdout.splitlines()[-1]))
    return passes[-1] | {"results": [row for one in passes for row in one["results"]]}


def busy_ticks() -> int:
    """CPU time of the whole machine since boot, stolen time included."""
    fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(fields) - fields[3] - fields[4]  # less idle and iowait


def group_ticks(group: int) -> int:
    """CPU time of a process group so far."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[2]) == group:
            total += int(fields[11]) + int(fields[12])
    return total


def others_share(group: int, action: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], float]:
    """What `action` gives, and the share of all cores that neither it nor the server used meanwhile."""
    start, before = time.monotonic(), busy_ticks() - group_ticks(group)
    client = os.times()
    result = action()
    after = os.times()
    ours = (after.children_user - client.children_user) + (
        after.children_system - client.children_system
    )
    ticks = os.sysconf("SC_CLK_TCK")
    others = (busy_ticks() - group_ticks(group) - before) / ticks - ours
    return result, others / (time.monotonic() - start) / (os.cpu_count() or 1)


def summary(results: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Medians over rounds for each server, concurrency and case, with both ratios."""
    table: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for result in results:
        for row in result["bench"]["results"]:
            table.setdefault((result["server"], row["concurrency"], row["case"]), []).append(row)
    rows = []
    for (server, concurrency, case), found in table.items():
        keys = ("tok_s", "ratio_to_base", "ttft_p50", "ttft_p99", "itl_p50", "itl_p99")
        medians = {key: statistics.median(row[key] for row in found) for key in keys}
        ours = table.get(("jlora", concurrency, case), [])
        mine = statistics.median(row["tok_s"] for row in ours) if ours else None
        rows.append(
            {
                "clients": concurrency,
                "case": case,
                "server": server,
                **medians,
                "rounds": [row["tok_s"] for row in found],
                "jlora_over_it": None if mine is None else mine / medians["tok_s"],
            }
        )
    rows.sort(key=lambda r: (r["clients"], CASES.index(r["case"]), names.index(r["server"])))
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table on stdout, in Markdown's shape."""
    from rich import box

    table = Table(box=box.MARKDOWN)
    heads = ["clients", "case", "server", "tok/s", "of its base", "jlora / it", "TTFT p50 ms"]
    for head in [*heads, "TTFT p99", "ITL p50 ms", "ITL p99"]:
        table.add_column(head, justify="left" if head in ("case", "server") else "right")
    for row in rows:
        ratio = row["jlora_over_it"]
        table.add_row(
            str(row["clients"]),
            row["case"],
            row["server"],
            f"{row['tok_s']:.1f}",
            f"{row['ratio_to_base']:.2f}",
            "-" if ratio is None or row["server"] == "jlora" else f"{ratio:.2f}",
            *(f"{row[key]:.0f}" for key in ("ttft_p50", "ttft_p99")),
            *(f"{row[key]:.1f}" for key in ("itl_p50", "itl_p99")),
        )
    Console(width=130).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm-python", default="/tmp/vllm-venv/bin/python")
    parser.add_argument("--vllm-dtypes", nargs="*", default=["auto", "float32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--other-every", type=int, default=1, help="vLLM float32: every nth round")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--waves", type=int, default=1, help="requests per client and case")
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    args = parser.parse_args()
    # Whoever ends this ends the server that runs, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    model = demo_model_folder()
    work = Path(tempfile.mkdtemp(prefix="jlora-vllm-"))
    results: list[dict[str, Any]] = []
    document = {
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "results": results,
    }
    try:
        written = write_random_adapters(work / "adapters", ModelConfig.from_folder(model), RANKS)
        adapters = {f"a{i}": path for i, path in enumerate(written.values())}
        all_servers = servers(args, model, adapters)
        names = [server.name for server in all_servers]
        for number in range(args.rounds):
            turn = [server for server in all_servers if number % server.every == 0]
            for server in turn if number % 2 == 0 else reversed(turn):
                before = os.getloadavg()[0]
                with running(server, work) as (url, group, ready):
                    bench, others = others_share(
                        group,
                        lambda url=url, n=number: load(url, ["base", *adapters], args, n),
                    )
                results.append(
                    {
                        "round": number,
                        "server": server.name,
                        "ready_s": round(ready, 1),
                        "load_before": before,
                        "others_cpu": round(others, 3),
                        "bench": bench,
                    }
                )
                document["summary"] = summary(results, names)
                args.out.write_text(json.dumps(document, indent=1) + "\n")
                print(
                    f"round {number}: {server.name}: ready after {ready:.0f} s; others used "
                    f"{others:.1%} of the cores",
                    flush=True,
                )
        show(summary(results, names))
    finally:
        shutil.rmtree(work / "adapters", ignore_errors=True)
        print(f"server logs: {work}; results: {args.out}", flush=True)


if __name__ == "__main__":
    main()
