"""What tests of Triton's kernels share: compiled on a GPU, in the interpreter elsewhere."""

from dataclasses import fields, replace
from importlib.metadata import version

import pytest
import torch
from torch import Tensor

from kernels.attention import AttentionBatch

pytest.importorskip("triton")
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
needs_triton = pytest.mark.skipif(
    not HAS_GPU and version("triton") < "3.7",
    reason="before 3.7, Triton's interpreter fails with NumPy 2.4",
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The interpreter multiplies bfloat16's bits as integers.
DOT_DTYPES = DTYPES if DEVICE == "cuda" else [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def moved(batch: AttentionBatch) -> AttentionBatch:
    """The batch with its tensors on the device."""
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    tensors = {name: x.to(DEVICE) for name, x in tensors.items() if isinstance(x, Tensor)}
    return replace(batch, **tensors)


def close(actual: Tensor, expected: Tensor, *, num_roundings: int = 1) -> None:
    # The interpreter cuts bfloat16's bits off where a GPU rounds.
    tolerance = TOLERANCE[expected.dtype] * (1 if DEVICE == "cuda" else num_roundings)
    torch.testing.assert_close(actual.cpu(), expected, atol=tolerance, rtol=tolerance)
