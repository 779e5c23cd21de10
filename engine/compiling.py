"""Compiles the kernels that an engine will launch: on all cores, before its start runs the first.

One by one, as they come, they are most of the time until a worker whose cache is empty is ready. So
the start's steps are gone through once without running a kernel. Operations of torch's do run in
there, on whatever memory holds: nothing may depend on values, so no token is chosen.
"""

from itertools import chain

import torch

from engine.config import EngineConfig
from engine.decode_graphs import DecodeGraphs, graph_sizes
from engine.device_blocks import DeviceBlocks
from engine.kv_memory import allocate_kv_pool
from engine.made_up_steps import largest_step, prompt_steps, warm_up_steps
from engine.models.causal_lm import CausalLM
from engine.models.shortened import shortened
from engine.prompt_graphs import PromptGraphs, graph_shapes
from engine.runner import ModelRunner
from kernels.choice import CHUNK, Filters, choose_tokens
from kernels.sampling import penalize, rule_out
from protocol.layout import KVLayout

# For so many tokens at most, kernels have tiles of their own.
_FEW_TOKENS = (16, 32, 64)


def compile_kernels(
    model: CausalLM, layout: KVLayout, config: EngineConfig, *, progress: bool
) -> None:
    """Takes no more of the GPU's memory than the largest step."""
    # Imported here: a machine without a GPU needs no Triton.
    from kernels.gpu.launching import compile_ahead

    few = shortened(model)
    compile_ahead(lambda: _launch_all(few, layout, config), progress=progress)


def watch_kernels() -> None:
    """From now on it's logged if a kernel is compiled, since somebody waits for it."""
    # Imported here, as above.
    from kernels.gpu.launching import warn_of_compilations

    warn_of_compilations()


def _launch_all(model: CausalLM, layout: KVLayout, config: EngineConfig) -> None:
    """What profiling.py runs, then the runner captures, and copies of blocks launch; and what steps
    between may need."""
    # Imported here, as below.
    from kernels.gpu.hopper.linear_tiles import token_counts

    kv_pool = allocate_kv_pool(layout, 1, device=model.device)
    runner = ModelRunner(
        model, kv_pool, root_seed=0, uses_flash_attention=config.uses_flash_attention
    )
    max_model_len = model.config.max_model_len
    largest, _ = largest_step(
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        block_size=layout.block_size,
    )
    limits = {"block_size": layout.block_size, "max_tokens": max_model_len}
    # Steps that no graph is captured for may have the tiles of any number of tokens.
    steps = prompt_steps((*_FEW_TOKENS, *token_counts()), **limits)
    for plan in chain([largest], warm_up_steps(**limits, is_gpu=True), steps):
        runner.launch(plan)
        for item in plan.scheduled:
            runner.release(item.sequence)
    _choose(model)
    DeviceBlocks(kv_pool)
    # Where no graph is captured, too, since such steps then launch these kernels one by one.
    shapes = graph_shapes(config.max_num_seqs, config.max_num_batched_tokens)
    prompts = PromptGraphs(model, kv_pool, shapes)
    for shape in shapes:
        prompts.launch(*shape)
    sizes = sorted({*graph_sizes(config.max_num_seqs), *_FEW_TOKENS})
    decodes = DecodeGraphs(model, kv_pool, sizes)
    for size in sizes:
        decodes.launch(size)


def _choose(model: CausalLM) -> None:
    """From the logits as they come and from those that something is done to before, as the
    sampler does: penalties, tokens ruled out."""
    device, width = model.device, model.config.vocab_size
    logits = torch.zeros((1, width), dtype=model.dtype, device=device)
    scores = torch.zeros((1, -(-width // CHUNK) * CHUNK), device=device)
    places = torch.zeros(1, dtype=torch.int64, device=device)
    ones = torch.ones(1, device=device)
    penalize(
        scores,
        places=places,
        slots=places,
        output_counts=torch.zeros((1, width), dtype=torch.int32, device=device),
        in_prompt=torch.zeros((1, width), dtype=torch.bool, device=device),
        repetition=ones,
        presence=ones,
        frequency=ones,
    )
    allowed = torch.zeros((1, -(-width // 32)), dtype=torch.int32, device=device)
    rule_out(scores, places=places, allowed=allowed)
    uniforms = torch.zeros(1, dtype=torch.float64, device=device)
    filters = Filters(places, ones, ones)
    for each in (logits, scores):
        choose_tokens(each)
        choose_tokens(each, temperature=ones, uniforms=uniforms)
        choose_tokens(each, temperature=ones, uniforms=uniforms, filters=filters)
