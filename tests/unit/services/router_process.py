"""A further router of a test's stack, in a process of its own, which can be killed."""

import asyncio
import dataclasses
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from router_stack import RouterStack

from services.router.config import RouterConfig


@asynccontextmanager
async def router_process(
    stack: RouterStack, model: Path, listener: socket.socket, **settings: Any
) -> AsyncIterator[tuple[asyncio.subprocess.Process, httpx.AsyncClient]]:
    """A second router of the same stack, on an inherited socket."""
    config = RouterConfig(
        fd=listener.fileno(), redis_url=stack.redis_url, model=str(model), **settings
    )
    code = (
        "import sys; from services.router.config import RouterConfig;"
        "from services.router.service import run_router;"
        f"sys.exit(run_router(RouterConfig(**{dataclasses.asdict(config)!r})))"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code),
        pass_fds=(listener.fileno(),),
        stderr=asyncio.subprocess.PIPE,
    )
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        async with httpx.AsyncClient(base_url=url, timeout=30.0) as client:
            # Healthy only when it has found the stack's worker.
            async with asyncio.timeout(30.0):
                while not await _answers(client):
                    assert process.returncode is None
                    await asyncio.sleep(0.02)
            yield process, client
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _answers(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/health")).status_code == 200
    except httpx.TransportError:
        return False
