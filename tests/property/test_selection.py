"""The figures of a choice are what their formulas say, computed here head by head and entry by entry."""

import math
import random

import pytest
import torch
from small_models import build, config

from rorqual.engine.selection import SelectionTap, jaccard, look_at, selection_hash
from rorqual.errors import ConfigError, RequestError
from rorqual.model import Segment, Trace, Transformer


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build(config(compress_ratios=[0, 4, 8, 4], index_topk=4))


def text(count: int) -> list[int]:
    return [random.Random(4).randrange(64) for _ in range(count)]


def test_figures_are_their_formulas(model: Transformer) -> None:
    ids, window, needle = text(90), model.cfg.sliding_window, (30, 33)
    state = model.new_state(1)
    found = look_at(model, state, ids, [5, 50, 88], needle)
    trace = Trace(capture=["*"])
    with torch.inference_mode():
        model.forward_streams(torch.tensor([ids]), trace=trace)
    assert [(one.layer, one.q_pos) for one in found] == [(layer, t) for layer in (1, 3) for t in (5, 50, 88)]
    for one in found:
        kept = {k.split(".")[-1]: v[0] for k, v in trace.captured.items() if k.startswith(f"layers.{one.layer}.attn.")}
        t, seen = one.q_pos, (one.q_pos + 1) // 4
        assert one.n_visible == seen
        sink, scale = model.layers[one.layer].attn.attn_sink, model.cfg.head_dim**-0.5
        heads, lost = [], []
        for head in range(model.cfg.num_attention_heads):
            q = kept["q"][t, head]
            far = [math.exp(float(q @ kept["entries"][i]) * scale) for i in range(seen)]
            near = [math.exp(float(q @ kept["keys"][t + i]) * scale) for i in range(window) if t - window + 1 + i >= 0]
            heads.append([x / sum(far) for x in far])
            rest = [x for i, x in enumerate(far) if i not in one.selected]
            lost.append(sum(rest) / (sum(far) + sum(near) + math.exp(float(sink[head]))))
        mean = [sum(column) / len(heads) for column in zip(*heads, strict=True)]
        amr = sum(mean[i] for i in one.selected)
        ideal = sum(sorted(mean, reverse=True)[: len(one.selected)])
        assert one.amr == pytest.approx(amr, rel=1e-4)
        assert one.amr_eff == pytest.approx(amr / ideal, rel=1e-4)
        assert one.amr_head_min == pytest.approx(min(sum(h[i] for i in one.selected) for h in heads), rel=1e-4)
        assert one.amr_all == pytest.approx(1 - sum(lost) / len(lost), rel=1e-4)
        scores = [
            sum(float(w) * max(0.0, float(kept["index_q"][t, j] @ kept["index_entries"][i]))
                for j, w in enumerate(kept["index_weights"][t]))
            for i in range(seen)
        ]  # fmt: skip
        kth = sorted(scores, reverse=True)[min(4, seen) - 1]
        assert one.kth_score == pytest.approx(kth, abs=1e-5)
        norm = sum(math.exp(x) for x in scores)
        assert one.kl == pytest.approx(
            sum(p * math.log(p / (math.exp(x) / norm)) for p, x in zip(mean, scores, strict=True)), abs=1e-4
        )
        if t == 5:
            assert one.nbh is None and set(one.selected) == set(range(seen)) and one.amr == pytest.approx(1)
            continue
        cover = [i for i in range(seen) if any(30 <= u < 33 for u in range(4 * i - 4, 4 * i + 4))]
        assert one.needle_entries == (cover[0], cover[-1] + 1) == (7, 10)
        assert one.nbh == any(i in one.selected for i in cover)
        assert one.nbh_full == all(i in one.selected for i in cover)
        top = max(scores[i] for i in cover)
        assert one.rank == (1 + sum(x > top + 1e-6 for x in scores)) / seen
        spread = torch.tensor(scores).std()
        assert one.margin == pytest.approx(float((top - kth) / spread), abs=1e-3)


def test_looking_changes_nothing(model: Transformer) -> None:
    ids = text(80)
    state, other = model.new_state(1), model.new_state(1)
    look_at(model, state, ids)
    with torch.inference_mode():
        model.step([Segment(other, ids)])
        assert torch.equal(model.step([Segment(state, [3])]), model.step([Segment(other, [3])]))


def test_levels_of_a_tap(model: Transformer) -> None:
    ids = text(80)
    taps = [SelectionTap(level, every=7) for level in (0, 1, 2, 3)]
    for tap in taps:
        found = look_at(model, model.new_state(1), ids, tap=tap)
    assert not taps[0].counters and not taps[1].rows
    assert len(taps[3].rows) == len(found) and len(taps[2].rows) == 2 * -(-(len(ids) - 3) // 7)
    for tap in taps[1:]:
        assert tap.counters[1].queries == len(ids) - 3
        assert tap.counters[1].hash == taps[3].counters[1].hash
    assert 0 < taps[3].figures()["amr"] <= 1
    row = taps[3].rows[-1].to_row(item_id="a")
    entries, at = [], 0
    for step in row["selected"]:
        at += step
        entries.append(at)
    assert tuple(entries) == taps[3].rows[-1].selected and row["item_id"] == "a"
    with pytest.raises(ConfigError, match="from 0 to 3"):
        SelectionTap(4)  # type: ignore[arg-type]


def test_hash_and_overlap() -> None:
    assert selection_hash([3, 9]) == selection_hash([9, 3]) != selection_hash([3, 10])
    assert jaccard([1, 2], [2, 3]) == pytest.approx(1 / 3) and jaccard([], []) == 1


@pytest.mark.parametrize("length", [40, 41, 42, 43])
def test_cover_is_the_pooling_window(model: Transformer, length: int) -> None:
    """Entry i pools tokens [4 i - 4, 4 i + 4) where blocks overlap, [8 i, 8 i + 8) where they do not."""
    for layer, ratio, back in ((1, 4, 4), (2, 8, 0)):
        for begin in range(length):
            for end in (begin + 1, min(length, begin + 6)):
                expected = [
                    i for i in range(length // ratio)
                    if any(begin <= t < end for t in range(ratio * i - back, ratio * i + ratio))
                ]  # fmt: skip
                assert [*range(*model.cover(layer, begin, end, length))] == expected
    with pytest.raises(RequestError, match="it has none"):
        model.cover(0, 1, 2, 40)
