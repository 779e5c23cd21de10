"""What operators may do to a running router, and what they're told when they may not."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
from router_stack import RouterStack, open_router_stack, until

from protocol.messages import ControlMessage, PrefixCacheReset, ResetPrefixCache
from services.router.admin.cache_resets import CacheResets
from services.router.noop_worker import NoopBehaviour
from services.runtime.peers import Peer, PeerSignal

pytestmark = pytest.mark.asyncio(loop_scope="module")

ENDLESS = {"prompt": "abc", "max_tokens": 400}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RouterStack]:
    async with open_router_stack(tmp_path_factory.mktemp("router")) as stack:
        await stack.add_worker(behaviour=NoopBehaviour(stall_at=8))
        yield stack


@pytest.fixture
def root_level() -> Iterator[None]:
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


def error_of(response: httpx.Response) -> tuple[int, Any, Any]:
    error = response.json()["error"]
    return response.status_code, error["param"], error["code"]


@pytest.mark.usefixtures("root_level")
async def test_settings_change_and_are_shown(stack: RouterStack) -> None:
    changes = {
        "log_level": "error",
        "disable_log_requests": True,
        "max_queued_requests": 5,
        "queue_timeout_s": 7,
        "request_timeout_s": 60.5,
        "max_attempts": 2,
        "local_prefill": "never",
    }
    before = (await stack.client.get("/load_config")).json()["settings"]
    answer = await stack.post("/load_config", changes)
    assert answer.status_code == 200
    assert answer.json()["settings"] == before | changes
    assert (await stack.client.get("/load_config")).json()["settings"] == before | changes
    assert logging.getLogger().level == logging.ERROR
    service = stack.service
    assert service.dispatcher.policy.max_attempts == 2
    assert service._admission.policy.max_waiting == 5
    assert service._admission.policy.max_wait_s == 7
    assert not service._reports.log_requests
    restored = {name: before[name] for name in changes}
    assert (await stack.post("/load_config", restored)).json()["settings"] == before


@pytest.mark.usefixtures("root_level")
async def test_a_changed_timeout_holds_for_the_next_request(stack: RouterStack) -> None:
    await stack.post("/load_config", {"request_timeout_s": 0.2})
    assert (await stack.post("/v1/completions", ENDLESS)).status_code == 504
    await stack.post("/load_config", {"request_timeout_s": 3600.0})


@pytest.mark.parametrize(
    ("body", "field", "code"),
    [
        ({"port": 1}, "port", "fixed_setting"),
        ({"api_key": ["x"]}, "api_key", "fixed_setting"),
        ({"colour": "red"}, "colour", "unknown_setting"),
        ({"max_queued_requests": 9, "port": 1}, "port", "fixed_setting"),
        ({"max_queued_requests": -1}, "max_queued_requests", "invalid_value"),
        ({"max_queued_requests": 1.5}, "max_queued_requests", "invalid_type"),
        ({"max_queued_requests": None}, "max_queued_requests", "invalid_type"),
        ({"log_level": "loud"}, "log_level", "invalid_value"),
        ([], None, "invalid_type"),
    ],
)
async def test_bad_settings_are_named(
    stack: RouterStack, body: Any, field: str | None, code: str
) -> None:
    before = (await stack.client.get("/load_config")).json()["settings"]
    assert error_of(await stack.post("/load_config", body)) == (400, field, code)
    assert (await stack.client.get("/load_config")).json()["settings"] == before


async def test_a_request_is_aborted_by_its_id(stack: RouterStack) -> None:
    worker = stack.workers[0]
    async with stack.client.stream(
        "POST", "/v1/completions", json=ENDLESS | {"stream": True}
    ) as response:
        request_id = response.headers["x-request-id"]
        answer = await stack.post("/abort", {"request_id": request_id})
        assert answer.json() == {
            "num_aborted": 1,
            "request_ids": [request_id],
            "num_routers": 1,
        }
        *_, error, end, _ = (await response.aread()).decode().split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "request_aborted"
    assert end == "data: [DONE]"
    await until(lambda: worker.num_running == 0)
    again = await stack.post("/abort", {"request_id": request_id})
    assert error_of(again) == (404, None, "request_not_found")


async def test_all_requests_are_aborted(stack: RouterStack) -> None:
    worker = stack.workers[0]
    asking = [asyncio.create_task(stack.post("/v1/completions", ENDLESS)) for _ in range(3)]
    await until(lambda: worker.num_running == 3)
    assert (await stack.post("/abort", {"abort_all": True})).json()["num_aborted"] == 3
    for response in await asyncio.gather(*asking):
        assert error_of(response) == (499, None, "request_aborted")
    await until(lambda: worker.num_running == 0)
    assert (await stack.post("/abort", {"abort_all": True})).json()["num_aborted"] == 0
    assert (await stack.client.get("/load")).json()["server_load"] == 0


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "request_id"),
        ({"request_id": "a", "abort_all": True}, "request_id"),
        ({"request_id": 1}, "request_id"),
        ({"abort_all": "yes"}, "abort_all"),
    ],
)
async def test_bad_aborts_are_named(stack: RouterStack, body: dict[str, Any], field: str) -> None:
    assert error_of(await stack.post("/abort", body))[:2] == (400, field)


async def test_what_waits_in_the_queue_is_aborted_too(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    async with open_router_stack(tmp_path_factory.mktemp("router")) as stack:
        await stack.add_worker(behaviour=NoopBehaviour(stall_at=0))
        stack.service._admission._capacity = lambda: 1
        asking = [asyncio.create_task(stack.post("/v1/completions", ENDLESS)) for _ in range(2)]
        await until(lambda: stack.service._admission.num_waiting == 1)
        assert (await stack.post("/abort", {"abort_all": True})).json()["num_aborted"] == 2
        for response in await asyncio.gather(*asking):
            assert error_of(response) == (499, None, "request_aborted")


async def test_all_workers_reset_their_caches(stack: RouterStack) -> None:
    await stack.add_worker("prefill")
    answer = await stack.client.post("/reset_prefix_cache")
    assert answer.json() == {
        "success": True,
        "num_dropped_blocks": 0,
        "workers": {"decode-0": 0, "prefill-1": 0},
    }


async def test_without_workers_there_is_nothing_to_reset(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    async with open_router_stack(tmp_path_factory.mktemp("router"), api_keys=("k",)) as stack:
        for path in ("/reset_prefix_cache", "/abort", "/load_config"):
            assert (await stack.client.post(path)).status_code == 401
        key = {"Authorization": "Bearer k"}
        answer = await stack.client.post("/reset_prefix_cache", headers=key)
        assert answer.json() == {"success": True, "num_dropped_blocks": 0, "workers": {}}


class Wire:
    """Takes what is sent to a few peers."""

    def __init__(self) -> None:
        self.sent: list[tuple[Peer, ControlMessage]] = []
        self.peers = [Peer(f"worker-{i}", i + 1, link=self) for i in range(3)]

    def transmit(self, peer: Peer, message: ControlMessage) -> None:
        self.sent.append((peer, message))


async def test_a_reset_waits_for_no_dead_or_silent_worker() -> None:
    wire, resets = Wire(), CacheResets()
    answering, dying, silent = wire.peers
    waiting = asyncio.create_task(resets.reset(wire.peers, deadline_s=0.2))
    await until(lambda: len(wire.sent) == 3)
    [message] = {message for _, message in wire.sent}
    assert isinstance(message, ResetPrefixCache)
    resets.answered(answering, PrefixCacheReset(message.reset_id, 7))
    resets.peer_lost(dying)
    assert await waiting == {"worker-0": 7, "worker-1": None, "worker-2": None}
    # Too late, and of nobody's reset.
    resets.answered(silent, PrefixCacheReset(message.reset_id, 7))


async def test_a_lost_worker_is_not_asked() -> None:
    wire, resets = Wire(), CacheResets()
    wire.peers[0].signal(PeerSignal.GONE)
    assert await resets.reset(wire.peers[:1]) == {"worker-0": None}
    assert wire.sent == []
