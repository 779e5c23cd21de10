"""The suite runs over every transport, and where peers read each other's pools."""

from collections.abc import AsyncIterator

import pytest
from mapped_region import MappedRegion
from transfer_cluster import Cluster, transport_maker

from kvtransfer import KVRegion


@pytest.fixture(params=["local", "ucx", "mapped"])
async def cluster(request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    is_mapped = request.param == "mapped"
    transport = "local" if is_mapped else request.param
    cluster = Cluster(transport_maker(transport), MappedRegion if is_mapped else KVRegion)
    yield cluster
    await cluster.close()
