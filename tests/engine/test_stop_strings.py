from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from llm_boost.engine.stop_strings import StopStrings

letters = st.text("ab", max_size=40)
stops = st.lists(st.text("ab", min_size=1, max_size=6), max_size=4).map(tuple)


def reference(text: str, stops: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    """Character by character: the first that is complete, of several the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(st.lists(letters, max_size=12), stops, st.booleans())
@settings(deadline=None)
def test_the_cut_does_not_depend_on_the_pieces(
    pieces: list[str], stops: tuple[str, ...], include: bool
) -> None:
    expected, expected_stop = reference("".join(pieces), stops, include)
    matcher = StopStrings(stops, include=include)
    shown, stop = "", None
    for piece in pieces:
        more, stop = matcher.push(piece)
        shown += more
        assert expected.startswith(shown), "text was shown that a stop string takes back"
        if stop:
            break
    if not stop:
        shown += matcher.flush()
    assert (shown, stop) == (expected, expected_stop)


def test_only_what_may_be_a_stop_string_is_held_back() -> None:
    matcher = StopStrings(("</end>", "###"), include=False)
    assert matcher.push("hello <") == ("hello ", None)
    assert matcher.push("b> #") == ("<b> ", None)
    assert matcher.push("# </en") == ("## ", None)
    assert matcher.push("d> gone") == ("", "</end>")
