"""`tandem run-batch` with a stack of its own."""

import json
import signal
import subprocess
import sys
from pathlib import Path

from tandem_stack import MODEL, START_DEADLINE_S, wait_for

SMALL = ("--prefill-workers", "0", "--max-model-len", "512", "--num-gpu-blocks-override", "128")


def start(source: Path, target: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "cli", "run-batch", "-i", str(source), "-o", str(target)),
            *SMALL,
            *arguments,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_file_is_answered_in_two_runs(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        {
            "custom_id": f"city {i}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": MODEL,
                "messages": [{"role": "user", "content": f"Tell me about city {i}."}],
                "max_tokens": 64,
                "ignore_eos": True,
            },
        }
        for i in range(8)
    ]
    source.write_text("\n".join(json.dumps(line) for line in lines))

    with start(source, target, "--max-concurrency", "1") as process:
        wait_for(
            lambda: (
                process.poll() is not None or (target.exists() and b"\n" in target.read_bytes())
            ),
            "the first result",
            START_DEADLINE_S,
        )
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=START_DEADLINE_S)
    assert process.returncode == 130, errors
    assert "run again to go on" in errors
    num_first = len(target.read_bytes().splitlines())
    assert 1 <= num_first < 8

    with start(source, target) as process:
        output, errors = process.communicate(timeout=START_DEADLINE_S)
    assert process.returncode == 0, output + errors
    assert f"{8 - num_first} results were added" in errors
    results = [json.loads(line) for line in target.read_text().splitlines()]
    assert {result["custom_id"] for result in results} == {line["custom_id"] for line in lines}
    assert len(results) == 8
    assert all(r["response"]["body"]["usage"]["completion_tokens"] == 64 for r in results)
