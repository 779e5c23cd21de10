"""Products of 8-bit numbers as cuBLASLt is told of them.

A row-major matrix is the transpose of the library's column-major one, so it is asked for
`out.T = weight @ x.T`: A is `weight`, transposed, B is `x`, and C and D are both `out`. The other
way round it has no products of 8 bits.
"""

from ctypes import c_int8, c_int32, c_uint32, c_void_p
from dataclasses import dataclass

from torch import Tensor

from kernels.gpu.cublaslt_library import (
    ADD_BIAS,
    BFLOAT16,
    COMPUTE_FLOAT32,
    E4M3,
    FLOAT32,
    SCALE_OF_EACH_ROW,
    TRANSPOSED,
    Descriptor,
    Library,
    Operation,
)

VECTOR_ALIGNMENT = 16
"""Of scales and biases, in bytes."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a choice of algorithm depends on."""

    num_tokens: int
    out_features: int
    in_features: int
    has_bias: bool
    adds: bool
    """To what `out` holds, instead of overwriting it."""
    has_scales: bool = True
    """Or the sums of products of 8 bits are the result, as they are."""


class Descriptors:
    """Of a product of `shape`, with any of its algorithms. Raises CublasLtError."""

    def __init__(self, library: Library, shape: Shape) -> None:
        self._has_scales = shape.has_scales
        tokens, outputs, inputs = shape.num_tokens, shape.out_features, shape.in_features
        self.a = Descriptor(library, "MatrixLayout", E4M3, inputs, outputs, inputs)
        self.b = Descriptor(library, "MatrixLayout", E4M3, inputs, tokens, inputs)
        self.out = Descriptor(library, "MatrixLayout", BFLOAT16, outputs, tokens, outputs)
        self.operation = Descriptor(library, "MatmulDesc", COMPUTE_FLOAT32, FLOAT32)
        self.operation.set(Operation.TRANSPOSE_A, c_int32(TRANSPOSED))
        # As torch's: sums stay in the tensor cores' accumulators.
        self.operation.set(Operation.FAST_ACCUMULATION, c_int8(1))
        if shape.has_scales:
            self.operation.set(Operation.A_SCALE_MODE, c_int32(SCALE_OF_EACH_ROW))
            self.operation.set(Operation.B_SCALE_MODE, c_int32(SCALE_OF_EACH_ROW))
            # Else no algorithm is found, and one is chosen by alignment; nothing is read.
            self.operation.set(Operation.A_SCALE_POINTER, c_void_p(VECTOR_ALIGNMENT))
            self.operation.set(Operation.B_SCALE_POINTER, c_void_p(VECTOR_ALIGNMENT))
        if shape.has_bias:
            self.operation.set(Operation.EPILOGUE, c_uint32(ADD_BIAS))
            self.operation.set(Operation.BIAS_TYPE, c_int32(BFLOAT16))
            self.operation.set(Operation.BIAS_POINTER, c_void_p(VECTOR_ALIGNMENT))

    def point_to(self, a_scales: Tensor, b_scales: Tensor, bias: Tensor | None) -> None:
        """For the next call alone. Raises CublasLtError."""
        if self._has_scales:
            self.operation.set(Operation.A_SCALE_POINTER, c_void_p(a_scales.data_ptr()))
            self.operation.set(Operation.B_SCALE_POINTER, c_void_p(b_scales.data_ptr()))
        if bias is not None:
            self.operation.set(Operation.BIAS_POINTER, c_void_p(bias.data_ptr()))
