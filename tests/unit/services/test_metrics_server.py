"""A worker's HTTP endpoint for scrapers and health checks."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest

from protocol.errors import StartupError
from services.runtime import metrics_server
from services.runtime.metrics_server import MetricsServer


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Counter("tandem:seen", "Things seen.", registry=registry).inc(3)
    return registry


@pytest.fixture
async def server(registry: CollectorRegistry) -> AsyncIterator[MetricsServer]:
    server = MetricsServer(registry, host="127.0.0.1", port=0)
    yield server
    server.close()


async def test_it_serves_metrics(server: MetricsServer, registry: CollectorRegistry) -> None:
    async with httpx.AsyncClient(base_url=server.address) as client:
        answer = await client.get("/metrics?name[]=all")
        assert answer.content == generate_latest(registry)
        assert answer.headers["content-type"].startswith("text/plain")
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/other")).status_code == 404


async def test_health_is_the_event_loops(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_server, "LOOP_ANSWER_S", 0.05)
    statuses: list[int] = []
    asked = threading.Thread(
        target=lambda: statuses.append(httpx.get(f"{server.address}/health").status_code)
    )
    asked.start()
    deadline_s = time.monotonic() + 20.0
    while not statuses and time.monotonic() < deadline_s:
        time.sleep(0.01)  # noqa: ASYNC251  (the loop is to be stalled)
    asked.join()
    assert statuses == [503]
    recovered = await asyncio.to_thread(httpx.get, f"{server.address}/health")
    assert recovered.status_code == 200


async def test_a_taken_port_is_one_sentence(
    server: MetricsServer, registry: CollectorRegistry
) -> None:
    port = int(server.address.rpartition(":")[2])
    with pytest.raises(StartupError, match=rf"--metrics-port: cannot listen on 127.0.0.1:{port}"):
        MetricsServer(registry, host="127.0.0.1", port=port)
