"""Lists of blocks as arrays."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.block_ids import (
    check_block_range,
    pack_block_ids,
    to_block_ids,
    unpack_block_ids,
)
from kvtransfer.fence import Fence
from protocol.errors import TransferError

BLOCK_IDS = st.integers(0, 2**32 - 1)


@given(st.lists(BLOCK_IDS))
def test_lists_survive_the_way(block_ids: list[int]):
    assert unpack_block_ids(pack_block_ids(to_block_ids(block_ids))).tolist() == block_ids


@pytest.mark.parametrize("wrong", [-1, 2**32, 2**70])
def test_what_is_no_number_of_a_block(wrong: int):
    with pytest.raises(TransferError, match=f"{wrong} is no block's number"):
        to_block_ids([0, wrong, 1])


def test_bytes_that_are_no_list():
    with pytest.raises(TransferError, match="3 bytes are no list of blocks"):
        unpack_block_ids(b"odd")


@given(st.lists(BLOCK_IDS), st.integers(0, 2**32))
def test_ranges(block_ids: list[int], num_blocks: int):
    array = to_block_ids(block_ids)
    if max(block_ids, default=-1) < num_blocks:
        check_block_range(array, num_blocks)
    else:
        with pytest.raises(TransferError, match=f"{max(block_ids)} is outside the pool"):
            check_block_range(array, num_blocks)


@given(st.frozensets(st.integers(0, 40)), st.lists(st.integers(0, 42) | BLOCK_IDS))
def test_a_fence_refuses_the_first_foreign_block(ours: frozenset[int], block_ids: list[int]):
    fence = Fence(1, attempt=0, sender_incarnation=2, block_ids=ours)
    foreign = next((block_id for block_id in block_ids if block_id not in ours), None)
    expected = None if foreign is None else f"block {foreign} is not part of ticket 1"
    assert fence.refusal_of_blocks(to_block_ids(block_ids)) == expected
