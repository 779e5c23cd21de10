"""KV blocks between worker processes: register a region, connect, write, be notified."""

from kvtransfer.agent import TransferAgent
from kvtransfer.config import TransferConfig
from kvtransfer.connection import Connection
from kvtransfer.counters import DirectionCounters, PeerCounters
from kvtransfer.probe import PathReport
from kvtransfer.receiver import WriteReceived
from kvtransfer.region import KVRegion
from kvtransfer.transport import Transport

__all__ = [
    "Connection",
    "DirectionCounters",
    "KVRegion",
    "PathReport",
    "PeerCounters",
    "TransferAgent",
    "TransferConfig",
    "Transport",
    "WriteReceived",
]
