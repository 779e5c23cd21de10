"""A worker without a model: real sockets, real registration, tokens out of thin air.

What the router is tested and measured against. Its output repeats the prompt, so everybody can
say which token belongs at which position: `prompt[i % len(prompt)]` at output position `i`.

    python -m services.router.noop_worker --redis-url URL --role decode
"""

import argparse
import asyncio
import os
import signal
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import uvloop

from protocol.ids import RequestKey, WorkerId, WorkerRef, WorkerRole, new_incarnation
from protocol.layout import KVLayout
from protocol.messages import (
    PROTOCOL_VERSION,
    AbortRequest,
    ExpectRequest,
    LoadReport,
    PrefixCacheReset,
    RequestFailed,
    ResetPrefixCache,
    RunLocal,
    RunPrefill,
    StepOutputs,
)
from protocol.records import WorkerLoad, WorkerRecord
from protocol.request import PhaseTimings, Request, SequenceOutput, TokenLogprobs
from services.runtime.channel import ControlChannel
from services.runtime.peers import ChannelEvent, Identity, Peer, PeerDown, Received
from services.runtime.redis_client import open_redis
from services.runtime.registry import WorkerRegistration
from services.runtime.tasks import TaskOwner

NOOP_LAYOUT = KVLayout(
    model_fingerprint="noop",
    num_layers=1,
    num_kv_heads=1,
    head_dim=64,
    block_size=16,
    dtype="bfloat16",
)


@dataclass(frozen=True, slots=True)
class NoopBehaviour:
    """`step_s` lie between two steps, each of which makes `tokens_per_step` tokens a sequence.

    `stall_at` is the output position at which every sequence stops for good, `fails_at` the one
    behind which its grammar can't be followed; `refuses` fails every request, retryably or not.
    """

    step_s: float = 0.0
    tokens_per_step: int = 1
    stall_at: int | None = None
    fails_at: int | None = None
    refuses: bool = False
    refusal_is_retryable: bool = True
    max_model_len: int = 8192


@dataclass(slots=True)
class _Running:
    request: Request
    router: Peer
    position: int
    last_position: int
    num_cached_tokens: int | None


class NoopWorker:
    """One worker, prefill or decode; make it inside the running event loop."""

    def __init__(
        self,
        role: WorkerRole,
        redis_url: str,
        *,
        worker_id: WorkerId,
        behaviour: NoopBehaviour | None = None,
    ) -> None:
        self.role = role
        self.requests: list[Request] = []
        self.aborted: asyncio.Queue[RequestKey] = asyncio.Queue()
        self.behaviour = behaviour or NoopBehaviour()
        identity = Identity(worker_id, new_incarnation())
        self._channel = ControlChannel(identity, self._on_channel)
        address = self._channel.listen("tcp://127.0.0.1:0")
        self.ref = WorkerRef(worker_id, identity.incarnation, address)
        self._redis = open_redis(redis_url)
        self._registration = WorkerRegistration(self._redis, self._record())
        self._running: dict[RequestKey, _Running] = {}
        self._has_work = asyncio.Event()
        self._tasks = TaskOwner(on_failure=self._fail)
        self._failure: BaseException | None = None

    def start(self) -> None:
        self._tasks.start(self._registration.run())
        self._tasks.start(self._step_forever())

    def report_load(self, load: WorkerLoad) -> None:
        """To every router that is connected."""
        for peer in self._channel.peers:
            peer.send(LoadReport(load))

    def wake(self) -> None:
        """Goes on with what has stalled; `behaviour` has changed."""
        self._has_work.set()

    async def close(self) -> None:
        """Raises what went wrong in the background, if something did."""
        await self._tasks.close()
        await self._registration.withdraw()
        await self._channel.close()
        await self._redis.aclose()
        if self._failure is not None:
            raise self._failure

    @property
    def num_running(self) -> int:
        return len(self._running)

    def _record(self) -> WorkerRecord:
        return WorkerRecord(
            protocol_version=PROTOCOL_VERSION,
            ref=self.ref,
            role=self.role,
            model="noop",
            layout=NOOP_LAYOUT,
            num_blocks=4096,
            max_num_seqs=1024,
            max_num_batched_tokens=8192,
            max_model_len=self.behaviour.max_model_len,
            metrics_address="",
            pid=os.getpid(),
            hostname=socket.gethostname(),
        )

    def _on_channel(self, event: ChannelEvent) -> None:
        match event:
            case Received(peer, RunLocal(request)):
                self._start(peer, request, first=0)
            case Received(peer, RunPrefill(request)):
                self._start(peer, request, first=0)
            case Received(peer, ExpectRequest(request)):
                self._start(peer, request, first=1)
            case Received(peer, ResetPrefixCache(reset_id)):
                peer.send(PrefixCacheReset(reset_id, num_dropped_blocks=0))
            case Received(_, AbortRequest(key)):
                self._running.pop(key, None)
                self.aborted.put_nowait(key)
            case PeerDown(peer):
                for key in [k for k, run in self._running.items() if run.router is peer]:
                    del self._running[key]
            case _:
                pass

    def _start(self, router: Peer, request: Request, *, first: int) -> None:
        """Prefill makes the first token, decode those behind it, a lone worker all of them."""
        self.requests.append(request)
        if self.behaviour.refuses:
            retryable = self.behaviour.refusal_is_retryable
            router.send(RequestFailed(request.key, "no room", retryable))
            return
        assert request.sampling.max_tokens is not None
        position = len(request.token_ids) - request.num_prompt_tokens + first
        last = request.sampling.max_tokens - 1
        if self.role is WorkerRole.PREFILL:
            last = min(last, position)
        if position <= last:
            num_cached = None if first else 0
            self._running[request.key] = _Running(request, router, position, last, num_cached)
            self._has_work.set()

    async def _step_forever(self) -> None:
        while True:
            await self._has_work.wait()
            if not self._step():
                self._has_work.clear()
            await asyncio.sleep(self.behaviour.step_s)

    def _step(self) -> bool:
        """False if there is nothing to do until another request comes."""
        outputs: dict[Peer, list[SequenceOutput]] = {}
        for key, run in list(self._running.items()):
            if self.behaviour.stall_at is not None and run.position >= self.behaviour.stall_at:
                continue
            if run.position == self.behaviour.fails_at:
                field = "structured_outputs"
                message = f"`{field}` can't be followed any further: it's too complex"
                run.router.send(RequestFailed(key, message, retryable=False, field=field))
                del self._running[key]
                continue
            output = self._advance(run)
            outputs.setdefault(run.router, []).append(output)
            if run.position > run.last_position:
                del self._running[key]
        for router, its_outputs in outputs.items():
            router.send(StepOutputs(its_outputs))
        return bool(outputs)

    def _advance(self, run: _Running) -> SequenceOutput:
        request = run.request
        count = min(self.behaviour.tokens_per_step, run.last_position + 1 - run.position)
        prompt = request.token_ids[: request.num_prompt_tokens]
        start, run.position = run.position, run.position + count
        token_ids = [prompt[i % len(prompt)] for i in range(start, run.position)]
        num_cached, run.num_cached_tokens = run.num_cached_tokens, None
        is_last = run.position == request.sampling.max_tokens
        return SequenceOutput(
            key=request.key,
            position=start,
            token_ids=token_ids,
            finish_reason="length" if is_last else None,
            logprobs=_logprobs(request.sampling.logprobs, token_ids),
            prompt_logprobs=_logprobs(request.sampling.prompt_logprobs, prompt[1:])
            if start == 0 and request.reads_prompt
            else None,
            pooled=_pooled(request) if start == 0 else None,
            num_cached_tokens=num_cached,
            timings=None if num_cached is None else PhaseTimings(prefill_s=0.0),
        )

    def _fail(self, error: BaseException) -> None:
        self._failure = error


def _pooled(request: Request) -> bytes | None:
    """Three numbers that tell prompts apart."""
    if request.pooling is None:
        return None
    token_ids = request.token_ids
    return struct.pack("=3f", len(token_ids), token_ids[0], token_ids[-1])


def _logprobs(count: int | None, token_ids: Sequence[int]) -> list[TokenLogprobs] | None:
    if count is None:
        return None
    return [TokenLogprobs(-0.5, 1, [i] * min(count, 1), [-0.5] * min(count, 1)) for i in token_ids]


async def _run(arguments: argparse.Namespace) -> None:
    behaviour = NoopBehaviour(
        step_s=arguments.step_s,
        tokens_per_step=arguments.tokens_per_step,
        stall_at=arguments.stall_at,
        max_model_len=arguments.max_model_len,
    )
    worker = NoopWorker(
        WorkerRole(arguments.role),
        arguments.redis_url,
        worker_id=arguments.worker_id,
        behaviour=behaviour,
    )
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    worker.start()
    await stop.wait()
    await worker.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="A worker without a model.")
    parser.add_argument("--redis-url", required=True)
    parser.add_argument("--role", choices=[str(role) for role in WorkerRole], default="decode")
    parser.add_argument("--worker-id", default=f"noop-{os.getpid()}")
    parser.add_argument("--step-s", type=float, default=0.0)
    parser.add_argument("--tokens-per-step", type=int, default=1)
    parser.add_argument("--stall-at", type=int)
    parser.add_argument("--max-model-len", type=int, default=8192)
    uvloop.run(_run(parser.parse_args()))


if __name__ == "__main__":
    main()
