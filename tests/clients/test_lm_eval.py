"""lm-eval's `local-completions` model against a running stack: what its tasks ask of a server.

Its tasks themselves need data sets from the net, and packages for them that aren't installed.
"""

from pathlib import Path

import pytest
from client_requests import KEY
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from tandem_stack import MODEL

from engine.weights.model_dir import resolve_model


@pytest.fixture(scope="module")
def tokenizer() -> Path:
    return resolve_model(None, progress=False)


@pytest.fixture(params=[1, 3], ids=["one by one", "in parallel"])
def model(request: pytest.FixtureRequest, api_url: str, tokenizer: Path) -> LocalCompletionsAPI:
    return LocalCompletionsAPI(
        model=MODEL,
        base_url=f"{api_url}/completions",
        tokenizer=str(tokenizer),
        tokenizer_backend="huggingface",
        header={"Authorization": f"Bearer {KEY}"},
        num_concurrent=request.param,
        batch_size=2,
        max_retries=1,
    )


def instances(kind: str, *arguments: tuple[object, ...]) -> list[Instance]:
    return [Instance(kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def test_loglikelihoods(model: LocalCompletionsAPI) -> None:
    question = "The capital of France is"
    pairs = [
        (question, " Paris"),
        (question, " banana"),
        (question, " Paris."),
        (f"{question} Paris", "."),
    ]
    (paris, is_greedy), (banana, _), (sentence, _), (dot, _) = model.loglikelihood(
        instances("loglikelihood", *pairs)
    )
    assert 0 > paris > banana
    assert is_greedy in (True, False)
    # A text is as likely as its parts, but for rounding to bfloat16.
    assert sentence == pytest.approx(paris + dot, abs=0.3)


def test_a_rolling_loglikelihood(model: LocalCompletionsAPI) -> None:
    sense, nonsense = model.loglikelihood_rolling(
        instances(
            "loglikelihood_rolling",
            ("The sun rises in the east.",),
            ("East sun the in the rises.",),
        )
    )
    assert 0 > sense > nonsense


def test_generated_text_ends_where_told(model: LocalCompletionsAPI) -> None:
    options = {"until": [" three"], "max_gen_toks": 12, "temperature": 0}
    [text] = model.generate_until(instances("generate_until", ("one two three one two", options)))
    assert " three" not in text
