"""What the ledger counts between a placement and the report that contains it."""

from protocol.ids import RequestKey
from services.router.placement.ledger import NO_WORK, PlacedWork, PlacementLedger

KEY = RequestKey("request", 1)
OTHER = RequestKey("other", 1)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def ledger() -> tuple[PlacementLedger, Clock]:
    clock = Clock()
    return PlacementLedger(settle_s=0.1, foreign_ttl_s=1.0, clock=clock), clock


def place(book: PlacementLedger, key: RequestKey = KEY, *, prefill: str | None = "p") -> None:
    book.placed(key, prefill=prefill, decode="d", num_prefill_tokens=500, num_blocks=32)


def test_a_remote_placement_counts_on_both_workers() -> None:
    book, _ = ledger()
    place(book)
    place(book, OTHER)
    assert book.pending("p") == PlacedWork(1000, 2, 0)
    assert book.pending("d") == PlacedWork(0, 2, 64)
    assert book.pending("elsewhere") == NO_WORK


def test_a_local_placement_counts_on_decode_alone() -> None:
    book, _ = ledger()
    place(book, prefill=None)
    assert book.pending("d") == PlacedWork(500, 1, 32)


def test_prefills_next_settled_report_contains_it() -> None:
    book, clock = ledger()
    place(book)
    book.reported("p")
    assert book.pending("p").num_sequences == 1, "that report may have left before it came"
    clock.now_s += 0.2
    book.reported("p")
    assert book.pending("p") == NO_WORK


def test_decode_reports_it_only_once_the_prompt_is_computed() -> None:
    book, clock = ledger()
    place(book)
    clock.now_s += 10.0
    book.reported("d")
    assert book.pending("d").num_sequences == 1
    book.prefilled(KEY)
    book.reported("d")
    assert book.pending("d").num_sequences == 1
    clock.now_s += 0.2
    book.reported("d")
    assert book.pending("d") == NO_WORK


def test_the_end_clears_both_sides_and_may_come_twice() -> None:
    book, _ = ledger()
    place(book)
    place(book, OTHER)
    book.ended(KEY)
    book.ended(KEY)
    assert book.pending("p") == PlacedWork(500, 1, 0)
    book.ended(OTHER)
    assert book.own == {}


def test_a_lost_worker_is_forgotten() -> None:
    book, _ = ledger()
    place(book)
    book.worker_lost("p")
    assert book.pending("p") == NO_WORK
    book.prefilled(KEY)
    book.ended(KEY)
    assert book.own == {}


def test_other_routers_placements_are_added_until_they_expire() -> None:
    book, clock = ledger()
    place(book)
    book.others_placed("router-b", {"p": PlacedWork(100, 1, 0)})
    book.others_placed("router-c", {"p": PlacedWork(1, 1, 0)})
    assert book.pending("p") == PlacedWork(601, 3, 0)
    assert book.own["p"] == PlacedWork(500, 1, 0)
    clock.now_s += 0.6
    book.others_placed("router-b", {})
    assert book.pending("p") == PlacedWork(501, 2, 0)
    clock.now_s += 0.6
    assert book.pending("p") == PlacedWork(500, 1, 0)
