"""The suite runs over every transport."""

from collections.abc import AsyncIterator

import pytest
from transfer_cluster import Cluster, transport_maker


@pytest.fixture(params=["local", "ucx"])
async def cluster(request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    cluster = Cluster(transport_maker(request.param))
    yield cluster
    await cluster.close()
