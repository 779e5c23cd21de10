"""A router as a process: what stops its start, and how it ends."""

import asyncio
import json
import signal
import socket
from pathlib import Path

import httpx
import pytest
from router_process import router_process
from router_stack import open_router_stack, parse_events, until, write_toy_model

from protocol.errors import StartupError
from services.router.config import RouterConfig
from services.router.noop_worker import NoopBehaviour
from services.router.service import run_router


async def test_it_drains_what_runs_when_told_to_stop(tmp_path: Path) -> None:
    async with open_router_stack(tmp_path) as stack:
        worker = await stack.spawn_worker("slow", step_s=0.02)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            async with router_process(stack, tmp_path, listener) as (process, client):
                body = {"prompt": "abc", "max_tokens": 60, "stream": True}
                async with client.stream("POST", "/v1/completions", json=body) as response:
                    parts = response.aiter_bytes()
                    content = await anext(parts)
                    process.send_signal(signal.SIGTERM)
                    async for part in parts:
                        content += part
                text = "".join(e["choices"][0]["text"] for e in parse_events(content))
                assert text == "abc" * 20
                assert await process.wait() == 0
        assert worker.returncode is None


async def test_requests_that_outlast_the_drain_are_ended(tmp_path: Path) -> None:
    async with open_router_stack(tmp_path) as stack:
        silent = await stack.add_worker(behaviour=NoopBehaviour(stall_at=0))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            async with router_process(stack, tmp_path, listener, drain_timeout_s=1.0) as (
                process,
                client,
            ):
                body = {"prompt": "abc"}
                asking = asyncio.create_task(client.post("/v1/completions", json=body))
                await until(lambda: silent.num_running == 1)
                process.send_signal(signal.SIGTERM)
                assert await process.wait() == 0
                await until(lambda: silent.num_running == 0)
                [result] = await asyncio.gather(asking, return_exceptions=True)
                assert isinstance(result, httpx.TransportError) or result.status_code >= 499


async def test_one_line_for_each_request_as_json(tmp_path: Path) -> None:
    async with open_router_stack(tmp_path) as stack:
        await stack.add_worker()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            async with router_process(stack, tmp_path, listener, log_format="json") as (
                process,
                client,
            ):
                answer = await client.post("/v1/completions", json={"prompt": "abc"})
                process.send_signal(signal.SIGTERM)
                assert process.stderr is not None
                lines = (await process.stderr.read()).splitlines()
        events = [json.loads(line) for line in lines]
        [line] = [event for event in events if event.get("event") == "request"]
        assert line["request_id"] == answer.json()["id"]
        assert (line["prompt_tokens"], line["output_tokens"], line["outcome"]) == (3, 16, "length")
        assert line["decode"] == "decode-0"
        assert line["ttft_ms"] <= line["e2e_ms"]


@pytest.fixture
def toy_model(tmp_path: Path) -> Path:
    return write_toy_model(tmp_path)


def test_it_needs_redis(toy_model: Path) -> None:
    with pytest.raises(StartupError, match="--redis-url"):
        run_router(RouterConfig(model=str(toy_model)))


def test_a_missing_model_stops_it(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="nowhere"):
        run_router(RouterConfig(model=str(tmp_path / "nowhere"), redis_url="redis://x"))


def test_a_port_in_use_stops_it(toy_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = RouterConfig(
            model=str(toy_model), redis_url="redis://x", port=taken.getsockname()[1]
        )
        with pytest.raises(StartupError, match="in use"):
            run_router(config)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_key_file_without_keys_opens_no_door(toy_model: Path, content: str) -> None:
    file = toy_model / "keys"
    file.write_text(content)
    config = RouterConfig(model=str(toy_model), redis_url="redis://x", api_key_file=str(file))
    with pytest.raises(StartupError, match="holds no key"):
        run_router(config)


def test_a_broken_generation_config_stops_it(toy_model: Path) -> None:
    (toy_model / "generation_config.json").write_text('{"temperature": -1}')
    with pytest.raises(StartupError, match="generation_config"):
        run_router(RouterConfig(model=str(toy_model), redis_url="redis://x"))


def test_a_chat_template_file_must_exist(toy_model: Path) -> None:
    config = RouterConfig(
        model=str(toy_model), redis_url="redis://x", chat_template=str(toy_model / "none.jinja")
    )
    with pytest.raises(StartupError, match=r"none\.jinja"):
        run_router(config)
