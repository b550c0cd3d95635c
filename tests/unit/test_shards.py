"""Token shards, windows, fill-in-the-middle, and the loss mask laid over tokens."""

import random
from pathlib import Path

import numpy as np
import pytest

from rorqual import tokenizer as tk
from rorqual.data import (
    IGNORE,
    Corpus,
    CorpusDocument,
    GeneratorSource,
    ShardSource,
    build_shard,
    encode_pieces,
    fim_document,
    heldout_batches,
    task_sources,
)
from rorqual.data.fim import choose_middle, split_for_fim
from rorqual.data.shards import shard_key
from rorqual.errors import CheckpointError, ConfigError, DataError
from rorqual.tokenizer import Tokenizer, train_tokenizer

FUNCTION = """\
def f{i}(a, b):
    c = a + {i}
    if c > b:
        return '<｜User｜> é {i}'

    return c * b


"""
CODE = "".join(FUNCTION.format(i=i) for i in range(60))


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return train_tokenizer([CODE], 420)


def corpus(*texts: str) -> Corpus:
    return Corpus.build("c", [CorpusDocument(f"{i}.py", text) for i, text in enumerate(texts)])


def test_shard_holds_every_document_and_is_made_once(tok: Tokenizer, tmp_path: Path) -> None:
    both = corpus(CODE, "x = 1\n")
    shard = build_shard(both, tok, tmp_path)
    assert len(shard) == 2 and shard.tokens.dtype == np.uint16 and shard.num_bytes == both.num_bytes
    for i, document in enumerate(both.documents):
        ids = shard.tokens[shard.offsets[i] : shard.offsets[i + 1]].tolist()
        assert ids == [*tok.encode(document.text, allow_special=False), tok.eos_token_id]
    (folder,) = tmp_path.iterdir()
    before = (folder / "tokens.npy").stat().st_mtime_ns
    assert build_shard(both, tok, tmp_path).key == shard.key
    assert (folder / "tokens.npy").stat().st_mtime_ns == before
    other = train_tokenizer([CODE], 421)
    assert len({shard.key, shard_key(corpus(CODE), tok), shard_key(both, other)}) == 3


def test_shard_errors(tok: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"corpus 'c' has no documents.*Fix: give more documents"):
        build_shard(corpus(), tok, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"token cache .* cannot be written.*Fix: free some space"):
        build_shard(corpus(CODE), tok, tmp_path / "file" / "cache")
    shard = build_shard(corpus(CODE), tok, tmp_path / "cache")
    tokens = tmp_path / "cache" / f"c-{shard.key}" / "tokens.npy"
    tokens.write_bytes(tokens.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"is damaged .*Fix: delete that folder"):
        build_shard(corpus(CODE), tok, tmp_path / "cache")


def test_windows_cover_the_shard_and_start_at_top_level_lines(tok: Tokenizer, tmp_path: Path) -> None:
    shard = build_shard(corpus(CODE, "x = 1\n"), tok, tmp_path)
    source = ShardSource(shard, tok, window_tokens=128)
    joined = np.concatenate([source.window(i).ids[1:] for i in range(len(source))])
    assert joined.tolist() == shard.tokens.tolist()
    texts = [tok.decode(source.window(i).ids[1:].tolist()) for i in range(len(source) - 1)]
    assert all(text.startswith("def f") for text in texts)
    assert all(len(source.window(i)) <= 129 for i in range(len(source)))
    for epoch in range(2):
        places = [source.documents(3, epoch * len(source) + i)[0] for i in range(len(source))]
        assert sorted(len(d) for d in places) == sorted(len(source.window(i)) for i in range(len(source)))
    with pytest.raises(ConfigError, match="fim_rate=2"):
        ShardSource(shard, tok, fim_rate=2)


def test_fim_documents_hold_the_whole_window(tok: Tokenizer, tmp_path: Path) -> None:
    source = ShardSource(build_shard(corpus(CODE), tok, tmp_path), tok, window_tokens=200, fim_rate=1.0, fim_tokens=64)
    assert not source.has_splittable
    begin, hole, end = (f"<｜fim▁{part}｜>" for part in ("begin", "hole", "end"))
    whole = ""
    for index in range(len(source)):
        for document in source.documents(5, index):
            text = tok.decode(document.ids.tolist())
            assert text.startswith(tk.BOS + begin) and text.endswith(tk.EOS)
            prefix, rest = text[len(tk.BOS + begin) :].split(hole)
            suffix, middle = rest.removesuffix(tk.EOS).split(end)
            whole += prefix + middle + suffix
            assert len(document) < 80
            # everything is learned but BOS and the three markers
            controls = {tok.token_id(t) for t in (tk.BOS, begin, hole, end)}
            assert [i in controls for i in document.ids.tolist()] == (~document.loss_mask).tolist()
    for i in range(60):
        assert f"def f{i}(a, b):\n    c = a + {i}\n" in whole
    first, again = source.documents(5, 1), source.documents(5, 1)
    assert [d.ids.tolist() for d in first] == [d.ids.tolist() for d in again]


def test_fim_middles() -> None:
    rng = random.Random(0)
    text = CODE[:600]
    middles = []
    for _ in range(400):
        start, stop = choose_middle(text, rng)
        assert 0 <= start <= stop <= len(text)
        middles.append((start, text[start:stop]))
    at_line = sum(start == 0 or text[start - 1] == "\n" for start, _ in middles)
    assert 0.4 < at_line / len(middles) < 0.75
    bodies = sum(text[:start].endswith("b):\n") and m.endswith("return c * b\n") for start, m in middles)
    assert bodies > 40
    assert choose_middle("", rng) == (0, 0)
    for target in (16, 50, 1000):
        parts = split_for_fim(text, target)
        assert "".join(parts) == text and max(map(len, parts)) <= target
    bare = Tokenizer.from_json(train_tokenizer([CODE], 420).to_json().replace("fim▁hole", "fim▁gone"))
    with pytest.raises(CheckpointError, match="no token '<｜fim▁hole｜>'"):
        fim_document("a\nb\n", bare, rng)


def test_pieces_are_tokenised_as_one_text(tok: Tokenizer) -> None:
    pieces = [("<｜User｜>add 1", False), ("", True), ("2", False), ("<｜Assistant｜></think>", False)]
    pieces += [("é = 3", True), ("<｜end▁of▁sentence｜>", True), ("\n", False)]
    ids, mask = encode_pieces(tok, pieces)
    assert ids.tolist() == [tok.bos_token_id, *tok.encode("".join(text for text, _ in pieces))]
    assert tok.decode(ids[mask].tolist()) == "é = 3<｜end▁of▁sentence｜>"
    with_bos, _ = encode_pieces(tok, [(tk.BOS, True), *pieces])
    assert with_bos.tolist() == ids.tolist()
    alone, alone_mask = encode_pieces(tok, [])
    assert alone.tolist() == [tok.bos_token_id] and alone_mask.tolist() == [False]


def test_conversation_shards_keep_their_loss_mask(tok: Tokenizer, tmp_path: Path) -> None:
    pieces = (("<｜User｜>hi<｜Assistant｜></think>", False), ("return" + tk.EOS, True))
    document = CorpusDocument("a#1", "".join(t for t, _ in pieces), pieces)
    source = ShardSource(
        build_shard(Corpus.build("chat", [document]), tok, tmp_path), tok, window_tokens=16, fim_rate=1
    )
    (made,) = source.documents(0, 0)
    ids, mask = encode_pieces(tok, pieces)
    assert made.ids.tolist() == ids.tolist() and made.loss_mask.tolist() == mask.tolist()
    assert not made.is_splittable and not source.has_splittable


def test_generated_documents_depend_on_seed_and_index_only(tok: Tokenizer) -> None:
    source = GeneratorSource("g", lambda rng: [(str(rng.random()), True)], tok)
    made = [source.documents(1, i)[0].ids.tolist() for i in (0, 1, 0)]
    assert made[0] == made[2] != made[1] != source.documents(2, 1)[0].ids.tolist()


def test_task_families_are_sources(tok: Tokenizer) -> None:
    names = [source.name for source in task_sources(tok)]
    assert "task:arith" in names and len(names) == len(set(names)) >= 5
    (arith,) = task_sources(tok, ["arith"])
    (document,) = arith.documents(0, 0)
    assert document.loss_mask.any() and not document.loss_mask[0]
    assert document.ids[-1] == tok.eos_token_id
    with pytest.raises(ConfigError, match=r"no task family 'poetry'.*Fix: choose from .*arith"):
        task_sources(tok, ["poetry"])


def test_heldout_batches_show_every_token_once(tok: Tokenizer, tmp_path: Path) -> None:
    shard = build_shard(corpus(CODE, "x = 1\n"), tok, tmp_path)
    source = ShardSource(shard, tok, window_tokens=63, fim_rate=0.5)
    batches = list(heldout_batches(source, 4, 64))
    targets = [t for b in batches for t in b.labels.flatten().tolist() if t != IGNORE]
    # window starts are predicted from BOS where the window was not cut by a row's end
    cut = sum(int(b.segment_ids[:, -1].sum()) + len(b.segment_ids) for b in batches)
    assert len(shard.tokens) - cut <= len(targets) <= len(shard.tokens)
    tokens = np.concatenate([b.tokens.flatten().numpy() for b in batches])
    tokens = tokens[(tokens != tok.bos_token_id) & (tokens != tok.pad_token_id)]
    assert tokens.tolist() == shard.tokens.tolist()
