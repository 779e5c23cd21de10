"""What cuBLASLt is asked for, by a stand-in that multiplies as its documentation says; and what
happens where it's missing, too old or refuses."""

import ctypes
import logging
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from kernels.fp8 import FP8, Fp8Rows, quantize_rows_reference
from kernels.fp8_linear import Fp8Linear, fp8_linear_reference
from kernels.gpu import cublaslt, cublaslt_library, fp8_linear
from kernels.gpu.cublaslt_library import (
    Algorithm,
    CublasLtError,
    Estimate,
    Operation,
    Preference,
)
from kernels.gpu.cublaslt_shapes import Shape

TYPES = {0: torch.float32, 14: torch.bfloat16, 28: FP8}
HANDLE, STREAM = 77, 78
NUM_TOKENS = 72


def at(address: int, dtype: torch.dtype, num_rows: int, num_columns: int, stride: int) -> Tensor:
    """The column-major matrix there."""
    num_bytes = (num_columns - 1) * stride * dtype.itemsize + num_rows * dtype.itemsize
    memory = (ctypes.c_uint8 * num_bytes).from_address(address)
    values = torch.frombuffer(memory, dtype=dtype)
    return values.as_strided((num_rows, num_columns), (1, stride))


class Multiplier:
    """cuBLASLt, for products of 8 bits by a transposed A; `status` is what multiplying returns."""

    def __init__(self, num_algorithms: int = 3) -> None:
        self.num_algorithms = num_algorithms
        self.status = self.heuristic_status = self.estimate_status = self.check_status = 0
        self.workspace_bytes = 0
        self.alive: dict[int, dict[int, Any]] = {}
        self.num_heuristics = self.num_products = 0
        self.last_algorithm = -1
        self.last_choices: dict[int, int] = {}
        self.version = 130100
        self._next = 1

    def __getattr__(self, name: str) -> Any:
        if name.endswith("Create"):
            return self._create
        if name.endswith("Destroy"):
            return lambda pointer: self.alive.pop(pointer.value) and 0
        if name.endswith("SetAttribute"):
            return self._set
        raise AttributeError(name)

    def _create(self, pointer: Any, *arguments: int) -> int:
        pointer._obj.value = self._next
        self.alive[self._next] = {-1 - index: value for index, value in enumerate(arguments)}
        self._next += 1
        return 0

    def _set(self, pointer: ctypes.c_void_p, attribute: int, value: Any, size: int) -> int:
        assert size == ctypes.sizeof(value._obj)
        self.alive[pointer.value or 0][attribute] = value._obj.value
        return 0

    def cublasLtGetVersion(self) -> int:  # noqa: N802
        return self.version

    def cublasLtMatmulAlgoConfigSetAttribute(  # noqa: N802
        self, algorithm: Any, choice: int, value: Any, size: int
    ) -> int:
        assert size == ctypes.sizeof(value._obj) == (2 if choice in (7, 8) else 4)
        # There is no room for the eighth under its number.
        algorithm._obj.data[3 if choice == 8 else choice] = value._obj.value
        return 0

    def cublasLtMatmulAlgoCheck(self, handle: int, operation: Any, *rest: Any) -> int:  # noqa: N802
        *layouts, _, estimate = rest
        assert handle == HANDLE
        assert len(layouts) == 4
        estimate._obj.workspace_bytes = self.workspace_bytes
        return self.check_status

    def cublasLtMatmulAlgoGetHeuristic(  # noqa: N802
        self, handle: int, operation: Any, *descriptors_most_found: Any
    ) -> int:
        *layouts, preference, most, found, num_found = descriptors_most_found
        assert handle == HANDLE
        assert len(layouts) == 4
        assert self.alive[preference.value][Preference.MAX_WORKSPACE_BYTES] == 32 << 20
        assert operation.value in self.alive
        self.num_heuristics += 1
        num_found._obj.value = min(most, self.num_algorithms)
        for index in range(num_found._obj.value):
            found[index].status = self.estimate_status
            found[index].workspace_bytes = self.workspace_bytes
            found[index].algorithm.data[0] = index
        return self.heuristic_status

    def cublasLtMatmul(self, handle: int, operation: Any, alpha: Any, *arguments: Any) -> int:  # noqa: N802
        a, a_layout, b, b_layout, beta, c, c_layout, d, d_layout, *rest = arguments
        algorithm, workspace, workspace_bytes, stream = rest
        assert (handle, stream) == (HANDLE, STREAM)
        assert workspace is not None
        assert workspace_bytes == 32 << 20
        if self.status:
            return self.status
        self.num_products += 1
        self.last_algorithm = algorithm._obj.data[0]
        self.last_choices = dict(enumerate(algorithm._obj.data[1:7], 1))
        of = self.alive[operation.value]
        assert of[Operation.TRANSPOSE_A] == 1
        assert of[Operation.FAST_ACCUMULATION] == 1
        has_scales = Operation.A_SCALE_MODE in of
        a, b, c, d = (
            at(address, *self._layout(layout))
            for address, layout in ((a, a_layout), (b, b_layout), (c, c_layout), (d, d_layout))
        )
        sums = alpha._obj.value * a.float().T @ b.float()
        if has_scales:
            assert of[Operation.A_SCALE_MODE] == of[Operation.B_SCALE_MODE] == 3
            a_scales = at(of[Operation.A_SCALE_POINTER], torch.float32, len(d), 1, 1)
            b_scales = at(of[Operation.B_SCALE_POINTER], torch.float32, d.shape[1], 1, 1)
            sums *= a_scales * b_scales.T
        else:
            # A pointer to none is a scale of 1.
            assert of.keys().isdisjoint((Operation.A_SCALE_POINTER, Operation.B_SCALE_POINTER))
        if beta._obj.value:
            sums += beta._obj.value * c.float()
        if of.get(Operation.EPILOGUE) == 4:
            assert of[Operation.BIAS_TYPE] == 14
            sums += at(of[Operation.BIAS_POINTER], torch.bfloat16, len(d), 1, 1).float()
        d.copy_(sums)
        return 0

    def _layout(self, descriptor: Any) -> tuple[torch.dtype, int, int, int]:
        layout = self.alive[descriptor.value]
        return TYPES[layout[-1]], layout[-2], layout[-3], layout[-4]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Multiplier]:
    library = Multiplier()
    monkeypatch.setattr(cublaslt, "_library_for", lambda _: library)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: HANDLE)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=STREAM))
    clear()
    yield library
    clear()
    assert not library.alive


def clear() -> None:
    for cache in (cublaslt.products, cublaslt._report, cublaslt._workspace):
        cache.cache_clear()


def aligned(x: Tensor) -> Tensor:
    """A copy where torch's allocator for GPUs would put it."""
    memory = torch.zeros(x.nbytes + 512, dtype=torch.uint8)
    first = -memory.data_ptr() % 512
    copy = memory[first : first + x.nbytes].view(x.dtype).view(x.shape)
    return copy.copy_(x)


def rows(x: Tensor) -> Fp8Rows:
    made = quantize_rows_reference(x)
    return Fp8Rows(aligned(made.values), aligned(made.scales))


class Case:
    def __init__(self, *, has_bias: bool = False) -> None:
        torch.manual_seed(0)
        self.x = rows(torch.randn(NUM_TOKENS, 48))
        bias = aligned(torch.randn(32).bfloat16()) if has_bias else None
        self.packed = Fp8Linear(rows(torch.randn(32, 48)), bias, None)
        self.residual = aligned(torch.randn(NUM_TOKENS, 32).bfloat16())
        self.before = self.residual.clone()

    def add(self, x: Tensor | Fp8Rows | None = None) -> bool:
        return fp8_linear.add_fp8_linear(self.x if x is None else x, self.packed, self.residual)

    def assert_added(self) -> None:
        product = fp8_linear_reference(self.x, self.packed, dtype=torch.float32)
        expected = (product + self.before.float()).bfloat16()
        torch.testing.assert_close(self.residual, expected, atol=1e-2, rtol=1e-2)

    def assert_unchanged(self) -> None:
        assert torch.equal(self.residual, self.before)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("workspace_bytes", [0, 1000])
def test_products_are_added(library: Multiplier, workspace_bytes: int, *, has_bias: bool) -> None:
    library.workspace_bytes = workspace_bytes
    case = Case(has_bias=has_bias)
    assert case.add()
    case.assert_added()
    again = Case(has_bias=has_bias)
    assert again.add()
    again.assert_added()
    assert library.num_heuristics == 1


def test_any_of_its_algorithms_overwrites(library: Multiplier) -> None:
    case = Case()
    shape = Shape(NUM_TOKENS, 32, 48, has_bias=False, adds=False)
    found = cublaslt.products(shape, case.residual.device, 8)
    assert len(found) == library.num_algorithms
    for index, product in enumerate(found):
        case.residual.fill_(torch.nan)
        assert product(case.x, case.packed.weight, None, case.residual)
        assert library.last_algorithm == index
        case.before.zero_()
        case.assert_added()


@pytest.mark.parametrize("is_refused", [False, True])
def test_long_sums_of_many_tokens_have_a_tile_that_was_measured(
    library: Multiplier, monkeypatch: pytest.MonkeyPatch, *, is_refused: bool
) -> None:
    library.check_status = 15 if is_refused else 0
    for limit in ("_MANY_TOKENS", "_LONG_SUM"):
        monkeypatch.setattr(cublaslt, limit, 48)
    case = Case()
    assert case.add()
    case.assert_added()
    none = dict.fromkeys(range(1, 7), 0)
    # The tile, the cluster and the option.
    assert library.last_choices == (none if is_refused else none | {1: 24, 3: 5, 5: 7})
    clear()
    # What numbers mean in other releases isn't known.
    library.version = 130200
    assert Case().add()
    assert library.last_choices == none
    clear()
    library.version = 130100
    monkeypatch.setattr(cublaslt, "_MANY_TOKENS", NUM_TOKENS + 1)
    assert Case().add()
    assert library.last_choices == none


@pytest.mark.parametrize("is_refused", [False, True])
def test_sums_of_many_tokens_have_no_scales(
    library: Multiplier, monkeypatch: pytest.MonkeyPatch, *, is_refused: bool
) -> None:
    case = Case()
    x, weight = case.x, case.packed.weight
    # Of fewer tokens the product with scales is as fast.
    assert fp8_linear.unscaled_sums(x, weight) is None
    monkeypatch.setattr(cublaslt, "_MANY_UNSCALED_TOKENS", NUM_TOKENS)
    library.check_status = 15 if is_refused else 0
    monkeypatch.setattr(torch, "empty", lambda *shape, **of: aligned(torch.zeros(*shape, **of)))
    sums = fp8_linear.unscaled_sums(x, weight)
    assert sums is not None
    torch.testing.assert_close(sums, (x.values.float() @ weight.values.float().T).bfloat16())
    none = dict.fromkeys(range(1, 7), 0)
    # The tile, the cluster and the option.
    assert library.last_choices == (none if is_refused else none | {1: 201, 3: 5, 5: 2})
    library.status = 15
    assert fp8_linear.unscaled_sums(x, weight) is None
    library.version = 130200
    clear()
    library.status = 0
    assert fp8_linear.unscaled_sums(x, weight) is None


def test_nothing_is_done_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    clear()
    # What the product would take isn't made either.
    monkeypatch.delattr(fp8_linear, "quantized")
    case = Case()
    assert not case.add()
    assert not case.add(torch.randn(NUM_TOKENS, 48))
    case.assert_unchanged()


def test_inputs_are_quantized_on_the_way(
    library: Multiplier, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case()
    monkeypatch.setattr(fp8_linear, "quantized", lambda *_: case.x)
    assert case.add(torch.randn(NUM_TOKENS, 48))
    case.assert_added()


@pytest.mark.parametrize("failing", ["heuristic_status", "estimate_status", "num_algorithms"])
def test_nothing_is_done_without_an_algorithm(
    library: Multiplier, caplog: pytest.LogCaptureFixture, failing: str
) -> None:
    setattr(library, failing, 0 if failing == "num_algorithms" else 15)
    case = Case()
    with caplog.at_level(logging.INFO):
        assert not case.add()
        assert not case.add()
    case.assert_unchanged()
    assert library.num_heuristics == 1
    assert len(caplog.records) == 1


def test_what_was_refused_is_not_asked_for_again(library: Multiplier) -> None:
    library.status = 15
    case = Case()
    assert not case.add()
    library.status = 0
    assert not case.add()
    case.assert_unchanged()
    other = Case(has_bias=True)
    assert other.add()
    other.assert_added()


@pytest.mark.parametrize("failing", ["status", "heuristic_status"])
def test_what_fails_is_no_refusal(library: Multiplier, failing: str) -> None:
    setattr(library, failing, 13)
    with pytest.raises(CublasLtError, match="status 13"):
        Case().add()


def test_other_types_and_places_are_refused(library: Multiplier) -> None:
    case = Case()
    weight, residual = case.packed.weight, case.residual
    wide = aligned(torch.zeros(NUM_TOKENS + 1, 32).bfloat16())
    for bias, stream in (
        (None, residual.float()),
        (None, residual.half()),
        (None, wide.view(-1)[8:-24].view(NUM_TOKENS, 32)),
        (None, aligned(residual.T).T),
        (aligned(torch.zeros(32)), residual),
        (aligned(torch.zeros(40).bfloat16())[1:33], residual),
    ):
        assert cublaslt.adding_product(NUM_TOKENS, weight, bias, stream) is None
    longer = rows(torch.randn(NUM_TOKENS + 1, 48))
    case.x = Fp8Rows(longer.values[1:], longer.scales[1:])
    assert not case.add()
    case.assert_unchanged()
    assert library.num_products == 0


def test_shapes_are_kept_up_to_a_limit(library: Multiplier) -> None:
    case = Case()
    for num_tokens in range(1, cublaslt._MOST_SHAPES + 10):
        assert cublaslt.adding_product(num_tokens, case.packed.weight, None, case.residual)
    # Three matrices and what is done with them.
    assert len(library.alive) == 4 * cublaslt._MOST_SHAPES


class TestLoading:
    @pytest.fixture(autouse=True)
    def forget(self) -> Iterator[None]:
        cublaslt_library.loaded_library.cache_clear()
        yield
        cublaslt_library.loaded_library.cache_clear()

    @pytest.mark.parametrize(("version", "is_new"), [(120805, False), (120900, True)])
    def test_old_ones_are_left_alone(
        self, monkeypatch: pytest.MonkeyPatch, version: int, *, is_new: bool
    ) -> None:
        asked: list[str] = []

        def open_library(name: str, *, mode: int) -> Any:
            asked.append(name)
            return SimpleNamespace(cublasLtGetVersion=lambda: version)

        monkeypatch.setattr(torch.version, "cuda", "12.9")
        monkeypatch.setattr(cublaslt_library, "open_library", open_library)
        assert (cublaslt_library.loaded_library() is not None) == is_new
        assert asked == ["libcublasLt.so.12"]

    @pytest.mark.parametrize("cuda", [None, "99.1"])
    def test_none_is_loaded(self, monkeypatch: pytest.MonkeyPatch, cuda: str | None) -> None:
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert cublaslt_library.loaded_library() is None

    def test_one_that_lacks_a_function(self, monkeypatch: pytest.MonkeyPatch) -> None:
        libc = ctypes.CDLL(None)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(ctypes, "PyDLL", lambda *_: libc)
        monkeypatch.setattr(ctypes, "CDLL", lambda *_: libc)
        assert cublaslt_library.loaded_library() is None


def test_structures_are_those_of_the_header() -> None:
    assert ctypes.sizeof(Algorithm) == 64
    assert ctypes.sizeof(Estimate) == 96
    assert (Estimate.workspace_bytes.offset, Estimate.status.offset) == (64, 72)
