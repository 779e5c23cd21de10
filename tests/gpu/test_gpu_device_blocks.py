"""Copies between blocks on the device and staging memory."""

import random

import pytest
import torch

from engine.device_blocks import DeviceBlocks
from kvtransfer import DeviceRegion

NUM_BLOCKS = 64


@pytest.mark.parametrize("block_bytes", [24, 4096, 65536, 65552, 4 << 20])
def test_scatter_is_the_inverse_of_gather(block_bytes: int) -> None:
    pool = torch.randint(0, 256, (NUM_BLOCKS, block_bytes), dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    region = DeviceRegion(DeviceBlocks(pool), num_blocks=NUM_BLOCKS, block_bytes=block_bytes)
    before = pool.cpu()
    src, dst = (random.Random(seed).sample(range(NUM_BLOCKS), 20) for seed in (1, 2))
    staging = region.allocate(32 * block_bytes)
    num_bytes = region.gather([(block_id, 1) for block_id in src], staging)
    assert num_bytes == 20 * block_bytes
    region.scatter(staging[:num_bytes], [(block_id, 1) for block_id in dst])

    expected = before.clone()
    expected[dst] = before[src]
    assert torch.equal(pool.cpu(), expected)
    assert bytes(region.host_bytes((3, 2))) == expected[3:5].numpy().tobytes()


def test_views_and_slices_name_the_pools_own_memory() -> None:
    pool = torch.zeros((NUM_BLOCKS, 64), dtype=torch.uint8, device="cuda")
    view = DeviceBlocks(pool).view(5, 3)
    assert view.nbytes == 3 * 64
    assert view.__cuda_array_interface__["data"] == (pool[5].data_ptr(), False)
    assert view[64:128].__cuda_array_interface__["data"] == (pool[6].data_ptr(), False)
    assert view[64:128].__cuda_array_interface__["shape"] == (64,)


def test_descriptions_of_pools_that_make_no_sense_are_declined() -> None:
    pool = torch.zeros((NUM_BLOCKS, 64), dtype=torch.uint8, device="cuda")
    blocks = DeviceBlocks(pool)
    with pytest.raises(OSError, match="5 bytes describe no pool"):
        blocks.map(b"short")
    with pytest.raises(OSError, match="its blocks have 32 bytes, ours 64"):
        blocks.map(DeviceBlocks(pool.view(-1, 32)).export())
    region = DeviceRegion(blocks, num_blocks=NUM_BLOCKS, block_bytes=64)
    assert region.map(b"short") is None
