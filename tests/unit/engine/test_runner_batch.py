"""The arrays of a step against a plain loop over its tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.batch import PersistentBatch, StepArrays
from engine.models.config import ModelConfig, read_model_config
from engine.scheduler.plan import ScheduledSequence
from engine.sequence import Sequence
from protocol.ids import RequestKey
from protocol.request import Request
from protocol.sampling import SamplingParams

BLOCK_SIZE = 4
MAX_MODEL_LEN = 40


def model_config(target: Path, **overrides: Any) -> ModelConfig:
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_MODEL_LEN,
    }
    (target / "config.json").write_text(json.dumps(raw | overrides))
    return read_model_config(target)


@pytest.fixture
def batch(tmp_path: Path) -> PersistentBatch:
    return PersistentBatch(model_config(tmp_path), block_size=BLOCK_SIZE)


class Blocks:
    """Gives out block ids that are neither ascending nor adjacent."""

    def __init__(self) -> None:
        self.next_id = 1000

    def cover(self, sequence: Sequence) -> None:
        while len(sequence.block_ids) * BLOCK_SIZE < sequence.num_tokens:
            self.next_id -= 7
            sequence.block_ids.append(self.next_id)


def make_sequence(name: str, num_tokens: int, *, num_prompt_tokens: int | None = None) -> Sequence:
    request = Request(
        key=RequestKey(name, 1),
        token_ids=list(range(num_tokens)),
        num_prompt_tokens=num_prompt_tokens or num_tokens,
        sampling=SamplingParams(max_tokens=10),
    )
    return Sequence(request=request, root=b"", arrival_s=0.0)


def check(arrays: StepArrays, scheduled: list[ScheduledSequence]) -> None:
    token_ids: list[int] = []
    slots: list[int] = []
    positions: list[int] = []
    starts = [0]
    samples: list[int] = []
    sample_positions: list[int] = []
    for i, item in enumerate(scheduled):
        sequence = item.sequence
        first = sequence.num_computed_tokens
        for position in range(first, first + item.num_new_tokens):
            block, offset = divmod(position, BLOCK_SIZE)
            token_ids.append(sequence.token_ids[position])
            slots.append(sequence.block_ids[block] * BLOCK_SIZE + offset)
            positions.append(position)
        starts.append(len(token_ids))
        if item.samples:
            samples.append(i)
            sample_positions.append(sequence.num_output_tokens)
        needed = -(-(first + item.num_new_tokens) // BLOCK_SIZE)
        assert arrays.block_tables[i, :needed].tolist() == sequence.block_ids[:needed]
    lens = [item.sequence.num_computed_tokens + item.num_new_tokens for item in scheduled]
    assert arrays.token_ids.tolist() == token_ids
    assert arrays.slots.tolist() == slots
    assert arrays.positions.tolist() == positions
    assert arrays.query_starts.tolist() == starts
    assert arrays.kv_lens.tolist() == lens
    assert arrays.max_kv_len == max(lens)
    counts = [item.num_new_tokens for item in scheduled]
    assert arrays.max_query_len == max(counts)
    chunks = [i for i, count in enumerate(counts) if count > 1]
    assert arrays.num_decodes == min(chunks, default=len(counts))
    assert arrays.samples.tolist() == samples
    assert arrays.sample_rows.tolist() == [i.sequence.row for i in scheduled if i.samples]
    assert arrays.sample_positions.tolist() == sample_positions
    assert arrays.slots.dtype == arrays.positions.dtype == arrays.token_ids.dtype == np.int64
    assert arrays.block_tables.dtype == arrays.kv_lens.dtype == np.int32
    assert arrays.block_tables.flags.c_contiguous


def test_chunks_and_decode_rows_over_several_steps(batch: PersistentBatch) -> None:
    blocks = Blocks()
    prompt = make_sequence("prompt", 30)
    resumed = make_sequence("resumed", 9, num_prompt_tokens=5)
    for sequence in (prompt, resumed):
        blocks.cover(sequence)
        batch.add(sequence)
    resumed.num_computed_tokens = 8
    for num_new in (11, 12, 7):
        samples = prompt.num_computed_tokens + num_new == prompt.num_tokens
        scheduled = [
            ScheduledSequence(resumed, 1, samples=True),
            ScheduledSequence(prompt, num_new, samples=samples),
        ]
        check(batch.arrays(scheduled), scheduled)
        prompt.num_computed_tokens += num_new
        resumed.num_computed_tokens += 1
        resumed.token_ids.append(50)
        blocks.cover(resumed)
    only_chunks = [ScheduledSequence(make_sequence("chunk", 20), 6, samples=False)]
    blocks.cover(only_chunks[0].sequence)
    batch.add(only_chunks[0].sequence)
    check(batch.arrays(only_chunks), only_chunks)


def test_rows_are_reused_and_grow(batch: PersistentBatch) -> None:
    blocks = Blocks()
    sequences = [make_sequence(str(i), 5 + i % 9) for i in range(50)]
    for sequence in sequences:
        blocks.cover(sequence)
        batch.add(sequence)
    assert len({sequence.row for sequence in sequences}) == batch.num_rows == 50
    for sequence in sequences[::2]:
        batch.remove(sequence)
        assert batch.remove(sequence) is None
    assert batch.num_rows == 25
    late = [make_sequence(f"late {i}", 3) for i in range(25)]
    for sequence in late:
        blocks.cover(sequence)
        batch.add(sequence)
    running = sequences[1::2] + late
    assert {sequence.row for sequence in running} == set(range(50))
    for sequence in running:
        sequence.num_computed_tokens = sequence.num_tokens - 1
    scheduled = [ScheduledSequence(sequence, 1, samples=True) for sequence in running]
    check(batch.arrays(scheduled), scheduled)


def test_a_preempted_sequence_comes_back_with_other_blocks(batch: PersistentBatch) -> None:
    blocks = Blocks()
    sequence = make_sequence("s", 10)
    for _ in range(2):
        sequence.block_ids.clear()
        blocks.cover(sequence)
        batch.add(sequence)
        scheduled = [ScheduledSequence(sequence, 10, samples=True)]
        check(batch.arrays(scheduled), scheduled)
        batch.remove(sequence)


def test_long_sequences_of_dynamic_rope_use_the_second_table(tmp_path: Path) -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    config = model_config(tmp_path, rope_parameters=scaling)
    batch = PersistentBatch(config, block_size=BLOCK_SIZE)
    long = make_sequence("long", MAX_MODEL_LEN - 9)  # up to 10 more: beyond the trained length
    short = make_sequence("short", MAX_MODEL_LEN - 10)
    scheduled = [ScheduledSequence(sequence, 3, samples=False) for sequence in (long, short)]
    for item in scheduled:
        Blocks().cover(item.sequence)
        batch.add(item.sequence)
    offset = config.max_model_len
    assert batch.arrays(scheduled).positions.tolist() == [offset, offset + 1, offset + 2, 0, 1, 2]
