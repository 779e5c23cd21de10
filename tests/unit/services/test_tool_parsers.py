"""Tool calls and thoughts in text: examples of each format, and any text cut anywhere."""

import json
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.openai.chat_reader import ReadingRules
from services.router.openai.first_call import FirstCallParser
from services.router.openai.listed_calls import ListedCallsParser
from services.router.openai.reasoning_parsers import REASONING_FORMATS, Thought
from services.router.openai.tool_formats import TOOL_FORMATS
from services.router.openai.tool_parsers import (
    NamedCallParser,
    Parsed,
    ToolParser,
)

WEATHER = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
TIME = '{"name": "get_time", "parameters": {}}'
PARSERS: dict[str, Callable[[], ToolParser]] = {
    **{name: tool_format.parser for name, tool_format in TOOL_FORMATS.items()},
    "named": lambda: NamedCallParser("f"),
    "required": ListedCallsParser,
}


def parse(parser: ToolParser, *texts: str) -> Parsed:
    parsed = Parsed()
    for text in texts:
        parsed.add(parser.push(text))
    parsed.add(parser.finish())
    return parsed


def joined(parsed: Parsed) -> tuple[str, dict[int, tuple[str, str]]]:
    """Content, and (name, arguments) of each call by index."""
    calls: dict[int, tuple[str, str]] = {}
    for piece in parsed.calls:
        name, arguments = calls.get(piece.index, ("", ""))
        calls[piece.index] = name + (piece.name or ""), arguments + piece.arguments
    return parsed.content, calls


ONE = [("get_weather", {"city": "Paris"})]
TWO = [*ONE, ("get_time", {})]
EXAMPLES = [
    ("hermes", f"<tool_call>\n{WEATHER}\n</tool_call>", "", ONE),
    ("hermes", f"Let me see. <tool_call>{WEATHER}</tool_call>", "Let me see. ", ONE),
    ("qwen", f"<tool_call>{WEATHER}</tool_call>\n<tool_call>{TIME}</tool_call>", "\n", TWO),
    ("hermes", f"<tool_call>{WEATHER}", "", ONE),
    ("hermes", "<tool_call>{broken</tool_call>", "<tool_call>{broken</tool_call>", []),
    ("hermes", "a <tool_box> b", "a <tool_box> b", []),
    ("hermes", "a <tool_", "a <tool_", []),
    ("llama3_json", WEATHER, "", ONE),
    ("llama3_json", f"<|python_tag|>{WEATHER}; {TIME}", "", TWO),
    ("llama3_json", "Hello {there}", "Hello {there}", []),
    ("llama3_json", '{"no": "call"}', '{"no": "call"}', []),
    ("mistral", f"[TOOL_CALLS][{WEATHER}, {TIME}]", "", TWO),
    ("mistral", f"Well. [TOOL_CALLS] [{WEATHER}]", "Well. ", ONE),
    ("granite", f"<|tool_call|>[{WEATHER}]", "", ONE),
    ("pythonic", '[get_weather(city="Paris"), get_time()]', "", TWO),
    ("pythonic", "[1, 2, 3]", "[1, 2, 3]", []),
    ("pythonic", "[f(x=g())]", "[f(x=g())]", []),
    ("pythonic", "no list", "no list", []),
    ("required", f"[{WEATHER}, {TIME}]", "", TWO),
    ("required", f"[{WEATHER}, {TIME[:-3]}", f", {TIME[:-3]}", ONE),
    ("required", WEATHER[:-3], WEATHER[:-3], []),
    ("required", f"[{WEATHER}, {{}}]", ", {}]", ONE),
]


@pytest.mark.parametrize(("name", "text", "content", "calls"), EXAMPLES)
def test_examples(name: str, text: str, content: str, calls: list[tuple[str, dict]]) -> None:
    found_content, found = joined(parse(PARSERS[name](), text))
    assert found_content == content
    assert [(call, json.loads(arguments)) for call, arguments in found.values()] == calls


def test_a_named_calls_arguments_come_as_they_are_written() -> None:
    parser = NamedCallParser("f")
    assert [piece.name for piece in parse(parser, '{"a"', ": 1}").calls] == ["f", None]
    assert joined(parse(NamedCallParser("f"), '{"a"', ": 1}"))[1] == {0: ("f", '{"a": 1}')}


def test_words_before_a_call_are_not_held_back() -> None:
    parser = TOOL_FORMATS["hermes"].parser()
    assert parser.push("Let me <").content == "Let me "
    assert parser.push("b> see").content == "<b> see"


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|tool_call|>", "<|python_tag|>", WEATHER, TIME,
    "[", "]", "{", "}", ";", ", ", '"', "\\", "f(a=1)", "<", "<t", "think>", "<think>", "</think>",
    " ", "\n", "word", "é", "🙂", '{"name": "f", "arguments": {"x": NaN}}',
]  # fmt: skip
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=12).map("".join)


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted(place % (len(text) + 1) for place in places)
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=300, deadline=None)
@given(text=texts, places=st.lists(st.integers(0, 200), max_size=8))
def test_cuts_make_no_difference_and_arguments_are_json(
    name: str, text: str, places: list[int]
) -> None:
    whole = joined(parse(PARSERS[name](), text))
    assert joined(parse(PARSERS[name](), *cut(text, places))) == whole
    assert joined(parse(PARSERS[name](), *text)) == whole
    if name != "named":
        for _, arguments in whole[1].values():
            assert isinstance(json.loads(arguments, parse_constant=pytest.fail), dict)


def first_parser(name: str) -> FirstCallParser:
    tool_format = TOOL_FORMATS[name]
    return FirstCallParser(tool_format.parser, tool_format.closings)


ODD = '{"name": "f", "arguments": {"x": "}\\"}{("}}'
FIRST_EXAMPLES = [
    ("hermes", f"So. <tool_call>{WEATHER}</tool_call>", f"<tool_call>{TIME}</tool_call>", "So. "),
    ("qwen", f"<tool_call>{ODD}</tool_call>", " Done.", ""),
    ("mistral", f"It's {{so}}. [TOOL_CALLS] [{ODD}", f", {TIME}]", "It's {so}. "),
    ("mistral", f"[TOOL_CALLS]{TIME}", "", ""),
    ("granite", f"<|tool_call|>[{WEATHER}", "]", ""),
    ("llama3_json", ODD, f"; {TIME}", ""),
    ("llama3_json", f"<|python_tag|>[{WEATHER}", f", {TIME}]", ""),
    ("pythonic", """[f(x={"a": ("'", ')')})""", ", get_time()]", ""),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "rest", "content"), FIRST_EXAMPLES)
def test_the_first_call_is_passed_on_once_it_is_whole_and_is_the_last(
    name: str, text: str, rest: str, content: str
) -> None:
    parser = first_parser(name)
    parsed = Parsed()
    for char in text:
        assert not parsed.calls
        parsed.add(parser.push(char))
    assert [call.index for call in parsed.calls] == [0]
    assert parsed.content == content
    parsed.add(parser.push(rest))
    parsed.add(parser.finish())
    assert joined(parsed) == joined(parse(first_parser(name), text + rest))
    assert joined(parsed)[1][0] == joined(parse(PARSERS[name](), text + rest))[1][0]


def test_a_call_among_thoughts_does_not_end_an_output() -> None:
    thoughts, calls = REASONING_FORMATS["qwen3"], partial(first_parser, "hermes")
    watch = ReadingRules(make_thoughts=thoughts, make_calls=calls, ends_with_call=True).watch()
    assert watch is not None
    call = f"<tool_call>{TIME}</tool_call>"
    assert not watch(f"<think>{call}</think>{call[:-1]}")
    assert watch(">")
    assert ReadingRules(make_calls=calls).watch() is None


@pytest.mark.parametrize("name", TOOL_FORMATS)
@settings(max_examples=300, deadline=None)
@given(text=texts, places=st.lists(st.integers(0, 200), max_size=8))
def test_first_calls_do_not_depend_on_cuts_and_are_those_of_all(
    name: str, text: str, places: list[int]
) -> None:
    whole = joined(parse(first_parser(name), text))
    assert joined(parse(first_parser(name), *cut(text, places))) == whole
    assert joined(parse(first_parser(name), *text)) == whole
    assert len(whole[1]) <= 1
    content, calls = joined(parse(PARSERS[name](), text))
    if calls:
        assert whole[1] == {0: calls[0]}
        assert content.startswith(whole[0])


def think(name: str, *texts: str) -> tuple[str, str]:
    parser = REASONING_FORMATS[name]()
    thoughts = [parser.push(text) for text in texts] + [parser.finish()]
    return "".join(t.reasoning for t in thoughts), "".join(t.content for t in thoughts)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("qwen3", "<think>hm</think>yes", ("hm", "yes")),
        ("qwen3", "\n<think>hm", ("hm", "")),
        ("qwen3", "yes", ("", "yes")),
        ("qwen3", "<thin", ("", "<thin")),
        ("deepseek_r1", "hm</think>yes", ("hm", "yes")),
        ("deepseek_r1", "<think>hm</think>yes", ("hm", "yes")),
        ("deepseek_r1", "hm", ("hm", "")),
        ("deepseek_r1", "hm</thi", ("hm</thi", "")),
    ],
)
def test_thoughts(name: str, text: str, expected: tuple[str, str]) -> None:
    assert think(name, text) == expected


@pytest.mark.parametrize("name", REASONING_FORMATS)
@settings(max_examples=300, deadline=None)
@given(text=texts, places=st.lists(st.integers(0, 200), max_size=8))
def test_cuts_make_no_difference_to_thoughts(name: str, text: str, places: list[int]) -> None:
    assert think(name, *cut(text, places)) == think(name, text) == think(name, *text)


def test_thoughts_are_not_held_back() -> None:
    parser = REASONING_FORMATS["qwen3"]()
    assert parser.push("<think>I wonder <") == Thought(reasoning="I wonder ")


def test_a_required_call_does_not_wait_for_the_next() -> None:
    parser = ListedCallsParser()
    (call,) = parser.push(f"[{WEATHER}, ").calls
    assert (call.index, call.name) == (0, "get_weather")
    assert parser.push(TIME[:-1]) == Parsed()
    (call,) = parser.push("}").calls
    assert (call.index, call.name) == (1, "get_time")
    assert parser.push("]") == parser.finish() == Parsed()
