import random

import pytest
from unreadable import NESTED_JSON

from engine.weights.model_dir import resolve_model
from loadtest.config import BenchConfig
from loadtest.prompt_text import PromptWriter
from loadtest.traces import TraceRequest, read_trace
from loadtest.workload import synthetic_requests, trace_requests, warmup_requests
from protocol.errors import StartupError

WRITER = PromptWriter.for_any_model()


@pytest.mark.parametrize("num_tokens", [1, 32, 1500])
def test_a_prompt_has_exactly_the_tokens_asked_for(num_tokens):
    from tokenizers import Tokenizer

    model = resolve_model(None, progress=False)
    text = PromptWriter.for_tokenizer(model).write(num_tokens, random.Random(1))
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    assert len(tokenizer.encode(text).ids) == num_tokens


def test_a_directory_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(StartupError, match=r"There is no tokenizer\.json"):
        PromptWriter.for_tokenizer(tmp_path)


def test_a_seed_gives_the_same_requests_and_another_seed_others():
    config = BenchConfig(num_prompts=4, input_len=20, request_rate=2.0)
    again = synthetic_requests(config, WRITER)
    assert synthetic_requests(config, WRITER) == again
    assert synthetic_requests(BenchConfig(num_prompts=4, input_len=20, seed=1), WRITER) != again


def test_requests_share_the_prefixes_and_nothing_else():
    config = BenchConfig(num_prompts=6, input_len=30, prefix_len=10, num_prefixes=2)
    prompts = [request.prompt.split() for request in synthetic_requests(config, WRITER)]
    assert all(len(prompt) == 30 for prompt in prompts)
    assert len({tuple(prompt[:10]) for prompt in prompts}) == 2
    assert len({tuple(prompt[10:]) for prompt in prompts}) == 6


def test_poisson_arrivals_have_the_rate_asked_for():
    config = BenchConfig(num_prompts=2000, input_len=1, request_rate=50.0)
    offsets_s = [request.offset_s or 0.0 for request in synthetic_requests(config, WRITER)]
    assert offsets_s == sorted(offsets_s)
    assert offsets_s[-1] == pytest.approx(2000 / 50, rel=0.1)


def test_warm_up_prompts_are_none_of_the_measured_ones():
    config = BenchConfig(num_prompts=8, warmup_prompts=8)
    measured = {request.prompt for request in synthetic_requests(config, WRITER)}
    assert measured.isdisjoint(request.prompt for request in warmup_requests(config, WRITER))


def test_a_mooncake_trace_shares_text_where_it_shared_blocks(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}\n'
        '{"timestamp": 500, "input_length": 700, "output_length": 6, "hash_ids": [1, 3]}\n'
    )
    trace = read_trace(path)
    assert trace[1] == TraceRequest(0.5, 700, 6, (1, 3))
    first, second = trace_requests(BenchConfig(trace_speed=2.0), trace, WRITER)
    assert second.offset_s == 0.25
    assert len(first.prompt.split()) == 600
    assert first.prompt.split()[:512] == second.prompt.split()[:512]
    assert first.prompt.split()[512:] != second.prompt.split()[512:600]


def test_an_azure_trace_is_read_and_scaled(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:47.6805900,100,20\n"
    )
    config = BenchConfig(trace_scale=0.1, num_prompts=1)
    (request,) = trace_requests(config, read_trace(path), WRITER)
    assert (len(request.prompt.split()), request.output_len, request.offset_s) == (37, 4, 0.0)
    assert read_trace(path)[1].offset_s == 1.0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", "{}\n"),
        ("x.csv", "a,b\n1,2\n"),
        ("x.jsonl", ""),
        ("missing.csv", None),
        ("x.jsonl", NESTED_JSON.decode()),
    ],
)
def test_what_is_no_trace_is_refused_with_its_name(tmp_path, name, content):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(StartupError, match=name.replace(".", r"\.")):
        read_trace(path)
