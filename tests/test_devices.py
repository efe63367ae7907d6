"""How a device's memory is read."""

from types import SimpleNamespace

from jlora.device_memory import device_memory


def test_the_memory_of_a_device_is_its_pools_where_it_has_one():
    stats = {"bytes_limit": 100, "bytes_in_use": 30}
    device = SimpleNamespace(memory_stats=lambda: stats, local_hardware_id=0)
    assert device_memory(device) == (100, 30)
