"""Decode steps captured as CUDA graphs, one for each of a ladder of batch sizes.

A decode step of a few sequences is some hundred kernels of microseconds each: launched one by one
they wait for Python, replayed as a graph they follow each other. A graph reads its inputs where it
was captured, so a step copies its arrays there, in one piece; a batch between two sizes is padded
with rows that attend to nothing and store nothing.
"""

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from engine.batch import StepArrays
from engine.capture import GraphMemory, capture
from engine.graph_inputs import GraphInputs
from engine.models.causal_lm import CausalLM
from engine.models.shortened import shortened

# Up to here the ladder has every power of two, from here on every eighth size.
_FINE_UP_TO = 8


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture: 1, 2, 4, 8, 16, 24, … up to `max_num_seqs`, ascending."""
    fine = [size for size in (1, 2, 4) if size < max_num_seqs]
    coarse = range(_FINE_UP_TO, max_num_seqs, _FINE_UP_TO)
    return [*fine, *coarse, max_num_seqs]


class DecodeGraphs:
    """Captured forward passes over one model and pool; `hidden` replays the one that fits."""

    def __init__(self, model: CausalLM, kv_pool: Tensor, sizes: list[int]) -> None:
        """`capture` is to be called before `hidden`.

        `kv_pool` is [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim].
        """
        self._model = model
        self._short_model = shortened(model)
        self._kv_pool = kv_pool
        self._sizes = sizes
        self._inputs = GraphInputs(
            max_seqs=sizes[-1],
            max_tokens=sizes[-1],
            max_blocks=-(-model.config.max_model_len // kv_pool.shape[4]),
            device=kv_pool.device,
        )
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._hidden: dict[int, Tensor] = {}

    def capture(self, memory: GraphMemory, *, progress: bool) -> None:
        """Captures all sizes. Nothing else may run on the device meanwhile."""
        sizes = self._sizes
        # The largest first: the others find their memory in what it leaves.
        shown = tqdm(reversed(sizes), "CUDA graphs", len(sizes), disable=not progress, leave=False)
        for size in shown:
            self.launch(size)
            self._graphs[size], self._hidden[size] = capture(
                lambda size=size: self._forward(self._model, size), memory
            )

    @torch.inference_mode()
    def launch(self, size: int) -> None:
        """Every kernel that a graph of that size replays, and the head that comes behind."""
        self._model.logits(self._forward(self._short_model, size))

    def hidden(self, arrays: StepArrays, sampled: Tensor) -> Tensor | None:
        """[num_seqs, hidden_size], valid until the next call; None if the step isn't captured:
        several tokens of a sequence, more sequences than the largest size, or one that doesn't
        sample. `sampled` are the tokens of the step before, which `arrays.sources` speaks of."""
        num_seqs = len(arrays.kv_lens)
        is_decode = len(arrays.token_ids) == num_seqs == len(arrays.samples)
        if not is_decode or num_seqs > self._sizes[-1]:
            return None
        size = self._sizes[int(np.searchsorted(self._sizes, num_seqs))]
        self._inputs.write(arrays, sampled, num_singles=size, num_seqs=size, num_tokens=size)
        self._graphs[size].replay()
        return self._hidden[size][:num_seqs]

    def _forward(self, model: CausalLM, size: int) -> Tensor:
        batch = self._inputs.batch(
            num_seqs=size,
            num_tokens=size,
            max_query_len=1,
            max_kv_len=model.config.max_model_len,
        )
        return model.forward(self._inputs.token_ids(size), batch, self._kv_pool)
