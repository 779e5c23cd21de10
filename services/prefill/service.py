"""A prefill worker's process, put together."""

import asyncio

from engine.config import EngineConfig
from engine.engine import Engine
from engine.loading import load_engine
from engine.scheduler.prefill import PrefillScheduler
from kvtransfer.incoming_write import WriteReceived
from protocol.ids import WorkerRole
from services.prefill.links import DecodeLinks
from services.prefill.loop import Command, PrefillLoop, TurnReport
from services.prefill.worker import PrefillWorker
from services.runtime.config import WorkerConfig
from services.runtime.engine_thread import EngineThread
from services.runtime.log import configure_logging
from services.runtime.worker_host import WorkerHost
from services.runtime.worker_transfer import open_agent, pool_region


def run_prefill(engine_config: EngineConfig, config: WorkerConfig) -> int:
    """Loads the model and serves until the process is told to stop; returns its exit code.

    Raises StartupError.
    """
    configure_logging(level=config.log_level, log_format=config.log_format)
    engine = load_engine(engine_config)
    return asyncio.run(_serve(engine, engine_config, config))


async def _serve(engine: Engine, engine_config: EngineConfig, config: WorkerConfig) -> int:
    host = WorkerHost(
        WorkerRole.PREFILL,
        config,
        engine_config,
        model=engine.model,
        num_blocks=engine.pool.num_blocks,
    )

    def on_turn(report: TurnReport) -> None:
        worker.on_turn(report)
        host.update(report.load, report.kv_events, report.prefix_stats)
        host.metrics.observe_tokens(
            num_prompt=report.num_prompt_tokens,
            num_generated=report.num_generated_tokens,
            num_forced=report.num_generated_tokens - len(report.done),
        )

    loop = PrefillLoop(
        engine,
        PrefillScheduler(engine.pool, engine.scheduler_config),
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
        on_write=_refuse_write,
    )
    worker = PrefillWorker(
        block_size=engine_config.block_size,
        engine_thread=engine_thread,
        links=DecodeLinks(
            ours=host.ref,
            layout=engine.model.layout,
            channel=host.channel,
            agent=agent,
            tasks=host.tasks,
        ),
        tasks=host.tasks,
        metrics=host.metrics,
    )
    try:
        return await host.serve(worker, engine_thread)
    finally:
        await agent.close()


def _refuse_write(write: WriteReceived) -> None:
    raise AssertionError(f"{write.sender} wrote to a prefill worker, which issues no tickets")
