"""Steps over made-up sequences: they measure a GPU's memory and take first-use costs."""

import torch
from torch import Tensor

from engine.compiling import compile_kernels
from engine.config import EngineConfig
from engine.decode_graphs import graph_sizes
from engine.gpu_memory import GpuMemory, gib
from engine.kv_memory import allocate_kv_pool
from engine.made_up_steps import largest_step, warm_up_steps
from engine.models.causal_lm import CausalLM
from engine.prompt_graphs import graph_shapes
from engine.runner import ModelRunner
from engine.scheduler.plan import StepPlan
from protocol.errors import StartupError
from protocol.layout import KVLayout

# A process's CUDA context, its libraries' and our kernels (0.75 GiB on an H100), and its staging
# memory for transfers (0.25). Not measured: workers that start at the same time on one card can't
# tell whose memory is whose.
_OUTSIDE_TORCH_BYTES = 1 << 30
# What the driver keeps of a captured graph; an H100's takes 2 MiB for 32 layers.
_GRAPH_LAYER_BYTES = 1 << 16


def warm_up(runner: ModelRunner, kv_pool: Tensor, *, max_model_len: int) -> None:
    """Steps of a few sequences, in a pool that holds nothing yet."""
    num_blocks, block_size = kv_pool.shape[0], kv_pool.shape[4]
    max_tokens = min(num_blocks * block_size, max_model_len)
    for plan in warm_up_steps(block_size=block_size, max_tokens=max_tokens, is_gpu=kv_pool.is_cuda):
        _run(runner, plan)


def measure_gpu_memory(
    model: CausalLM, layout: KVLayout, config: EngineConfig, *, progress: bool
) -> GpuMemory:
    """What the model, its largest step and its CUDA graphs take of this worker's share of a GPU.

    Kernels are compiled on the way. Raises StartupError if that does not fit in what is free.
    """
    device = model.device
    torch.cuda.empty_cache()
    weights_bytes = torch.cuda.memory_allocated(device)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    # Reserved, not allocated: what lies idle between a step's tensors is nobody else's.
    before_bytes = torch.cuda.memory_reserved(device)
    try:
        # Only now: what kernels keep from their first call on is a part of the largest step.
        compile_kernels(model, layout, config, progress=progress)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        kv_bytes = _run_largest_step(model, layout, config)
        torch.cuda.synchronize(device)
        activations_bytes = torch.cuda.max_memory_reserved(device) - before_bytes - kv_bytes
        torch.cuda.empty_cache()
        graphs_bytes = 0 if config.enforce_eager else _graphs_bytes(model, layout, config)
    except torch.OutOfMemoryError as error:
        raise StartupError(
            f"The largest step, of {config.max_num_batched_tokens} tokens, does not fit in what "
            f"the GPU has free ({gib(free_bytes)} of {gib(total_bytes)}) beside "
            f"{gib(weights_bytes)} of weights; lower --max-num-batched-tokens, or end what else "
            "uses the GPU."
        ) from error
    return GpuMemory(
        utilization=config.gpu_memory_utilization,
        total_bytes=total_bytes,
        weights_bytes=weights_bytes,
        activations_bytes=activations_bytes,
        graphs_bytes=graphs_bytes,
        outside_bytes=_OUTSIDE_TORCH_BYTES,
    )


def _graphs_bytes(model: CausalLM, layout: KVLayout, config: EngineConfig) -> int:
    """Memory of all graphs, from captures of the largest: the others share their tensors."""
    device = model.device
    sizes = graph_sizes(config.max_num_seqs)
    shapes = graph_shapes(config.max_num_seqs, config.max_num_batched_tokens)
    kv_pool = allocate_kv_pool(layout, 1, device=device)
    before_bytes = torch.cuda.memory_reserved(device)
    runner = ModelRunner(model, kv_pool, root_seed=0)
    runner.capture_graphs(sizes[-1:], shapes[:1], progress=False, always=True)
    torch.cuda.empty_cache()
    shared_bytes = torch.cuda.memory_reserved(device) - before_bytes
    del runner, kv_pool
    torch.cuda.empty_cache()
    num_graphs = len(sizes) + len(shapes)
    return shared_bytes + num_graphs * layout.num_layers * _GRAPH_LAYER_BYTES


def _run_largest_step(model: CausalLM, layout: KVLayout, config: EngineConfig) -> int:
    """Returns the bytes of its blocks, which are gone again."""
    plan, num_blocks = largest_step(
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        max_model_len=model.config.max_model_len,
        block_size=layout.block_size,
    )
    kv_pool = allocate_kv_pool(layout, num_blocks, device=model.device)
    runner = ModelRunner(
        model, kv_pool, root_seed=0, uses_flash_attention=config.uses_flash_attention
    )
    _run(runner, plan)
    return kv_pool.nbytes


def _run(runner: ModelRunner, plan: StepPlan) -> None:
    step = runner.launch(plan)
    step.sample()
    step.result()
    for item in plan.scheduled:
        runner.release(item.sequence)
