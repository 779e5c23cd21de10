"""Routes over a mirrored cluster: real connections, records and reports by hand, no Redis."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from router_stack import write_toy_model

from protocol.ids import RequestKey, WorkerRef, WorkerRole
from protocol.layout import KVLayout
from protocol.messages import PROTOCOL_VERSION
from protocol.records import WorkerLoad, WorkerRecord
from protocol.request import Request
from protocol.sampling import SamplingParams
from services.router.dispatch.flight import Route
from services.router.placement.candidates import PlacementPolicy
from services.router.placement.cluster import ADMITTED_PER_SLOT, Cluster, PlacementState
from services.router.placement.index import IndexState, PrefixIndex
from services.router.placement.ledger import NO_WORK, PlacementLedger
from services.router.served_model import ServedModel
from services.runtime.channel import ControlChannel
from services.runtime.kv_feed import KVFeed
from services.runtime.peers import ChannelEvent, Identity, PeerDown, PeerUp
from services.runtime.redis_client import open_redis

BLOCK_SIZE = 16
NUM_BLOCKS = 1000
MAX_NUM_SEQS = 8
PATIENCE_S = 20.0
NOBODY: frozenset[str] = frozenset()
IDLE = WorkerLoad(num_free_blocks=NUM_BLOCKS, prefill_ms_per_token=1.0, decode_ms_per_step=10.0)


class Workers:
    """A cluster and the listening ends of its workers."""

    def __init__(self, model: ServedModel) -> None:
        self.index = PrefixIndex()
        self.ledger = PlacementLedger()
        self.channels: dict[str, ControlChannel] = {}
        self.records: dict[str, WorkerRecord] = {}
        self.kinds: list[str] = []
        self._changed = asyncio.Event()
        self._redis = open_redis("unix:///nowhere")
        self.router = ControlChannel(Identity("router", 1), self._on_event)
        self.cluster = Cluster(
            self.router,
            model,
            PlacementState(self.index, self.ledger, PlacementPolicy()),
            KVFeed(self._redis, self.index),
            on_placed=self.kinds.append,
        )

    def _on_event(self, event: ChannelEvent) -> None:
        if isinstance(event, PeerDown):
            self.cluster.peer_lost(event.peer)
        if isinstance(event, PeerDown | PeerUp):
            self._changed.set()

    async def _until_changed(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self._changed.wait()
        self._changed.clear()

    async def add(self, worker_id: str, role: WorkerRole, load: WorkerLoad = IDLE) -> None:
        channel = ControlChannel(Identity(worker_id, 1), lambda _: None)
        self.channels[worker_id] = channel
        self.records[worker_id] = WorkerRecord(
            protocol_version=PROTOCOL_VERSION,
            ref=WorkerRef(worker_id, 1, channel.listen("tcp://127.0.0.1:0")),
            role=role,
            model="toy",
            layout=KVLayout("model", 2, 2, 16, BLOCK_SIZE, "float32"),
            num_blocks=NUM_BLOCKS,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=512,
            max_model_len=512,
            metrics_address="",
            pid=1,
            hostname="host",
        )
        self.cluster.records_came(self.records)
        await self._until_changed()
        self.report(worker_id, load)

    def report(self, worker_id: str, load: WorkerLoad) -> None:
        self.cluster.load_came(self.router.connect(self.records[worker_id].ref), load)

    async def end(self, worker_id: str) -> None:
        await self.channels.pop(worker_id).close()
        await self._until_changed()

    def hold(self, worker_id: str, request: Request, num_blocks: int) -> None:
        hashes = self.cluster.block_hashes(request, ())[:num_blocks]
        self.index.resync(worker_id, 1, sequence=0, hashes=set(hashes))

    def choose(self, request: Request, *, avoid: frozenset[str] = NOBODY) -> Route | None:
        return self.cluster.choose(request, self.cluster.block_hashes(request, ()), avoid=avoid)

    async def close(self) -> None:
        for channel in (self.router, *self.channels.values()):
            await channel.close()
        await self._redis.aclose()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    path: Path = write_toy_model(tmp_path_factory.mktemp("model"))
    return ServedModel.from_dir(path, names=("toy",))


@pytest.fixture
async def workers(model: ServedModel) -> AsyncIterator[Workers]:
    workers = Workers(model)
    yield workers
    await workers.close()


def request(name: str = "request", num_tokens: int = 160) -> Request:
    return Request(
        key=RequestKey(name, 1),
        token_ids=list(range(num_tokens)),
        num_prompt_tokens=num_tokens,
        sampling=SamplingParams(max_tokens=16),
    )


def names(route: Route | None) -> tuple[str | None, str]:
    assert route is not None
    return route.prefill and route.prefill.worker_id, route.decode.worker_id


async def test_without_decode_workers_there_is_no_route(workers: Workers) -> None:
    assert workers.choose(request()) is None
    assert workers.cluster.unready_reason() is not None
    assert workers.cluster.capacity() is None
    await workers.add("p", WorkerRole.PREFILL)
    assert workers.choose(request()) is None


async def test_a_pair_prefills_remotely_and_a_lone_decode_locally(workers: Workers) -> None:
    await workers.add("d", WorkerRole.DECODE)
    assert names(workers.choose(request("a"))) == (None, "d")
    await workers.add("p", WorkerRole.PREFILL)
    assert names(workers.choose(request("b"))) == ("p", "d")
    assert workers.kinds == ["local", "remote"]
    assert workers.cluster.capacity() == ADMITTED_PER_SLOT * MAX_NUM_SEQS


async def test_who_holds_the_prefix_gets_the_request(workers: Workers) -> None:
    for worker_id in ("p0", "p1", "p2"):
        await workers.add(worker_id, WorkerRole.PREFILL)
    await workers.add("d", WorkerRole.DECODE)
    workers.hold("p1", request(), 8)
    route = workers.choose(request())
    assert names(route) == ("p1", "d")
    assert route is not None
    assert route.num_cached_tokens == 8 * BLOCK_SIZE


async def test_a_burst_spreads_before_any_report(workers: Workers) -> None:
    for number in range(3):
        await workers.add(f"p{number}", WorkerRole.PREFILL)
        await workers.add(f"d{number}", WorkerRole.DECODE)
    routes = [names(workers.choose(request(f"r{number}"))) for number in range(3)]
    assert {prefill for prefill, _ in routes} == {"p0", "p1", "p2"}
    assert {decode for _, decode in routes} == {"d0", "d1", "d2"}
    for number in range(3):
        workers.cluster.prefilled(RequestKey(f"r{number}", 1))
        workers.cluster.ended(RequestKey(f"r{number}", 1))
    assert workers.ledger.own == {}


async def test_draining_and_avoided_workers_are_left_out(workers: Workers) -> None:
    await workers.add("leaving", WorkerRole.DECODE, WorkerLoad(draining=True))
    assert workers.choose(request()) is None
    await workers.add("d", WorkerRole.DECODE)
    assert names(workers.choose(request("a"))) == (None, "d")
    assert names(workers.choose(request("b"), avoid=frozenset({"d"}))) == (None, "d")
    await workers.add("other", WorkerRole.DECODE)
    assert names(workers.choose(request("c"), avoid=frozenset({"d"}))) == (None, "other")


async def test_a_lost_worker_is_forgotten_and_comes_back_empty(workers: Workers) -> None:
    await workers.add("d", WorkerRole.DECODE)
    workers.hold("d", request(), 5)
    workers.choose(request())
    await workers.end("d")
    assert workers.cluster.describe() == []
    assert workers.index.num_blocks == 0
    assert workers.ledger.pending("d") == NO_WORK
    await workers.add("d", WorkerRole.DECODE)
    assert workers.index.state("d") is IndexState.DEGRADED
    assert workers.cluster.count_index_states() == {"exact": 0, "degraded": 1}


async def test_a_request_larger_than_every_pool_has_no_route(workers: Workers) -> None:
    await workers.add("d", WorkerRole.DECODE)
    assert workers.choose(request(num_tokens=BLOCK_SIZE * NUM_BLOCKS)) is None


async def test_a_full_decode_worker_loses_to_one_with_room(workers: Workers) -> None:
    full = WorkerLoad(num_running=MAX_NUM_SEQS, num_waiting=3, num_referenced_blocks=NUM_BLOCKS)
    await workers.add("full", WorkerRole.DECODE, full)
    await workers.add("idle", WorkerRole.DECODE)
    for number in range(4):
        assert names(workers.choose(request(f"r{number}"))) == (None, "idle")
