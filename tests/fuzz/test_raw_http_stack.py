"""As test_raw_http.py, with real workers: none of their blocks may stay behind either."""

from collections.abc import Iterator

import pytest
from raw_client import fuzz
from raw_requests import seeds
from tandem_stack import TandemStack

NUM_REQUESTS = 400


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TandemStack]:
    log = tmp_path_factory.mktemp("stack") / "log"
    # Short, so that what asks for as much as there is gets its answer soon.
    arguments = ("--served-model-name", "toy", "--max-model-len", "96", "--max-num-seqs", "16")
    with TandemStack(log, "--disable-log-requests", *arguments) as running:
        yield running


async def test_any_bytes_leave_no_block_behind(stack: TandemStack) -> None:
    before = {name: worker["pid"] for name, worker in stack.workers().items()}
    address = ("127.0.0.1", stack.port)
    result = await fuzz(address, seeds(0, NUM_REQUESTS))
    # /health says so if this machine left a worker no time to be heard; it's to be back.
    unheard = [seed for seed, text in result.wrong.items() if '"code":"no_worker"' in text]
    for seed in unheard:
        del result.wrong[seed]
    result.check()
    stack.wait_idle()
    (await fuzz(address, unheard)).check()
    stack.wait_idle()
    assert {name: worker["pid"] for name, worker in stack.workers().items()} == before
    assert result.statuses[200] > 0
