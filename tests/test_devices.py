"""How much of a device jax takes, how its memory is read and what of it K/V pages get."""

import dataclasses
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jaxlib import xla_client

from jlora import build, device_memory
from jlora.device_memory import (
    FRACTION,
    SMALL_BLOCKS,
    USERS_CHOICE,
    DeviceMemory,
    small_blocks,
    start_backend,
)
from jlora.engine.config import EngineConfig
from jlora.models.config import ModelConfig
from jlora.options import ModelOptions
from jlora.sharding import Layout

GB = 10**9


class Backend:
    """Stands for jax: notes what its GPU backend would be started with."""

    def __init__(self, platforms: str | None = None, error: Exception | None = None):
        self.config = SimpleNamespace(values={"jax_platforms": platforms})
        self.started: dict[str, Any] = {}
        self._error = error

    def default_backend(self) -> str:
        self.started = dict(xla_client.generate_pjrt_gpu_plugin_options())
        if self._error is not None:
            raise self._error
        return "gpu"


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch):
    """backend(**how) puts one in jax's place; none of its variables is set."""
    for name in USERS_CHOICE:
        monkeypatch.delenv(name, raising=False)

    def make(**how: Any) -> Backend:
        made = Backend(**how)
        monkeypatch.setattr(device_memory, "jax", made)
        return made

    return make


@pytest.mark.parametrize(("utilization", "share"), [(0.9, 0.95), (0.5, 0.55), (0.123, 0.173), (1, 0.95)])  # fmt: skip
def test_jax_takes_a_little_more_of_a_gpu_than_may_be_used(backend, utilization, share):
    jax, before = backend(), dict(os.environ)
    assert start_backend(utilization) == "gpu"
    assert jax.started["memory_fraction"] == share
    assert dict(os.environ) == before


@pytest.mark.parametrize("name", USERS_CHOICE)
def test_who_sets_jaxs_memory_himself_keeps_it(backend, monkeypatch, name):
    value = "platform" if name.endswith("ALLOCATOR") else "0.4"
    monkeypatch.setenv(name, value)
    jax, before = backend(), dict(os.environ)
    assert start_backend(0.9) == "gpu"
    assert jax.started.get("memory_fraction") == (0.4 if name.endswith("FRACTION") else None)
    assert dict(os.environ) == before


def test_nothing_changes_where_jax_may_use_cpus_only(backend):
    jax = backend(platforms="cpu")
    start_backend(0.9)
    assert "memory_fraction" not in jax.started


def test_a_backend_that_does_not_start_leaves_no_share_behind(backend):
    backend(error=RuntimeError("no device"))
    with pytest.raises(RuntimeError, match="no device"):
        start_backend(0.9)
    assert FRACTION not in os.environ


def test_an_engine_uses_no_device_before_the_share_is_set(tiny_model, tiny_adapter, tmp_path):
    """In a process of its own: here jax runs already."""
    code = (
        "import sys\nfrom jax._src import xla_bridge\nfrom jlora import LLM, build\n"
        "def start(utilization):\n"
        "    print(utilization, xla_bridge.backends_are_initialized())\n    sys.exit()\n"
        "build.start_backend = start\n"
        "LLM(sys.argv[1], lora_modules={'a': sys.argv[2]}, gpu_memory_utilization=0.7)"
    )
    folder = tiny_model("llama")
    paths = [str(folder), str(tiny_adapter(folder))]
    env = os.environ | {"PYTHONPATH": os.getcwd(), "JLORA_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code, *paths], env=env, capture_output=True, text=True)  # fmt: skip
    assert done.stdout == "0.7 False\n", done.stderr


def memory_of(stats: dict[str, int] | None, driver: Any, monkeypatch: Any) -> DeviceMemory:
    """Of a device with these statistics of jax, whose driver says (total, free) or raises."""

    def ask(_: int) -> tuple[int, int]:
        if isinstance(driver, Exception):
            raise driver
        return driver

    monkeypatch.setattr(device_memory, "_cuda_memory", ask)
    device = SimpleNamespace(memory_stats=lambda: stats, local_hardware_id=0)
    return device_memory.device_memory(device)


NO_DRIVER = OSError("libcuda.so.1 is not there")
POOL = {"bytes_limit": 95, "bytes_in_use": 30, "pool_bytes": 95}


@pytest.mark.parametrize(
    ("stats", "driver", "card", "pool", "used"),
    [
        (POOL, (100, 3), 100, 95, 30),
        (POOL, NO_DRIVER, 95, 95, 30),
        (POOL | {"pool_bytes": -1}, (100, 3), 100, 95, 30),  # jax does not say
        (POOL | {"pool_bytes": 40}, (100, 58), 100, 95, 30),  # it grows
        (POOL | {"pool_bytes": 40}, (100, 20), 100, 60, 30),  # others have the rest
        (None, (100, 60), 100, 100, 40),
    ],
)
def test_card_and_pool_of_a_device(stats, driver, card, pool, used, monkeypatch):
    found = memory_of(stats, driver, monkeypatch)
    assert found == DeviceMemory(card=card, pool=pool, used=used)


def test_a_device_whose_memory_nobody_knows_is_an_error(monkeypatch):
    with pytest.raises(OSError, match="libcuda"):
        memory_of(None, NO_DRIVER, monkeypatch)


@pytest.mark.parametrize(
    ("pool", "temporaries", "room"),
    [
        (950, 10, 900 - 300),  # the card's share
        (750, 10, 712 - 300 + 1),  # jax's own pool, but for a twentieth
        (950, 100, 850 - 300),  # what temporary buffers leave
        (250, 10, 237 - 300 + 1),  # more is taken already
    ],
)
def test_arrays_get_their_share_of_the_card_as_far_as_the_pool_goes(pool, temporaries, room):
    assert DeviceMemory(card=1000, pool=pool, used=300).room(0.9, temporaries) == room


def kv_pages(monkeypatch: Any, *memories: DeviceMemory, **options: Any) -> int:
    """K/V pages of 1 GB on GPUs with these memories; 1 GB is for temporary buffers."""
    monkeypatch.setattr(build.jax, "devices", lambda: range(8))
    monkeypatch.setattr(build, "device_memory", lambda device: memories[device])
    config = EngineConfig(max_model_len=1 << 16, max_num_seqs=32, max_num_batched_tokens=1 << 16)
    given = ModelOptions(mesh=len(memories), **options)
    return build._kv_pages(given, config, GB, GB, "gpu")


def card(pool: int, used: int = 20) -> DeviceMemory:
    """One of 80 GB."""
    return DeviceMemory(card=80 * GB, pool=pool * GB, used=used * GB)


def test_pages_fill_the_share_of_the_card_on_the_fullest_device(monkeypatch, caplog):
    assert kv_pages(monkeypatch, card(76)) == 52
    assert kv_pages(monkeypatch, card(76), gpu_memory_utilization=0.5) == 20
    assert kv_pages(monkeypatch, card(76), card(76, used=30)) == 2 * 42
    assert kv_pages(monkeypatch, card(76, used=75)) == 0
    assert not caplog.records


def test_a_pool_that_is_smaller_than_the_share_is_said(monkeypatch, caplog):
    assert kv_pages(monkeypatch, card(60)) == 37
    assert "60.0 of a device's 80.0 GB, less than --gpu-memory-utilization 0.9" in caplog.text


@pytest.mark.parametrize("rows", [1, 8, 32, 100, 256, 512, 1024, 4096])
@pytest.mark.parametrize("tokens", [None, 64, 300, 2048, 8192])
def test_steps_with_prompts_are_whole_row_blocks_on_a_gpu(tiny_model, rows, tokens):
    cfg = ModelConfig.from_folder(tiny_model("llama"))
    options = ModelOptions(max_num_seqs=rows, max_model_len=64, max_num_batched_tokens=tokens)
    made = build._engine_config(options, cfg, build._PLATFORMS["gpu"], free_padding=True)
    assert all(n % (8 if n <= 64 else 128) == 0 for n in made.decode_buckets)
    assert rows <= made.decode_buckets[-1] < rows + 128
    totals = [sum(pair) for pair in made.prefill_buckets]
    assert all(total == 128 or total % 256 == 0 for total in totals)
    assert max(totals) <= max(tokens or 2048, 2 * rows + 1024 + 256)
    decode, prompts = max(made.prefill_buckets, key=lambda pair: pair[1])
    assert decode >= rows
    assert prompts == made.max_num_batched_tokens >= 64
    if tokens is None:
        assert prompts >= 1024


def test_temporary_buffers_of_an_8b_model_take_two_gigabytes_on_one_device(tiny_model):
    cfg = ModelConfig.from_folder(tiny_model("llama"))
    cfg = dataclasses.replace(cfg, vocab=128256, embed=4096)
    config = EngineConfig(max_model_len=1024, max_num_seqs=256, max_num_batched_tokens=2048)
    one, two = (build._temporaries(Layout(cfg, tp), config, np.dtype("float16")) for tp in (1, 2))
    assert one == 128256 * (4096 * 2 + 8 * 256 * 4)
    assert one - two == 128256 * 4096


def test_as_many_small_blocks_are_held_as_lie_free_beside_them():
    device, most = jax.devices()[0], 1 << 20
    sizes = sorted(block.nbytes for block in small_blocks(device, 100))
    assert sizes == [size for size, count in SMALL_BLOCKS.items() for _ in range(count // 2)]
    larger = sorted(block.nbytes for block in small_blocks(device, most))
    assert larger == [*sizes, *[most] * 4]
