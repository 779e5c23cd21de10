"""Each test that schemathesis makes has an id of its own, by the endpoint."""

from pathlib import Path

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Its tests have one id together, of which several processes that share them would run one."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and item.parent is not None:
            item._id = item.parent.id.child(item.name)
