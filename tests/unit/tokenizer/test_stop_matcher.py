"""Stop strings are found wherever the text is cut, and hold back no more than they must."""

from hypothesis import given
from hypothesis import strategies as st

from engine.tokenizer import StopMatcher

letters = st.text("ab", max_size=30)
stops = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3)


def expected_cut(text: str, stop: list[str], *, include: bool) -> tuple[str, str | None]:
    ends = [(text.index(s) + len(s), -len(s), s) for s in stop if s in text]
    if not ends:
        return text, None
    end, _, matched = min(ends)
    return text[: end if include else end - len(matched)], matched


@given(text=letters, stop=stops, include=st.booleans(), data=st.data())
def test_equals_a_search_in_the_whole_text(
    *, text: str, stop: list[str], include: bool, data: st.DataObject
) -> None:
    matcher = StopMatcher(stop, include=include)
    out, rest = "", text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        out += matcher.push(rest[:size])
        rest = rest[size:]
    out += matcher.finish()
    assert (out, matcher.matched) == expected_cut(text, stop, include=include)


@given(text=letters, stop=stops)
def test_holds_back_exactly_what_may_become_a_stop_string(text: str, stop: list[str]) -> None:
    matcher = StopMatcher(stop)
    out = matcher.push(text)
    if matcher.matched is None:
        held = [n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])]
        assert out == text[: len(text) - max(held, default=0)]


def test_without_stop_strings_all_text_passes() -> None:
    matcher = StopMatcher(())
    assert [matcher.push("a"), matcher.push("b"), matcher.finish()] == ["a", "b", ""]


def test_nothing_comes_after_a_match() -> None:
    matcher = StopMatcher(["END"])
    parts = [matcher.push("one E"), matcher.push("ND two"), matcher.push("three")]
    assert parts == ["one ", "", ""]
    assert (matcher.matched, matcher.finish()) == ("END", "")


def test_a_failed_match_is_handed_out() -> None:
    matcher = StopMatcher(["\n\nQ:"])
    assert [matcher.push("a\n"), matcher.push("\nQ"), matcher.push("uiet")] == [
        "a",
        "",
        "\n\nQuiet",
    ]
