"""One stack with a real model and an API key for all clients."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from client_requests import KEY
from tandem_stack import TandemStack

# Read when the clients are imported: none of them is to call home.
os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false"}


@pytest.fixture(scope="package")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TandemStack]:
    log = tmp_path_factory.mktemp("stack") / "log"
    with TandemStack(log, "--disable-log-requests", "--api-key", KEY) as running:
        yield running


@pytest.fixture(scope="package")
def api_url(stack: TandemStack) -> str:
    return f"{stack.url}/v1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What these packages warn of is theirs to mend."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings("ignore"))
