"""Linear layers over weights that are stored once, in the layout their device reads fastest."""

from ctypes import byref
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.memory import HugePageArena
from kernels.native.arguments import LinearArgs, PackedRowsArgs, PackWeightArgs
from kernels.native.library import Operation, native_kernel

_PANEL = 32
_arena = HugePageArena()


@dataclass(frozen=True, slots=True, eq=False)
class PackedLinear:
    """The only copy of a layer's weight; made by `pack_linear`.

    A projection that always follows another on the same input (q, k and v; gate and up) belongs
    into one PackedLinear with rows concatenated: one pass over the input, one call.
    """

    out_features: int
    in_features: int
    weight: Tensor
    """[out_features, in_features], or [panels, ceil(in_features / 2), 32, 2] if `is_native`."""
    bias: Tensor | None
    is_native: bool

    def unpacked(self) -> Tensor:
        """The weight as [out_features, in_features]; a copy if the layout differs."""
        if not self.is_native:
            return self.weight
        rows = self.weight.transpose(1, 2).flatten(2, 3).flatten(0, 1)
        return rows[: self.out_features, : self.in_features].contiguous()

    def from_channel(self, first: int) -> "PackedLinear":
        """The layer of output channels `first` and up, a multiple of 32; its memory is a part of
        this one's."""
        assert first % _PANEL == 0
        return PackedLinear(
            self.out_features - first,
            self.in_features,
            self.weight[first // _PANEL if self.is_native else first :],
            None if self.bias is None else self.bias[first:],
            self.is_native,
        )

    def embed(self, ids: Tensor) -> Tensor:
        """Rows `ids` [num_tokens] of the weight, [num_tokens, in_features]: a tied embedding.

        Raises IndexError for an id that isn't a row.
        """
        kernel = native_kernel(Operation.PACKED_ROWS, self.weight)
        if not self.is_native or kernel is None:
            return torch.nn.functional.embedding(ids, self.weight)
        ids = ids.to(torch.int64).contiguous()
        out = torch.empty((ids.shape[0], self.in_features), dtype=self.weight.dtype)
        args = PackedRowsArgs(
            packed=self.weight.data_ptr(),
            rows=ids.data_ptr(),
            out=out.data_ptr(),
            num_rows=ids.shape[0],
            in_features=self.in_features,
            out_features=self.out_features,
            num_threads=torch.get_num_threads(),
        )
        if not kernel(byref(args)):
            raise IndexError(f"an id lies outside of 0 to {self.out_features - 1}")
        return out


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """Store `weight` [out_features, in_features] for `linear`. Drop the original afterwards.

    With bfloat16 on a CPU that has the instructions, the layout is our own; else it's torch's.
    """
    if weight.dim() != 2:
        raise ValueError(f"a linear weight has two dimensions, not {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is {tuple(bias.shape)} but weight {tuple(weight.shape)}")
    out_features, in_features = weight.shape
    weight = weight.contiguous()
    kernel = native_kernel(Operation.PACK_WEIGHT, weight)
    if kernel is None or (bias is not None and bias.dtype is not weight.dtype):
        return PackedLinear(out_features, in_features, weight, bias, is_native=False)
    shape = (-(-out_features // _PANEL), -(-in_features // 2), _PANEL, 2)
    packed = _arena.empty(shape, weight.dtype)
    args = PackWeightArgs(
        weight=weight.data_ptr(),
        packed=packed.data_ptr(),
        in_features=in_features,
        out_features=out_features,
        num_threads=torch.get_num_threads(),
    )
    kernel(byref(args))
    bias = None if bias is None else bias.contiguous()
    return PackedLinear(out_features, in_features, packed, bias, is_native=True)


def linear(x: Tensor, packed: PackedLinear) -> Tensor:
    """`x @ weight.T + bias`: [num_tokens, in_features] to [num_tokens, out_features].

    In the native layout a token's result is the same to the bit in any batch.
    """
    num_tokens, in_features = x.shape
    if in_features != packed.in_features:
        raise ValueError(f"x is {tuple(x.shape)}, expected [num_tokens, {packed.in_features}]")
    if x.is_cuda and x.dtype is not torch.float32 and x.stride(1) == 1:
        from kernels.gpu import linear_choice as gpu

        out = gpu.linear(x, packed.weight, packed.bias)
        if out is not None:
            return out
    kernel = native_kernel(Operation.LINEAR, x)
    if not packed.is_native or kernel is None:
        return linear_reference(x, packed)
    x_stride, element_stride = x.stride()
    if element_stride != 1:
        x, x_stride = x.contiguous(), in_features
    out = torch.empty((num_tokens, packed.out_features), dtype=x.dtype)
    bias = packed.bias
    args = LinearArgs(
        weight=packed.weight.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        x=x.data_ptr(),
        out=out.data_ptr(),
        num_tokens=num_tokens,
        in_features=in_features,
        out_features=packed.out_features,
        x_stride=x_stride,
        num_threads=torch.get_num_threads(),
    )
    if not kernel(byref(args)):
        raise MemoryError("no memory for a linear layer's workspace")
    return out


def add_linear(x: Tensor, packed: PackedLinear, residual: Tensor) -> bool:
    """`residual += linear(x, packed)` where the product adds on its way; elsewhere nothing, False.

    `residual` is [num_tokens, out_features]. The sum is rounded once.
    """
    is_fused = x.is_cuda and x.dtype is residual.dtype is not torch.float32
    if not is_fused or not residual.is_contiguous() or x.stride(1) != 1:
        return False
    if residual.shape != (x.shape[0], packed.out_features):
        raise ValueError(f"x is {tuple(x.shape)} but residual {tuple(residual.shape)}")
    from kernels.gpu import linear_choice as gpu

    if gpu.linear(x, packed.weight, packed.bias, residual=residual) is not None:
        return True
    if packed.bias is None:
        residual.addmm_(x, packed.weight.T)
    return packed.bias is None


def linear_reference(x: Tensor, packed: PackedLinear) -> Tensor:
    """`linear` in torch."""
    return torch.nn.functional.linear(x, packed.unpacked(), packed.bias)
