"""Another worker's pool on this host, mapped here and read by our own kernel: on the same card, or
on another over NVLink.

Exported as the card's UUID, the handle of the pool's allocation, the pool's offset in it and its
size in blocks. The owner reads and writes on as it likes; only ready blocks should be asked for.
"""

import struct
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine import cuda_ipc
from engine.block_copier import BlockCopier, BlockCopy, BlockIds

_EXPORTED = struct.Struct("=16s64sQQQ")
_TRIAL_BYTES = 64 << 20
# Half of an H200's multiprocessors, which is enough for the link to another card; decode steps have
# the others.
_PROGRAMS_OVER_A_LINK = 66


def export_blocks(blocks: Tensor) -> bytes:
    """For `PeerBlocks`; `blocks` is [num_blocks, block_bytes]. Raises OSError."""
    _make_current(blocks.device)
    handle, offset = cuda_ipc.export_memory(blocks.data_ptr())
    return _EXPORTED.pack(_uuid(blocks.device), handle, offset, *blocks.shape)


class PeerBlocks:
    """Copies from the peer's blocks to those of `pool`, uint8 [num_blocks, block_bytes]."""

    def __init__(self, exported: bytes, pool: Tensor, copier: BlockCopier) -> None:
        """The peer must be a process of this host. Raises OSError if its pool can't be mapped, as
        on a card out of this one's reach, or isn't all in the memory that the mapping has."""
        if len(exported) != _EXPORTED.size:
            raise OSError(f"{len(exported)} bytes describe no pool")
        uuid, handle, offset, self.num_blocks, block_bytes = _EXPORTED.unpack(exported)
        if block_bytes != pool.shape[1]:
            raise OSError(f"its blocks have {block_bytes} bytes, ours {pool.shape[1]}")
        _make_current(pool.device)
        num_bytes = self.num_blocks * block_bytes
        self._base, mapped_bytes = cuda_ipc.map_memory(handle)
        if offset + num_bytes > mapped_bytes:
            # What lies behind is another's: reading it would be a fault, or take it for KV.
            cuda_ipc.unmap_memory(self._base)
            raise OSError(
                f"it is said to have {num_bytes} bytes from {offset} on, "
                f"but the memory has {mapped_bytes}"
            )
        memory = _MappedMemory(self._base + offset, num_bytes)
        self._blocks = torch.as_tensor(memory, device=pool.device).view(-1, block_bytes)
        self._pool = pool
        self._copier = copier
        is_here = uuid == _uuid(pool.device)
        self._max_programs = None if is_here else _PROGRAMS_OVER_A_LINK

    def start_copy(self, source_ids: BlockIds, target_ids: BlockIds) -> BlockCopy:
        """From the peer's blocks to ours; ids must be within the pools."""
        return self._start(source_ids, self._pool, target_ids)

    def start_trial(self, num_blocks: int) -> BlockCopy:
        """Copies the peer's first blocks to memory that is thrown away, to see how fast it is."""
        block_bytes = self._pool.shape[1]
        num_scratch = max(1, min(num_blocks, _TRIAL_BYTES // block_bytes))
        with torch.cuda.stream(self._copier.stream):
            scratch = torch.empty(
                (num_scratch, block_bytes), dtype=torch.uint8, device=self._pool.device
            )
        ids = np.arange(num_blocks, dtype=np.uint32)
        return self._start(ids, scratch, ids % num_scratch)

    def close(self) -> None:
        """All copies must be done."""
        del self._blocks
        cuda_ipc.unmap_memory(self._base)

    def _start(self, source_ids: BlockIds, target: Tensor, target_ids: BlockIds) -> BlockCopy:
        return self._copier.start(
            self._blocks, source_ids, target, target_ids, max_programs=self._max_programs
        )


class _MappedMemory:
    """Bytes at a device address, as torch takes them without a copy."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (num_bytes,),
            "strides": None,
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def _make_current(device: torch.device) -> None:
    """Makes the device's context this thread's, which the driver's own calls need."""
    torch.cuda.current_stream(device).query()


def _uuid(device: torch.device) -> bytes:
    return bytes(torch.cuda.get_device_properties(device).uuid.bytes)
