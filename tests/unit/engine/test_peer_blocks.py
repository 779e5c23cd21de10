"""What a peer says of its pool is held against what a made-up driver has mapped."""

import ctypes
from typing import Any

import numpy as np
import pytest
import torch

from engine import cuda_ipc, peer_blocks
from engine.peer_blocks import PeerBlocks
from kvtransfer.device import DeviceRegion

UUID = b"u" * 16
BLOCK_BYTES = 64
MAPPED_BYTES = 8 * BLOCK_BYTES
BASE = 1 << 40
INVALID_VALUE = 1


class MadeUpDriver:
    """Maps one allocation of `MAPPED_BYTES`."""

    def __init__(self) -> None:
        self.num_mapped = 0
        self.range_status = 0

    def cuIpcOpenMemHandle_v2(self, address: Any, *_: object) -> int:  # noqa: N802
        address._obj.value = BASE
        self.num_mapped += 1
        return 0

    def cuMemGetAddressRange_v2(self, base: Any, size: Any, address: Any) -> int:  # noqa: N802
        assert address.value == BASE
        base._obj.value, size._obj.value = BASE, MAPPED_BYTES
        return self.range_status

    def cuIpcCloseMemHandle(self, address: ctypes.c_uint64) -> int:  # noqa: N802
        assert address.value == BASE
        self.num_mapped -= 1
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> MadeUpDriver:
    driver = MadeUpDriver()
    monkeypatch.setattr(cuda_ipc, "_driver", lambda: driver)
    monkeypatch.setattr(peer_blocks, "_uuid", lambda device: UUID)
    monkeypatch.setattr(peer_blocks, "_make_current", lambda device: None)
    memory = lambda address, num_bytes: np.zeros(num_bytes, np.uint8)  # noqa: E731
    monkeypatch.setattr(peer_blocks, "_MappedMemory", memory)
    return driver


def exported(*, offset: int, num_blocks: int, uuid: bytes = UUID) -> bytes:
    return peer_blocks._EXPORTED.pack(uuid, bytes(64), offset, num_blocks, BLOCK_BYTES)


def mapped(data: bytes) -> PeerBlocks:
    return PeerBlocks(data, torch.zeros(4, BLOCK_BYTES, dtype=torch.uint8), copier=None)


@pytest.mark.parametrize(("offset", "num_blocks"), [(0, 8), (0, 3), (5 * BLOCK_BYTES, 3)])
def test_a_pool_within_the_mapping_is_taken(driver: MadeUpDriver, offset: int, num_blocks: int):
    pool = mapped(exported(offset=offset, num_blocks=num_blocks))
    assert (pool.num_blocks, driver.num_mapped) == (num_blocks, 1)
    pool.close()
    assert driver.num_mapped == 0


@pytest.mark.parametrize(("uuid", "max_programs"), [(UUID, None), (b"v" * 16, 66)])
def test_a_link_needs_few_programs(driver: MadeUpDriver, uuid: bytes, max_programs: int | None):
    started: list[int | None] = []

    class Copier:
        def start(self, *_: object, max_programs: int | None) -> None:
            started.append(max_programs)

    data = exported(offset=0, num_blocks=8, uuid=uuid)
    pool = PeerBlocks(data, torch.zeros(4, BLOCK_BYTES, dtype=torch.uint8), Copier())
    ids = np.arange(2, dtype=np.uint32)
    pool.start_copy(ids, ids)
    assert started == [max_programs]


@pytest.mark.parametrize(
    ("offset", "num_blocks"), [(0, 9), (1, 8), (MAPPED_BYTES, 1), (0, 2**64 - 1), (2**64 - 1, 1)]
)
def test_a_pool_beyond_the_mapping_is_refused(driver: MadeUpDriver, offset: int, num_blocks: int):
    with pytest.raises(OSError, match=f"but the memory has {MAPPED_BYTES}"):
        mapped(exported(offset=offset, num_blocks=num_blocks))
    assert driver.num_mapped == 0, "nobody else would unmap it"


def test_a_mapping_of_unknown_size_is_refused(driver: MadeUpDriver):
    driver.range_status = INVALID_VALUE
    with pytest.raises(OSError, match="cuMemGetAddressRange_v2 failed with CUDA error 1"):
        mapped(exported(offset=0, num_blocks=8))
    assert driver.num_mapped == 0


def test_the_peer_is_told_to_send_messages_then(driver: MadeUpDriver):
    class Blocks:
        def map(self, data: bytes) -> PeerBlocks:
            return mapped(data)

    region = DeviceRegion(Blocks(), num_blocks=4, block_bytes=BLOCK_BYTES)
    assert region.map(exported(offset=0, num_blocks=9)) is None
    assert region.map(exported(offset=0, num_blocks=8)) is not None
