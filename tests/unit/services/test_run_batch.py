"""`tandem run-batch` against a running router, and what it refuses."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from router_stack import RouterStack, open_router_stack
from unreadable import NESTED_JSON

from cli.main import main

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEY = "secret"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RouterStack]:
    async with open_router_stack(tmp_path_factory.mktemp("router"), api_keys=(KEY,)) as stack:
        await stack.add_worker()
        yield stack


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_API_KEY", KEY)


def line(custom_id: str, **body: Any) -> str:
    body = {"prompt": "abc", "max_tokens": 3} | body
    request = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}
    return json.dumps(request)


async def run_batch(url: str, source: Path, target: Path) -> int:
    arguments = ["run-batch", "-i", str(source), "-o", str(target), "--url", url]
    return await asyncio.to_thread(main, arguments)


def results(target: Path) -> dict[str, Any]:
    lines = [json.loads(each) for each in target.read_text().splitlines()]
    by_id = {each["custom_id"]: each for each in lines}
    assert len(by_id) == len(lines)
    return by_id


async def test_every_request_gets_a_result(
    stack: RouterStack, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_text("\n".join(line(str(i)) for i in range(100)))
    assert await run_batch(f"{stack.url}/v1", source, target) == 0
    assert f"100 results were added to {target}." in capsys.readouterr().err
    found = results(target)
    assert set(found) == {str(i) for i in range(100)}
    assert found["7"]["response"]["body"]["choices"][0]["text"] == "abc"


async def test_an_error_is_a_result_too(stack: RouterStack, tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_text(line("good") + "\n\n" + line("bad", temperature=-1) + "\n")
    assert await run_batch(stack.url, source, target) == 1
    assert results(target)["bad"]["response"]["status_code"] == 400


async def test_a_run_goes_on_where_the_last_ended(
    stack: RouterStack, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_text("\n".join(line(str(i)) for i in range(4)))
    assert await run_batch(stack.url, source, target) == 0
    first, second, *_ = target.read_text().splitlines(keepends=True)
    target.write_text(first + second[:20])
    num_before = len(stack.workers[0].requests)
    assert await run_batch(stack.url, source, target) == 0
    assert set(results(target)) == {"0", "1", "2", "3"}
    assert target.read_text().startswith(first)
    assert len(stack.workers[0].requests) == num_before + 3
    capsys.readouterr()
    assert await run_batch(stack.url, source, target) == 0
    assert "have results already" in capsys.readouterr().err
    assert len(stack.workers[0].requests) == num_before + 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no request"),
        (line("a") + "\n{no json", "line 2: The line isn't valid JSON"),
        (line("a") + "\n" + line("a"), "line 2: The `custom_id` 'a' is there twice"),
        ('{"custom_id": "a", "url": "/v1/x", "body": {}}', "line 1: `url` must be"),
        ('{"custom_id": "a", "url": "/v1/completions"}', "line 1: `body` is required"),
    ],
)
async def test_a_bad_input_file_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_text(content)
    assert await run_batch("http://127.0.0.1:9", source, target) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not target.exists()


async def test_files_that_can_not_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    assert await run_batch("http://127.0.0.1:9", source, target) == 2
    assert f"Can't read {source}: No such file" in capsys.readouterr().err
    source.write_text(line("a"))
    assert await run_batch("http://127.0.0.1:9", source, source) == 2
    assert "the same file" in capsys.readouterr().err
    assert await run_batch("http://127.0.0.1:9", source, tmp_path / "none" / "out") == 2
    assert "Can't write" in capsys.readouterr().err
    target.write_text('{"custom_id": "z"}\n')
    assert await run_batch("http://127.0.0.1:9", source, target) == 2
    assert "choose another file" in capsys.readouterr().err
    target.write_bytes(NESTED_JSON + b"\n")
    assert await run_batch("http://127.0.0.1:9", source, target) == 2
    assert "choose another file" in capsys.readouterr().err
    assert main(["run-batch", "-i", str(source)]) == 2
    assert "-o FILE" in capsys.readouterr().err


async def test_a_server_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.run_batch._CONNECT_PAUSE_S", 0.01)
    source = tmp_path / "in"
    source.write_text(line("a"))
    assert await run_batch("http://127.0.0.1:9", source, tmp_path / "out") == 2
    assert "The server doesn't answer: can't connect to 127.0.0.1:9" in capsys.readouterr().err


@pytest.mark.parametrize(
    "body", [b"[1]", b'"\xff"', NESTED_JSON], ids=["list", "no utf-8", "nested"]
)
async def test_a_server_that_answers_in_another_form(tmp_path: Path, body: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()

    source, target = tmp_path / "in", tmp_path / "out"
    source.write_text(line("a"))
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        await run_batch(f"http://127.0.0.1:{port}", source, target)
    response = results(target)["a"]["response"]
    assert response["request_id"] == results(target)["a"]["id"]
    if body == b"[1]":
        assert response["body"] == [1]
    else:
        assert response["body"]["error"]["message"] == body.decode(errors="replace")
