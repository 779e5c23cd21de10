"""A worker's transfer agent, from its settings and its pool's memory."""

from collections.abc import Callable

from kvtransfer.agent import TransferAgent
from kvtransfer.config import TransferConfig
from kvtransfer.receiver import WriteReceived
from kvtransfer.region import KVRegion
from kvtransfer.ucx import UcxTransport
from protocol.ids import WorkerRef
from services.runtime.config import WorkerConfig


def open_agent(
    config: WorkerConfig,
    ref: WorkerRef,
    region: KVRegion,
    *,
    on_write: Callable[[WriteReceived], None],
) -> TransferAgent:
    """A started agent; call it within the running event loop. Raises TransferError."""
    agent = TransferAgent(
        UcxTransport(),
        region,
        worker_id=ref.worker_id,
        incarnation=ref.incarnation,
        on_write=on_write,
        config=TransferConfig(verify_checksums=config.verify_kv_checksums),
    )
    agent.start()
    return agent
