"""Steps with few new tokens of prompts captured as CUDA graphs.

Launched kernel by kernel, a step takes the host longer than its few hundred tokens take the
device, and everybody in it waits. So there is a graph for some numbers of running sequences and,
with each, for a ladder of tokens; a step is padded to the next that has room for it.
"""

import time
from bisect import bisect_left
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from engine.batch import StepArrays
from engine.capture import GraphMemory, capture
from engine.graph_inputs import GraphInputs
from engine.models.causal_lm import CausalLM
from engine.models.shortened import shortened
from engine.upload import to_device

# Sequences with one token each; multiples of 16, so that what lies behind them is aligned.
SINGLES = (0, 16, 64, 128, 256)
# Tokens of a whole step: those that fill the tiles of products. With many sequences only some.
_TOKENS = (64, 128, 192, 256, 384, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048)
_MANY_SINGLES = 128
_TOKENS_WITH_MANY = (256, 384, 512, 1024, 2048, 2304)
# Sequences with several tokens in a step.
MAX_CHUNKS = 16
# The context that kernels' work is ordered for, and how many tokens a step's may look at in all,
# those of the longest step at such a context: beyond, it's attention that takes the time.
_USUAL_KV_LEN = 4096
_MAX_ATTENDED = _TOKENS_WITH_MANY[-1] * _USUAL_KV_LEN
# A step is worth a graph if launching it takes this share of the time in which it's through.
_LAUNCH_SHARE = 0.75


def graph_shapes(max_num_seqs: int, max_num_batched_tokens: int) -> list[tuple[int, int]]:
    """(sequences with one token, tokens of others) that may be worth a graph, the largest first."""
    most_singles = min(max_num_seqs, max_num_batched_tokens)
    shapes: list[tuple[int, int]] = []
    for fewer, num_singles in pairwise((-1, *_up_to(most_singles, SINGLES))):
        ladder = _TOKENS if num_singles < _MANY_SINGLES else _TOKENS_WITH_MANY
        most_padding = num_singles - fewer - 1
        rungs = _up_to(max_num_batched_tokens + most_padding, ladder)
        shapes += ((num_singles, rung - num_singles) for rung in rungs if rung > num_singles)
    return sorted(shapes, key=sum, reverse=True)


def _up_to(most: int, ladder: tuple[int, ...]) -> tuple[int, ...]:
    """With the first that has room for `most`."""
    return ladder[: bisect_left(ladder, most) + 1]


def num_attended(arrays: StepArrays) -> int:
    """Tokens that those of sequences with several attend to, all together; at most, since a token
    doesn't attend to what follows it."""
    first = arrays.num_decodes
    num_queries = np.diff(arrays.query_starts[first:]).astype(np.int64)
    return int(num_queries @ arrays.kv_lens[first:])


class PromptGraphs:
    """Captured forward passes over one model and pool; `hidden` replays the one that fits."""

    def __init__(
        self,
        model: CausalLM,
        kv_pool: Tensor,
        shapes: list[tuple[int, int]],
    ) -> None:
        """`shapes` are those that may be captured; `capture` is to be called before `hidden`.

        `kv_pool` is [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim].
        """
        self._model = model
        self._short_model = shortened(model)
        self._kv_pool = kv_pool
        self._shapes = shapes
        self._inputs = GraphInputs(
            max_seqs=max(num_singles for num_singles, _ in shapes) + MAX_CHUNKS,
            max_tokens=sum(shapes[0]),
            max_blocks=-(-model.config.max_model_len // kv_pool.shape[4]),
            device=kv_pool.device,
        )
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._hidden: dict[tuple[int, int], Tensor] = {}
        # By numbers of sequences with one token, ascending, as the numbers of tokens are.
        self._ladders: dict[int, list[int]] = {}

    def capture(self, memory: GraphMemory, *, progress: bool, always: bool = False) -> None:
        """Captures the shapes that the host is slow to launch, or `always` all. Nothing else may
        run on the device meanwhile."""
        shapes = self._shapes
        if not always:
            longest = self._longest_slow_to_launch(sorted({sum(each) for each in shapes}))
            shapes = [shape for shape in shapes if sum(shape) <= longest]
        for num_singles, num_tokens in sorted(shapes):
            self._ladders.setdefault(num_singles, []).append(num_tokens)
        shown = tqdm(shapes, "CUDA graphs of prompts", disable=not progress, leave=False)
        for shape in shown:
            self.launch(*shape)
            self._graphs[shape], self._hidden[shape] = capture(
                lambda shape=shape: self._forward(self._model, *shape), memory
            )

    @torch.inference_mode()
    def launch(self, num_singles: int, num_tokens: int) -> None:
        """Every kernel that a graph of that shape replays."""
        self._forward(self._short_model, num_singles, num_tokens)

    def hidden(self, arrays: StepArrays, sampled: Tensor) -> Tensor | None:
        """Hidden states of the sequences that sample, [num_samples, hidden_size]; None if the step
        isn't captured: no or too many prompts, more sequences or tokens than the largest size, or
        too many tokens over too long contexts.

        `sampled` are the tokens of the step before, which `arrays.sources` speaks of.
        """
        num_decodes = arrays.num_decodes
        num_prompts = len(arrays.kv_lens) - num_decodes
        num_tokens = len(arrays.token_ids) - num_decodes
        shape = self._shape_for(num_decodes, num_tokens)
        if (
            shape is None
            or not 0 < num_prompts <= MAX_CHUNKS
            or num_attended(arrays) > _MAX_ATTENDED
        ):
            return None
        singles, tokens = shape
        self._inputs.write(
            arrays,
            sampled,
            num_singles=singles,
            num_seqs=singles + MAX_CHUNKS,
            num_tokens=singles + tokens,
        )
        self._graphs[shape].replay()
        hidden, at = self._hidden[shape], arrays.samples
        if not len(at):
            return hidden[:0]
        at = at + (at >= num_decodes) * (singles - num_decodes)
        return hidden.index_select(0, to_device(at, hidden.device))

    def _shape_for(self, num_decodes: int, num_tokens: int) -> tuple[int, int] | None:
        """The smallest that has room for so many sequences with one token and tokens of others."""
        for num_singles, ladder in self._ladders.items():
            if num_singles >= num_decodes:
                fitting = bisect_left(ladder, num_tokens)
                return None if fitting == len(ladder) else (num_singles, ladder[fitting])
        return None

    def _longest_slow_to_launch(self, nums_tokens: list[int]) -> int:
        """Which of these, ascending, is the largest number of prompt tokens for which the device
        waits for the host; 0 if it never does."""
        slow = (num for num in reversed(nums_tokens) if self._launch_share(num) > _LAUNCH_SHARE)
        return next(slow, 0)

    @torch.inference_mode()
    def _launch_share(self, num_tokens: int) -> float:
        """Of the time that a step of prompts alone takes, kernel by kernel."""
        self._forward(self._model, 0, num_tokens)  # compiles kernels, makes workspaces
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        self._forward(self._model, 0, num_tokens)
        launched_s = time.perf_counter()
        torch.cuda.synchronize()
        return (launched_s - started_s) / (time.perf_counter() - started_s)

    def _forward(self, model: CausalLM, num_singles: int, num_tokens: int) -> Tensor:
        longest = model.config.max_model_len
        batch = self._inputs.batch(
            num_seqs=num_singles + MAX_CHUNKS,
            num_tokens=num_singles + num_tokens,
            max_query_len=num_tokens,
            max_kv_len=longest,
            usual_kv_len=_USUAL_KV_LEN,
        )
        last = batch.last_tokens(longest)
        if num_singles:
            batch = batch.divided(num_singles, (longest, longest), attends_in_parts=True)
        token_ids = self._inputs.token_ids(num_singles + num_tokens)
        return model.forward(token_ids, batch, self._kv_pool, last)
