"""Linear layers over weights of 16 bits: our kernels for the tokens of a decode step, where they
are faster than torch's."""

from torch import Tensor

from kernels.gpu import linear as few_tokens
from kernels.gpu.hopper.linear_tiles import HopperTile, tile_for_16_bits
from kernels.gpu.hopper.support import is_hopper
from kernels.gpu.linear_tiles import is_fastest

# What the hardware that copies tiles asks of rows.
_ROW_BYTES = 16


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, residual: Tensor | None = None
) -> Tensor | None:
    """`x @ weight.T + bias`, added to `residual`, in place, if there is one. None, and nothing
    done, where torch's product is faster.

    All are of one type of 16 bits, `weight` is contiguous, `x` in its rows.
    """
    if not len(x):
        return None
    if is_fastest(len(x), *weight.shape):
        return few_tokens.linear(x, weight, bias, residual=residual)
    tile = _hopper_tile(x, weight)
    if tile is None:
        return None
    # Imported on first use: not every Triton has Gluon.
    from kernels.gpu.hopper.linear import hopper_linear

    return hopper_linear(x, weight, bias, tile=tile, residual=residual)


def _hopper_tile(x: Tensor, weight: Tensor) -> HopperTile | None:
    if not is_hopper(x.device) or not (_has_whole_rows(x) and _has_whole_rows(weight)):
        return None
    return tile_for_16_bits(len(x), *weight.shape)


def _has_whole_rows(x: Tensor) -> bool:
    row_bytes = x.stride(0) * x.element_size()
    return row_bytes % _ROW_BYTES == 0 and x.data_ptr() % _ROW_BYTES == 0
