"""Pages of entries: counting, sharing, copying on write, bytes by the formula."""

import gc

import pytest
import torch

from rorqual.config import ModelConfig
from rorqual.errors import CacheError
from rorqual.model.page_table import Paged, PageTable
from rorqual.model.pages import PagePool, tokens_per_page
from rorqual.ops import page_rows

CFG = ModelConfig.preset("minke")


def pool_of(num_pages: int, page_tokens: int | None = None) -> PagePool:
    return PagePool(CFG, torch.empty(0), num_pages * (page_tokens or 128), page_tokens)


def paged(pool: PagePool, table: PageTable) -> Paged:
    """The entries of Minke's first CSA layer."""
    return Paged(pool.tensor(2, "entries"), table, 4)


def rows(*numbers: int) -> torch.Tensor:
    """Entries that say which they are."""
    return torch.tensor(numbers, dtype=torch.float32)[None, :, None].expand(1, -1, CFG.head_dim)


@pytest.mark.parametrize("preset", ["minke", "bryde", "v4-flash", "v4-pro"])
def test_bytes_per_token_are_the_formula(preset: str) -> None:
    cfg = ModelConfig.preset(preset).replace(cache_format="exact")
    size = 2
    pool = PagePool(cfg, torch.empty(0, dtype=torch.bfloat16), 256)
    csa = sum(spec.has_indexer for spec in cfg.layers)
    hca = sum(spec.kind == "hca" for spec in cfg.layers)
    per_token = csa * (cfg.head_dim + cfg.index_head_dim) * size / 4 + hca * cfg.head_dim * size / 128
    assert pool.page_bytes == per_token * 128
    assert sum(pool.tensor(part.layer, part.name).nbytes for part in pool.parts) == 2 * pool.page_bytes


def test_v4_flash_matches_the_published_dimensions() -> None:
    """21 CSA layers of 1,280 bytes a 4 tokens and 20 HCA layers of 1,024 bytes a 128, in bf16."""
    cfg = ModelConfig.preset("v4-flash")
    pool = PagePool(cfg.replace(cache_format="exact"), torch.empty(0, dtype=torch.bfloat16), 1)
    assert pool.page_bytes / 128 == 21 * 1280 / 4 + 20 * 1024 / 128


def test_a_page_is_the_least_multiple_of_every_ratio() -> None:
    assert tokens_per_page(CFG) == 128
    assert tokens_per_page(CFG.replace(compress_ratios=(0, 0, 4, 96, 4, 96))) == 384
    with pytest.raises(CacheError, match="cannot hold layer 3, whose entries cover 128 tokens"):
        PagePool(CFG, torch.empty(0), 1024, page_tokens=64)


def test_pages_are_counted_and_low_ids_come_first() -> None:
    pool = pool_of(4)
    assert pool.take(3) == [0, 1, 2] and pool.num_free == 1
    pool.retain([1])
    pool.release([0, 1])
    assert (pool.count(0), pool.count(1)) == (0, 1)
    assert pool.take(2) == [0, 3]
    with pytest.raises(CacheError, match="0 free pages of 4, and 1 are needed"):
        pool.take()


def test_the_pool_asks_for_room_before_it_gives_up() -> None:
    pool = pool_of(2)
    held = pool.take(2)
    asked: list[int] = []

    def make_room(count: int) -> None:
        asked.append(count)
        pool.release([held.pop()])

    pool.make_room = make_room
    assert pool.take() == [1] and asked == [1]


def test_a_forgotten_table_gives_its_pages_back() -> None:
    pool = pool_of(3)
    table = PageTable(pool)
    table.ensure(0, 300)
    other = table.fork(256)
    assert other.pages == table.pages[:2] and pool.num_free == 0
    del table
    gc.collect()
    assert pool.num_free == 1
    other.close()
    assert pool.num_free == 3


def test_writing_to_a_shared_page_copies_it() -> None:
    pool = pool_of(8)
    table = PageTable(pool)
    table.ensure(0, 256)
    entries = paged(pool, table)
    entries.append(rows(*range(64)))
    other = table.fork(256)
    theirs = paged(pool, other)
    theirs.length = 64
    other.truncate(140)  # back into a page that both use
    other.ensure(140, 300)
    theirs.append(rows(*range(100, 140)), 35)
    assert entries.gather()[0, :, 0].tolist() == list(range(64))
    assert theirs.gather()[0, :, 0].tolist() == [*range(35), *range(100, 140)]
    assert other.pages[0] == table.pages[0] and other.pages[1] != table.pages[1]


def test_scattered_pages_read_as_one_sequence() -> None:
    pool = pool_of(8)
    a, b = PageTable(pool), PageTable(pool)
    mine, theirs = paged(pool, a), paged(pool, b)
    for start in range(0, 384, 32):  # the two grow by turns
        for table, part, sign in ((a, mine, 1), (b, theirs, -1)):
            table.ensure(start, start + 32)
            part.append(rows(*(sign * (start // 4 + i) for i in range(8))))
    assert not a.is_run and not b.is_run
    assert mine.gather()[0, :, 0].tolist() == list(range(96))
    assert theirs.gather(50)[0, :, 0].tolist() == [-i for i in range(50)]
    place = a.tensor[torch.arange(96) // mine.rows_per_page] * mine.rows_per_page + torch.arange(96) % 32
    assert torch.equal(mine.pool.view(-1, CFG.head_dim)[place], mine.gather()[0])  # as the C kernels address it


def test_frozen_entries_stay() -> None:
    pool = pool_of(2)
    table = PageTable(pool)
    table.ensure(0, 200)
    entries = paged(pool, table)
    entries.append(rows(*range(32)))
    entries.frozen = 32
    entries.append(rows(*range(900, 940)), 0)
    assert entries.gather()[0, :, 0].tolist() == [*range(32), *range(932, 940)]
    entries.append(None, 8)
    assert entries.length == 32


@pytest.mark.parametrize("pages", [[0, 1, 2], [5, 1, 3]])
def test_pages_as_bytes_and_back(pages: list[int]) -> None:
    pool, other = pool_of(6), pool_of(6)
    for part in pool.parts:
        pool.tensor(part.layer, part.name).normal_()
        other.tensor(part.layer, part.name).zero_()
    content = pool.read(pages)
    assert content.shape == (3, pool.page_bytes)
    other.write([2, 3, 4], content)
    other.write([5, 0], content[1:])
    for part in pool.parts:
        mine, theirs = pool.tensor(part.layer, part.name), other.tensor(part.layer, part.name)
        assert torch.equal(theirs[2:5], mine[pages]) and torch.equal(theirs[[5, 0]], mine[pages[1:]])


def test_what_is_released_in_the_middle_of_another_call_is_counted_by_the_next() -> None:
    pool = pool_of(4)
    pages = pool.take(3)
    with pool._lock:  # as when a table is collected while another takes pages, or in another thread
        pool.release(pages[:2])
    assert [pool.count(page) for page in pages] == [0, 0, 1]
    assert pool.num_free == 3 and pool.take(3) == [0, 1, 3]


def test_pages_of_a_store_are_in_use_while_a_sequence_has_them_too() -> None:
    pool = pool_of(8)
    pages = pool.take(3)
    pool.keep(pages)
    assert pool.num_in_use == pool.num_in_use_of(pages) == pool.num_held_once(pages) == 3
    pool.release(pages[:2])
    assert (pool.num_in_use, pool.num_in_use_of(pages), pool.num_free) == (1, 1, 5)
    pool.retain(pages)
    assert pool.num_in_use == 3 and pool.num_held_once(pages) == 2
    for page in pages:
        pool.drop(page)
    pool.release(pages)
    assert (pool.num_in_use, pool.num_free) == (1, 7)
    with pytest.raises(AssertionError, match="once too often"):
        pool.release(pages[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_from_rows_in_c_are_those_of_torch(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (3, 128 + 64 + 200), dtype=torch.uint8, generator=draw)
    content = rows[:, 128:320]  # as records lie in a file: with something before and behind
    mine = [torch.zeros(5, 2, 64 // dtype.itemsize, dtype=dtype), torch.zeros(5, 64, dtype=torch.uint8)]
    theirs = [part.clone() for part in mine]
    page_rows.scatter(content, [4, 0, 2], mine)
    page_rows.reference(content, [4, 0, 2], theirs)
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)) and not one[[1, 3]].any()
        assert one[[0, 2, 4]].view(torch.uint8).any()
