"""A router with real HTTP, ZMQ and Redis, over workers without a model, in one event loop."""

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import redis.asyncio
import redis.exceptions
import uvicorn
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from cli.redis_server import find_redis_server, redis_arguments, redis_socket_url
from protocol.ids import WorkerRole
from services.router.config import RouterConfig
from services.router.http.server import make_server
from services.router.noop_worker import NoopBehaviour, NoopWorker
from services.router.served_model import ServedModel
from services.router.service import RouterService

DEADLINE_S = 20.0
MODEL = "toy"
MAX_MODEL_LEN = 512

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'forbidden' %}{{ raise_exception('no such role') }}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_toy_model(path: Path, *, marks: tuple[str, ...] = ()) -> Path:
    """Every byte is a token, so that texts, tokens and characters cut across each other; so is
    each of `marks`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={t: i for i, t in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    backend.add_tokens([AddedToken(mark) for mark in marks])
    backend.save(str(path / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 258 + len(marks),
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "max_position_embeddings": MAX_MODEL_LEN,
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    return path


@dataclass(slots=True)
class RouterStack:
    """What tests talk to. Workers are added and removed as they like."""

    url: str
    redis_url: str
    client: httpx.AsyncClient
    service: RouterService
    model: ServedModel
    stack: AsyncExitStack
    redis: asyncio.subprocess.Process
    workers: list[NoopWorker] = field(default_factory=list)

    async def add_worker(
        self, role: str = "decode", behaviour: NoopBehaviour | None = None
    ) -> NoopWorker:
        """A worker in this process, known to the router when this returns."""
        worker = NoopWorker(
            WorkerRole(role),
            self.redis_url,
            worker_id=f"{role}-{len(self.workers)}",
            behaviour=replace(behaviour or NoopBehaviour(), max_model_len=MAX_MODEL_LEN),
        )
        self.workers.append(worker)
        worker.start()
        self.stack.push_async_callback(worker.close)
        await self.until_known(worker.ref.worker_id)
        return worker

    async def spawn_worker(
        self, worker_id: str, role: str = "decode", **options: Any
    ) -> asyncio.subprocess.Process:
        """A worker in its own process, which can be killed."""
        options.setdefault("max_model_len", MAX_MODEL_LEN)
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.router.noop_worker"),
            *("--redis-url", self.redis_url, "--role", role, "--worker-id", worker_id),
            *arguments,
        )
        self.stack.push_async_callback(_end, process)
        await self.until_known(worker_id)
        return process

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    @property
    def num_delivered(self) -> int:
        """Tokens of requests under way that have come from workers."""
        return sum(len(flight.tokens) for flight in self.service.dispatcher.flights)

    def kill_redis(self) -> None:
        self.redis.kill()

    async def until_known(self, worker_id: str) -> None:
        def is_known() -> bool:
            return any(
                entry["state"] == "alive" and entry["record"]["ref"]["worker_id"] == worker_id
                for entry in self.service.cluster.describe()
            )

        await until(is_known)

    async def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return await self.client.post(path, json=body, **options)

    async def stream(self, path: str, body: Any) -> list[dict[str, Any]]:
        """All events of a stream, less the closing [DONE]."""
        response = await self.post(path, body | {"stream": True})
        assert response.status_code == 200, response.text
        return parse_events(response.content)


def parse_events(content: bytes) -> list[dict[str, Any]]:
    events = content.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def parse_named_events(content: bytes) -> list[dict[str, Any]]:
    """Of a stream whose events have names, which their data repeats as `type`."""
    *raw, rest = content.decode().split("\n\n")
    assert rest == ""
    events = []
    for lines in raw:
        name, data = lines.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110  (what is waited for has no event)
            await asyncio.sleep(0.005)


@asynccontextmanager
async def open_router_stack(
    path: Path,
    *,
    api_keys: tuple[str, ...] = (),
    marks: tuple[str, ...] = (),
    model_dir: Path | None = None,
    **settings: Any,
) -> AsyncIterator[RouterStack]:
    """A router without workers, for the toy model, which has these `marks`, or that of `model_dir`;
    `settings` are RouterConfig's."""
    async with AsyncExitStack() as stack:
        redis_url, redis_process = await _start_redis(path, stack)
        model_dir = model_dir or write_toy_model(path, marks=marks)
        model = ServedModel.from_dir(model_dir, names=(MODEL, "alias"))
        config = RouterConfig(redis_url=redis_url, **settings)
        service = RouterService(config, model, api_keys=api_keys)
        listener = socket.create_server(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = make_server(service.app, drain_timeout_s=1.0)
        await service.start()
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        stack.push_async_callback(_stop, server, serving, service)
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=60.0))
        await until(lambda: server.started)
        yield RouterStack(url, redis_url, client, service, model, stack, redis_process)


async def _start_redis(path: Path, stack: AsyncExitStack) -> tuple[str, asyncio.subprocess.Process]:
    file = path / "redis.sock"
    process = await asyncio.create_subprocess_exec(*redis_arguments(find_redis_server(), file))
    stack.push_async_callback(_end, process)
    url = redis_socket_url(file)
    async with redis.asyncio.Redis.from_url(url) as client, asyncio.timeout(DEADLINE_S):
        while True:
            try:
                await client.ping()
                return url, process
            except redis.exceptions.ConnectionError:
                await asyncio.sleep(0.01)


async def _stop(
    server: uvicorn.Server, serving: asyncio.Task[None], service: RouterService
) -> None:
    server.should_exit = server.force_exit = True
    await serving
    await service.close()


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()
