"""Whether what a benchmark times is right: its error against a reference of higher precision.

References multiply the very numbers that the kernels get, so what is left is how kernels round.
"""

import torch
from torch import Tensor

from kernels.attention import AttentionBatch, paged_attention_reference
from kernels.fp8 import FP8, Fp8Rows

# bfloat16 keeps 8 bits, and rounding to it costs 1.7e-3 of a result's norm.
RESULT_ERROR = 4e-3
# Over thousands of 8-bit products the tensor cores' short sums cost up to 2.9e-3 besides.
FP8_RESULT_ERROR = 5e-3
# Of 16-bit inputs, quantization keeps 4 bits: 2.6e-2.
QUANTIZED_ERROR = 4e-2
# Weights are rounded to bfloat16, too, before they multiply values.
ATTENTION_ERROR = 1e-2
# FlashAttention 3 rounds queries and weights to 8 bits for an 8-bit pool, 2.6e-2 each.
FP8_ATTENTION_ERROR = 6e-2
MOST_ROWS = 128
_LAST_ROWS = 256


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||; NaN if a number is none, or the shapes differ."""
    if actual.shape != expected.shape:
        return float("nan")
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm()).item()


class Check:
    """Compares results of a case with what is `expected` of all, or of some `rows`."""

    def __init__(
        self, case: str, expected: Tensor, *, bound: float, rows: Tensor | None = None
    ) -> None:
        self._case, self._expected, self._bound, self._rows = case, expected, bound, rows
        self.errors: dict[str, float] = {}
        """Of what was right, to three digits."""

    def __call__(self, name: str, actual: Tensor) -> float:
        """The relative error. Raises SystemExit where it isn't below the bound."""
        rows = self._rows
        error = relative_error(actual if rows is None else actual[rows], self._expected)
        if not error < self._bound:
            bound = f"{self._bound:.0e}"
            raise SystemExit(
                f"{self._case}: {name} has an error of {error:.2e}, allowed is {bound}"
            )
        self.errors[name] = float(f"{error:.2e}")
        return self.errors[name]


def sampled_rows(num_rows: int, device: torch.device) -> Tensor:
    """int64 [at most `MOST_ROWS`]: all of few rows; of many, the first, the last and random ones,
    half of them near the end, where tiles are cut off."""
    if num_rows <= MOST_ROWS:
        return torch.arange(num_rows, device=device)
    anywhere = torch.randint(num_rows, (MOST_ROWS // 2,), device=device)
    from_end = torch.randint(min(num_rows, _LAST_ROWS), (MOST_ROWS // 2,), device=device)
    anywhere[0], from_end[0] = 0, 0
    return torch.cat((anywhere, num_rows - 1 - from_end))


def rows_of(x: Fp8Rows, rows: Tensor) -> Fp8Rows:
    # Not every operation knows float8; bytes are as good.
    return Fp8Rows(x.values.view(torch.uint8)[rows].view(FP8), x.scales[rows])


def product(x: Tensor | Fp8Rows, weight: Tensor | Fp8Rows, rows: Tensor) -> Tensor:
    """`x[rows] @ weight.T` in float32, or with operands of 8 bits in float64."""
    if isinstance(weight, Tensor):
        assert isinstance(x, Tensor)
        return x[rows].float() @ weight.float().T
    is_fp8 = isinstance(x, Fp8Rows)
    given = rows_of(x, rows).dequantized(torch.float64) if is_fp8 else x[rows].double()
    return given @ weight.dequantized(torch.float64).T


def attention(
    q: Tensor, pool: Tensor, layer: int, batch: AttentionBatch, rows: Tensor, *, scale: float
) -> Tensor:
    """Attention of `q[rows]` in float32, each query as a sequence of its own.

    `batch` has sequences of one length and as many queries each.
    """
    seqs = rows // batch.max_query_len
    positions = batch.max_kv_len - batch.max_query_len + rows % batch.max_query_len
    queries = AttentionBatch(
        query_starts=torch.arange(len(rows) + 1, device=rows.device, dtype=torch.int32),
        kv_lens=(positions + 1).int(),
        block_tables=batch.block_tables[seqs],
        slots=torch.zeros_like(rows),
        positions=positions,
        max_query_len=1,
        max_kv_len=batch.max_kv_len,
        num_seqs=len(rows),
    )
    # All numbers of 8 bits are some of 16.
    of_layer = pool[:, layer : layer + 1].to(q.dtype)
    return paged_attention_reference(q[rows].float(), of_layer, 0, queries, scale=scale)
