"""Decoding agrees with the `tokenizers` library, whole and in steps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from engine.tokenizer import IncrementalDetokenizer, Tokenizer

ids = st.lists(st.integers(0, 275), max_size=40)
cuts = st.lists(st.integers(1, 5), max_size=40)


def push_in_steps(
    tokenizer: Tokenizer, token_ids: list[int], steps: list[int], *, skip: bool
) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip, starts_text=True)
    parts: list[str] = []
    position = 0
    for size in [*steps, len(token_ids)]:
        parts.append(detokenizer.push(token_ids[position : position + size]))
        position += size
    return [*parts, detokenizer.finish()]


@given(token_ids=ids, steps=cuts, skip=st.booleans())
def test_steps_concatenate_to_the_whole_text(
    backend: Backend, *, token_ids: list[int], steps: list[int], skip: bool
) -> None:
    tokenizer = Tokenizer(backend)
    parts = push_in_steps(tokenizer, token_ids, steps, skip=skip)
    assert "".join(parts) == tokenizer.decode(token_ids, skip_special_tokens=skip)


@given(token_ids=ids, skip=st.booleans())
def test_byte_level_decodes_any_ids_as_the_library(
    byte_level: Tokenizer, *, token_ids: list[int], skip: bool
) -> None:
    expected = byte_level._backend.decode(token_ids, skip_special_tokens=skip)
    assert byte_level.decode(token_ids, skip_special_tokens=skip) == expected


@given(text=st.text(max_size=30), skip=st.booleans())
def test_byte_fallback_decodes_well_formed_text_as_the_library(
    byte_fallback: Tokenizer, *, text: str, skip: bool
) -> None:
    token_ids = byte_fallback.encode(text)
    expected = byte_fallback._backend.decode(token_ids, skip_special_tokens=skip)
    assert byte_fallback.decode(token_ids, skip_special_tokens=skip) == expected


@given(text=st.text(max_size=30))
def test_encoding_and_decoding_gives_the_text_back(byte_level: Tokenizer, text: str) -> None:
    assert byte_level.decode(byte_level.encode(text), skip_special_tokens=False) == text


@pytest.mark.parametrize("char", ["é", "日", "👩", "𝄞"])
def test_no_character_is_split(byte_fallback: Tokenizer, char: str) -> None:
    byte_ids = [byte_fallback._backend.token_to_id(f"<0x{byte:02X}>") for byte in char.encode()]
    detokenizer = IncrementalDetokenizer(byte_fallback)
    parts = [detokenizer.push([token_id]) for token_id in byte_ids]
    assert parts == [""] * (len(byte_ids) - 1) + [char]


def test_an_incomplete_character_at_the_end_becomes_one_replacement(
    byte_fallback: Tokenizer,
) -> None:
    byte_ids = [byte_fallback._backend.token_to_id(f"<0x{byte:02X}>") for byte in "👩".encode()]
    detokenizer = IncrementalDetokenizer(byte_fallback)
    assert detokenizer.push(byte_ids[:3]) == ""
    assert detokenizer.finish() == "�"


def test_a_valid_character_among_broken_bytes_survives(byte_fallback: Tokenizer) -> None:
    broken = [byte_fallback._backend.token_to_id(t) for t in ("<0xC3>", "<0xA9>", "<0xFF>")]
    assert byte_fallback.decode(broken) == "é�"


def test_text_behind_a_prompt_keeps_its_leading_space(byte_fallback: Tokenizer) -> None:
    world = byte_fallback.encode("world", add_special_tokens=False)
    alone = IncrementalDetokenizer(byte_fallback, starts_text=True)
    assert (IncrementalDetokenizer(byte_fallback).push(world), alone.push(world)) == (
        " world",
        "world",
    )


def test_special_tokens_are_skipped_or_written_out(byte_level: Tokenizer) -> None:
    token_ids = byte_level.encode("<|im_start|>hello<|im_end|>")
    assert byte_level.decode(token_ids) == "hello"
    assert byte_level.decode(token_ids, skip_special_tokens=False) == "<|im_start|>hello<|im_end|>"


def test_an_id_without_a_token_is_no_text(byte_level: Tokenizer) -> None:
    assert byte_level.decode([byte_level.num_ids + 5]) == ""
    assert byte_level.token_name(byte_level.num_ids + 5) is None


def test_a_tokens_bytes_may_be_part_of_a_character(byte_level: Tokenizer) -> None:
    assert [byte_level.token_bytes(i) for i in byte_level.encode("日")] == [
        bytes([byte]) for byte in "日".encode()
    ]
