"""The conformance ladder of the evaluation specification (5.6): which tests climb each rung, and the rungs' own checks.

`RUNGS` names tests elsewhere; that they exist is checked here. What those leave open is tested below, by rung.
"""

import ast
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rorqual.config import ModelConfig
from rorqual.engine.selection import selection_hash
from rorqual.model import Segment, Trace, Transformer
from rorqual.model.decode import plan_of
from rorqual.ops.hadamard import hadamard
from rorqual.ops.index_scan import IndexKeys, index_scan, index_scan_reference, scan_scores
from rorqual.ops.native.decode_step import columns

TESTS = Path(__file__).parents[1]
RUNGS = {
    "L0": ["unit/test_index_scan.py::test_scores_of_any_numbers", "unit/test_native_ops.py::test_index_reduce"],
    "L1": ["parity/test_appendix_a.py::test_hadamard_signs", "parity/test_appendix_a.py::test_intermediates"],
    "L2": ["parity/test_appendix_a.py::test_yarn_frequencies", "parity/test_appendix_a.py::test_intermediates"],
    "L3": ["property/test_index_scan_cuts.py::test_picks_do_not_depend_on_the_cut",
           "property/test_paged_state.py::test_a_paged_life_equals_a_contiguous_one"],
    "L4": ["property/test_state.py::test_the_future_does_not_show",
           "property/test_guard.py::test_what_is_read_holds_all_that_the_indexer_picks"],
    "L5": ["property/test_bitwise.py::test_any_split",
           "property/test_guard.py::test_any_cut_gives_the_bits_of_one_pass"],
    "L6": ["unit/test_selftest.py::test_every_residue_is_met", "unit/test_selftest.py::test_a_check_passes"],
    "L7": ["unit/test_index_scan.py::test_ties_go_to_the_lowest_index",
           "unit/test_index_scan.py::test_a_row_does_not_depend_on_its_neighbours_or_on_threads"],
    "L8": ["property/test_guard.py::test_with_room_for_all_a_guard_changes_nothing"],
    "L9": ["unit/test_index_scan.py::test_scores_of_fp4_numbers_are_the_same_bits_in_every_form",
           "unit/test_cache_codec.py::test_rounded_index_keys_come_back"],
    "L10": ["property/test_speculation.py::test_what_drafts_left_behind_is_gone_bit_for_bit"],
    "L11": ["unit/test_config.py"],
    "L12": ["unit/test_index_scan.py::test_scores_in_the_worst_order"],
    "L13": ["property/test_forced_entries.py::test_anchors_pins_and_system_message"],
}  # fmt: skip


def small(**changes: object) -> Transformer:
    """Window, CSA, HCA, CSA; four picks; random weights, so that every query sees all that it may."""
    values = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "compress_ratios": [0, 4, 8, 4],
        "num_attention_heads": 4, "head_dim": 32, "qk_rope_head_dim": 8, "q_lora_rank": 16, "o_groups": 2,
        "o_lora_rank": 8, "sliding_window": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "index_n_heads": 4, "index_head_dim": 32, "index_topk": 4, "hc_mult": 2,
        "num_nextn_predict_layers": 0, "num_hash_layers": 1, "max_position_embeddings": 8192, "torch_dtype": "float32",
    }  # fmt: skip
    return Transformer(ModelConfig.from_dict({**values, **changes}), seed=3).eval()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return small()


def text(count: int) -> list[int]:
    return [random.Random(2).randrange(64) for _ in range(count)]


@torch.inference_mode()
def picks_of(model: Transformer, ids: list[int], sizes: list[int]) -> tuple[Tensor, dict[str, list[set[int]]]]:
    """Streams and picks of a text read in pieces of these sizes."""
    names = [f"layers.{spec.index}.attn.index_topk" for spec in model.cfg.layers if spec.has_indexer]
    state, at, parts = model.new_state(1), 0, list[Tensor]()
    picked: dict[str, list[set[int]]] = {name: [] for name in names}
    for size in sizes:
        trace = Trace(capture=names)
        parts.append(model.forward_streams(torch.tensor([ids[at : at + size]]), state=state, trace=trace))
        for name in names:
            picked[name] += [set(row.tolist()) - {-1} for row in trace.captured[name][0]]
        at += size
    return torch.cat(parts, 1), picked


@pytest.mark.parametrize("rung", RUNGS)
def test_the_rung_has_its_tests(rung: str) -> None:
    for named in RUNGS[rung]:
        file, _, name = named.partition("::")
        tree = ast.parse((TESTS / file).read_text())
        assert not name or name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, named


@pytest.mark.parametrize("kind", ["random", "all-negative", "all-equal", "huge"])
def test_l0_scores_are_the_formula(kind: str) -> None:
    """relu of each head's product, weighted as it is, added up: in 64 bits here."""
    draw = torch.Generator().manual_seed(1)
    q, weights, keys = (torch.randn(*shape, generator=draw) for shape in ((2, 4, 32), (2, 4), (70, 32)))
    if kind == "all-negative":
        keys = -keys.abs() * q[0, 0].sign()
        q = q[:1, :1].abs().expand(2, 4, 32) * q[0, 0].sign()
    elif kind == "all-equal":
        keys = keys[:1].expand(70, 32)
    elif kind == "huge":
        keys = keys * 10.0 ** torch.randint(-12, 12, (70, 1), generator=draw)
    keys, q = keys.contiguous(), q.contiguous()
    scores = scan_scores(q, weights, IndexKeys(keys, 32), 70)
    dots = torch.einsum("rjk,ck->rjc", q.double(), keys.double()).clamp_min(0)
    expected = torch.einsum("rj,rjc->rc", weights.double(), dots)
    size = torch.einsum("rj,rjc->rc", weights.double().abs(), dots.abs()) + q.double().abs().sum() * 1e-30
    assert ((scores - expected).abs() <= 1e-5 * size + 1e-6 * expected.abs() + 1e-5 * keys.double().norm(dim=1)).all()
    if kind == "all-negative":
        assert (scores == 0).all()


def test_l1_rotation_of_both_sides_cancels_and_of_one_does_not() -> None:
    draw = torch.Generator().manual_seed(1)
    q, weights, keys = (torch.randn(*shape, generator=draw) for shape in ((2, 4, 32), (2, 4), (70, 32)))
    plain = scan_scores(q, weights, IndexKeys(keys, 32), 70)
    both = scan_scores(hadamard(q), weights, IndexKeys(hadamard(keys).contiguous(), 32), 70)
    one = scan_scores(hadamard(q), weights, IndexKeys(keys, 32), 70)
    assert torch.allclose(plain, both, atol=1e-4) and not torch.allclose(plain, one, atol=0.1)


@pytest.mark.parametrize("page_rows", [32, 64, 128, 256])
def test_l3_pages_of_any_size(page_rows: int) -> None:
    draw = torch.Generator().manual_seed(page_rows)
    pages = -(-700 // page_rows)
    order = torch.randperm(3 * pages, generator=draw)[:pages]
    q, weights, keys = (torch.randn(*shape, generator=draw) for shape in ((3, 4, 32), (3, 4), (pages * page_rows, 32)))
    pool = torch.zeros(3 * pages, page_rows, 32)
    pool[order] = keys.view(pages, page_rows, 32)
    ends = torch.tensor([10, 333, 700])
    expected = index_scan_reference(q, weights, IndexKeys(keys, 32), None, ends, 16)
    assert torch.equal(index_scan(q, weights, IndexKeys(pool, 32, order), None, ends, 16), expected)


def test_l3_pages_beyond_two_gigabytes() -> None:
    """Only the pages that are used are ever touched, so the pool takes no memory to speak of."""
    draw = torch.Generator().manual_seed(0)
    q, weights, keys = (torch.randn(*shape, generator=draw) for shape in ((1, 4, 32), (1, 4), (512, 32)))
    pool = torch.empty(70_000, 256, 32)
    order = torch.tensor([69_999, 66_000])
    assert int(order.min()) * 256 * 32 * 4 > 1 << 31
    pool[order] = keys.view(2, 256, 32)
    ends = torch.tensor([500])
    found = index_scan(q, weights, IndexKeys(pool, 32, order), None, ends, 16)
    assert torch.equal(found, index_scan_reference(q, weights, IndexKeys(keys, 32), None, ends, 16))


def test_l4_no_entry_is_seen_before_its_last_token(model: Transformer) -> None:
    _, picked = picks_of(model, text(90), [90])
    for rows in picked.values():
        for t, row in enumerate(rows):
            assert all((entry + 1) * 4 <= t + 1 for entry in row)
            assert len(row) == min(4, (t + 1) // 4)


@pytest.mark.parametrize("size", [1, 3, 4, 5, 127, 128, 129])
def test_l5_pieces_of_any_size(model: Transformer, size: int) -> None:
    count = 140 if size < 5 else 390
    ids = text(count)
    whole, picked = picks_of(model, ids, [4096])
    pieces, again = picks_of(model, ids, [min(size, count - at) for at in range(0, count, size)])
    assert torch.equal(whole, pieces) and picked == again


@torch.inference_mode()
def test_l7_a_hundred_replays_under_load_have_one_hash(model: Transformer) -> None:
    ids, draw, hashes = text(60), random.Random(1), set[tuple[int, ...]]()
    _, picked = picks_of(model, ids, [60])
    expected = tuple(selection_hash(sorted(rows[-1])) for rows in picked.values())
    name = [f"layers.{spec.index}.attn.index_topk" for spec in model.cfg.layers if spec.has_indexer]
    shared = model.new_state(1)
    model.step([Segment(shared, ids[:-1])])
    logits = set[bytes]()
    for replay in range(100):
        others = [model.new_state(1) for _ in range(draw.randrange(3))]
        state = shared.fork()
        company = [Segment(one, text(draw.randrange(1, 30))) for one in others]
        scores = model.next_scores([*company, Segment(state, ids[-1:])])
        logits.add(scores.logits[0, -1].numpy().tobytes())
        if replay % 10 == 0:
            trace = Trace(capture=name)
            model.forward_streams(torch.tensor([ids[-1:]]), state=shared.fork(), trace=trace)
            hashes.add(tuple(selection_hash(trace.captured[one][0, 0].tolist()) for one in name))
    assert hashes == {expected} and len(logits) == 1


def test_l8_with_room_for_all_it_is_dense() -> None:
    wide, ids = small(index_topk=30), text(110)
    with torch.inference_mode():
        chosen = wide.forward_streams(torch.tensor([ids]), state=wide.new_state(1))
        dense = wide.forward_streams(torch.tensor([ids]), state=wide.new_state(1), trace=Trace(dense=True))
    assert torch.equal(chosen, dense)


def test_l11_one_source_of_k(model: Transformer) -> None:
    """The configuration's, in every indexer and in the fused step's table; a file's other k reaches them all."""
    for k in (4, 7):
        one = small(index_topk=k)
        assert {layer.attn.indexer.top_k for layer in one.layers if layer.attn.indexer is not None} == {k}
        with torch.inference_mode():
            plan = plan_of(one, [one.new_state(1)])
        if plan is not None:
            assert int(plan.network.shape[columns("Shape").index("top_k")]) == k
        _, picked = picks_of(one, text(80), [80])
        assert {max(map(len, rows)) for rows in picked.values()} == {k}
        assert ModelConfig.from_dict(one.cfg.to_dict()).index_topk == k


def test_l12_ten_thousand_near_equal_candidates() -> None:
    """In any order of arrival the true best: scores that differ in their last bits only."""
    draw = torch.Generator().manual_seed(5)
    q, weights = torch.zeros(1, 1, 32), torch.ones(1, 1)
    q[0, 0, 0] = 1.0
    values = 1 + torch.randperm(10_000, generator=draw).float() * 2.0**-20
    for order in (torch.arange(10_000), values.argsort(), values.argsort(descending=True)):
        keys = torch.zeros(10_000, 32)
        keys[:, 0] = values[order]
        found = index_scan(q, weights, IndexKeys(keys, 32), None, torch.tensor([10_000]), 100)[0]
        assert found.tolist() == sorted(keys[:, 0].topk(100).indices.tolist())


def test_l13_the_sink_stands_outside_the_choice(model: Transformer) -> None:
    """Every head's sink takes part in the softmax of queries that choose, and is no entry that could be dropped."""
    ids = text(80)
    whole, picked = picks_of(model, ids, [80])
    attn = model.layers[1].attn
    kept = attn.attn_sink.detach().clone()
    try:
        with torch.no_grad():
            attn.attn_sink += 2.0
        other, again = picks_of(model, ids, [80])
    finally:
        with torch.no_grad():
            attn.attn_sink.copy_(kept)
    first = "layers.1.attn.index_topk"
    assert picked[first] == again[first] and len(picked[first][-1]) == model.cfg.index_topk
    assert not torch.equal(whole[:, -1], other[:, -1])
