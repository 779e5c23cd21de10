"""Finds the C function for an operation and an element type."""

import ctypes
import functools
import logging
from collections.abc import Callable
from enum import Enum

import torch
from torch import Tensor

from kernels.native.build import BuildError, build_library

NativeKernel = Callable[..., int]
"""Takes a pointer to the operation's argument structure; returns 0 for failure where it can."""

logger = logging.getLogger(__name__)


class Operation(Enum):
    """The C functions, by name without prefix and type."""

    RMS_NORM = "rms_norm"
    ADD_RMS_NORM = "add_rms_norm"
    SILU_AND_MUL = "silu_and_mul"
    ROPE_AND_STORE_KV = "rope_and_store_kv"
    PAGED_ATTENTION = "paged_attention"
    LINEAR = "linear"
    PACK_WEIGHT = "pack_weight"
    PACKED_ROWS = "packed_rows"
    FILTER_WEIGHTS = "filter_weights"
    PENALIZE = "penalize"
    RULE_OUT = "rule_out"


# A call that takes microseconds keeps Python's interpreter lock: handing it to another thread and
# waiting to get it back costs more, up to the switch interval of 5 ms.
_LONG = frozenset(
    {
        Operation.PAGED_ATTENTION,
        Operation.LINEAR,
        Operation.PACK_WEIGHT,
        Operation.FILTER_WEIGHTS,
        Operation.PENALIZE,
        Operation.RULE_OUT,
    }
)
_BFLOAT16_DOT = (Operation.LINEAR, Operation.PACK_WEIGHT, Operation.PACKED_ROWS)
_FLOAT32 = (Operation.FILTER_WEIGHTS, Operation.PENALIZE, Operation.RULE_OUT)
_ANY_CPU = tuple(
    operation for operation in Operation if operation not in (*_BFLOAT16_DOT, *_FLOAT32)
)
_SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def native_kernel(operation: Operation, tensor: Tensor) -> NativeKernel | None:
    """The C function for tensors like this one, None if torch has to do it."""
    if not tensor.is_cpu:
        return None
    return _kernels().get((operation, tensor.dtype))


@functools.cache
def _kernels() -> dict[tuple[Operation, torch.dtype], NativeKernel]:
    try:
        path = build_library()
        long, short = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
    except (BuildError, OSError) as error:
        logger.warning("CPU kernels run in torch, which is slower: %s.", error)
        return {}
    table: dict[tuple[Operation, torch.dtype], NativeKernel] = {}
    for operation in _ANY_CPU:
        for dtype, suffix in _SUFFIXES.items():
            library = long if operation in _LONG else short
            table[operation, dtype] = library[f"tandem_{operation.value}_{suffix}"]
    for operation in _FLOAT32:
        table[operation, torch.float32] = long[f"tandem_{operation.value}_f32"]
    if short.tandem_has_bf16_dot():
        for operation in _BFLOAT16_DOT:
            library = long if operation in _LONG else short
            table[operation, torch.bfloat16] = library[f"tandem_{operation.value}_bf16"]
    else:
        logger.info("This CPU has no AVX512-BF16: linear layers run in torch.")
    return table
