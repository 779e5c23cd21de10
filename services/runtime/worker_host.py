"""Everything around a worker's engine: its address, its presence in Redis, its start and its end.

1. The control channel listens, so the worker has an address; then it registers in Redis.
2. Messages go to the worker, its load goes to Redis and to every peer that listens.
3. SIGTERM or SIGINT: no new work comes (the load says `draining`), running requests get
   `drain_timeout_s` to end. A second signal, or a fault on the engine thread, ends it at once.
4. The worker deregisters, says Goodbye to all peers, and stops its engine thread.
"""

import asyncio
import gc
import logging
import os
import signal
import socket
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import msgspec

from engine.config import EngineConfig
from engine.model_info import ModelInfo
from engine.scheduler.admission import PrefixStats
from protocol.ids import WorkerRef, WorkerRole, new_incarnation
from protocol.messages import PROTOCOL_VERSION, LoadReport
from protocol.records import KVEvent, WorkerLoad, WorkerRecord
from services.runtime.addresses import announced_host
from services.runtime.channel import ControlChannel
from services.runtime.config import WorkerConfig
from services.runtime.engine_thread import EngineThread
from services.runtime.metrics import WorkerMetrics
from services.runtime.metrics_server import MetricsServer
from services.runtime.peers import ChannelEvent, Identity
from services.runtime.redis_client import open_redis
from services.runtime.registry import WorkerRegistration
from services.runtime.tasks import TaskOwner

logger = logging.getLogger(__name__)

ReportT = TypeVar("ReportT")

REPORT_INTERVAL_S = 0.2
ENGINE_STOP_TIMEOUT_S = 10.0
EXIT_FAULT = 1


class Worker(Protocol):
    """The role's own part, in the event loop."""

    @property
    def num_requests(self) -> int: ...

    def on_channel(self, event: ChannelEvent) -> None: ...

    def maintain(self) -> None:
        """Called every `REPORT_INTERVAL_S`: leases and the like."""
        ...

    def transfer_rates(self) -> dict[str, float]:
        """Measured GB/s to each peer that KV goes to."""
        ...


class WorkerHost:
    """Make it inside the running event loop, then the role's parts on it, then `serve`."""

    def __init__(
        self,
        role: WorkerRole,
        config: WorkerConfig,
        engine_config: EngineConfig,
        *,
        model: ModelInfo,
        num_blocks: int,
    ) -> None:
        """Raises StartupError if an address is taken or the Redis URL isn't one."""
        assert config.redis_url is not None, "checked on the command line"
        self._drain_timeout_s = config.drain_timeout_s
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._num_signals = 0
        self._exit_code = 0
        self._worker: Worker | None = None
        self._load = WorkerLoad()
        self._prefix_stats = PrefixStats()
        worker_id = config.worker_id or f"{role}-{socket.gethostname()}-{os.getpid()}"
        identity = Identity(worker_id, new_incarnation())
        self.tasks = TaskOwner(on_failure=self._fail)
        self.channel = ControlChannel(identity, self._on_channel)
        bound = self.channel.listen(f"tcp://{config.host}:{config.control_port}")
        port = bound.rpartition(":")[2]
        self.ref = WorkerRef(
            worker_id, identity.incarnation, f"tcp://{announced_host(config.host)}:{port}"
        )
        self.metrics = WorkerMetrics(model_name=model.name, worker_id=worker_id)
        if num_blocks:
            self.metrics.describe_pool(block_size=model.layout.block_size, num_blocks=num_blocks)
        self._metrics_server = MetricsServer(
            self.metrics.registry, host=config.host, port=config.metrics_port
        )
        self._redis = open_redis(config.redis_url)
        self._registration = WorkerRegistration(
            self._redis,
            WorkerRecord(
                protocol_version=PROTOCOL_VERSION,
                ref=self.ref,
                role=role,
                model=model.name,
                layout=model.layout,
                num_blocks=num_blocks,
                max_num_seqs=engine_config.max_num_seqs,
                max_num_batched_tokens=engine_config.max_num_batched_tokens,
                max_model_len=model.max_model_len,
                metrics_address=self._metrics_server.address,
                pid=os.getpid(),
                hostname=socket.gethostname(),
            ),
        )

    def publisher(self, on_report: Callable[[ReportT], None]) -> Callable[[ReportT], None]:
        """How the engine thread hands its reports to the event loop."""

        def publish(report: ReportT) -> None:
            self._loop.call_soon_threadsafe(on_report, report)

        return publish

    def fail_from_engine(self, error: Exception) -> None:
        """For `EngineThread.on_failure`: the process can't be trusted any more and ends."""
        self._loop.call_soon_threadsafe(self._fail, error)

    def update(self, load: WorkerLoad, kv_events: list[KVEvent], stats: PrefixStats) -> None:
        """Takes the engine's state after a turn; `stats` count since the start."""
        self._load = load
        self._registration.publish_kv(kv_events)
        self.metrics.observe_cache(
            num_queried=stats.num_queried_tokens - self._prefix_stats.num_queried_tokens,
            num_hit=stats.num_hit_tokens - self._prefix_stats.num_hit_tokens,
        )
        self._prefix_stats = stats

    async def serve(self, worker: Worker, engine_thread: EngineThread[Any]) -> int:
        """Runs until told to stop; returns the process's exit code."""
        self._worker = worker
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._on_signal)
        # Modules and weights live for ever: the collector need not walk torch's 200,000 objects
        # again, neither between two steps (0.1 s) nor at the process's end (0.4 s).
        gc.collect()
        gc.freeze()
        engine_thread.start()
        registering = self.tasks.start(self._registration.run())
        reporting = self.tasks.start(self._report_regularly(worker))
        await self._stop.wait()
        if self._exit_code == 0:
            await self._drain(worker)
        registering.cancel()
        reporting.cancel()
        await self._registration.withdraw()
        await self.tasks.close()
        await self.channel.close()
        await self._redis.aclose()
        self._metrics_server.close()
        if not engine_thread.stop(ENGINE_STOP_TIMEOUT_S):
            logger.warning("the engine's last step does not end; leaving without it")
        return self._exit_code

    def _on_channel(self, event: ChannelEvent) -> None:
        # Nobody is connected before `serve`: the address is published there.
        if self._worker is not None:
            self._worker.on_channel(event)

    def _on_signal(self) -> None:
        self._num_signals += 1
        self._stop.set()

    def _fail(self, error: BaseException) -> None:
        logger.critical("ending after a fault", exc_info=error)
        self._exit_code = EXIT_FAULT
        self._stop.set()

    async def _drain(self, worker: Worker) -> None:
        """Waits for running requests; load reports tell the routers to send no more."""
        deadline_s = self._loop.time() + self._drain_timeout_s
        while worker.num_requests and self._loop.time() < deadline_s:
            if self._num_signals > 1 or self._exit_code:
                break
            await asyncio.sleep(REPORT_INTERVAL_S)
        if worker.num_requests:
            logger.warning("%d requests did not end in time", worker.num_requests)

    async def _report_regularly(self, worker: Worker) -> None:
        while True:
            load = msgspec.structs.replace(
                self._load,
                transfer_gb_per_s=worker.transfer_rates(),
                draining=self._stop.is_set(),
            )
            worker.maintain()
            self.metrics.observe_load(load)
            self._registration.update_load(load)
            report = LoadReport(load)
            for peer in self.channel.peers:
                peer.send(report)
            await asyncio.sleep(REPORT_INTERVAL_S)
