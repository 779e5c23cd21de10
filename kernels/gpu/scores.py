"""Changes to rows of scores before the choice: penalties, and what masks rule out."""

import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.dependent_launch import (
    launch_options,
    let_successor_start,
    wait_for_predecessor,
)
from kernels.gpu.launching import launch
from kernels.gpu.sizes import ceil_div

_BLOCK = 1024


@triton.jit
def _penalize_kernel(
    scores,
    stride,
    places,
    slots,
    output_counts,
    in_prompt,
    width,
    repetition,
    presence,
    frequency,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    slot = tl.load(slots + row)
    count = tl.load(output_counts + slot * width + columns, mask=mask, other=0)
    is_prompt = tl.load(in_prompt + slot * width + columns, mask=mask, other=0)
    is_output = count > 0
    factor = tl.load(repetition + row)
    there = scores + tl.load(places + row) * stride + columns
    score = tl.load(there, mask=mask)
    repeated = tl.where(score > 0.0, score / factor, score * factor)
    score = tl.where(is_output | (is_prompt != 0), repeated, score)
    score -= tl.load(frequency + row) * count.to(tl.float32)
    score -= tl.where(is_output, tl.load(presence + row), 0.0)
    tl.store(there, score, mask=mask)


@triton.jit
def _rule_out_kernel(
    scores, stride, width, places, allowed, num_words, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    words = columns // 32
    mask = tl.load(allowed + row * num_words + words, mask=words < num_words, other=0)
    is_out = ((mask >> (columns % 32)) & 1) == 0
    there = scores + tl.load(places + row) * stride + columns
    tl.store(there, float("-inf"), mask=is_out & (columns < width))


def penalize(
    scores: Tensor,
    *,
    places: Tensor,
    slots: Tensor,
    output_counts: Tensor,
    in_prompt: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    """`kernels.sampling.penalize` for rows of scores that are contiguous."""
    width = in_prompt.shape[1]
    if len(places):
        launch(_penalize_kernel, (len(places), ceil_div(width, _BLOCK)))(
            scores,
            scores.stride(0),
            places,
            slots,
            output_counts,
            in_prompt,
            width,
            repetition,
            presence,
            frequency,
            BLOCK=_BLOCK,
            num_warps=4,
            **launch_options(scores.device),
        )


def rule_out(scores: Tensor, *, places: Tensor, allowed: Tensor) -> None:
    """`kernels.sampling.rule_out` for rows of scores that are contiguous, masks on the device."""
    width = scores.shape[1]
    if len(places):
        launch(_rule_out_kernel, (len(places), ceil_div(width, _BLOCK)))(
            scores,
            scores.stride(0),
            width,
            places,
            allowed,
            allowed.shape[1],
            BLOCK=_BLOCK,
            num_warps=4,
            **launch_options(scores.device),
        )
