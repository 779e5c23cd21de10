"""Whether FlashAttention 3 can be had where a user asks for it."""

from collections.abc import Sequence

import torch

from protocol.errors import StartupError


def check_flash_attention(
    *,
    device: torch.device,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    head_dim: int,
    layer_windows: Sequence[int | None],
) -> None:
    """Raises StartupError if no prompt of such a model could have it, whatever its length."""
    if device.type != "cuda":
        reason = "needs a Hopper GPU, such as an H100, not a CPU"
    elif None not in layer_windows:
        reason = "knows no sliding windows, which all of this model's layers have"
    else:
        reason = _reason_against(device, dtype, kv_dtype, head_dim)
    if reason is not None:
        raise StartupError(
            f"--attention-backend flash-attn {reason}; leave it out for our own kernels."
        )


def _reason_against(
    device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int
) -> str | None:
    # Imported here: a machine without a GPU needs no Triton.
    from kernels.gpu import flash_attention
    from kernels.gpu.cards import is_hopper_card

    if not is_hopper_card(device):
        name = torch.cuda.get_device_name(device)
        return f"needs a Hopper GPU, such as an H100, not {name}"
    if dtype is not torch.bfloat16:
        return f"needs a model in bfloat16, and this one runs in {_name(dtype)}"
    if kv_dtype not in flash_attention.KV_DTYPES:
        return f"takes keys and values in bfloat16 or fp8_e4m3, not in {_name(kv_dtype)}"
    if head_dim not in flash_attention.HEAD_DIMS:
        sizes = ", ".join(map(str, flash_attention.HEAD_DIMS))
        return f"takes attention heads of {sizes} elements, and this model's have {head_dim}"
    try:
        flash_attention.library()
    except ImportError as error:
        return (
            f"needs FlashAttention 3, as `pip install 'tandem[flash-attn]'` installs it ({error})"
        )
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
