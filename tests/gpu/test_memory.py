"""jax's pool on a real GPU is what the utilization asks for. In processes of their own: here it is taken."""

import os
import subprocess
import sys

import pytest

from jlora.device_memory import USERS_CHOICE

pytestmark = pytest.mark.gpu

CODE = """
import os, sys
from jlora.device_memory import device_memory, start_backend
assert start_backend(float(sys.argv[1])) == "gpu"
import jax
device = jax.devices()[0]
memory, limit = device_memory(device), device.memory_stats()["bytes_limit"]
print(limit / memory.card, memory.pool <= limit, memory.used < memory.card / 100)
"""


def start(utilization: str, **variables: str) -> tuple[float, str]:
    """(the pool's share of the card, whether pool and use are plausible); no array is made."""
    env = {name: value for name, value in os.environ.items() if name not in USERS_CHOICE}
    env |= {"PYTHONPATH": os.getcwd(), **variables}
    done = subprocess.run(
        [sys.executable, "-c", CODE, utilization], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    share, rest = done.stdout.split(maxsplit=1)
    return float(share), rest.strip()


@pytest.mark.parametrize(("utilization", "share"), [("0.9", 0.95), ("0.5", 0.55), ("1", 0.95)])
def test_the_pool_is_a_little_more_than_the_utilization_of_the_card(utilization, share):
    assert start(utilization) == (pytest.approx(share, abs=0.005), "True True")


@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_a_share_from_the_environment_is_the_pool(name):
    assert start("0.9", **{name: "0.3"}) == (pytest.approx(0.3, abs=0.005), "True True")
