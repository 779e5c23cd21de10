"""KV blocks between worker processes: register a region, connect, write, be notified."""

from kvtransfer.agent import TransferAgent
from kvtransfer.config import TransferConfig
from kvtransfer.connection import Connection
from kvtransfer.counters import DirectionCounters, PeerCounters
from kvtransfer.device import DeviceBlocks, DeviceRegion
from kvtransfer.incoming_write import WriteReceived
from kvtransfer.probe import PathReport
from kvtransfer.region import KVRegion, Region
from kvtransfer.transport import Transport

__all__ = [
    "Connection",
    "DeviceBlocks",
    "DeviceRegion",
    "DirectionCounters",
    "KVRegion",
    "PathReport",
    "PeerCounters",
    "Region",
    "TransferAgent",
    "TransferConfig",
    "Transport",
    "WriteReceived",
]
