"""The load client against a small server whose every answer the test chooses."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from unreadable import NESTED_JSON

from loadtest.bench import measure, run_bench
from loadtest.config import BenchConfig
from loadtest.results import RequestResult, percentile, summarize
from protocol.errors import StartupError

MODELS = {"data": [{"id": "m"}]}


def event(text: str = "", **more: object) -> bytes:
    choices = [{"delta": {"content": text}}] if text else []
    return b"data: " + json.dumps({"choices": choices, **more}).encode() + b"\n\n"


USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
GOOD = [event("a"), event("b") + event("c"), event(usage=USAGE), b"data: [DONE]\n\n"]


class ScriptedServer:
    """Answers the n-th completion with `answers[n]`: status and pieces of the body."""

    def __init__(self, answer: Callable[[int], tuple[int, list[bytes]]]) -> None:
        self._answer = answer
        self.bodies: list[dict[str, object]] = []
        self.num_connections = 0
        self.num_running = self.most_running = 0
        self.url = ""
        self._connections: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["ScriptedServer"]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            async with asyncio.timeout(10):
                await asyncio.gather(*self._connections)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().partition(b"content-length:")[2].split()[0])
                body = await reader.readexactly(length)
                if head.startswith(b"GET"):
                    await self._send(writer, 200, [json.dumps(MODELS).encode()])
                    continue
                self.bodies.append(json.loads(body))
                self.num_running += 1
                self.most_running = max(self.most_running, self.num_running)
                await self._send(writer, *self._answer(len(self.bodies) - 1))
                self.num_running -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _send(self, writer: asyncio.StreamWriter, status: int, pieces: list[bytes]) -> None:
        writer.write(f"HTTP/1.1 {status} X\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for piece in pieces:
            if piece == b"":
                writer.transport.abort()
                raise ConnectionResetError
            writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            await writer.drain()
            await asyncio.sleep(0.001)
        writer.write(b"0\r\n\r\n")


def config(server: ScriptedServer, **settings: object) -> BenchConfig:
    values: dict[str, object] = {"num_prompts": 6, "max_concurrency": 2, "input_len": 5}
    return BenchConfig(base_url=server.url, **(values | {"warmup_prompts": 0} | settings))


async def test_a_stream_is_timed_and_counted():
    async with ScriptedServer(lambda _: (200, GOOD)).running() as server:
        measured = await measure(config(server))
    summary = measured.summary
    assert (summary.num_completed, summary.errors) == (6, {})
    assert (summary.mean_prompt_tokens, summary.mean_output_tokens) == (7, 3)
    assert summary.cached_tokens_share == pytest.approx(4 / 7)
    assert server.most_running == 2
    assert server.num_connections <= 3, "connections are kept"
    for result in measured.results:
        assert result.first_token_s is not None
        assert result.first_token_s <= result.end_to_end_s
        assert len(result.gaps_s) == 2
    assert server.bodies[0]["stream_options"] == {"include_usage": True}
    assert server.bodies[0]["ignore_eos"] is True


async def test_an_answer_without_stream_has_tokens_but_no_first_one():
    body = json.dumps({"choices": [{"text": "abc"}], "usage": USAGE}).encode()
    async with ScriptedServer(lambda _: (200, [body])).running() as server:
        measured = await measure(config(server, stream=False, endpoint="completions"))
    assert measured.summary.ttft_ms is None
    assert measured.summary.mean_output_tokens == 3
    assert isinstance(server.bodies[0]["prompt"], str)


async def test_each_kind_of_failure_is_counted():
    answers = [
        (200, GOOD),
        (503, [b'{"error": {"message": "no"}}']),
        (200, [event("a"), b""]),
        (200, [event("a")]),
        (200, [event("a"), b'data: {"error": {"message": "lost"}}\n\n', b"data: [DONE]\n\n"]),
        (200, [b"data: nonsense\n\n", b"data: [DONE]\n\n"]),
        (200, [b'data: {"choices": [{"text": "\xff"}]}\n\n', b"data: [DONE]\n\n"]),
        (200, [b"data: " + NESTED_JSON + b"\n\n", b"data: [DONE]\n\n"]),
    ]
    async with ScriptedServer(lambda n: answers[n]).running() as server:
        measured = await measure(config(server, max_concurrency=1, num_prompts=len(answers)))
    assert measured.summary.num_completed == 1
    assert measured.summary.errors == {
        "HTTP 503": 1,
        "connection lost": 1,
        "stream ended early": 1,
        "error in the answer": 1,
        "answer isn't OpenAI's": 3,
    }


async def test_a_silent_server_is_given_up():
    async with ScriptedServer(lambda _: (200, [event("a")] * 500)).running() as server:
        measured = await measure(config(server, num_prompts=1, request_timeout_s=0.1))
    assert measured.summary.errors == {"timeout": 1}


async def test_a_request_that_waits_for_a_place_says_how_late_it_is():
    async with ScriptedServer(lambda _: (200, GOOD * 3)).running() as server:
        settings = {"request_rate": 10_000.0, "max_concurrency": 1}
        measured = await measure(config(server, **settings))
    assert measured.results[-1].late_s > measured.results[0].late_s
    assert measured.summary.max_late_ms == pytest.approx(
        1000 * max(result.late_s for result in measured.results)
    )


async def test_a_model_that_is_not_served_is_named():
    async with ScriptedServer(lambda _: (200, GOOD)).running() as server:
        with pytest.raises(StartupError, match="doesn't serve x, but m"):
            await measure(config(server, model="x"))


def test_a_server_that_is_not_there_is_one_sentence():
    with pytest.raises(StartupError, match="doesn't answer"):
        run_bench(BenchConfig(base_url="http://127.0.0.1:1"))


def test_a_url_that_is_none_is_refused():
    with pytest.raises(StartupError, match="is no http"):
        run_bench(BenchConfig(base_url="ftp://x"))


async def test_files_hold_the_summary_and_a_line_a_request(tmp_path, capsys):
    summary_path, requests_path = tmp_path / "s.json", tmp_path / "r.jsonl"
    async with ScriptedServer(lambda _: (200, GOOD)).running() as server:
        settings = config(
            server,
            api_key="hunter2",
            result_file=str(summary_path),
            requests_file=str(requests_path),
        )
        assert await asyncio.to_thread(run_bench, settings) == 0
    written = json.loads(summary_path.read_text())
    assert written["summary"]["num_completed"] == 6
    assert written["machine"]["cores"] >= 1
    assert "hunter2" not in summary_path.read_text()
    lines = [json.loads(line) for line in requests_path.read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(6))
    assert "output tok/s" in capsys.readouterr().out


def test_percentiles_interpolate():
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == 2.5
    assert percentile([1.0], 99) == 1.0


def test_failed_requests_count_for_nothing_but_errors():
    good = RequestResult(
        index=0, start_s=0.0, output_tokens=10, first_token_s=0.1, end_to_end_s=1.0
    )
    bad = RequestResult(index=1, start_s=0.0, error="timeout", output_tokens=5, end_to_end_s=9.0)
    summary = summarize([good, bad], duration_s=2.0)
    assert summary.output_tokens_per_s == 5.0
    assert summary.e2e_ms is not None
    assert summary.e2e_ms.maximum == 1000.0
    assert summary.tpot_ms is not None
    assert summary.tpot_ms.mean == pytest.approx(100.0)
