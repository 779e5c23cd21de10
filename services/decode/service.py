"""A decode worker's process, put together."""

import asyncio

from engine.config import EngineConfig
from engine.engine import Engine
from engine.loading import load_engine
from engine.scheduler.decode import DecodeScheduler
from kvtransfer.incoming_write import WriteReceived
from protocol.ids import RequestKey, WorkerRole
from services.decode.loop import Command, DecodeLoop, TurnReport
from services.decode.transfers import IncomingTransfers
from services.decode.worker import DecodeWorker
from services.runtime.config import WorkerConfig
from services.runtime.engine_thread import EngineThread
from services.runtime.log import configure_logging
from services.runtime.worker_host import WorkerHost
from services.runtime.worker_transfer import open_agent, pool_region


def run_decode(engine_config: EngineConfig, config: WorkerConfig) -> int:
    """Loads the model and serves until the process is told to stop; returns its exit code.

    Raises StartupError.
    """
    configure_logging(level=config.log_level, log_format=config.log_format)
    engine = load_engine(engine_config)
    engine.allocate_swap_space()
    return asyncio.run(_serve(engine, engine_config, config))


async def _serve(engine: Engine, engine_config: EngineConfig, config: WorkerConfig) -> int:
    host = WorkerHost(
        WorkerRole.DECODE,
        config,
        engine_config,
        model=engine.model,
        num_blocks=engine.pool.num_blocks,
    )

    def on_turn(report: TurnReport) -> None:
        worker.on_turn(report)
        host.update(report.load, report.kv_events, report.prefix_stats)
        host.metrics.observe_preemptions(report.num_preempted, num_swapped=report.num_swapped)
        host.metrics.observe_tokens(
            num_prompt=report.num_prompt_tokens,
            num_generated=report.num_generated_tokens,
            num_forced=report.num_forced_tokens,
        )

    # Agent, transfers and worker know each other; these two are called in the running loop only.
    def on_write(write: WriteReceived) -> None:
        transfers.write_received(write)
        host.metrics.observe_received(
            write.sender, num_bytes=write.num_bytes, seconds=write.seconds
        )

    def give_back(key: RequestKey, message: str) -> None:
        worker.give_back(key, message)

    loop = DecodeLoop(
        engine,
        DecodeScheduler(engine.pool, engine.scheduler_config),
        publish=host.publisher(on_turn),
    )
    engine_thread = EngineThread[Command](loop, on_failure=host.fail_from_engine)
    agent = open_agent(
        config,
        host.ref,
        pool_region(
            engine.kv_pool.data_ptr(),
            engine.device_blocks,
            num_blocks=engine.pool.num_blocks,
            block_bytes=engine.model.layout.block_bytes,
        ),
        on_write=on_write,
    )
    transfers = IncomingTransfers(
        incarnation=host.ref.incarnation,
        agent=agent,
        tasks=host.tasks,
        post=engine_thread.post,
        give_back=give_back,
        ticket_ttl_s=config.ticket_ttl_s,
    )
    worker = DecodeWorker(
        layout=engine.model.layout,
        agent=agent,
        engine_thread=engine_thread,
        transfers=transfers,
        tasks=host.tasks,
    )
    try:
        return await host.serve(worker, engine_thread)
    finally:
        await agent.close()
