"""Engram's addresses: against big integers, distinct primes, document starts, the compressed vocabulary."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from rorqual.config import ModelConfig
from rorqual.config_engram import EngramConfig
from rorqual.errors import CheckpointError, ConfigError
from rorqual.model.layout import Layout
from rorqual.model.ngram_hash import NgramHash, draw_multipliers, is_prime, primes_from, table_sizes
from rorqual.tokenizer import Tokenizer, compress_vocabulary, train_tokenizer
from rorqual.tokenizer.compression import canonical

V = 1000


def settings(**changes: Any) -> EngramConfig:
    values = {"layers": (1, 4), "rows": 97, "orders": (2, 3, 4), "heads": 3, "head_dim": 4, "pad_token_id": 2}
    return EngramConfig(**{**values, **changes})


def layout_of(tokens: Tensor, segments: Tensor | None = None) -> Layout:
    return Layout(tokens.shape[0], tokens.shape[1], tokens.device, segment_ids=segments)


def rows_of(hashing: NgramHash, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
    layout = layout_of(tokens, segments)
    ids = hashing.compress(tokens)
    return hashing(ids, layout.halo(ids, hashing.engram.max_order - 1), layout)


def random_map(seed: int) -> Tensor:
    """A compression of V ids to 700, every id used."""
    draw = torch.Generator().manual_seed(seed)
    return torch.cat([torch.arange(700), torch.randint(0, 700, (V - 700,), generator=draw)])


def slow_rows(hashing: NgramHash, tokens: list[int], flavour: str) -> list[list[int]]:
    """The definition, token by token in Python integers, of one document."""
    e = hashing.engram
    compression, multipliers = hashing.compression.tolist(), hashing.multipliers.tolist()
    pad = compression[e.pad_token_id]
    sizes = table_sizes(e, hashing.layer)
    out = []
    for t in range(len(tokens)):
        run = [compression[tokens[t - k]] if t >= k else pad for k in range(e.max_order)]
        if flavour == "v41" and pad in run:
            run = [pad if k >= run.index(pad) else x for k, x in enumerate(run)]
        row, table, offset = [], 0, 0
        for order in e.orders:
            h = 0
            for k in range(order):
                assert run[k] * multipliers[k] < 2**63
                h ^= run[k] * multipliers[k]
            for _ in range(e.heads):
                row.append(h % sizes[table] + offset)
                offset += sizes[table]
                table += 1
        out.append(row)
    return out


@pytest.mark.parametrize("flavour", ["paper", "v41"])
@pytest.mark.parametrize("orders", [(2,), (2, 3), (1, 3, 6)])
def test_rows_equal_big_integers(flavour: str, orders: tuple[int, ...]) -> None:
    hashing = NgramHash(settings(flavour=flavour, orders=orders), 4, V)
    hashing.install(random_map(0))
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, V, (3, 50), generator=draw)
    tokens[1, ::7] = 2  # pad tokens inside
    rows = rows_of(hashing, tokens)
    assert rows.tolist() == [slow_rows(hashing, row, flavour) for row in tokens.tolist()]
    assert int(rows.min()) >= 0 and int(rows.max()) < hashing.num_rows


def test_the_largest_vocabulary_does_not_overflow() -> None:
    """Products reach just below 2^63; a larger multiplier would wrap around and give negative rows."""
    hashing = NgramHash(settings(), 1, 129_280)
    top = torch.full((1, 8), 129_279)
    assert rows_of(hashing, top).tolist() == [slow_rows(hashing, top[0].tolist(), "paper")]
    for size in (2, 700, 129_280):
        drawn = draw_multipliers(settings(layers=tuple(range(60))), 59, size)
        assert all(a % 2 == 1 and a * (size - 1) < 2**63 for a in drawn) and len(set(drawn)) == 4
        assert max(drawn) * size > 2**60, "the multipliers do not use the room there is"


def test_primes_are_the_next_ones_and_used_once() -> None:
    e = settings()
    sizes = [table_sizes(e, layer) for layer in e.layers]
    every = [p for layer in sizes for p in layer]
    assert every == list(itertools.islice((n for n in range(97, 10**6) if all(n % d for d in range(2, n))), len(every)))
    for layer, own in zip(e.layers, sizes, strict=True):
        hashing = NgramHash(e, layer, V)
        assert hashing.sizes.tolist() == own and hashing.num_rows == sum(own)
        assert hashing.offsets.tolist() == [sum(own[:i]) for i in range(len(own))]
    large = next(primes_from(2_262_400))
    assert [n for n in range(2_262_400, large + 1) if all(n % d for d in range(2, 1505))] == [large]
    assert is_prime(2**61 - 1) and not is_prime(3_215_031_751)
    layers = [NgramHash(e, layer, V).multipliers.tolist() for layer in e.layers]
    assert layers[0] != layers[1] and NgramHash(settings(seed=1), 1, V).multipliers.tolist() != layers[0]


def test_constants_are_those_of_the_released_generator() -> None:
    """NumPy's default generator seeded with seed + 10007 layer, odd numbers below (2^63 - 1) / V."""
    import numpy as np

    drawn = np.random.default_rng(3 + 10007 * 4).integers(0, (2**63 - 1) // V // 2, size=4)
    assert draw_multipliers(settings(seed=3), 4, V) == [2 * int(r) + 1 for r in drawn]


@pytest.mark.parametrize("flavour", ["paper", "v41"])
def test_rows_depend_on_the_run_inside_the_document_only(flavour: str) -> None:
    hashing = NgramHash(settings(flavour=flavour), 1, V)
    draw = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, V, (1, 40), generator=draw)
    segments = torch.tensor([[0] * 13 + [1] * 9 + [2] * 18])
    starts = [0] * 13 + [13] * 9 + [22] * 18
    rows = rows_of(hashing, tokens, segments)
    for t in range(40):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % (V - 3) + 3
        differs = (rows_of(hashing, changed, segments) != rows).flatten(2)[0]
        for other in range(40):
            reaches = [0 <= other - t < n and starts[other] <= t for n in (2, 3, 4)]
            by_order = differs[other].view(3, 3).any(-1).tolist()
            assert by_order == reaches, f"a change at {t} seen at {other}"
    for start, stop in ((0, 13), (13, 22), (22, 40)):  # each document as if it were alone
        assert torch.equal(rows[:, start:stop], rows_of(hashing, tokens[:, start:stop]))


def test_v41_does_not_look_across_a_pad_token() -> None:
    tokens = torch.tensor([[7, 8, 2, 9, 10]])
    changed = torch.tensor([[70, 80, 2, 9, 10]])
    for flavour, same in (("v41", True), ("paper", False)):
        hashing = NgramHash(settings(flavour=flavour), 1, V)
        assert torch.equal(rows_of(hashing, tokens)[0, 3:], rows_of(hashing, changed)[0, 3:]) is same


def test_canonical_spellings() -> None:
    same = [
        ("Naïve", "naive"),
        ("ＡＢＣ", "abc"),
        ("ﬁn", "fin"),
        ("\n\t ", " "),
        (" The ", "the"),
        ("É", "é"),
        ("a\n b", "A B"),
    ]
    for one, other in same:
        assert canonical(one) == canonical(other), (one, other)
    assert canonical("\u0301") == "\u0301", "an accent alone keeps its own id"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = ["The the THE théâtre Theatre\n\n  def f(x): return X\n  naïve Naive " * 20]
    return train_tokenizer(texts, 400, digits=1)


def test_the_compressed_vocabulary(tokenizer: Tokenizer) -> None:
    found = compress_vocabulary(tokenizer, tokenizer.vocab_size + 5)
    assert found.shape == (tokenizer.vocab_size + 5,) and found[0] == 0
    assert found.max() + 1 == len(set(found.tolist())) < tokenizer.vocab_size
    firsts = [list(found).index(number) for number in range(found.max() + 1)]
    assert firsts == sorted(firsts), "numbered in the order of first appearance"
    assert len(set(found[tokenizer.vocab_size :])) == 1 and found[-1] not in found[: tokenizer.vocab_size]
    by_bytes = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    assert found[by_bytes[b"T"]] == found[by_bytes[b"t"]] and found[by_bytes[b" "]] == found[by_bytes[b"\n"]]
    broken = [by_bytes[bytes([b])] for b in (0xC3, 0xC4, 0xFF)]
    assert len(set(found[broken])) == 3, "pieces of characters are only like themselves"
    control = sorted(tokenizer.control_token_ids)
    assert len(set(found[control])) == len(control)


def test_installing_a_map_draws_multipliers_for_its_size(tokenizer: Tokenizer) -> None:
    size = tokenizer.vocab_size
    hashing = NgramHash(settings(), 1, size)
    compression = torch.from_numpy(compress_vocabulary(tokenizer, size))
    hashing.install(compression)
    assert torch.equal(hashing.compression, compression)
    assert hashing.multipliers.tolist() == draw_multipliers(settings(), 1, int(compression.max()) + 1)
    hashing.check("here")
    with pytest.raises(CheckpointError, match=r"vocabulary map has shape \(3,\).*tokenizer"):
        hashing.install(torch.arange(3))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("multipliers", 2**62 + 1, "leave 63 bits"),
        ("multipliers", 4, "leave 63 bits"),
        ("compression", -1, "leave 63 bits"),
        ("sizes", 96, "primes from 97 on"),
        ("offsets", 5, "sums of the sizes"),
    ],
)
def test_damaged_constants_are_noticed(name: str, value: int, words: str) -> None:
    hashing = NgramHash(settings(), 1, V)
    getattr(hashing, name)[1] = value
    with pytest.raises(CheckpointError, match=f"layers.1.*{words}"):
        hashing.check("layers.1")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": [6]}, ["block 6", "num_hidden_layers=6"]),
        ({"layers": []}, ["engram.layers is []"]),
        ({"layers": [1, 1]}, ["rising order"]),
        ({"layers": 1}, ["engram.layers must be a list"]),
        ({"orders": [3, 2]}, ["engram.orders"]),
        ({"orders": [2, 40]}, ["16 tokens"]),
        ({"rows": 1}, ["engram.rows is 1"]),
        ({"rows": True}, ["engram.rows is True"]),
        ({"rows": 2**50}, ["rows a head"]),
        ({"heads": 0}, ["engram.heads is 0"]),
        ({"kernel": 0}, ["engram.kernel is 0"]),
        ({"flavour": "v5"}, ["engram.flavour is 'v5'", "'paper' or 'v41'"]),
        ({"placement": "disk"}, ["engram.placement is 'disk'"]),
        ({"pad_token_id": 4096}, ["pad_token_id is 4096", "vocabulary of 4096"]),
        ({"width": 4}, ["no setting width"]),
        (None, []),
        (3, ["engram must be an object"]),
        ({"rows": ...}, ["engram lacks rows"]),
    ],
)
def test_settings_are_checked(changes: Any, words: list[str]) -> None:
    minke = ModelConfig.preset("minke")
    if isinstance(changes, dict):
        changes = {"layers": [1], "rows": 100, **changes}
        changes = {k: v for k, v in changes.items() if v is not ...}
    if not words:
        assert ModelConfig.from_dict({**minke.to_dict(), "engram": changes}) == minke
        return
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict({**minke.to_dict(), "engram": changes})
    assert all(word in str(caught.value) for word in words), str(caught.value)
