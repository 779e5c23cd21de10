"""Logits of small random models against transformers', over every way to cut a prompt in steps."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from engine.models.causal_lm import CausalLM
from engine.models.config import ModelConfig, read_model_config
from engine.models.registry import load_model
from kernels.attention import AttentionBatch

BLOCK_SIZE = 4
NUM_BLOCKS = 128
TOLERANCE = 1e-4

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 2.5, 3.0, 5.0],
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}


def rope(**scaling: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10_000.0, **scaling}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-multi-head": ("Llama", {"num_key_value_heads": 4}),
    "llama-uneven-heads": (
        "Llama",
        {"head_dim": 20, "num_attention_heads": 2, "num_key_value_heads": 1},
    ),
    "llama-head-dim": ("Llama", {"head_dim": 16}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("Llama", rope(rope_type="linear", factor=2.0)),
    "llama-dynamic": ("Llama", rope(rope_type="dynamic", factor=2.0)),
    "llama3": ("Llama", rope(**LLAMA3)),
    "llama-yarn": ("Llama", rope(**YARN)),
    "llama-yarn-mscale": ("Llama", rope(**YARN, mscale=0.7, mscale_all_dim=1.0, truncate=False)),
    "llama-longrope": ("Llama", rope(**LONGROPE)),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 6}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen2-yarn": ("Qwen2", rope(**YARN)),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-window": (
        "Qwen3",
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    ),
}


@dataclass
class PagedSequence:
    """Tokens, and the blocks that hold the KV of the first `num_computed` of them."""

    token_ids: list[int]
    block_ids: list[int]
    num_computed: int = 0
    logits: list[Tensor] = field(default_factory=list[Tensor])


class PagedModel:
    """Runs steps as a scheduler would ask for them, and keeps every token's logits."""

    def __init__(self, model: CausalLM) -> None:
        config = model.config
        self.model = model
        self.free_block_ids = list(range(NUM_BLOCKS))
        # Poisoned, so that reading a slot that was never written can't go unnoticed.
        self.pool = torch.full(
            (NUM_BLOCKS, config.num_layers, 2, config.num_kv_heads, BLOCK_SIZE, config.head_dim),
            float("nan"),
        )

    def sequence(self, token_ids: list[int], *, like: PagedSequence | None = None) -> PagedSequence:
        """A new sequence; with `like`, it shares that one's full blocks of equal tokens."""
        shared = 0
        if like is not None:
            while (
                shared + BLOCK_SIZE < len(token_ids)
                and shared + BLOCK_SIZE <= like.num_computed
                and token_ids[: shared + BLOCK_SIZE] == like.token_ids[: shared + BLOCK_SIZE]
            ):
                shared += BLOCK_SIZE
        block_ids = like.block_ids[: shared // BLOCK_SIZE] if like is not None else []
        return PagedSequence(token_ids, block_ids.copy(), shared)

    @torch.inference_mode()
    def step(self, work: list[tuple[PagedSequence, int]], *, last_only: bool = False) -> None:
        """Runs the next n tokens of each sequence in one batch, for all logits or the last ones."""
        token_ids: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        starts = [0]
        for sequence, num_new in work:
            end = sequence.num_computed + num_new
            while len(sequence.block_ids) * BLOCK_SIZE < end:
                # From the end: block ids are then neither ascending nor equal to their index.
                sequence.block_ids.append(self.free_block_ids.pop())
            offset = self.model.config.rope_row_offset(len(sequence.token_ids))
            for position in range(sequence.num_computed, end):
                token_ids.append(sequence.token_ids[position])
                block_id = sequence.block_ids[position // BLOCK_SIZE]
                slots.append(block_id * BLOCK_SIZE + position % BLOCK_SIZE)
                positions.append(position + offset)
            starts.append(len(token_ids))
            sequence.num_computed = end
        kv_lens = [sequence.num_computed for sequence, _ in work]
        width = max(len(sequence.block_ids) for sequence, _ in work)
        batch = AttentionBatch(
            query_starts=torch.tensor(starts, dtype=torch.int32),
            kv_lens=torch.tensor(kv_lens, dtype=torch.int32),
            block_tables=torch.tensor(
                [s.block_ids + [0] * (width - len(s.block_ids)) for s, _ in work],
                dtype=torch.int32,
            ),
            slots=torch.tensor(slots),
            positions=torch.tensor(positions),
            max_query_len=max(num_new for _, num_new in work),
            max_kv_len=max(kv_lens),
            num_seqs=len(work),
        )
        last = batch.last_tokens(max(kv_lens)) if last_only else None
        hidden = self.model.forward(torch.tensor(token_ids), batch, self.pool, last)
        logits = self.model.logits(hidden)
        num_rows = [1 if last_only else num_new for _, num_new in work]
        for (sequence, _), rows in zip(work, logits.split(num_rows), strict=True):
            sequence.logits.append(rows)


@dataclass(frozen=True)
class Pair:
    ours: CausalLM
    reference: Any

    def expected(self, token_ids: list[int]) -> Tensor:
        with torch.inference_mode():
            return self.reference(torch.tensor([token_ids]), use_cache=False).logits[0]

    def tokens(self, count: int, *, seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, SIZES["vocab_size"], (count,), generator=generator).tolist()


def make_checkpoint(family: str, overrides: dict[str, Any], target: Path) -> Any:
    """A directory with a random model as transformers saves it, and that model."""
    torch.manual_seed(7)
    config_class = getattr(transformers, f"{family}Config")
    config = config_class(**{**SIZES, **overrides}, attn_implementation="eager")
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Larger than the default, and biases and norms not trivial, so that errors show.
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.2)
    model.save_pretrained(target)
    return model


@pytest.fixture(scope="module", params=CASES, ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    family, overrides = CASES[request.param]
    target = tmp_path_factory.mktemp(request.param)
    reference = make_checkpoint(family, overrides, target)
    return Pair(load(target), reference)


def load(model_dir: Path) -> CausalLM:
    config: ModelConfig = read_model_config(model_dir)
    return load_model(config, model_dir, dtype=torch.float32, device=torch.device("cpu"))


def assert_equal(sequence: PagedSequence, expected: Tensor) -> None:
    """The last logits that the sequence computed equal the last of `expected`."""
    actual = torch.cat(sequence.logits)
    torch.testing.assert_close(actual, expected[-len(actual) :], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("length", [1, 11, 50])
def test_whole_prompt(pair: Pair, length: int) -> None:
    paged = PagedModel(pair.ours)
    sequence = paged.sequence(pair.tokens(length, seed=length))
    paged.step([(sequence, length)])
    assert_equal(sequence, pair.expected(sequence.token_ids))


def test_chunked_prompt(pair: Pair) -> None:
    paged = PagedModel(pair.ours)
    sequence = paged.sequence(pair.tokens(45, seed=1))
    for chunk in (5, 16, 1, 20, 3):
        paged.step([(sequence, chunk)])
    assert_equal(sequence, pair.expected(sequence.token_ids))


def test_cached_prefix(pair: Pair) -> None:
    paged = PagedModel(pair.ours)
    prefix = pair.tokens(26, seed=2)
    first = paged.sequence(prefix + pair.tokens(14, seed=3))
    paged.step([(first, 40)])
    second = paged.sequence(prefix + pair.tokens(20, seed=4), like=first)
    assert second.num_computed == 24
    paged.step([(second, 22)])
    assert_equal(second, pair.expected(second.token_ids))
    assert_equal(first, pair.expected(first.token_ids))


def test_decode_one_token_at_a_time(pair: Pair) -> None:
    paged = PagedModel(pair.ours)
    sequence = paged.sequence(pair.tokens(30, seed=5))
    paged.step([(sequence, 20)])
    for _ in range(10):
        paged.step([(sequence, 1)])
    assert_equal(sequence, pair.expected(sequence.token_ids))


def test_sequences_mixed_in_a_batch(pair: Pair) -> None:
    paged = PagedModel(pair.ours)
    lengths = (9, 33, 24, 2)
    sequences = [paged.sequence(pair.tokens(n, seed=10 + n)) for n in lengths]
    steps = [(8, 10, None, 1), (1, 20, 17, 1), (None, 1, 6, None), (None, 1, 1, None)]
    steps.append((None, 1, None, None))
    for step in steps:
        paged.step([(s, n) for s, n in zip(sequences, step, strict=True) if n is not None])
    for sequence in sequences:
        assert sequence.num_computed == len(sequence.token_ids)
        assert_equal(sequence, pair.expected(sequence.token_ids))


def test_last_tokens_alone(pair: Pair) -> None:
    """Their logits are the same, and all others' keys and values are there for what follows."""
    paged = PagedModel(pair.ours)
    sequences = [paged.sequence(pair.tokens(n, seed=20 + n)) for n in (9, 33, 24)]
    steps = [(8, 10, None), (1, 20, 17)]
    for step in steps:
        work = [(s, n) for s, n in zip(sequences, step, strict=True) if n is not None]
        paged.step(work, last_only=True)
        for sequence, _ in work:
            expected = pair.expected(sequence.token_ids)[sequence.num_computed - 1]
            torch.testing.assert_close(sequence.logits.pop()[0], expected, atol=TOLERANCE, rtol=0)
    paged.step([(sequences[1], 3), (sequences[2], 7)])
    for sequence in sequences[1:]:
        assert_equal(sequence, pair.expected(sequence.token_ids))


def test_last_tokens_of_many(pair: Pair) -> None:
    """So many tokens that the last layer makes no queries for them."""
    paged = PagedModel(pair.ours)
    sequences = [paged.sequence(pair.tokens(32, seed=i)) for i in range(10)]
    paged.step([(sequence, 30) for sequence in sequences], last_only=True)
    paged.step([(sequence, 2) for sequence in sequences])
    for sequence in sequences:
        computed = torch.cat(sequence.logits)
        expected = pair.expected(sequence.token_ids)[29:]
        torch.testing.assert_close(computed, expected, atol=TOLERANCE, rtol=0)


def test_dynamic_scaling_beyond_the_trained_length(tmp_path: Path) -> None:
    """transformers picks theta by the sequence's length, we by the longest that is served."""
    reference = make_checkpoint("Llama", rope(rope_type="dynamic", factor=2.0), tmp_path)
    pair = Pair(load(tmp_path), reference)
    paged = PagedModel(pair.ours)
    assert pair.ours.config.max_model_len == 128
    sequence = paged.sequence(pair.tokens(128, seed=6))
    paged.step([(sequence, 100)])
    paged.step([(sequence, 28)])
    assert_equal(sequence, pair.expected(sequence.token_ids))


def test_checkpoint_in_the_old_spelling(tmp_path: Path) -> None:
    """`rope_theta` and `rope_scaling` with `type`, as before transformers 5."""
    reference = make_checkpoint("Llama", rope(rope_type="linear", factor=4.0), tmp_path)
    path = tmp_path / "config.json"
    text = path.read_text().replace('"rope_type"', '"type"')
    path.write_text(text.replace('"rope_parameters"', '"rope_scaling"'))
    pair = Pair(load(tmp_path), reference)
    paged = PagedModel(pair.ours)
    sequence = paged.sequence(pair.tokens(40, seed=8))
    paged.step([(sequence, 40)])
    assert_equal(sequence, pair.expected(sequence.token_ids))
