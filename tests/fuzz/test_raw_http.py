"""Whatever bytes come, the router answers in OpenAI's shape, at once, and keeps nothing of them."""

from collections.abc import Iterator

import httpx
import pytest
from raw_client import fuzz
from raw_requests import make_request, seeds
from stack_thread import StackThread

BATCH = 1000


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StackThread]:
    path = tmp_path_factory.mktemp("router")
    with StackThread(path, max_body_bytes=1 << 17) as running:
        yield running


def test_requests_are_made_from_their_seeds_alone() -> None:
    assert [make_request(seed) for seed in range(300)] == [
        make_request(seed) for seed in range(300)
    ]


async def test_any_bytes_are_answered_and_leave_nothing_behind(
    router: StackThread, request: pytest.FixtureRequest
) -> None:
    first: int = request.config.getoption("--fuzz-seed")
    count: int = request.config.getoption("--fuzz-requests")
    statuses: dict[int, int] = {}
    for start in range(first, first + count, BATCH):
        result = await fuzz(router.address, seeds(start, min(BATCH, first + count - start)))
        result.check()
        router.wait_idle()
        async with httpx.AsyncClient() as client:
            load = await client.get(f"{router.stack.url}/load")
        assert load.json()["server_load"] == 0
        statuses |= {s: statuses.get(s, 0) + n for s, n in result.statuses.items()}
        print(
            f"{start - first + BATCH} requests, answers by status: {dict(sorted(statuses.items()))}"
        )
    if count >= BATCH:
        # Neither all good nor all bad: it went in at several depths.
        assert min(statuses.get(status, 0) for status in (200, 400, 404, 405)) > 0
