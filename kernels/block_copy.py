"""Copying scattered blocks to scattered places in one launch."""

import torch
from torch import Tensor

_VECTOR_BYTES = 16


def copy_blocks(
    source: Tensor,
    source_ids: Tensor,
    target: Tensor,
    target_ids: Tensor,
    *,
    max_programs: int | None = None,
) -> None:
    """`target[target_ids[i]] = source[source_ids[i]]` for every i.

    `source` and `target` are uint8 [any number of blocks, block_bytes], contiguous, within one
    device's reach; the ids are integers [num_copies] there, within their pools and without a target
    twice. No more than `max_programs` run: where a link binds, more would only keep other kernels
    off the device.
    """
    if source.shape[1] != target.shape[1] or source_ids.shape != target_ids.shape:
        raise ValueError(
            f"{len(source_ids)} blocks of {source.shape[1]} bytes can't go to "
            f"{len(target_ids)} of {target.shape[1]}"
        )
    if source.is_cuda and _is_aligned(source) and _is_aligned(target):
        from kernels.gpu import block_copy as gpu

        gpu.copy_blocks(source, source_ids, target, target_ids, max_programs=max_programs)
    else:
        copy_blocks_reference(source, source_ids, target, target_ids)


def copy_blocks_reference(
    source: Tensor, source_ids: Tensor, target: Tensor, target_ids: Tensor
) -> None:
    """`copy_blocks` in torch."""
    target.index_copy_(0, target_ids.long(), torch.index_select(source, 0, source_ids.long()))


def _is_aligned(blocks: Tensor) -> bool:
    return blocks.shape[1] % _VECTOR_BYTES == 0 and blocks.data_ptr() % _VECTOR_BYTES == 0
