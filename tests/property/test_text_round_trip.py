"""Any text survives the tokenizer, and any bytes stream out as they decode whole."""

from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.data import encode_pieces
from rorqual.tokenizer import MARKER_TOKENS, SPECIAL_TOKENS, Tokenizer, train_tokenizer

markers = st.sampled_from((*SPECIAL_TOKENS, *MARKER_TOKENS, "<｜", "｜>", "<think", "\r\n", "  ", "é", "e\u0301"))
texts = st.lists(st.text(max_size=12) | markers, max_size=8).map("".join)


@cache
def tok() -> Tokenizer:
    return train_tokenizer(["the cat sat. def f(x):\n    return x + 123\n価格 été 😀😀 <think>"] * 3, 400)


@settings(max_examples=300, deadline=None)
@given(texts)
def test_text_survives_both_ways_of_encoding(text: str) -> None:
    for allow_special in (True, False):
        ids = tok().encode(text, allow_special=allow_special)
        assert tok().decode(ids) == text
        assert tok().byte_lengths[ids].sum() == len(text.encode())
    controls = {tok().token_id(t) for t in (*SPECIAL_TOKENS, *MARKER_TOKENS)}
    assert not controls & set(ids)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 399), max_size=30))
def test_streamed_pieces_join_to_the_whole(ids: list[int]) -> None:
    decoder = tok().stream_decoder()
    pieces = [decoder.push(i) for i in ids]
    shown = b""
    for i, piece in zip(ids, pieces, strict=True):
        shown += tok().token_bytes(i)
        assert len(piece) <= len(shown)
    assert "".join(pieces) + decoder.flush() == tok().decode(ids)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=12).map(bytes))
def test_invalid_bytes_stream_as_python_decodes_them(data: bytes) -> None:
    byte = {tok().token_bytes(i): i for i in range(3, 259)}
    decoder = tok().stream_decoder()
    streamed = "".join(decoder.push(byte[bytes([b])]) for b in data) + decoder.flush()
    assert streamed == data.decode("utf-8", "replace")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(texts, st.booleans()), max_size=6))
def test_cutting_a_text_into_pieces_never_changes_its_ids(pieces: list[tuple[str, bool]]) -> None:
    text = "".join(piece for piece, _ in pieces)
    ids, mask = encode_pieces(tok(), pieces)
    expected = tok().encode(text)
    if expected[:1] != [tok().bos_token_id]:
        expected = [tok().bos_token_id, *expected]
    assert ids.tolist() == expected and len(mask) == len(ids) and not mask[0]
    if all(is_loss for _, is_loss in pieces):
        assert mask[1:].all()
