from dataclasses import replace

import pytest

from engine.config import EngineConfig
from engine.gpu_memory import GpuMemory
from engine.kv_memory import num_kv_blocks
from protocol.errors import StartupError
from protocol.layout import KVLayout

GIB = 2**30
MEMORY = GpuMemory(
    utilization=0.5,
    total_bytes=80 * GIB,
    weights_bytes=15 * GIB,
    activations_bytes=2 * GIB,
    graphs_bytes=GIB // 2,
    outside_bytes=GIB,
)
LAYOUT = KVLayout(
    model_fingerprint="m",
    num_layers=32,
    num_kv_heads=8,
    head_dim=128,
    block_size=16,
    dtype="bfloat16",
)


def test_kv_blocks_get_what_nothing_else_of_the_share_needs() -> None:
    assert MEMORY.share_bytes == 40 * GIB
    assert MEMORY.kv_bytes() == 40 * GIB - 18 * GIB - GIB // 2


@pytest.mark.parametrize("utilization", [0.1, 0.25])
def test_too_small_a_share_is_said_with_all_numbers(utilization: float) -> None:
    memory = replace(MEMORY, utilization=utilization, weights_bytes=20 * GIB)
    with pytest.raises(StartupError) as error:
        memory.kv_bytes()
    for number in (
        f"--gpu-memory-utilization {utilization} of 80.00 GiB",
        f"allows {80 * utilization:.2f} GiB",
        "weights need 20.00 GiB",
        "the largest step 2.00 GiB",
        "CUDA graphs 0.50 GiB",
        "CUDA itself and transfers 1.00 GiB",
        "23.50 GiB before any KV block",
        "Allow more than 0.294",
    ):
        assert number in str(error.value)
    assert replace(memory, utilization=0.294).kv_bytes() > 0


def test_a_pool_too_small_for_the_length_asked_for_says_where_the_share_went() -> None:
    memory = replace(MEMORY, utilization=0.24)
    config = EngineConfig(max_model_len=8192)
    with pytest.raises(
        StartupError, match=r"8192 tokens needs 1\.00 GiB.* 0\.70 GiB; lower"
    ) as error:
        num_kv_blocks(
            config, LAYOUT, free_bytes=memory.kv_bytes(), origin=f"what is left ({memory})"
        )
    assert "weights need 15.00 GiB" in str(error.value)
    assert "--max-model-len (to 5728 at most)" in str(error.value)
