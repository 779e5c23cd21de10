"""The part of cuBLASLt's interface that `kernels.gpu.cublaslt` needs, by ctypes.

Numbers, types and sizes are those of cublasLt.h, cublas_api.h and library_types.h, the same in
CUDA 12.9, 13.0 and 13.1 and cuBLAS 13.10. What grows from release to release, descriptors, is
made by the library itself.
"""

import ctypes
import functools
import logging
import os
import weakref
from ctypes import POINTER, byref, c_int, c_int64, c_size_t, c_uint64, c_void_p
from enum import IntEnum
from typing import Any, Protocol

import torch

logger = logging.getLogger(__name__)

FLOAT32, BFLOAT16, E4M3 = 0, 14, 28
"""Of cudaDataType_t."""
COMPUTE_FLOAT32 = 68
"""Of cublasComputeType_t."""
TRANSPOSED = 1
"""Of cublasOperation_t."""
ADD_BIAS = 4
"""Of cublasLtEpilogue_t: a value for each row of the column-major result."""
SCALE_OF_EACH_ROW = 3
"""CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F: of op(A)'s rows, and of op(B)'s columns."""
_MATRIX_SCALES_VERSION = 120900


_REFUSALS = (7, 8, 15)
"""Of cublasStatus_t: for these values, on this architecture, or at all."""


class Operation(IntEnum):
    """Attributes of what is multiplied, and how (cublasLtMatmulDescAttributes_t)."""

    TRANSPOSE_A = 3
    EPILOGUE = 7
    BIAS_POINTER = 8
    A_SCALE_POINTER = 17
    B_SCALE_POINTER = 18
    FAST_ACCUMULATION = 25
    BIAS_TYPE = 26
    A_SCALE_MODE = 31
    B_SCALE_MODE = 32


class Preference(IntEnum):
    """Attributes of what an algorithm may need (cublasLtMatmulPreferenceAttributes_t)."""

    MAX_WORKSPACE_BYTES = 1


class Choice(IntEnum):
    """Attributes of an algorithm (cublasLtMatmulAlgoConfigAttributes_t)."""

    ALGORITHM = 0
    TILE = 1
    SPLITS = 2
    REDUCTION = 3
    SWIZZLE = 4
    OPTION = 5
    STAGES = 6
    INNER_SHAPE = 7
    CLUSTER_SHAPE = 8


_SHORT_CHOICES = (Choice.INNER_SHAPE, Choice.CLUSTER_SHAPE)
TILE_256_BY_128, TILE_176_BY_128 = 24, 201
"""Of cublasLtMatmulTile_t."""
CLUSTER_1_BY_2 = 5
"""Of cublasLtClusterShape_t."""


class Algorithm(ctypes.Structure):
    """cublasLtMatmulAlgo_t."""

    _fields_ = (("data", c_uint64 * 8),)


class Estimate(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t: an algorithm and what it takes."""

    _fields_ = (
        ("algorithm", Algorithm),
        ("workspace_bytes", c_size_t),
        ("status", c_int),
        ("waves", ctypes.c_float),
        ("reserved", c_int * 4),
    )


class CublasLtError(Exception):
    """A call of the library's returned another status than success."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.is_refusal = status in _REFUSALS
        """Whether it doesn't do what it was asked for, and has done nothing."""


class Library(Protocol):
    """The functions, by their names in C. All return a status, 0 for success."""

    def __getattr__(self, name: str, /) -> Any: ...  # noqa: ANN401


class Descriptor:
    """One of the library's, which is destroyed with this object."""

    def __init__(self, library: Library, kind: str, *arguments: int) -> None:
        """`kind` as in the name of the function that creates it. Raises CublasLtError."""
        self.pointer = c_void_p()
        check(getattr(library, f"cublasLt{kind}Create")(byref(self.pointer), *arguments))
        destroy = getattr(library, f"cublasLt{kind}Destroy")
        # Not when the process ends: other threads may be within the library.
        weakref.finalize(self, destroy, self.pointer).atexit = False
        self._set = getattr(library, f"cublasLt{kind}SetAttribute")

    def set(self, attribute: IntEnum, value: "ctypes._SimpleCData[Any]") -> None:
        """`value` is of the attribute's own size. Raises CublasLtError."""
        check(self._set(self.pointer, attribute, byref(value), ctypes.sizeof(value)))


def check(status: int) -> None:
    """Raises CublasLtError."""
    if status:
        raise CublasLtError(status)


def choices(library: Library, algorithm: Algorithm) -> dict[str, int]:
    """What tells `algorithm` from others, in numbers of cublasLt.h. Raises CublasLtError."""
    found: dict[str, int] = {}
    for choice in Choice:
        value = _number(choice)
        size = ctypes.sizeof(value)
        check(
            library.cublasLtMatmulAlgoConfigGetAttribute(
                byref(algorithm), choice, byref(value), size, byref(c_size_t())
            )
        )
        found[choice.name.lower()] = value.value
    return found


def chosen(library: Library, algorithm: Algorithm, values: dict[Choice, int]) -> Algorithm:
    """`algorithm` with other choices. Raises CublasLtError."""
    other = Algorithm.from_buffer_copy(algorithm)
    for choice, number in values.items():
        value = _number(choice, number)
        check(
            library.cublasLtMatmulAlgoConfigSetAttribute(
                byref(other), choice, byref(value), ctypes.sizeof(value)
            )
        )
    return other


def _number(choice: Choice, value: int = 0) -> "ctypes.c_uint16 | ctypes.c_uint32":
    return ctypes.c_uint16(value) if choice in _SHORT_CHOICES else ctypes.c_uint32(value)


@functools.cache
def loaded_library() -> Library | None:
    """The library that torch has loaded; None if there is none, or it's too old to scale each row
    and column of a product."""
    cuda = torch.version.cuda  # pyright: ignore[reportAttributeAccessIssue]
    if cuda is None:
        return None
    name = f"libcublasLt.so.{cuda.split('.')[0]}"
    try:
        library = open_library(name, mode=os.RTLD_NOLOAD)
    except (OSError, AttributeError) as error:
        logger.info("products of 8 bits won't add on their way: %s", error)
        return None
    version = library.cublasLtGetVersion()
    if version < _MATRIX_SCALES_VERSION:
        logger.info("products of 8 bits won't add on their way: %s is of %d", name, version)
        return None
    return library


def open_library(name: str, *, mode: int = ctypes.DEFAULT_MODE) -> Library:
    """The library of this name or path. Raises OSError, or AttributeError for a missing function.

    Calls that take microseconds keep Python's interpreter lock; one that launches may wait.
    """
    short, long = ctypes.PyDLL(name, mode), ctypes.CDLL(name, mode)
    return _Functions(short, long)


_SET = (c_void_p, c_int, c_void_p, c_size_t)
_SHORT: dict[str, tuple[Any, ...]] = {
    "cublasLtGetVersion": (),
    "cublasLtMatrixLayoutCreate": (POINTER(c_void_p), c_int, c_uint64, c_uint64, c_int64),
    "cublasLtMatrixLayoutDestroy": (c_void_p,),
    "cublasLtMatrixLayoutSetAttribute": _SET,
    "cublasLtMatmulDescCreate": (POINTER(c_void_p), c_int, c_int),
    "cublasLtMatmulDescDestroy": (c_void_p,),
    "cublasLtMatmulDescSetAttribute": _SET,
    "cublasLtMatmulPreferenceCreate": (POINTER(c_void_p),),
    "cublasLtMatmulPreferenceDestroy": (c_void_p,),
    "cublasLtMatmulPreferenceSetAttribute": _SET,
    "cublasLtMatmulAlgoConfigGetAttribute": (*_SET, POINTER(c_size_t)),
    "cublasLtMatmulAlgoConfigSetAttribute": _SET,
}
_LONG: dict[str, tuple[Any, ...]] = {
    # Handle, operation, A, B, C, D.
    "cublasLtMatmulAlgoCheck": (*(c_void_p,) * 6, POINTER(Algorithm), POINTER(Estimate)),
    "cublasLtMatmulAlgoGetHeuristic": (
        *(c_void_p,) * 7,  # handle, operation, A, B, C, D, preference
        c_int,
        POINTER(Estimate),
        POINTER(c_int),
    ),
    "cublasLtMatmul": (
        *(c_void_p,) * 12,  # handle, operation, alpha, A, B, beta, C, D: pointer and layout
        POINTER(Algorithm),
        c_void_p,
        c_size_t,
        c_void_p,  # the stream
    ),
}


class _Functions:
    """`Library`'s, with the types of their arguments."""

    def __init__(self, short: ctypes.CDLL, long: ctypes.CDLL) -> None:
        for library, prototypes in ((short, _SHORT), (long, _LONG)):
            for name, argument_types in prototypes.items():
                function = library[name]
                function.argtypes = argument_types
                setattr(self, name, function)
        self.cublasLtGetVersion.restype = c_size_t

    def __getattr__(self, name: str, /) -> Any:  # noqa: ANN401
        raise AttributeError(f"cuBLASLt's {name} isn't declared here")
