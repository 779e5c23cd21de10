"""Runs a step's plan on the device: arrays, forward pass, logits of the rows that sample, tokens.

The forward pass of a decode step may be a captured CUDA graph: everything before it is host
arithmetic, everything behind it depends on what samples.
"""

import torch
from torch import Tensor

from engine.batch import PersistentBatch, StepArrays
from engine.decode_graphs import DecodeGraphs
from engine.grammar import GrammarCompiler
from engine.models.causal_lm import CausalLM
from engine.prompt_reader import PromptReader
from engine.sampler.sampled import SampledToken
from engine.sampler.sampler import Sampler
from engine.scheduler.plan import ScheduledSequence, StepPlan
from engine.sequence import Sequence
from engine.upload import Uploader
from kernels.attention import AttentionBatch


class ModelRunner:
    """One model with one KV pool and the sequences that run on them."""

    def __init__(
        self,
        model: CausalLM,
        kv_pool: Tensor,
        *,
        root_seed: int,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        """`kv_pool` is [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]."""
        self._model = model
        self._kv_pool = kv_pool
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
        self._graphs: DecodeGraphs | None = None

    def capture_graphs(self, sizes: list[int], *, progress: bool) -> None:
        """From now on decode steps of up to `sizes[-1]` sequences replay CUDA graphs."""
        self._graphs = DecodeGraphs(self._model, self._kv_pool, sizes, progress=progress)

    @property
    def num_rows(self) -> int:
        """Sequences that have run and not been released."""
        return self._batch.num_rows

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> list[SampledToken]:
        """One token for each scheduled sequence that samples, in the plan's order.

        Nothing advances: the scheduler's `commit` does that. A sampled token counts as its
        sequence's next one, so commit it or `release` the sequence.
        """
        for sequence in plan.preempted:
            self.release(sequence)
        if not plan.scheduled:
            return []
        for item in plan.scheduled:
            if item.sequence.row is None:
                self._sampler.add(self._batch.add(item.sequence), item.sequence)
                self._reader.add(item.sequence)
        arrays = self._batch.arrays(plan.scheduled)
        is_read = self._reader.wants(plan.scheduled)
        hidden = None if self._graphs is None or is_read else self._graphs.hidden(arrays)
        if hidden is None:
            hidden = self._hidden(arrays, plan.scheduled if is_read else [])
        if not len(arrays.sample_rows):
            return []
        sampled = self._sampler.sample(
            self._model.logits(hidden), arrays.sample_rows, arrays.sample_positions
        )
        sequences = [item.sequence for item in plan.scheduled if item.samples]
        if sampled.logprobs is None and not sampled.failures and not is_read:
            return [
                SampledToken(sequence, token_id, None)
                for sequence, token_id in zip(sequences, sampled.token_ids, strict=True)
            ]
        logprobs = sampled.logprobs or [None] * len(sequences)
        columns = zip(sequences, sampled.token_ids, logprobs, strict=True)
        return [
            SampledToken(
                sequence,
                token_id,
                logprob,
                self._reader.report(sequence),
                sampled.failures.get(place),
            )
            for place, (sequence, token_id, logprob) in enumerate(columns)
        ]

    def release(self, sequence: Sequence) -> None:
        """The sequence ended or lost its blocks. Nothing happens if it has no row."""
        row = self._batch.remove(sequence)
        if row is not None:
            self._sampler.remove(row)
            self._reader.remove(sequence)

    def _hidden(self, arrays: StepArrays, read: list[ScheduledSequence]) -> Tensor:
        """Hidden states of the tokens that sample, [num_samples, hidden_size]; the reader sees
        those of the whole step first if `read` is all that is scheduled, and not empty."""
        token_ids, query_starts, kv_lens, block_tables, slots, positions, sample_tokens = (
            self._uploader.upload(
                [
                    arrays.token_ids,
                    arrays.query_starts,
                    arrays.kv_lens,
                    arrays.block_tables,
                    arrays.slots,
                    arrays.positions,
                    arrays.sample_tokens,
                ]
            )
        )
        batch = AttentionBatch(
            query_starts=query_starts,
            kv_lens=kv_lens,
            block_tables=block_tables,
            slots=slots,
            positions=positions,
            max_query_len=arrays.max_query_len,
            max_kv_len=arrays.max_kv_len,
            num_seqs=len(arrays.kv_lens),
        )
        hidden = self._model.forward(token_ids, batch, self._kv_pool)
        if read:
            self._reader.read(read, hidden, arrays.query_starts)
        if len(arrays.sample_tokens) == len(arrays.token_ids):
            return hidden
        return hidden.index_select(0, sample_tokens)
