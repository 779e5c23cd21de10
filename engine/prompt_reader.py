"""What requests want to know of their prompts' own tokens: log-probabilities, or one vector.

Both come from hidden states of prompt tokens, which otherwise nobody looks at. They're gathered
chunk by chunk, and are complete when the prompt's last chunk has run.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.models.causal_lm import CausalLM
from engine.sampler.logprobs import token_logprobs
from engine.sampler.sampled import NO_REPORT, PromptReport
from engine.scheduler.plan import ScheduledSequence
from engine.sequence import Sequence
from protocol.pooling import PoolingParams
from protocol.request import TokenLogprobs

# Logits of so many tokens at once: 128 MB for a vocabulary of 128k, in float32.
_ROWS_AT_ONCE = 256


@dataclass(slots=True)
class _Reading:
    """Of one sequence, as far as its chunks have run; `vector` float32 [hidden_size]."""

    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    vector: Tensor | None = None


class PromptReader:
    """All readings that are under way."""

    def __init__(self, model: CausalLM) -> None:
        self._model = model
        self._readings: dict[Sequence, _Reading] = {}

    def add(self, sequence: Sequence) -> None:
        """The sequence starts to run; most have nothing to read."""
        if sequence.request.reads_prompt and sequence.num_output_tokens == 0:
            self._readings[sequence] = _Reading()

    def remove(self, sequence: Sequence) -> None:
        self._readings.pop(sequence, None)

    def wants(self, scheduled: list[ScheduledSequence]) -> bool:
        """Whether this step's hidden states are of interest."""
        return bool(self._readings) and any(item.sequence in self._readings for item in scheduled)

    def read(
        self,
        scheduled: list[ScheduledSequence],
        hidden: Tensor,
        query_starts: NDArray[np.int32],
    ) -> None:
        """Takes a step's hidden states [num_tokens, hidden_size], sequence after sequence."""
        for item, first in zip(scheduled, query_starts.tolist(), strict=False):
            reading = self._readings.get(item.sequence)
            if reading is not None:
                self._read(item, reading, hidden[first : first + item.num_new_tokens])

    def report(self, sequence: Sequence) -> PromptReport:
        """The sequence's prompt is computed."""
        reading = self._readings.pop(sequence, None)
        if reading is None:
            return NO_REPORT
        request = sequence.request
        pooled = None
        if reading.vector is not None and request.pooling is not None:
            vector = _finished(reading.vector, request.pooling, request.num_prompt_tokens)
            pooled = vector.cpu().numpy().astype("<f4").tobytes()
        has_logprobs = request.sampling.prompt_logprobs is not None
        return PromptReport(reading.logprobs if has_logprobs else None, pooled)

    def _read(self, item: ScheduledSequence, reading: _Reading, hidden: Tensor) -> None:
        request = item.sequence.request
        pooling = request.pooling
        if pooling is not None and pooling.type == "mean":
            total = hidden.sum(0, dtype=torch.float32)
            reading.vector = total if reading.vector is None else reading.vector + total
        elif pooling is not None and item.samples:
            reading.vector = hidden[-1].float()
        num_top = request.sampling.prompt_logprobs
        if num_top is not None:
            # The state of one token tells of the next; the last one's is the first output's.
            start = item.start + 1
            targets = request.token_ids[start : start + item.num_new_tokens]
            for first in range(0, len(targets), _ROWS_AT_ONCE):
                some = targets[first : first + _ROWS_AT_ONCE]
                logits = self._model.logits(hidden[first : first + len(some)]).float()
                token_ids = torch.tensor(some, device=logits.device)
                reading.logprobs += token_logprobs(logits, token_ids, [num_top] * len(some))


def _finished(vector: Tensor, pooling: PoolingParams, num_tokens: int) -> Tensor:
    """From the sum of hidden states, or the last one, to what was asked for."""
    if pooling.type == "mean":
        vector = vector / num_tokens
    if pooling.dimensions is not None:
        vector = vector[: pooling.dimensions]
    return torch.nn.functional.normalize(vector, dim=0) if pooling.normalize else vector
