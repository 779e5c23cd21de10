"""An idle worker finds wrong books, and doesn't spend its time on looking for them."""

import pytest

from engine.block_pool import BlockOwnershipError, BlockPool
from services.runtime.idle_check import IdleCheck


def test_wrong_books_end_the_worker() -> None:
    pool = BlockPool(8, 4)
    check = IdleCheck(pool)
    pool._free.append(0)
    with pytest.raises(BlockOwnershipError, match="add up"):
        check.run()


def test_a_check_is_followed_by_a_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 10.5, 59.0, 61.0, 61.5])
    monkeypatch.setattr("services.runtime.idle_check.time.monotonic", lambda: next(now))
    pool = BlockPool(8, 4)
    checked: list[float] = []
    monkeypatch.setattr(pool, "check_integrity", lambda: checked.append(1.0))
    check = IdleCheck(pool)
    check.run()  # takes half a second, so the next one is due at 60.5
    check.run()
    assert len(checked) == 1
    check.run()
    assert len(checked) == 2
