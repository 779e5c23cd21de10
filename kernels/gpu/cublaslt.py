"""Products of 8-bit numbers by cuBLASLt itself, which can add to the residual stream on the way.

torch's product calls the same library without the sum.
"""

import ctypes
import functools
import logging
from ctypes import byref, c_float, c_int, c_uint64
from threading import Lock

import torch
from torch import Tensor

from kernels.fp8 import Fp8Rows
from kernels.gpu.cards import is_hopper_card
from kernels.gpu.cublaslt_library import (
    CLUSTER_1_BY_2,
    TILE_176_BY_128,
    TILE_256_BY_128,
    Choice,
    CublasLtError,
    Descriptor,
    Estimate,
    Library,
    Preference,
    check,
    choices,
    chosen,
    loaded_library,
)
from kernels.gpu.cublaslt_shapes import VECTOR_ALIGNMENT, Descriptors, Shape

logger = logging.getLogger(__name__)

# What NVIDIA recommends for Hopper.
_WORKSPACE_BYTES = 32 << 20
# Prompts come in any number of tokens, and choosing again takes the host tens of microseconds.
_MOST_SHAPES = 512
# What the library assumes of matrices unless told otherwise.
_MATRIX_ALIGNMENT = 256
# What measured faster than what the library names for products that scale each row, where the
# card's power binds (H100, benchmarks/gpu/products.py --cublaslt all). What an option means is the
# release's own affair.
_MEASURED_RELEASE = range(130100, 130200)
# For long sums of many tokens by 5 %, to the same bits.
_MANY_TOKENS, _LONG_SUM = 8192, 8192
_FOR_LONG_SUMS = {
    Choice.TILE: TILE_256_BY_128,
    Choice.CLUSTER_SHAPE: CLUSTER_1_BY_2,
    Choice.OPTION: 7,
}
# By 4 to 8 %. No such tile scales rows.
_MANY_UNSCALED_TOKENS = 2048
_UNSCALED = {
    Choice.TILE: TILE_176_BY_128,
    Choice.CLUSTER_SHAPE: CLUSTER_1_BY_2,
    Choice.OPTION: 2,
}
_ONE, _ZERO = c_float(1.0), c_float(0.0)
# A descriptor has one call's pointers at a time.
_lock = Lock()


class Product:
    """`out = x @ weight.T + bias`, or `out +=` that, by one of the library's algorithms."""

    def __init__(
        self, library: Library, shape: Shape, descriptors: Descriptors, estimate: Estimate
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

        Scales are read if the shape has some.

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
            if not error.is_refusal:
                raise
            # Remembered, so that a step which is captured goes the way of the one before it.
            self._is_refused = True
            _report(f"a product came back with {error}")
            return False
        return True

    def _launch(self, x: Fp8Rows, weight: Fp8Rows, bias: Tensor | None, out: Tensor) -> None:
        """On the current device. Raises CublasLtError."""
        stream = torch.cuda.current_stream().cuda_stream
        of = self._descriptors
        of.point_to(weight.scales, x.scales, bias)
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
                _workspace(out.device).data_ptr(),
                _WORKSPACE_BYTES,
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


def unscaled_product(num_tokens: int, weight: Fp8Rows) -> Product | None:
    """What makes the sums `x.values @ weight.values.T`, without scales, for so many tokens.

    None where that is no faster than with scales, or the library can't.
    """
    device = weight.values.device
    library = _library_for(device)
    out_features, in_features = weight.values.shape
    shape = Shape(
        num_tokens, out_features, in_features, has_bias=False, adds=False, has_scales=False
    )
    if library is None or not _measured_choices(library, shape) or not _takes_rows(weight):
        return None
    found = products(shape, device)
    return found[0] if found else None


@functools.lru_cache(_MOST_SHAPES)
def products(shape: Shape, device: torch.device, most: int = 1) -> tuple[Product, ...]:
    """By up to `most` algorithms, the fastest first: one that was measured, or what the library
    expects; none if it can't."""
    library = _library_for(device)
    if library is None:
        return ()
    _workspace(device)
    try:
        with torch.cuda.device(device):
            descriptors = Descriptors(library, shape)
            estimates = _estimates(library, descriptors, most)
            measured = _measured_choices(library, shape)
            if estimates and measured:
                preferred = _preferred(library, descriptors, estimates[0], measured)
                estimates = [*preferred, *estimates][:most]
    except CublasLtError as error:
        if not error.is_refusal:
            raise
        _report(f"no algorithm, {error}")
        return ()
    if not estimates:
        _report("no algorithm is known")
    return tuple(Product(library, shape, descriptors, estimate) for estimate in estimates)


def _library_for(device: torch.device) -> Library | None:
    # Alone among NVIDIA's GPUs, Hopper has products that scale each row and column.
    return loaded_library() if is_hopper_card(device) else None


def _estimates(library: Library, of: Descriptors, most: int) -> list[Estimate]:
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
    return [each for each in found[: num_found.value] if each.status == 0]


def _measured_choices(library: Library, shape: Shape) -> dict[Choice, int] | None:
    """Of the algorithm that measured faster than what the library names."""
    if library.cublasLtGetVersion() not in _MEASURED_RELEASE:
        return None
    if not shape.has_scales:
        return _UNSCALED if shape.num_tokens >= _MANY_UNSCALED_TOKENS else None
    is_long = shape.num_tokens >= _MANY_TOKENS and shape.in_features >= _LONG_SUM
    return _FOR_LONG_SUMS if is_long else None


def _preferred(
    library: Library, of: Descriptors, named: Estimate, measured: dict[Choice, int]
) -> list[Estimate]:
    """The algorithm `named`, with choices that measured faster; nothing where this release of the
    library refuses them. On the current device."""
    estimate = Estimate()
    try:
        algorithm = chosen(library, named.algorithm, measured)
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
    except CublasLtError as error:
        if not error.is_refusal:
            raise
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


def _is_aligned(x: Tensor, num_bytes: int = VECTOR_ALIGNMENT) -> bool:
    return x.is_contiguous() and x.data_ptr() % num_bytes == 0


@functools.cache
def _workspace(device: torch.device) -> Tensor:
    """Kept for good, since captured graphs go on using it, and taken with the first product, so
    that the measured largest step has it. At most one stream may multiply at a time."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a product by cuBLASLt must run once before it's captured")
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)


@functools.cache
def _report(reason: str) -> None:
    """Once for each."""
    logger.info("products of 8 bits don't add on their way: %s", reason)
