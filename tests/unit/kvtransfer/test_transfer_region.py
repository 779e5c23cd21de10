"""The registered region."""

import ctypes

import pytest

from kvtransfer import KVRegion
from kvtransfer.block_ids import to_block_ids
from protocol.errors import TransferError


def region(pool: bytearray) -> KVRegion:
    return KVRegion(memoryview(pool), num_blocks=8, block_bytes=4)


def test_gather_and_scatter_are_inverse():
    pool = bytearray(range(32))
    buffer = memoryview(bytearray(32))
    assert region(pool).gather([(6, 1), (0, 2)], buffer) == 12
    assert bytes(buffer[:12]) == bytes([24, 25, 26, 27, *range(8)])
    target = bytearray(32)
    region(target).scatter(buffer[:12], [(6, 1), (0, 2)])
    assert target == bytes([*range(8), *[0] * 16, 24, 25, 26, 27, *[0] * 4])


def test_a_view_is_the_memory_itself():
    pool = bytearray(32)
    region(pool).view((7, 1))[:] = b"abcd"
    assert pool[28:] == b"abcd"


def test_a_raw_address():
    array = (ctypes.c_ubyte * 32)()
    made = KVRegion.from_address(ctypes.addressof(array), num_blocks=8, block_bytes=4)
    made.view((1, 1))[:] = b"abcd"
    assert bytes(array[4:8]) == b"abcd"


def test_memory_that_does_not_fit():
    with pytest.raises(TransferError, match="has 31 bytes"):
        region(bytearray(31))
    with pytest.raises(TransferError, match="read-only"):
        KVRegion(memoryview(bytes(32)), num_blocks=8, block_bytes=4)


def test_blocks_outside():
    region(bytearray(32)).check_range(to_block_ids([7, 0]))
    with pytest.raises(TransferError, match="Block 8 is outside the pool of 8 blocks"):
        region(bytearray(32)).check_range(to_block_ids([0, 8, 1]))
