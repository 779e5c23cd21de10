"""The built-in model's tokenizer and template give what transformers gives."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from engine.tokenizer import IncrementalDetokenizer, Tokenizer
from engine.weights.model_dir import resolve_model

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces\n\n\ttabs\r\n",
    "naïve café 日本語 👩‍💻 ﷽ 𝄞",
    "<|im_start|>user\nhi<|im_end|>",
    "def f(x):\n    return x ** 2  # 1234567890\n",
    "a" * 5000,
    "word " * 2000,
]


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer.from_dir(resolve_model(None, progress=False))


@pytest.fixture(scope="module")
def theirs() -> Any:
    return AutoTokenizer.from_pretrained(resolve_model(None, progress=False))


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_encodes_and_decodes_alike(ours: Tokenizer, theirs: Any, text: str) -> None:
    token_ids = ours.encode(text)
    assert token_ids == theirs.encode(text)
    assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "Hi"}],
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " Hi \n"}],
        [
            {"role": "user", "content": "1"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "3"},
        ],
    ],
    ids=["user", "system", "turns"],
)
def test_renders_chats_alike(
    ours: Tokenizer, theirs: Any, messages: list[dict[str, str]], *, add_generation_prompt: bool
) -> None:
    expected = theirs.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
    )
    assert (
        ours.apply_chat_template(messages, add_generation_prompt=add_generation_prompt) == expected
    )


@given(token_ids=st.lists(st.integers(0, 49151), max_size=30))
@settings(max_examples=200, deadline=None)
def test_any_tokens_come_out_alike_in_steps(
    ours: Tokenizer, theirs: Any, token_ids: list[int]
) -> None:
    detokenizer = IncrementalDetokenizer(ours, skip_special_tokens=False)
    text = "".join(detokenizer.push([token_id]) for token_id in token_ids) + detokenizer.finish()
    assert text == theirs.decode(
        token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
