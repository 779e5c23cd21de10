"""An encode worker's books, and its loop over a real engine."""

import struct
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from tiny_encoders import write_encoder

from engine.config import EngineConfig
from engine.encoder import EncoderEngine
from protocol.ids import RequestKey
from protocol.messages import (
    AbortRequest,
    ControlMessage,
    PrefixCacheReset,
    RequestFailed,
    ResetPrefixCache,
    RunLocal,
    StepOutputs,
)
from protocol.pooling import PoolingParams
from protocol.request import Request, SequenceOutput
from protocol.sampling import SamplingParams
from services.encode.loop import Abort, Command, EncodeLoop, StartText, TextRefused, TurnReport
from services.encode.worker import EncodeWorker
from services.runtime.peers import PeerDown, Received


def request(name: str, num_tokens: int = 5) -> Request:
    return Request(
        key=RequestKey(name, 1),
        token_ids=list(range(4, 4 + num_tokens)),
        num_prompt_tokens=num_tokens,
        sampling=SamplingParams(max_tokens=1),
        pooling=PoolingParams(type="mean"),
    )


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> EncoderEngine:
    path = tmp_path_factory.mktemp("model")
    write_encoder(path, "BertModel")
    config = EngineConfig(
        model=str(path), device="cpu", dtype="float32", num_threads=1, max_num_seqs=2
    )
    return EncoderEngine.load(config, progress=False)


@pytest.fixture
def loop(engine: EncoderEngine) -> tuple[EncodeLoop, list[TurnReport]]:
    reports: list[TurnReport] = []
    return EncodeLoop(engine, publish=reports.append), reports


def test_a_step_answers_whoever_asked(loop: tuple[EncodeLoop, list[TurnReport]]) -> None:
    turns, reports = loop
    for name in "abc":
        turns.handle(StartText(request(name)))
    assert turns.step()
    before, after = reports
    assert (before.load.num_running, before.load.num_waiting) == (2, 1)
    assert before.load.queued_prefill_tokens == 5
    assert [output.key.request_id for output in after.outputs] == ["a", "b"]
    assert after.num_tokens == 10
    output = after.outputs[0]
    assert (output.token_ids, output.finish_reason) == ([], "length")
    assert output.pooled is not None
    assert sum(x * x for x in struct.unpack("<32f", output.pooled)) == pytest.approx(1.0, abs=1e-5)
    assert turns.step()
    assert not turns.step()
    assert [output.key.request_id for output in reports[-1].outputs] == ["c"]


def test_an_abort_before_its_step(loop: tuple[EncodeLoop, list[TurnReport]]) -> None:
    turns, reports = loop
    turns.handle(StartText(request("a")))
    turns.handle(Abort(RequestKey("a", 1)))
    assert not turns.step()
    turns.idle()
    assert reports[-1].load.num_waiting == 0


def test_a_text_that_is_too_long_is_refused(loop: tuple[EncodeLoop, list[TurnReport]]) -> None:
    turns, reports = loop
    turns.handle(StartText(request("a", num_tokens=65)))
    turns.idle()
    (refused,) = reports[-1].refused
    assert "up to 64 tokens" in refused.message


class Bench:
    """A worker without network or engine: `posted` is what its engine thread would do."""

    def __init__(self) -> None:
        self.posted: list[Command] = []
        self.router = Mock()
        self.worker = EncodeWorker(Mock(post=self.posted.append))

    def send(self, message: ControlMessage) -> None:
        self.worker.on_channel(Received(self.router, message))


@pytest.fixture
def bench() -> Bench:
    return Bench()


def answer(name: str) -> SequenceOutput:
    return SequenceOutput(
        key=RequestKey(name, 1), position=0, token_ids=[], finish_reason="length", pooled=b"1234"
    )


def test_answers_of_a_step_go_in_one_message(bench: Bench) -> None:
    for name in "abc":
        bench.send(RunLocal(request(name)))
    assert bench.worker.num_requests == 3
    bench.worker.on_turn(TurnReport(outputs=[answer("a"), answer("c")]))
    bench.router.send.assert_called_once_with(StepOutputs([answer("a"), answer("c")]))
    assert bench.worker.num_requests == 1


@pytest.mark.parametrize(
    "end",
    [
        lambda bench: bench.send(AbortRequest(RequestKey("a", 1))),
        lambda bench: bench.worker.on_channel(PeerDown(bench.router, Mock(), "")),
    ],
    ids=["abort", "router lost"],
)
def test_what_ends_a_request_early(bench: Bench, end: Callable[[Bench], None]) -> None:
    bench.send(RunLocal(request("a")))
    end(bench)
    assert bench.posted == [StartText(request("a")), Abort(RequestKey("a", 1))]
    assert bench.worker.num_requests == 0
    # Its step was running already.
    bench.worker.on_turn(TurnReport(outputs=[answer("a")]))
    bench.router.send.assert_not_called()


def test_a_refusal_is_final(bench: Bench) -> None:
    bench.send(RunLocal(request("a")))
    bench.worker.on_turn(TurnReport(refused=[TextRefused(RequestKey("a", 1), "too long")]))
    failed = RequestFailed(RequestKey("a", 1), "too long", retryable=False)
    bench.router.send.assert_called_once_with(failed)


def test_there_is_no_cache_to_reset(bench: Bench) -> None:
    bench.send(ResetPrefixCache(7))
    bench.router.send.assert_called_once_with(PrefixCacheReset(7, num_dropped_blocks=0))


def test_the_engine_says_what_it_is(engine: EncoderEngine, tmp_path: Path) -> None:
    assert engine.model.layout.block_bytes == 0
    assert (engine.model.max_model_len, engine.model.hidden_size) == (64, 32)
