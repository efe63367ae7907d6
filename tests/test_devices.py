"""How a device's memory is read."""

from types import SimpleNamespace

import jax

from jlora.device_memory import SMALL_BLOCKS, device_memory, small_blocks


def test_the_memory_of_a_device_is_its_pools_where_it_has_one():
    stats = {"bytes_limit": 100, "bytes_in_use": 30}
    device = SimpleNamespace(memory_stats=lambda: stats, local_hardware_id=0)
    assert device_memory(device) == (100, 30)


def test_as_many_small_blocks_are_held_as_lie_free_beside_them():
    device, most = jax.devices()[0], 1 << 20
    sizes = sorted(block.nbytes for block in small_blocks(device, 100))
    assert sizes == [size for size, count in SMALL_BLOCKS.items() for _ in range(count // 2)]
    larger = sorted(block.nbytes for block in small_blocks(device, most))
    assert larger == [*sizes, *[most] * 4]
