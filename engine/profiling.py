"""Steps over made-up sequences: they measure a GPU's memory and take first-use costs."""

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.decode_graphs import graph_sizes
from engine.gpu_memory import GpuMemory, gib
from engine.kv_memory import allocate_kv_pool
from engine.models.causal_lm import CausalLM
from engine.prompt_graphs import graph_shapes
from engine.runner import ModelRunner
from engine.scheduler.plan import ScheduledSequence, StepPlan
from engine.sequence import Sequence
from protocol.errors import StartupError
from protocol.ids import RequestKey
from protocol.layout import KVLayout
from protocol.request import Request
from protocol.sampling import SamplingParams

_WARM_UP_TOKENS, _WARM_UP_TOKENS_ON_GPU = 64, 512
# A process's CUDA context, its libraries' and our kernels (0.75 GiB on an H100), and its staging
# memory for transfers (0.25). Not measured: workers that start at the same time on one card can't
# tell whose memory is whose.
_OUTSIDE_TORCH_BYTES = 1 << 30
# What the driver keeps of a captured graph; an H100's takes 2 MiB for 32 layers.
_GRAPH_LAYER_BYTES = 1 << 16


def warm_up(runner: ModelRunner, kv_pool: Tensor, *, max_model_len: int) -> None:
    """A prompt and a decode step, greedy, random and filtered, in a pool that holds nothing yet."""
    num_blocks, block_size = kv_pool.shape[0], kv_pool.shape[4]
    # On a GPU, kernels of their own attend for long prompts.
    longest = _WARM_UP_TOKENS_ON_GPU if kv_pool.is_cuda else _WARM_UP_TOKENS
    for wanted, sampling in (
        (longest, SamplingParams(temperature=0.0)),
        (_WARM_UP_TOKENS, SamplingParams()),
        (_WARM_UP_TOKENS, SamplingParams(top_p=0.9)),
    ):
        num_tokens = min(wanted, num_blocks * block_size - 1, max_model_len - 1)
        block_ids = list(range(-(-(num_tokens + 1) // block_size)))
        sequence = _made_up(num_tokens, block_ids, sampling)
        _run(runner, [sequence], [num_tokens])
        sequence.num_computed_tokens = num_tokens
        sequence.token_ids.append(0)
        _run(runner, [sequence], [1])
        runner.release(sequence)


def measure_gpu_memory(model: CausalLM, layout: KVLayout, config: EngineConfig) -> GpuMemory:
    """What the model, its largest step and its CUDA graphs take of this worker's share of a GPU.

    Raises StartupError if that does not fit in what is free.
    """
    device = model.device
    torch.cuda.empty_cache()
    weights_bytes = torch.cuda.memory_allocated(device)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    # Reserved, not allocated: what lies idle between a step's tensors is nobody else's.
    before_bytes = torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
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
    """`max_num_batched_tokens` new tokens and `max_num_seqs` samples, all in the same blocks.

    Returns the bytes of those blocks, which are gone again.
    """
    num_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
    longest = min(config.max_num_batched_tokens - num_seqs + 1, model.config.max_model_len - 1)
    counts = [longest] + [1] * (num_seqs - 1)
    num_blocks = -(-longest // layout.block_size)
    kv_pool = allocate_kv_pool(layout, num_blocks, device=model.device)
    runner = ModelRunner(model, kv_pool, root_seed=0)
    block_ids = list(range(num_blocks))
    sampling = SamplingParams(top_p=0.9, logprobs=1)
    sequences = [_made_up(count, block_ids, sampling) for count in counts]
    _run(runner, sequences, counts)
    return kv_pool.nbytes


def _made_up(num_tokens: int, block_ids: list[int], sampling: SamplingParams) -> Sequence:
    request = Request(
        key=RequestKey("warm-up", 0),
        token_ids=[0] * num_tokens,
        num_prompt_tokens=num_tokens,
        sampling=sampling,
    )
    return Sequence(request=request, root=b"", arrival_s=0.0, block_ids=block_ids)


def _run(runner: ModelRunner, sequences: list[Sequence], counts: list[int]) -> None:
    items = [
        ScheduledSequence(sequence, count, samples=True)
        for sequence, count in zip(sequences, counts, strict=True)
    ]
    step = runner.launch(StepPlan(items))
    step.sample()
    step.result()
