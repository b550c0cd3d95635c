"""Stop strings never leak, wherever the token boundaries fall."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from rorqual.engine.events import TokenEvent
from rorqual.engine.stops import StopFilter


def run(pieces: list[str], stop: tuple[str, ...]) -> tuple[list[str], bool, int]:
    """(texts that went out in order, stopped, pieces pushed)."""
    stops = StopFilter(stop)
    out: list[TokenEvent] = []
    for number, piece in enumerate(pieces):
        out += stops.push(TokenEvent(number, piece))
        if stops.stopped:
            break
    out += stops.flush()
    assert [event.id for event in out] == list(range(len(out)))  # every token once, in order
    return [event.text for event in out], stops.stopped, len(out)


def expected(text: str, stop: tuple[str, ...]) -> str:
    """Definition: read character by character; the first complete stop string ends the text before it."""
    for end in range(1, len(text) + 1):
        complete = [s for s in stop if text[:end].endswith(s)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


def test_a_stop_string_across_tokens_is_held_back() -> None:
    stops = StopFilter(("\n\n##",))
    assert [e.text for e in stops.push(TokenEvent(1, "Hi.\n"))] == []
    assert stops.push(TokenEvent(2, "\n#")) == []
    assert [e.text for e in stops.push(TokenEvent(3, "#"))] == ["Hi.", "", ""]
    assert stops.stopped


def test_text_that_turns_out_harmless_goes_out() -> None:
    assert run(["a", "<", "/", "b"], ("</x>",)) == (["a", "<", "/", "b"], False, 4)


def test_a_control_token_is_no_text() -> None:
    stops = StopFilter(("<", "nk>a", "STOP"))
    assert stops.push(TokenEvent(1, "ST")) == []
    assert [e.text for e in stops.push(TokenEvent(2, "</think>"), is_control=True)] == ["ST", "</think>"]
    assert [e.text for e in stops.push(TokenEvent(3, "a"))] == ["a"]
    assert stops.push(TokenEvent(4, "OP"))[0].text == "OP" and not stops.stopped


def test_text_at_the_end_is_not_lost() -> None:
    assert run(["abc", "STO"], ("STOP",)) == (["abc", "STO"], False, 2)


def test_events_without_text_keep_their_place() -> None:
    assert run(["S", "", "T", ""], ("STOP",)) == (["S", "", "T", ""], False, 4)


@given(
    st.text("ab\n", max_size=24),
    st.lists(st.integers(0, 24), max_size=8),
    st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_any_cut_gives_the_text_before_the_first_stop(text: str, cuts: list[int], stop: list[str]) -> None:
    places = sorted({0, len(text), *(cut for cut in cuts if cut <= len(text))})
    pieces = [text[a:b] for a, b in pairwise(places)]
    texts, stopped, _ = run(pieces, tuple(stop))
    assert "".join(texts) == expected(text, tuple(stop))
    assert stopped == any(s in text for s in stop)


@given(st.text("ab", max_size=16), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_what_went_out_early_never_holds_part_of_a_stop(text: str, stop: list[str]) -> None:
    stops = StopFilter(stop)
    sent = ""
    for number, piece in enumerate(text):
        sent += "".join(event.text for event in stops.push(TokenEvent(number, piece)))
        assert expected(text, tuple(stop)).startswith(sent)
        if stops.stopped:
            break
