"""Steps over made-up sequences: they measure a GPU's memory peak and take first-use costs."""

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.kv_memory import allocate_kv_pool
from engine.models.causal_lm import CausalLM
from engine.runner import ModelRunner
from engine.scheduler.plan import ScheduledSequence, StepPlan
from engine.sequence import Sequence
from protocol.errors import StartupError
from protocol.ids import RequestKey
from protocol.layout import KVLayout
from protocol.request import Request
from protocol.sampling import SamplingParams

_WARM_UP_TOKENS = 64
# A process's CUDA context, its libraries' kernels and its staging memory for transfers. Not
# measured: workers that start at the same time on one card can't tell whose memory is whose.
_OUTSIDE_TORCH_BYTES = 1 << 30


def warm_up(runner: ModelRunner, kv_pool: Tensor) -> None:
    """A prompt and a decode step, greedy and random, in a pool that holds nothing yet."""
    num_blocks, block_size = kv_pool.shape[0], kv_pool.shape[4]
    num_tokens = min(_WARM_UP_TOKENS, num_blocks * block_size - 1)
    block_ids = list(range(-(-(num_tokens + 1) // block_size)))
    for sampling in (SamplingParams(temperature=0.0), SamplingParams(top_p=0.9)):
        sequence = _made_up(num_tokens, block_ids, sampling)
        _run(runner, [sequence], [num_tokens])
        sequence.num_computed_tokens = num_tokens
        sequence.token_ids.append(0)
        _run(runner, [sequence], [1])
        runner.release(sequence)


def gpu_free_bytes(model: CausalLM, layout: KVLayout, config: EngineConfig) -> int:
    """What is left for KV blocks of this worker's share of a GPU, after the largest step.

    Raises StartupError if weights and that step alone exceed the share, or what is free.
    """
    device = model.device
    _, total_bytes = torch.cuda.mem_get_info(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        _run_largest_step(model, layout, config)
    except torch.OutOfMemoryError as error:
        raise StartupError(
            f"The largest step, of {config.max_num_batched_tokens} tokens, does not fit in what "
            "the GPU has free; lower --max-num-batched-tokens, or end what else uses the GPU."
        ) from error
    torch.cuda.synchronize(device)
    peak_bytes = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    share_bytes = int(config.gpu_memory_utilization * total_bytes)
    own_bytes = peak_bytes + _OUTSIDE_TORCH_BYTES
    if share_bytes <= own_bytes:
        raise StartupError(
            f"--gpu-memory-utilization {config.gpu_memory_utilization} allows "
            f"{share_bytes / 2**30:.2f} GiB, but weights and the largest step need "
            f"{own_bytes / 2**30:.2f} GiB."
        )
    return share_bytes - own_bytes


def _run_largest_step(model: CausalLM, layout: KVLayout, config: EngineConfig) -> None:
    """`max_num_batched_tokens` new tokens and `max_num_seqs` samples, all in the same blocks."""
    num_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
    longest = min(config.max_num_batched_tokens - num_seqs + 1, model.config.max_model_len - 1)
    counts = [longest] + [1] * (num_seqs - 1)
    num_blocks = -(-longest // layout.block_size)
    kv_pool = allocate_kv_pool(layout, num_blocks, dtype=model.dtype, device=model.device)
    runner = ModelRunner(model, kv_pool, root_seed=0)
    block_ids = list(range(num_blocks))
    sampling = SamplingParams(top_p=0.9, logprobs=1)
    sequences = [_made_up(count, block_ids, sampling) for count in counts]
    _run(runner, sequences, counts)


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
    runner.execute(StepPlan(items))
