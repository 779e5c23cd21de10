"""An encode worker's process, put together."""

import asyncio

from engine.config import EngineConfig
from engine.encoder import EncoderEngine
from engine.loading import load_encoder_engine
from engine.scheduler.admission import PrefixStats
from protocol.ids import WorkerRole
from services.encode.loop import Command, EncodeLoop, TurnReport
from services.encode.worker import EncodeWorker
from services.runtime.config import WorkerConfig
from services.runtime.engine_thread import EngineThread
from services.runtime.log import configure_logging
from services.runtime.worker_host import WorkerHost


def run_encode(engine_config: EngineConfig, config: WorkerConfig) -> int:
    """Loads the model and serves until the process is told to stop; returns its exit code.

    Raises StartupError.
    """
    configure_logging(level=config.log_level, log_format=config.log_format)
    engine = load_encoder_engine(engine_config)
    return asyncio.run(_serve(engine, engine_config, config))


async def _serve(engine: EncoderEngine, engine_config: EngineConfig, config: WorkerConfig) -> int:
    host = WorkerHost(WorkerRole.ENCODE, config, engine_config, model=engine.model, num_blocks=0)

    def on_turn(report: TurnReport) -> None:
        worker.on_turn(report)
        host.update(report.load, [], PrefixStats())
        host.metrics.observe_tokens(num_prompt=report.num_tokens, num_generated=0)

    loop = EncodeLoop(engine, publish=host.publisher(on_turn))
    engine_thread = EngineThread[Command](loop, on_failure=host.fail_from_engine)
    worker = EncodeWorker(engine_thread)
    return await host.serve(worker, engine_thread)
