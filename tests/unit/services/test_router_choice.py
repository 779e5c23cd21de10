"""An output's text and end, whatever the cut of tokens into messages."""

import pytest
from router_stack import write_toy_model

from engine.tokenizer import Tokenizer
from protocol.ids import RequestKey
from protocol.request import SequenceOutput, TokenLogprobs
from protocol.sampling import SamplingParams
from services.router.dispatch.choice import Choice, Delta

KEY = RequestKey("request", 1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_dir(write_toy_model(tmp_path_factory.mktemp("model")))


def feed(
    choice: Choice, tokenizer: Tokenizer, text: str, *, size: int, last: str | None = None
) -> list[str]:
    """The texts of the deltas after each message of `size` tokens."""
    token_ids = tokenizer.encode(text)
    texts: list[str] = []
    for start in range(0, len(token_ids), size):
        part = token_ids[start : start + size]
        is_last = start + size >= len(token_ids)
        choice.push(
            SequenceOutput(KEY, start, part, finish_reason=last if is_last else None)  # type: ignore[arg-type]
        )
        texts.append(choice.take().text if choice.has_news else "")
    return texts


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("include", "expected"), [(False, "one "), (True, "one END")], ids=["without", "with"]
)
def test_a_stop_string_ends_it_across_any_tokens(
    tokenizer: Tokenizer, *, size: int, include: bool, expected: str
) -> None:
    sampling = SamplingParams(stop=("END",), include_stop_str_in_output=include)
    choice = Choice(tokenizer, sampling)
    choice.push(SequenceOutput(KEY, 0, []))
    for start in range(0, 12, size):
        choice.push(
            SequenceOutput(KEY, start, tokenizer.encode("one END two!")[start : start + size])
        )
        if choice.finish_reason:
            break
    delta = choice.take()
    assert (delta.text, delta.finish_reason, delta.stop_reason) == (expected, "stop", "END")
    assert choice.num_tokens == len("one END"), "tokens behind the stop string don't count"


def test_no_character_is_split(tokenizer: Tokenizer) -> None:
    choice = Choice(tokenizer, SamplingParams())
    assert feed(choice, tokenizer, "é日", size=1) == ["", "é", "", "", "日"]


def test_text_that_may_become_a_stop_string_waits(tokenizer: Tokenizer) -> None:
    choice = Choice(tokenizer, SamplingParams(stop=("abc",)))
    assert feed(choice, tokenizer, "xababd", size=1) == ["x", "", "", "ab", "", "abd"]


def test_the_end_releases_what_waited(tokenizer: Tokenizer) -> None:
    choice = Choice(tokenizer, SamplingParams(stop=("abc",)))
    assert feed(choice, tokenizer, "xab", size=3, last="length") == ["xab"]
    assert choice.finish_reason == "length"


def test_an_incomplete_character_at_the_end_is_replaced(tokenizer: Tokenizer) -> None:
    choice = Choice(tokenizer, SamplingParams())
    half = tokenizer.encode("日")[:2]
    choice.push(SequenceOutput(KEY, 0, half, finish_reason="length"))
    assert choice.take() == Delta("�", half, [], "length", None)


@pytest.mark.parametrize(("include", "expected"), [(False, "hi"), (True, "hi.")])
def test_the_token_that_stopped_it_is_no_text(
    tokenizer: Tokenizer, *, include: bool, expected: str
) -> None:
    dot = tokenizer.encode(".")[0]
    choice = Choice(tokenizer, SamplingParams(include_stop_str_in_output=include))
    output = SequenceOutput(
        KEY, 0, tokenizer.encode("hi."), finish_reason="stop", stop_token_id=dot
    )
    choice.push(output)
    assert choice.take() == Delta(expected, tokenizer.encode("hi."), [], "stop", dot)


@pytest.mark.parametrize(("min_tokens", "expected"), [(0, ""), (1, "."), (2, ".."), (9, "....")])
def test_before_min_tokens_nothing_is_a_stop_string(
    tokenizer: Tokenizer, *, min_tokens: int, expected: str
) -> None:
    choice = Choice(tokenizer, SamplingParams(stop=(".",), min_tokens=min_tokens))
    choice.push(SequenceOutput(KEY, 0, tokenizer.encode("....")))
    assert choice.take().text == expected


def test_a_late_reader_gets_everything_at_once(tokenizer: Tokenizer) -> None:
    choice = Choice(tokenizer, SamplingParams(logprobs=0))
    for position, token_id in enumerate(tokenizer.encode("hello")):
        logprobs = [TokenLogprobs(-float(position), 1, [], [])]
        choice.push(SequenceOutput(KEY, position, [token_id], logprobs=logprobs))
    delta = choice.take()
    assert (delta.text, [entry.logprob for entry in delta.logprobs]) == (
        "hello",
        [0.0, -1.0, -2.0, -3.0, -4.0],
    )
    assert not choice.has_news
