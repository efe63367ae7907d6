"""jlora against vLLM-CPU: one machine, one client, one set of adapters, the servers taking turns.

`python experiments/010_vllm_cpu/run.py --vllm-python /tmp/vllm-venv/bin/python` starts all servers
(an idle one uses no CPU), then loads them one at a time with `jlora.bench --base-url`, one case and
concurrency after the other. A measurement during which other processes used the cores is repeated.
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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
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
        name = f"vllm {'bf16 (default)' if dtype == 'auto' else dtype}"
        found.append(Server(name=name, command=command, env=env))
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


def load(url: str, models: Sequence[str], clients: int, case: str, seed: int, args: Any) -> Any:
    """One closed loop. The seed makes each round's prompts new, and equal for all servers."""
    command = [sys.executable, "-m", "jlora.bench", "--base-url", url, "--repeats", "1"]
    command += ["--models", ",".join(models), "--concurrency", str(clients)]
    command += {
        "base": ["--systems", "base"],
        "one": ["--systems", "unmerged", "--adapters", "1"],
        "mixed": ["--systems", "unmerged", "--adapters", str(len(models) - 1)],
    }[case]
    command += ["--num-prompts", str(max(len(RANKS), args.waves * clients))]
    command += ["--vocab-size", "49000", "--seed", str(seed)]
    command += ["--random-output-len", str(args.output_len)]
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
    )
    (row,) = json.loads(done.stdout.splitlines()[-1])["results"]
    return row | {"case": case, "concurrency": clients}


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


def wait_for_quiet(limit: float) -> None:
    """Until the cores are idle for three seconds, or `limit` seconds have passed."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        before = busy_ticks()
        time.sleep(3)
        if (busy_ticks() - before) / os.sysconf("SC_CLK_TCK") < 0.05 * 3 * (os.cpu_count() or 1):
            return


def measure(
    group: int, wanted: Callable[[], dict[str, Any]], args: argparse.Namespace
) -> dict[str, Any]:
    """A measurement without company, if one can be had in `args.tries`; else the least disturbed."""
    found = []
    for _ in range(args.tries):
        wait_for_quiet(args.quiet_seconds)
        row, others = others_share(group, wanted)
        found.append(row | {"others_cpu": round(others, 3)})
        if others < args.others_limit:
            break
    return min(found, key=lambda row: row["others_cpu"])


def summary(cells: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Medians over rounds for each server, concurrency and case, with both ratios."""
    keys = ("tok_s", "ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "others_cpu")
    groups: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    for cell in cells:
        key = (cell["concurrency"], cell["case"], cell["server"])
        groups.setdefault(key, []).append(cell)
    median = {
        group: {key: statistics.median(cell[key] for cell in found) for key in keys}
        for group, found in groups.items()
    }
    rows = []
    for (clients, case, server), values in median.items():
        base = median.get((clients, "base", server))
        ours = median.get((clients, case, "jlora"))
        rows.append(
            {
                "clients": clients,
                "case": case,
                "server": server,
                **values,
                "rounds": [cell["tok_s"] for cell in groups[clients, case, server]],
                "ratio_to_base": values["tok_s"] / base["tok_s"] if base else None,
                "jlora_over_it": ours["tok_s"] / values["tok_s"] if ours else None,
            }
        )
    rows.sort(key=lambda r: (r["clients"], CASES.index(r["case"]), names.index(r["server"])))
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table on stdout, in Markdown's shape."""
    from rich import box

    table = Table(box=box.MARKDOWN)
    heads = ["clients", "case", "server", "tok/s", "of its base", "jlora / it", "TTFT p50 ms"]
    for head in [*heads, "TTFT p99", "ITL p50 ms", "ITL p99", "others' CPU"]:
        table.add_column(head, justify="left" if head in ("case", "server") else "right")
    for row in rows:
        ratio = row["jlora_over_it"]
        table.add_row(
            str(row["clients"]),
            row["case"],
            row["server"],
            f"{row['tok_s']:.1f}",
            "-" if row["ratio_to_base"] is None else f"{row['ratio_to_base']:.2f}",
            "-" if ratio is None or row["server"] == "jlora" else f"{ratio:.2f}",
            *(f"{row[key]:.0f}" for key in ("ttft_p50", "ttft_p99")),
            *(f"{row[key]:.1f}" for key in ("itl_p50", "itl_p99")),
            f"{row['others_cpu']:.0%}",
        )
    Console(width=130).print(table)


def steps(args: argparse.Namespace) -> Iterator[tuple[int, int, str]]:
    """(round, clients, case)."""
    for number in range(args.rounds):
        for clients in args.concurrency:
            for case in CASES:
                yield number, clients, case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm-python", default="/tmp/vllm-venv/bin/python")
    parser.add_argument("--vllm-dtypes", nargs="*", default=["auto", "float32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--waves", type=int, default=1, help="requests per client and case")
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--tries", type=int, default=2)
    parser.add_argument("--others-limit", type=float, default=0.05)
    parser.add_argument("--quiet-seconds", type=float, default=60)
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    args = parser.parse_args()
    # Whoever ends this ends the servers that run, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    model = demo_model_folder()
    work = Path(tempfile.mkdtemp(prefix="jlora-vllm-"))
    cells: list[dict[str, Any]] = []
    document: dict[str, Any] = {
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
    }
    try:
        written = write_random_adapters(work / "adapters", ModelConfig.from_folder(model), RANKS)
        adapters = {f"a{i}": path for i, path in enumerate(written.values())}
        chosen = servers(args, model, adapters)
        names = [server.name for server in chosen]
        with ExitStack() as stack:
            up = [(server.name, *stack.enter_context(running(server, work))) for server in chosen]
            document["ready_s"] = {name: round(ready, 1) for name, _, _, ready in up}
            print("ready after seconds:", document["ready_s"], flush=True)
            for number, clients, case in steps(args):
                for name, url, group, _ in up if number % 2 == 0 else reversed(up):
                    wanted = partial(load, url, ["base", *adapters], clients, case, number, args)
                    cell = measure(group, wanted, args)
                    cells.append({"round": number, "server": name, **cell})
                    document |= {"summary": summary(cells, names), "measurements": cells}
                    args.out.write_text(json.dumps(document, indent=1) + "\n")
                    print(
                        f"round {number}, {clients} clients, {case}, {name}: {cell['tok_s']:.1f} "
                        f"tok/s; others used {cell['others_cpu']:.0%} of the cores",
                        flush=True,
                    )
        show(summary(cells, names))
    finally:
        shutil.rmtree(work / "adapters", ignore_errors=True)
        print(f"server logs: {work}; results: {args.out}", flush=True)


if __name__ == "__main__":
    main()
