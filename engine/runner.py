"""Runs a step's plan on the device: arrays, forward pass, logits of the rows that sample, tokens.

The forward pass of a step may be a captured CUDA graph: everything before it is host
arithmetic, everything behind it depends on what samples. Nothing waits for the device, unless a
request wants to know of its prompt.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from engine.batch import PersistentBatch, StepArrays
from engine.capture import GraphMemory
from engine.decode_graphs import DecodeGraphs
from engine.grammar import GrammarCompiler
from engine.models.causal_lm import CausalLM
from engine.prompt_graphs import PromptGraphs
from engine.prompt_reader import PromptReader
from engine.running_step import RunningStep
from engine.sampler.pending import PendingRows
from engine.sampler.sampler import Sampler
from engine.scheduler.plan import ScheduledSequence, StepPlan
from engine.sequence import Sequence
from engine.upload import Uploader, to_device
from kernels.attention import AttentionBatch

# As many decode rows beside prompts are worth launches of their own on a GPU.
_MIN_DECODES = 4


class ModelRunner:
    """One model with one KV pool and the sequences that run on them."""

    def __init__(
        self,
        model: CausalLM,
        kv_pool: Tensor,
        *,
        root_seed: int,
        uses_flash_attention: bool = False,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        """`kv_pool` is [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim].

        `uses_flash_attention` is for steps that aren't captured: those have few new tokens.
        """
        self._model = model
        self._kv_pool = kv_pool
        self._uses_flash_attention = uses_flash_attention
        self._batch = PersistentBatch(model.config, block_size=kv_pool.shape[4])
        self._uploader = Uploader(kv_pool.device)
        self._sampler = Sampler(
            vocab_size=model.config.vocab_size,
            eos_token_ids=model.config.eos_token_ids,
            root_seed=root_seed,
            device=kv_pool.device,
            grammars=grammars,
        )
        self._reader = PromptReader(model)
        self._graphs: tuple[DecodeGraphs, PromptGraphs] | None = None
        self._sampled = torch.zeros(1, dtype=torch.int64, device=kv_pool.device)

    def capture_graphs(
        self,
        sizes: list[int],
        shapes: list[tuple[int, int]],
        *,
        progress: bool,
        always: bool = False,
    ) -> None:
        """From now on decode steps of up to `sizes[-1]` sequences replay CUDA graphs, and steps
        with prompts of those `shapes` that `PromptGraphs` finds worth it, or `always` all."""
        memory = GraphMemory()
        model, kv_pool = self._model, self._kv_pool
        prompts = PromptGraphs(model, kv_pool, shapes)
        prompts.capture(memory, progress=progress, always=always)
        decodes = DecodeGraphs(model, kv_pool, sizes)
        decodes.capture(memory, progress=progress)
        self._graphs = (decodes, prompts)

    @property
    def uses_graphs(self) -> bool:
        return self._graphs is not None

    @property
    def num_rows(self) -> int:
        """Sequences that have run and not been released."""
        return self._batch.num_rows

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> RunningStep:
        """Queues a step up to its logits; what it returns then samples.

        Nothing advances: the scheduler's `commit` does that. A sampled token counts as its
        sequence's next one, so commit it or `release` the sequence. In a step that was scheduled
        ahead, `source`s are samples of the step that sampled last.
        """
        for sequence in plan.preempted:
            self.release(sequence)
        device = self._kv_pool.device
        if not plan.scheduled:
            return RunningStep([], None, reports={}, device=device)
        for item in plan.scheduled:
            if item.sequence.row is None:
                self._sampler.add(self._batch.add(item.sequence), item.sequence)
                self._reader.add(item.sequence)
        arrays = self._batch.arrays(plan.scheduled)
        is_read = self._reader.wants(plan.scheduled)
        hidden = None
        for graphs in () if self._graphs is None or is_read else self._graphs:
            hidden = graphs.hidden(arrays, self._sampled)
            if hidden is not None:
                break
        if hidden is None:
            hidden = self._hidden(arrays, plan.scheduled if is_read else [])
        sampling = [item for item in plan.scheduled if item.samples]
        if not sampling:
            return RunningStep([], None, reports={}, device=device)
        sample = functools.partial(self._sample, self._model.logits(hidden), arrays)
        sequences = (item.sequence for item in sampling) if is_read else ()
        reports = {each: self._reader.report(each) for each in sequences}
        return RunningStep(sampling, sample, reports=reports, device=device)

    def forced_tokens(self, sequences: list[Sequence]) -> dict[Sequence, list[int]]:
        """What must follow the tokens that a step has just yielded for `sequences`, by grammars;
        nothing of those that were released since."""
        return self._sampler.forced_tokens(sequences)

    @torch.inference_mode()
    def append(self, sequence: Sequence, token_ids: list[int]) -> None:
        """Its forced tokens are its next outputs: commit them behind the sampled one."""
        assert sequence.row is not None, "forced tokens are of rows"
        self._sampler.append(sequence.row, token_ids)

    def release(self, sequence: Sequence) -> None:
        """The sequence ended or lost its blocks. Nothing happens if it has no row."""
        row = self._batch.remove(sequence)
        if row is not None:
            self._sampler.remove(row)
            self._reader.remove(sequence)

    @torch.inference_mode()
    def _sample(self, logits: Tensor, arrays: StepArrays, places: list[int]) -> PendingRows:
        """For the rows of `logits` at `places`."""
        rows, positions = arrays.sample_rows, arrays.sample_positions
        if len(places) < len(rows):
            index = np.array(places)
            rows, positions = rows[index], positions[index]
            logits = logits.index_select(0, to_device(index, logits.device))
        pending = self._sampler.choose(logits, rows, positions)
        self._sampled = pending.token_ids
        return pending

    def _hidden(self, arrays: StepArrays, read: list[ScheduledSequence]) -> Tensor:
        """Hidden states of the sequences that sample, [num_samples, hidden_size]; the reader sees
        those of the whole step first if `read` is all that is scheduled, and not empty."""
        (
            token_ids,
            query_starts,
            kv_lens,
            block_tables,
            slots,
            positions,
            samples,
            *sources,
        ) = self._uploader.upload(
            [
                arrays.token_ids,
                arrays.query_starts,
                arrays.kv_lens,
                arrays.block_tables,
                arrays.slots,
                arrays.positions,
                arrays.samples,
                *([] if arrays.sources is None else [arrays.sources]),
            ]
        )
        for source in sources:
            known = self._sampled[source.clamp(min=0)]
            token_ids = torch.where(source < 0, token_ids, known)
        batch = AttentionBatch(
            query_starts=query_starts,
            kv_lens=kv_lens,
            block_tables=block_tables,
            slots=slots,
            positions=positions,
            max_query_len=arrays.max_query_len,
            max_kv_len=arrays.max_kv_len,
            num_seqs=len(arrays.kv_lens),
            uses_flash_attention=self._uses_flash_attention,
        )
        # On a GPU as in decode graphs, so that their kernels serve here, too.
        longest = self._model.config.max_model_len if token_ids.is_cuda else arrays.max_kv_len
        has_prompts = arrays.max_query_len > 1
        last = batch.last_tokens(longest) if has_prompts else None
        num_decodes = arrays.num_decodes
        # FlashAttention would round the queries of any to 8 bits, and read their whole contexts.
        min_decodes = 1 if self._uses_flash_attention else _MIN_DECODES
        if token_ids.is_cuda and min_decodes <= num_decodes < batch.num_seqs:
            max_prompt_kv_len = int(arrays.kv_lens[num_decodes:].max())
            batch = batch.divided(num_decodes, (longest, max_prompt_kv_len))
        if read:
            hidden = self._model.forward(token_ids, batch, self._kv_pool)
            self._reader.read(read, hidden, arrays.query_starts)
            hidden = hidden.index_select(0, query_starts[1:] - 1)
        else:
            hidden = self._model.forward(token_ids, batch, self._kv_pool, last)
        if len(arrays.samples) == len(arrays.kv_lens):
            return hidden
        return hidden.index_select(0, samples)
