"""Starts copies of blocks on a stream of their own, beside the engine's steps."""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.block_copy import copy_blocks

BlockIds: TypeAlias = NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """One copy under way."""

    _event: torch.cuda.Event

    @property
    def is_done(self) -> bool:
        return self._event.query()

    def wait(self) -> None:
        """Sleeps until it's done; other threads may run meanwhile."""
        self._event.synchronize()


class BlockCopier:
    """Copies follow each other in the order in which they were started."""

    def __init__(self, device: torch.device) -> None:
        # Small copies that a request waits for go before a step's next kernel.
        self.stream = torch.cuda.Stream(device, priority=-1)

    def start(
        self,
        source: Tensor,
        source_ids: BlockIds,
        target: Tensor,
        target_ids: BlockIds,
        *,
        max_programs: int | None = None,
    ) -> BlockCopy:
        """`target[target_ids[i]] = source[source_ids[i]]`; both uint8 [num_blocks, block_bytes]."""
        ids = torch.from_numpy(np.concatenate((source_ids, target_ids)).view(np.int32))
        with torch.cuda.stream(self.stream):
            # Pageable, and small: the driver has read it when this returns.
            index = ids.to(target.device, non_blocking=True)
            copy_blocks(
                source,
                index[: len(source_ids)],
                target,
                index[len(source_ids) :],
                max_programs=max_programs,
            )
            done = torch.cuda.Event(blocking=True)
            done.record()
        return BlockCopy(done)
