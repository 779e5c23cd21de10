"""Fixtures that tests of several packages share."""

import gc
import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

# OpenMP reads it when torch is imported, here and in whatever the tests start: long spins starve
# what else runs on the same few cores, a stack's other worker or another process of tests.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from redis_process import RedisServer

if TYPE_CHECKING:
    from xdist.scheduler import LoadFileScheduling

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter. Here, because it's decided when Triton is imported,
    # and Triton's own functions with it: whichever test's libraries do that first.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell that runs the tests in the background has them ignore Ctrl-C, and all that they start with
# them; but that's how stacks under test are stopped.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Files that share a stack, or what a reference has computed, and so a process.
SHARING = ("tests/clients/", "tests/integration/test_parity_")

# What is imported and collected stays till the end: see `pytest_collection_finish`.
gc.disable()


@pytest.fixture
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


def pytest_collection_finish() -> None:
    # 1.2 million objects, which take the collector a second of CPU time. Whatever runs in a thread
    # beside a test, say a router, would stand still meanwhile: for longer than Redis may take to
    # accept a connection.
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> "LoadFileScheduling":
    """Whole files to each process that runs tests, and those of `SHARING` to one."""
    from xdist.scheduler import LoadFileScheduling

    class BySharing(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            shared = (start for start in SHARING if nodeid.startswith(start))
            return next(shared, super()._split_scope(nodeid))

    return BySharing(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fuzz", "raw requests of tests/fuzz")
    group.addoption("--fuzz-requests", type=int, default=4000, help="how many are sent")
    group.addoption(
        "--fuzz-seed", type=int, default=0, help="seed of the first; the next is 1 more"
    )
