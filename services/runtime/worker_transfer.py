"""A worker's transfer agent, from its settings and its pool's memory."""

from collections.abc import Callable

from kvtransfer.agent import TransferAgent
from kvtransfer.config import TransferConfig
from kvtransfer.device import DeviceBlocks, DeviceRegion
from kvtransfer.incoming_write import WriteReceived
from kvtransfer.region import KVRegion, Region
from kvtransfer.ucx import DEVICE_MEMORY_SETTINGS, UcxTransport
from protocol.ids import WorkerRef
from services.runtime.config import WorkerConfig

# What a read of a step's blocks on one card, or over NVLink, takes, there and back.
SPIN_S = 0.001


def pool_region(
    address: int, device_blocks: DeviceBlocks | None, *, num_blocks: int, block_bytes: int
) -> Region:
    """The engine's pool: at `address` in host memory, unless it has `device_blocks`."""
    if device_blocks is None:
        return KVRegion.from_address(address, num_blocks=num_blocks, block_bytes=block_bytes)
    return DeviceRegion(device_blocks, num_blocks=num_blocks, block_bytes=block_bytes)


def open_agent(
    config: WorkerConfig,
    ref: WorkerRef,
    region: Region,
    *,
    on_write: Callable[[WriteReceived], None],
) -> TransferAgent:
    """A started agent; call it within the running event loop. Raises TransferError."""
    if region.peers_write:
        transport = UcxTransport(DEVICE_MEMORY_SETTINGS, peers_write=True, spin_s=SPIN_S)
        transfer_config = TransferConfig.for_device_memory(
            verify_checksums=config.verify_kv_checksums
        )
    else:
        transport = UcxTransport()
        transfer_config = TransferConfig(verify_checksums=config.verify_kv_checksums)
    agent = TransferAgent(
        transport,
        region,
        worker_id=ref.worker_id,
        incarnation=ref.incarnation,
        on_write=on_write,
        config=transfer_config,
    )
    agent.start()
    return agent
