import mmap

import psutil
import pytest
import torch

from engine.config import EngineConfig
from engine.kv_memory import allocate_kv_pool, cpu_free_bytes, num_kv_blocks
from protocol.errors import StartupError
from protocol.layout import KVLayout

CPU = torch.device("cpu")
LAYOUT = KVLayout(
    model_fingerprint="m", num_layers=2, num_kv_heads=2, head_dim=8, block_size=4, dtype="bfloat16"
)


def test_the_override_wins() -> None:
    config = EngineConfig(num_gpu_blocks_override=5, kv_cache_memory_bytes=2**30)
    assert num_kv_blocks(config, LAYOUT, free_bytes=0) == 5


def test_the_budget_is_spent_on_whole_blocks() -> None:
    config = EngineConfig(kv_cache_memory_bytes=10 * LAYOUT.block_bytes - 1)
    assert num_kv_blocks(config, LAYOUT, free_bytes=0) == 9
    assert num_kv_blocks(EngineConfig(), LAYOUT, free_bytes=3 * LAYOUT.block_bytes) == 3


def test_a_pool_too_small_for_the_length_asked_for_names_the_numbers() -> None:
    config = EngineConfig(max_model_len=41, kv_cache_memory_bytes=10 * LAYOUT.block_bytes)
    with pytest.raises(StartupError, match=r"41 tokens.*--max-model-len \(to 40 at most\)"):
        num_kv_blocks(config, LAYOUT, free_bytes=0)
    with pytest.raises(StartupError, match="1 tokens"):
        num_kv_blocks(EngineConfig(), LAYOUT, free_bytes=LAYOUT.block_bytes - 1)


def test_the_default_on_a_cpu_is_bounded_both_ways() -> None:
    available = psutil.virtual_memory().available
    few = cpu_free_bytes(EngineConfig(max_num_seqs=1), LAYOUT, max_model_len=100)
    assert few == 300 * LAYOUT.token_bytes
    many = cpu_free_bytes(EngineConfig(), LAYOUT, max_model_len=2**40)
    assert many < available / 2


def test_the_pool_is_page_aligned_and_writable() -> None:
    pool = allocate_kv_pool(LAYOUT, 7, device=CPU)
    assert pool.shape == (7, 2, 2, 2, 4, 8)
    assert pool.is_contiguous()
    assert pool.nbytes == 7 * LAYOUT.block_bytes
    assert pool.data_ptr() % mmap.PAGESIZE == 0
    assert not pool.any()
    pool[3].fill_(1.0)
    assert pool.sum() == pool[3].numel()


def test_more_than_the_machine_has_is_refused() -> None:
    num_blocks = 2 * psutil.virtual_memory().total // LAYOUT.block_bytes
    with pytest.raises(StartupError, match="GiB, more than"):
        allocate_kv_pool(LAYOUT, num_blocks, device=CPU)
