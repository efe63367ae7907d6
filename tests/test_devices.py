"""What is set in the environment before jax is imported, and how a device's memory is read."""

import importlib.metadata
import importlib.util
import os
import sys
from types import SimpleNamespace

import pytest

from jlora.console import ALLOCATOR, STABLE_GRAPHS, prepare_devices
from jlora.device_memory import device_memory


@pytest.fixture
def machine(monkeypatch):
    """machine(jax version, plugin) -> a process that has not imported jax yet."""

    def make(version, plugin, **environment):
        monkeypatch.delitem(sys.modules, "jax", raising=False)
        for name in ("XLA_FLAGS", ALLOCATOR):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == plugin or None)

    return make


@pytest.mark.parametrize(
    ("version", "plugin", "mesh", "environment", "expected"),
    [
        ("0.11.2", "jax_cuda13_plugin", 1, {}, (STABLE_GRAPHS, "vmm")),
        ("0.11.2", "jax_cuda12_plugin", 1, {"XLA_FLAGS": "--a=1"}, (f"--a=1 {STABLE_GRAPHS}", "vmm")),
        # an XLA that may not know the flag would end the process
        ("0.10.2", "jax_cuda12_plugin", 1, {}, (None, None)),
        ("0.12.0", "jax_cuda13_plugin", 1, {}, (None, None)),
        ("0.11.2", None, 1, {}, (None, None)),
        # what the user chose stays
        ("0.11.2", "jax_cuda13_plugin", 1, {ALLOCATOR: "bfc"}, (None, "bfc")),
        (
            "0.11.2",
            "jax_cuda13_plugin",
            1,
            {"XLA_FLAGS": "--xla_gpu_command_buffer_update_mode=ALWAYS_UPDATE"},
            ("--xla_gpu_command_buffer_update_mode=ALWAYS_UPDATE", None),
        ),
        (
            "0.11.2",
            "jax_cuda13_plugin",
            2,
            {},
            ("--xla_force_host_platform_device_count=2", None),
        ),
    ],
)  # fmt: skip
def test_graphs_are_kept_where_xla_can_and_the_user_did_not_choose(
    machine, version, plugin, mesh, environment, expected
):
    machine(version, plugin, **environment)
    prepare_devices(mesh)
    assert (os.environ.get("XLA_FLAGS"), os.environ.get(ALLOCATOR)) == expected


def test_the_memory_of_a_device_is_its_pools_where_it_has_one():
    stats = {"bytes_limit": 100, "bytes_in_use": 30}
    device = SimpleNamespace(memory_stats=lambda: stats, local_hardware_id=0)
    assert device_memory(device) == (100, 30)
