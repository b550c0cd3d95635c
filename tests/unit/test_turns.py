"""Sampled turns: a conversation that comes back as text gets the ids it was sampled with, and keeps its bytes."""

import logging
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.engine.store import TurnStore
from rorqual.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["the cat sat on the mat and the hat; unable, stable, able tables " * 20], 320)
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
EOS = TOKENIZER.eos_token_id


def spelled(text: str) -> list[int]:
    """`text` one byte a token: as no tokenizer with merges writes it."""
    return [TOKENIZER.encode(character, allow_special=False)[0] for character in text]


def turn(question: str, answer: list[int]) -> list[int]:
    return [*TOKENIZER.encode(f"{USER}{question}{ASSISTANT}</think>"), *answer]


def test_the_tokenizer_merges_what_these_tests_spell_out() -> None:
    assert len(TOKENIZER.encode("unable tables")) < len(spelled("unable tables"))


def test_a_sampled_turn_comes_back_as_it_was_sampled() -> None:
    store = TurnStore(TOKENIZER)
    asked = turn("the cat?", [])
    sampled = [*asked, *spelled("unable tables"), EOS]
    assert store.remember(sampled, len(asked)) == 1
    rendered = TOKENIZER.encode(TOKENIZER.decode(sampled) + f"{USER}and?{ASSISTANT}</think>")
    assert rendered[: len(sampled)] != sampled
    restored, replaced = store.restore(rendered)
    assert restored[: len(sampled)] == sampled and TOKENIZER.decode(restored) == TOKENIZER.decode(rendered)
    [one] = replaced
    assert (one.begin, one.end) == (len(asked), len(sampled) - 1)
    assert one.num_before == len(TOKENIZER.encode("unable tables"))


def test_turns_as_the_tokenizer_writes_them_are_not_stored() -> None:
    store = TurnStore(TOKENIZER)
    asked = turn("the cat?", [])
    assert store.remember([*asked, *TOKENIZER.encode("unable tables"), EOS], len(asked)) == 0 == len(store)


def test_thinking_and_answer_are_runs_of_their_own() -> None:
    """A client that returns both gets both back; the second is known only behind the first."""
    store = TurnStore(TOKENIZER)
    asked = TOKENIZER.encode(f"{USER}the cat?{ASSISTANT}<think>")
    end_of_thinking = TOKENIZER.encode("</think>")
    sampled = [*asked, *spelled("the hat"), *end_of_thinking, *spelled("on the mat"), EOS]
    assert store.remember(sampled, len(asked)) == 2
    text = TOKENIZER.decode(sampled)
    assert store.restore(TOKENIZER.encode(text))[0] == sampled
    changed = text.replace("the hat", "the cat", 1)
    assert store.restore(TOKENIZER.encode(changed))[0] == TOKENIZER.encode(changed), "another history, another turn"


def test_the_same_words_elsewhere_stay_as_they_are() -> None:
    store = TurnStore(TOKENIZER)
    asked = turn("the cat?", [])
    store.remember([*asked, *spelled("unable tables"), EOS], len(asked))
    other = TOKENIZER.encode(f"{USER}unable tables{ASSISTANT}</think>")
    assert store.restore(other) == (other, [])


def test_two_ways_of_sampling_one_text_do_not_mix() -> None:
    """Keyed by everything before them, equal texts of different conversations keep their own ids."""
    store = TurnStore(TOKENIZER)
    a, b = turn("the cat?", []), turn("the hat?", [])
    words = "unable tables"
    half = [*spelled(words[:7]), *TOKENIZER.encode(words[7:])]
    store.remember([*a, *spelled(words), EOS], len(a))
    store.remember([*b, *half, EOS], len(b))
    for before, answer in ((a, spelled(words)), (b, half)):
        rendered = TOKENIZER.encode(TOKENIZER.decode([*before, *answer, EOS]))
        assert store.restore(rendered)[0] == [*before, *answer, EOS]


def test_a_cut_character_is_not_remembered() -> None:
    store = TurnStore(TOKENIZER)
    asked = turn("the cat?", [])
    half = [i for i in range(TOKENIZER.vocab_size) if TOKENIZER.token_bytes(i) == "é".encode()[:1]]
    assert store.remember([*asked, *spelled("able "), *half, EOS], len(asked)) == 0


def test_turns_survive_a_restart_and_a_torn_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "turns"
    store = TurnStore(TOKENIZER, path)
    conversations = [turn(f"cat {i}?", []) for i in range(5)]
    for asked in conversations:
        store.remember([*asked, *spelled("unable tables"), EOS], len(asked))

    def found(store: TurnStore) -> list[bool]:
        texts = [
            TOKENIZER.encode(TOKENIZER.decode([*asked, *spelled("unable tables"), EOS])) for asked in conversations
        ]
        return [bool(store.restore(text)[1]) for text in texts]

    assert found(TurnStore(TOKENIZER, path)) == [True] * 5
    data = path.read_bytes()
    size = len(data) // 5
    os.truncate(path, len(data) - 3)
    with caplog.at_level(logging.WARNING):
        assert found(TurnStore(TOKENIZER, path)) == [True] * 4 + [False]
    assert "torn or damaged" in caplog.text
    damaged = bytearray(data)
    damaged[size + size // 2] ^= 1
    path.write_bytes(damaged)
    assert found(TurnStore(TOKENIZER, path)) == [True, False, True, True, True]


def test_the_store_is_bounded_and_its_file_too(tmp_path: Path) -> None:
    path = tmp_path / "turns"
    store = TurnStore(TOKENIZER, path, budget=80_000)
    for i in range(900):
        asked = turn(f"cat {i}?", [])
        store.remember([*asked, *spelled("unable tables, the hat"), EOS], len(asked))
        assert store.nbytes <= 80_000
    assert 400 < len(store) < 900 and path.stat().st_size < 170_000
    again = TurnStore(TOKENIZER, path, budget=80_000)
    assert len(again) == len(store)
    assert [path] == sorted(tmp_path.iterdir())


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    text=st.text(alphabet="the catsu ,\n", max_size=30), cuts=st.lists(st.integers(0, 30), max_size=6),
    question=st.text(alphabet="abc ", max_size=8),
)  # fmt: skip
def test_any_cutting_comes_back(text: str, cuts: list[int], question: str) -> None:
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    answer = [i for a, b in zip(bounds, bounds[1:], strict=False) for i in TOKENIZER.encode(text[a:b], False)]
    store = TurnStore(TOKENIZER)
    asked = turn(question, [])
    store.remember([*asked, *answer, EOS], len(asked))
    rendered = TOKENIZER.encode(TOKENIZER.decode([*asked, *answer, EOS]))
    assert store.restore(rendered)[0] == [*asked, *answer, EOS]
