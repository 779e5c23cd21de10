"""Rotary position embedding, fused with norms of heads before it and with storing keys and values
in the paged pool."""

from ctypes import byref

import torch
from torch import Tensor

from kernels.attention import AttentionBatch
from kernels.kv_format import FP8_DTYPES, UNSCALED, KVScales, native_format, saturated
from kernels.native.arguments import RopeArgs
from kernels.native.library import NativeKernel, Operation, native_kernel
from kernels.norm import HeadNorms, rms_norm, rms_norm_reference
from kernels.turning import turned, turns


def rope_and_store_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    batch: AttentionBatch,
    kv_pool: Tensor,
    layer: int,
    *,
    kv_scales: KVScales = UNSCALED,
    norms: HeadNorms | None = None,
) -> None:
    """Rotate `q` in place, and put the rotated `k` and `v` into the pool at `batch.slots`.

    `q` is [num_tokens, num_heads, head_dim], `k` and `v` [num_tokens, num_kv_heads, head_dim],
    all with a contiguous last dimension (views of one fused qkv tensor do). `cos_sin` is
    [max_positions, rotary_dim] float32: cosines in the first half of a row, sines in the second;
    dimension i rotates with i + rotary_dim / 2 (the NeoX way), those past rotary_dim stay. `k` is
    left as it is. `kv_pool` is [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim];
    with 8 bits it holds what came in divided by `kv_scales`, bounded by its type's largest value,
    and where `kernels.turning.turns` says so, `q` and what is stored of `k` are turned, too. With
    `norms`, heads are normalised before they are rotated, and rounded in between.
    """
    check_rope(q, k, v, cos_sin, kv_pool, norms)
    assert 0 <= layer < kv_pool.shape[1]
    kernel = native_kernel(Operation.ROPE_AND_STORE_KV, q)
    is_uniform = q.dtype is k.dtype is v.dtype
    kv_format = native_format(kv_pool, q.dtype) if is_uniform else None
    inputs = (q, k, v, cos_sin, batch, kv_pool, layer)
    if q.is_cuda:
        from kernels.gpu import rope as gpu

        gpu.rope_and_store_kv(*inputs, kv_scales=kv_scales, norms=norms)
    elif kernel is None or kv_format is None:
        rope_and_store_kv_reference(*inputs, kv_scales=kv_scales, norms=norms)
    else:
        _rope_and_store_kv_native(
            kernel, *inputs, kv_format=kv_format, kv_scales=kv_scales, norms=norms
        )


def _rope_and_store_kv_native(
    kernel: NativeKernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    batch: AttentionBatch,
    kv_pool: Tensor,
    layer: int,
    *,
    kv_format: int,
    kv_scales: KVScales,
    norms: HeadNorms | None,
) -> None:
    if norms is not None:
        q.copy_(rms_norm(q, norms.q, norms.eps))
        k = rms_norm(k, norms.k, norms.eps)
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, block_size = kv_pool.shape[3:5]
    block_stride, layer_stride, *_ = kv_pool.stride()
    _check_layout(q, k, v, cos_sin, kv_pool)
    args = RopeArgs(
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        pool=kv_pool.data_ptr() + layer * layer_stride * kv_pool.element_size(),
        cos_sin=cos_sin.data_ptr(),
        positions=batch.positions.data_ptr(),
        slots=batch.slots.data_ptr(),
        num_tokens=num_tokens,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        half=cos_sin.shape[1] // 2,
        block_size=block_size,
        q_stride=q.stride(0),
        k_stride=k.stride(0),
        v_stride=v.stride(0),
        cos_sin_stride=cos_sin.stride(0),
        block_stride=block_stride,
        kv_format=kv_format,
        turns=turns(kv_pool, cos_sin.shape[1]),
        num_threads=torch.get_num_threads(),
        k_scale=kv_scales.k,
        v_scale=kv_scales.v,
    )
    kernel(byref(args))


def check_rope(
    q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, kv_pool: Tensor, norms: HeadNorms | None
) -> None:
    """Raises ValueError where their shapes, or on a GPU their layouts, don't fit."""
    if k.shape != v.shape or q.shape[::2] != k.shape[::2]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} don't fit")
    if kv_pool.shape[3] != k.shape[1] or kv_pool.shape[5] != k.shape[2]:
        raise ValueError(f"k {tuple(k.shape)} doesn't fit the pool {tuple(kv_pool.shape)}")
    if cos_sin.shape[1] > q.shape[2]:
        raise ValueError(f"rotary_dim {cos_sin.shape[1]} exceeds head_dim {q.shape[2]}")
    if norms is not None and not norms.q.shape == norms.k.shape == q.shape[2:]:
        raise ValueError(f"norms {tuple(norms.q.shape)}, {tuple(norms.k.shape)} don't fit heads")
    if q.is_cuda:
        _check_layout(q, k, v, cos_sin, kv_pool)


def _check_layout(q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, kv_pool: Tensor) -> None:
    heads_are_adjacent = all(x.stride()[1:] == (x.shape[2], 1) for x in (q, k, v))
    if not (heads_are_adjacent and kv_pool.is_contiguous() and cos_sin.is_contiguous()):
        raise ValueError("rope needs adjacent heads, and a contiguous pool and table")


def rope_and_store_kv_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    batch: AttentionBatch,
    kv_pool: Tensor,
    layer: int,
    *,
    kv_scales: KVScales = UNSCALED,
    norms: HeadNorms | None = None,
) -> None:
    """`rope_and_store_kv` in torch."""
    if norms is not None:
        q[:] = rms_norm_reference(q, norms.q, norms.eps)
        k = rms_norm_reference(k, norms.k, norms.eps)
    cos, sin = cos_sin[batch.positions].unsqueeze(1).chunk(2, dim=-1)
    is_turned = turns(kv_pool, cos_sin.shape[1])
    rotated = _rotated(q, cos, sin)
    q[..., : cos_sin.shape[1]] = turned(rotated) if is_turned else rotated
    block_size = kv_pool.shape[4]
    block = batch.slots // block_size
    offset = batch.slots % block_size
    is_fp8 = kv_pool.dtype in FP8_DTYPES
    # Rounded once: floats until they are stored.
    keys = k.to(torch.float32 if is_fp8 else k.dtype, copy=True)
    keys[..., : cos_sin.shape[1]] = _rotated(keys, cos, sin)
    keys = turned(keys) if is_turned else keys
    for at, (values, scale) in enumerate(((keys, kv_scales.k), (v, kv_scales.v))):
        stored = saturated(values.float() / scale, kv_pool.dtype) if is_fp8 else values
        kv_pool.select(1, layer)[:, at][block, :, offset] = stored


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
