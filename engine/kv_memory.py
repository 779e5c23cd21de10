"""How many KV blocks there are, and the memory they live in."""

import mmap
import sys

import psutil
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.gpu_memory import gib
from protocol.errors import StartupError
from protocol.layout import KVLayout

# A CPU worker shares its machine: by default it takes a quarter of what is available, and no more
# than some long sequences or many short ones need. Pages cost memory only once they are used.
_CPU_SHARE = 0.25
_CPU_LONG_SEQS = 3
_CPU_TOKENS_PER_SEQ = 112


def num_kv_blocks(
    config: EngineConfig,
    layout: KVLayout,
    *,
    free_bytes: int,
    origin: str = "the memory left for it",
) -> int:
    """How many blocks to allocate.

    `free_bytes` is the memory that may go to KV blocks: what is available on a CPU, what
    profiling left of a GPU's share; `origin` is what to call it. Raises StartupError if the
    result can't hold the sequences that were asked for.
    """
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    if config.kv_cache_memory_bytes is not None:
        kv_bytes, origin = config.kv_cache_memory_bytes, "--kv-cache-memory-bytes"
    else:
        kv_bytes = free_bytes
    num_blocks = kv_bytes // layout.block_bytes
    needed = -(-(config.max_model_len or 1) // layout.block_size)
    if num_blocks < needed:
        raise StartupError(
            f"A KV cache for a sequence of {config.max_model_len or 1} tokens needs "
            f"{gib(needed * layout.block_bytes)}, but {origin} is {gib(kv_bytes)}; "
            f"lower --max-model-len (to {num_blocks * layout.block_size} at most) "
            "or give it more."
        )
    return num_blocks


def cpu_free_bytes(config: EngineConfig, layout: KVLayout, *, max_model_len: int) -> int:
    """The default size of a CPU worker's pool."""
    num_tokens = max(_CPU_LONG_SEQS * max_model_len, _CPU_TOKENS_PER_SEQ * config.max_num_seqs)
    wanted = num_tokens * layout.token_bytes
    return min(wanted, int(_CPU_SHARE * psutil.virtual_memory().available))


def allocate_kv_pool(layout: KVLayout, num_blocks: int, *, device: torch.device) -> Tensor:
    """[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim], contiguous.

    On a CPU it's page-aligned, as transports that register memory want it, and zero pages until
    used. Raises StartupError if there isn't as much memory.
    """
    shape = (
        num_blocks,
        layout.num_layers,
        2,
        layout.num_kv_heads,
        layout.block_size,
        layout.head_dim,
    )
    num_bytes = num_blocks * layout.block_bytes
    dtype: torch.dtype = getattr(torch, layout.dtype)
    if device.type != "cpu":
        try:
            return torch.empty(shape, dtype=dtype, device=device)
        except torch.OutOfMemoryError as error:
            free_bytes, total_bytes = torch.cuda.mem_get_info(device)
            where = f"the GPU has free ({gib(free_bytes)} of {gib(total_bytes)})"
            raise _no_memory(num_blocks, num_bytes, where) from error
    if num_bytes > psutil.virtual_memory().total:
        raise _no_memory(
            num_blocks, num_bytes, f"this machine's {gib(psutil.virtual_memory().total)}"
        )
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise _no_memory(num_blocks, num_bytes, "this machine gives") from error
    if sys.platform == "linux":
        # Transfers and attention both walk it block by block.
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _no_memory(num_blocks: int, num_bytes: int, where: str) -> StartupError:
    return StartupError(
        f"{num_blocks} KV blocks need {gib(num_bytes)}, more than {where}; lower "
        "--kv-cache-memory-bytes, --num-gpu-blocks-override or --gpu-memory-utilization."
    )
