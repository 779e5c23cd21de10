"""Which texts an encoder's step takes."""

from engine.text_queue import TextQueue
from protocol.ids import RequestKey
from protocol.request import Request
from protocol.sampling import SamplingParams


def request(name: str, num_tokens: int = 10, *, priority: int = 0, attempt: int = 1) -> Request:
    return Request(
        key=RequestKey(name, attempt),
        token_ids=[1] * num_tokens,
        num_prompt_tokens=num_tokens,
        sampling=SamplingParams(),
        priority=priority,
    )


def queue_of(*requests: Request, max_num_seqs: int = 4, max_num_batched_tokens: int = 35):
    queue = TextQueue(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
    for each in requests:
        queue.add(each, arrival_s=1.0)
    return queue


def names(queue: TextQueue) -> list[str]:
    return [text.request.key.request_id for text in queue.take()]


def test_a_step_is_bounded_by_tokens_and_texts() -> None:
    queue = queue_of(*(request(name) for name in "abcd"), max_num_batched_tokens=30)
    assert (len(queue), queue.num_tokens) == (4, 40)
    assert names(queue) == ["a", "b", "c"]
    assert (len(queue), queue.num_tokens) == (1, 10)
    assert names(queue) == ["d"]
    assert names(queue) == []
    queue = queue_of(*(request(name, 1) for name in "abcdef"))
    assert names(queue) == ["a", "b", "c", "d"]


def test_a_text_longer_than_a_step_runs_alone() -> None:
    queue = queue_of(request("long", 100), request("short", 1))
    assert names(queue) == ["long"]
    assert names(queue) == ["short"]


def test_priority_then_arrival() -> None:
    queue = queue_of(request("late", priority=1), request("a"), request("urgent", priority=-1))
    queue.add(request("b"), arrival_s=0.0)
    assert names(queue) == ["urgent", "a", "b"]
    assert names(queue) == ["late"]


def test_aborted_texts_are_passed_over() -> None:
    queue = queue_of(request("a"), request("b"), request("c"))
    queue.abort(RequestKey("b", 1))
    queue.abort(RequestKey("unknown", 1))
    assert (len(queue), queue.num_tokens) == (2, 20)
    assert names(queue) == ["a", "c"]


def test_aborted_and_sent_again_it_runs_once() -> None:
    queue = queue_of(request("a"), request("b"))
    queue.abort(RequestKey("a", 1))
    queue.add(request("a"), arrival_s=2.0)
    queue.add(request("a"), arrival_s=3.0)
    assert names(queue) == ["b", "a"]
    assert (len(queue), queue.num_tokens) == (0, 0)


def test_aborted_texts_behind_others_take_no_memory() -> None:
    queue = queue_of(request("first"), request("waits", priority=9))
    for i in range(1000):
        text = request(str(i), priority=10)
        queue.add(text, arrival_s=1.0)
        queue.abort(text.key)
    assert len(queue._heap) < 100
    assert names(queue) == ["first", "waits"]
    assert (len(queue), queue.num_tokens) == (0, 0)
