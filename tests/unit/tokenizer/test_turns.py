"""A text encoded turn by turn, known turns looked up, has the tokens of the whole text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from engine.tokenizer.turns import MAX_TURN_CHARS, TurnEncoder
from engine.weights.model_dir import resolve_model

PIECES = st.lists(
    st.sampled_from(["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|im_", "<tool call>", "日本"])
    | st.sampled_from([" ", "\n", "hello", " world", "user\n", "é"])
    | st.text(max_size=5),
    max_size=12,
)


def metaspace_backend() -> Backend:
    """Puts a space before a text's first word, and before no other's."""
    tokens = ["<unk>", "▁", "a", "b", "▁a"]
    backend = Backend(
        models.BPE(
            vocab={t: i for i, t in enumerate(tokens)}, merges=[("▁", "a")], unk_token="<unk>"
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.add_special_tokens([AddedToken("<s>", rstrip=True), AddedToken("<s>b")])
    return backend


METASPACE = metaspace_backend()
BUILT_IN_BACKEND = Backend.from_file(str(resolve_model(None, progress=False) / "tokenizer.json"))
BUILT_IN = TurnEncoder(BUILT_IN_BACKEND)


def whole(backend: Backend, text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids


@given(pieces=PIECES)
def test_any_text(backend: Backend, pieces: list[str]) -> None:
    encoder, text = TurnEncoder(backend), "".join(pieces)
    assert encoder.encode(text) == whole(backend, text)
    assert encoder.encode(text) == whole(backend, text)  # the second time from memory


@given(pieces=PIECES)
def test_the_built_in_tokenizer(pieces: list[str]) -> None:
    text = "".join(pieces)
    assert BUILT_IN.encode(text) == whole(BUILT_IN_BACKEND, text)


@given(pieces=st.lists(st.sampled_from(["<s>", "<s>b", " ", "a", "b"]), max_size=12))
def test_a_first_word_is_first_in_the_text_only(pieces: list[str]) -> None:
    text = "".join(pieces)
    assert TurnEncoder(METASPACE).encode(text) == whole(METASPACE, text)


@pytest.mark.parametrize(
    "token", [AddedToken("<s>", lstrip=True), AddedToken("b", single_word=True)]
)
@given(pieces=st.lists(st.sampled_from(["<s>", " ", "a", "b"]), max_size=12))
def test_a_token_that_looks_back(token: AddedToken, pieces: list[str]) -> None:
    backend, text = metaspace_backend(), "".join(pieces)
    backend.add_special_tokens([token])
    assert TurnEncoder(backend).encode(text) == whole(backend, text)


def test_a_long_turn(backend: Backend) -> None:
    text = "<|im_start|>" + "hello" * MAX_TURN_CHARS + "<|im_end|>"
    assert TurnEncoder(backend).encode(text) == whole(backend, text)
