"""Fixtures of the tests that need a CUDA device: small models and transformers' answers."""

import random
from pathlib import Path

import pytest
import torch
from greedy_reference import GreedyReference
from tiny_models import TINY_MODELS, VOCAB_SIZE, write_tiny_model

LENGTHS = (1, 5, 15, 16, 17, 33, 64, 129, 500, 1000)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.gpu)
            item.add_marker(needs_cuda)


@pytest.fixture(scope="session", params=TINY_MODELS)
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def reference(model_dir: Path) -> GreedyReference:
    return GreedyReference(model_dir)


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """One of each length in `LENGTHS`."""
    generator = random.Random(11)
    return [[generator.randrange(2, VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]
