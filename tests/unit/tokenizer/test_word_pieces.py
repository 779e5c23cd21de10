"""Tokenizers of encoders: WordPiece's and XLM-R's texts, as the library writes them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from engine.tokenizer import Tokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
PIECES = [*SPECIAL, "the", "cat", "sat", "un", "##believ", "##able", ".", ",", "?", "!", "'", "é"]
TEXTS = st.lists(st.sampled_from(["the", "cat", "unbelievable", ".", ", ", "?!", " ", "é", "'"]))


def word_pieces(*, cleanup: bool) -> Tokenizer:
    vocabulary = {piece: i for i, piece in enumerate(PIECES)}
    backend = Backend(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(strip_accents=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=cleanup)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    backend.add_special_tokens(SPECIAL)
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    return Tokenizer(backend)


@pytest.fixture(scope="module", params=[True, False])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return word_pieces(cleanup=request.param)


@given(parts=TEXTS, skip=st.booleans())
def test_it_decodes_as_the_library(tokenizer: Tokenizer, *, parts: list[str], skip: bool) -> None:
    token_ids = tokenizer.encode(" ".join(parts))
    expected = tokenizer._backend.decode(token_ids, skip_special_tokens=skip)
    assert tokenizer.decode(token_ids, skip_special_tokens=skip) == expected


def test_special_tokens_are_around_a_text_unless_it_shall_have_none(tokenizer: Tokenizer) -> None:
    text = "The unbelievable cat."
    inner = [4, 7, 8, 9, 5, 10]
    assert tokenizer.encode(text) == [2, *inner, 3]
    assert tokenizer.encode(text, add_special_tokens=False) == inner


def test_texts_are_neither_cut_nor_padded_on_the_quiet(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("cat") == [2, 5, 3]
    assert len(tokenizer.encode("cat " * 50)) == 52


@given(words=st.lists(st.sampled_from(["hello", "wor", "é"]), min_size=1))
def test_metaspace(words: list[str]) -> None:
    vocabulary = [("<unk>", 0.0), ("▁hello", -1.0), ("▁wor", -1.0), ("▁", -2.0), ("é", -2.0)]
    backend = Backend(models.Unigram(vocabulary, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(backend)
    text = " ".join(words)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert backend.decode(tokenizer.encode(text)) == text
