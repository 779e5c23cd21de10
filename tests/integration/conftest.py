"""Fixtures of the parity tests; the reference is computed once a session."""

import random
from pathlib import Path

import pytest
from greedy_reference import LENGTHS, WORDS, GreedyReference

from engine.tokenizer import Tokenizer
from engine.weights.model_dir import resolve_model


@pytest.fixture(scope="session")
def model_dir() -> Path:
    return resolve_model(None, progress=False)


@pytest.fixture(scope="session")
def reference(model_dir: Path) -> GreedyReference:
    return GreedyReference(model_dir)


@pytest.fixture(scope="session")
def prompts(model_dir: Path) -> list[list[int]]:
    """16 prompts of `LENGTHS` token ids; no two share their first block."""
    tokenizer = Tokenizer.from_dir(model_dir)
    made: list[list[int]] = []
    for length in LENGTHS:
        words = random.Random(length).choices(WORDS, k=length)
        made.append(tokenizer.encode(" ".join(words))[:length])
    assert [len(prompt) for prompt in made] == list(LENGTHS)
    return made
