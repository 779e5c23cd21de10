"""Products of 8-bit numbers by cuBLASLt itself, which can add to the residual stream on the way.

torch's product calls the same library without the sum. A row-major matrix is the transpose of the
library's column-major one, so it is asked for `out.T = weight @ x.T`: A is `weight`, transposed, B
is `x`, and C and D are both `out`. The other way round it has no products of 8 bits.
"""

import ctypes
import functools
import logging
from ctypes import byref, c_float, c_int, c_int8, c_int32, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from kernels.fp8 import Fp8Rows
from kernels.gpu.cublaslt_library import (
    ADD_BIAS,
    BFLOAT16,
    CLUSTER_1_BY_2,
    COMPUTE_FLOAT32,
    E4M3,
    FLOAT32,
    SCALE_OF_EACH_ROW,
    TILE_256_BY_128,
    TRANSPOSED,
    Choice,
    CublasLtError,
    Descriptor,
    Estimate,
    Library,
    Operation,
    Preference,
    check,
    choices,
    chosen,
    loaded_library,
)

logger = logging.getLogger(__name__)

# Alone among NVIDIA's GPUs, Hopper has products that scale each row and column.
_HOPPER = 9
# What NVIDIA recommends for Hopper.
_WORKSPACE_BYTES = 32 << 20
# Prompts come in any number of tokens, and choosing again takes the host tens of microseconds.
_MOST_SHAPES = 512
# What the library assumes of matrices unless told otherwise, and what we ask of vectors.
_MATRIX_ALIGNMENT, _VECTOR_ALIGNMENT = 256, 16
# For many tokens and long sums this is 5 % faster than what the library names, where the card's
# power binds (H100, cuBLAS 13.1; benchmarks/gpu/products.py --cublaslt). It isn't named for
# products that scale each row, but does them.
_MANY_TOKENS, _LONG_SUM = 8192, 8192
_FOR_LONG_SUMS = {
    Choice.TILE: TILE_256_BY_128,
    Choice.CLUSTER_SHAPE: CLUSTER_1_BY_2,
    Choice.OPTION: 7,
}
_ONE, _ZERO = c_float(1.0), c_float(0.0)
# A descriptor has one call's pointers at a time.
_lock = Lock()


@dataclass(frozen=True, slots=True)
class Shape:
    """What a choice of algorithm depends on."""

    num_tokens: int
    out_features: int
    in_features: int
    has_bias: bool
    adds: bool
    """To what `out` holds, instead of overwriting it."""


class Product:
    """`out = x @ weight.T + bias`, or `out +=` that, by one of the library's algorithms."""

    def __init__(
        self, library: Library, shape: Shape, descriptors: "_Descriptors", estimate: Estimate
    ) -> None:
        self._library, self._shape, self._descriptors = library, shape, descriptors
        self._estimate = estimate
        self._is_refused = False

    @property
    def choices(self) -> dict[str, int]:
        """What tells its algorithm from others, in numbers of cublasLt.h."""
        workspace_bytes = self._estimate.workspace_bytes
        return choices(self._library, self._estimate.algorithm) | {"workspace": workspace_bytes}

    def __call__(self, x: Fp8Rows, weight: Fp8Rows, bias: Tensor | None, out: Tensor) -> bool:
        """False, and nothing written, if the library refuses; then it won't be asked again.

        `x` is [num_tokens, in_features], `weight` [out_features, in_features], `bias` bfloat16
        [out_features] and `out` bfloat16 [num_tokens, out_features]; sums are rounded once.
        """
        shape = self._shape
        assert x.values.shape == (shape.num_tokens, shape.in_features)
        assert weight.values.shape == (shape.out_features, shape.in_features)
        assert out.shape == (shape.num_tokens, shape.out_features)
        assert (bias is not None) == shape.has_bias
        if self._is_refused or not (_takes_rows(x) and _takes(weight, bias, out)):
            return False
        try:
            with _lock, torch.cuda.device(out.device):
                self._launch(x, weight, bias, out)
        except CublasLtError as error:
            # Remembered, so that a step which is captured goes the way of the one before it.
            self._is_refused = True
            _report(f"a product came back with {error}")
            return False
        return True

    def _launch(self, x: Fp8Rows, weight: Fp8Rows, bias: Tensor | None, out: Tensor) -> None:
        """On the current device. Raises CublasLtError."""
        stream = torch.cuda.current_stream().cuda_stream
        workspace_bytes = self._estimate.workspace_bytes
        needs_workspace = workspace_bytes > 0
        workspace = _workspace(out.device, stream).data_ptr() if needs_workspace else None
        of = self._descriptors
        of.point_to(weight.scales.data_ptr(), x.scales.data_ptr(), bias)
        check(
            self._library.cublasLtMatmul(
                # Documented to be one of cuBLASLt's as well.
                torch.cuda.current_blas_handle(),
                of.operation.pointer,
                byref(_ONE),
                weight.values.data_ptr(),
                of.a.pointer,
                x.values.data_ptr(),
                of.b.pointer,
                byref(_ONE if self._shape.adds else _ZERO),
                out.data_ptr(),
                of.out.pointer,
                out.data_ptr(),
                of.out.pointer,
                byref(self._estimate.algorithm),
                workspace,
                workspace_bytes,
                stream,
            )
        )


def adding_product(
    num_tokens: int, weight: Fp8Rows, bias: Tensor | None, residual: Tensor
) -> Product | None:
    """What adds `x @ weight.T + bias` to `residual`, for an `x` of so many tokens.

    None where the library can't, or the caller's tensors aren't what it takes: bfloat16, in one
    piece, aligned as torch allocates them.
    """
    if not _takes(weight, bias, residual):
        return None
    out_features, in_features = weight.values.shape
    shape = Shape(num_tokens, out_features, in_features, bias is not None, adds=True)
    found = products(shape, residual.device)
    return found[0] if found else None


@functools.lru_cache(_MOST_SHAPES)
def products(shape: Shape, device: torch.device, most: int = 1) -> tuple[Product, ...]:
    """By up to `most` algorithms, the fastest first: one that was measured, or what the library
    expects; none if it can't."""
    library = _library_for(device)
    if library is None:
        return ()
    try:
        with torch.cuda.device(device):
            descriptors = _Descriptors(library, shape)
            estimates = _estimates(library, descriptors, most)
            if shape.num_tokens >= _MANY_TOKENS and shape.in_features >= _LONG_SUM:
                measured = _measured(library, descriptors, estimates[0])
                estimates = [*measured, *estimates][:most]
    except CublasLtError as error:
        _report(f"no algorithm, {error}")
        return ()
    return tuple(Product(library, shape, descriptors, estimate) for estimate in estimates)


def _library_for(device: torch.device) -> Library | None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != _HOPPER:
        return None
    return loaded_library()


class _Descriptors:
    """Of a product of `shape`, with any of its algorithms. Raises CublasLtError."""

    def __init__(self, library: Library, shape: Shape) -> None:
        tokens, outputs, inputs = shape.num_tokens, shape.out_features, shape.in_features
        self.a = Descriptor(library, "MatrixLayout", E4M3, inputs, outputs, inputs)
        self.b = Descriptor(library, "MatrixLayout", E4M3, inputs, tokens, inputs)
        self.out = Descriptor(library, "MatrixLayout", BFLOAT16, outputs, tokens, outputs)
        self.operation = Descriptor(library, "MatmulDesc", COMPUTE_FLOAT32, FLOAT32)
        self.operation.set(Operation.TRANSPOSE_A, c_int32(TRANSPOSED))
        # As torch's: sums stay in the tensor cores' accumulators.
        self.operation.set(Operation.FAST_ACCUMULATION, c_int8(1))
        self.operation.set(Operation.A_SCALE_MODE, c_int32(SCALE_OF_EACH_ROW))
        self.operation.set(Operation.B_SCALE_MODE, c_int32(SCALE_OF_EACH_ROW))
        # Without scales no algorithm is found, and one is chosen by alignment; nothing is read.
        self.operation.set(Operation.A_SCALE_POINTER, c_void_p(_VECTOR_ALIGNMENT))
        self.operation.set(Operation.B_SCALE_POINTER, c_void_p(_VECTOR_ALIGNMENT))
        if shape.has_bias:
            self.operation.set(Operation.EPILOGUE, c_uint32(ADD_BIAS))
            self.operation.set(Operation.BIAS_TYPE, c_int32(BFLOAT16))
            self.operation.set(Operation.BIAS_POINTER, c_void_p(_VECTOR_ALIGNMENT))

    def point_to(self, a_scales: int, b_scales: int, bias: Tensor | None) -> None:
        """For the next call alone. Raises CublasLtError."""
        self.operation.set(Operation.A_SCALE_POINTER, c_void_p(a_scales))
        self.operation.set(Operation.B_SCALE_POINTER, c_void_p(b_scales))
        if bias is not None:
            self.operation.set(Operation.BIAS_POINTER, c_void_p(bias.data_ptr()))


def _estimates(library: Library, of: _Descriptors, most: int) -> list[Estimate]:
    """On the current device. Raises CublasLtError."""
    preference = Descriptor(library, "MatmulPreference")
    preference.set(Preference.MAX_WORKSPACE_BYTES, c_uint64(_WORKSPACE_BYTES))
    found, num_found = (Estimate * most)(), c_int()
    check(
        library.cublasLtMatmulAlgoGetHeuristic(
            torch.cuda.current_blas_handle(),
            of.operation.pointer,
            of.a.pointer,
            of.b.pointer,
            of.out.pointer,
            of.out.pointer,
            preference.pointer,
            most,
            ctypes.cast(found, ctypes.POINTER(Estimate)),
            byref(num_found),
        )
    )
    usable = [each for each in found[: num_found.value] if each.status == 0]
    if not usable:
        raise CublasLtError("none is known")
    return usable


def _measured(library: Library, of: _Descriptors, named: Estimate) -> list[Estimate]:
    """What measured faster than `named`; nothing where this release of the library refuses it. On
    the current device."""
    estimate = Estimate()
    try:
        algorithm = chosen(library, named.algorithm, _FOR_LONG_SUMS)
        check(
            library.cublasLtMatmulAlgoCheck(
                torch.cuda.current_blas_handle(),
                of.operation.pointer,
                of.a.pointer,
                of.b.pointer,
                of.out.pointer,
                of.out.pointer,
                byref(algorithm),
                byref(estimate),
            )
        )
    except CublasLtError:
        return []
    estimate.algorithm = algorithm
    is_usable = estimate.status == 0 and estimate.workspace_bytes <= _WORKSPACE_BYTES
    return [estimate] if is_usable else []


def _takes(weight: Fp8Rows, bias: Tensor | None, out: Tensor) -> bool:
    return (
        _takes_rows(weight)
        and (bias is None or (bias.dtype is torch.bfloat16 and _is_aligned(bias)))
        and out.dtype is torch.bfloat16
        and _is_aligned(out, _MATRIX_ALIGNMENT)
    )


def _takes_rows(rows: Fp8Rows) -> bool:
    return _is_aligned(rows.values, _MATRIX_ALIGNMENT) and _is_aligned(rows.scales)


def _is_aligned(x: Tensor, num_bytes: int = _VECTOR_ALIGNMENT) -> bool:
    return x.is_contiguous() and x.data_ptr() % num_bytes == 0


@functools.cache
def _workspace(device: torch.device, stream: int) -> Tensor:  # noqa: ARG001  (a key)
    """Kept for good, since captured graphs go on using it; for the calls of one stream, which come
    one after the other."""
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)


@functools.cache
def _report(reason: str) -> None:
    """Once for each."""
    logger.info("products of 8 bits don't add on their way: %s", reason)
