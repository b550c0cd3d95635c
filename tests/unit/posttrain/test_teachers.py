"""Teachers: cached states give the very logits, heads come one by one, decisions are exact mixtures; merged weights."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from small_models import build, config, packable_config
from torch import Tensor

from rorqual.checkpoint import load_model, save_official, save_transformers
from rorqual.errors import CheckpointError, ConfigError
from rorqual.model import Transformer
from rorqual.model.quantised import quantise
from rorqual.posttrain.distill import Term, log_probs, reverse_kl
from rorqual.posttrain.distill_decision import Altered, Decision, follow
from rorqual.posttrain.hidden_cache import HiddenCache, StateKey, TeacherStates
from rorqual.posttrain.merge import average, merge_checkpoints, task_arithmetic
from rorqual.posttrain.teachers import Heads, Sample, Teacher, by_teacher, fill_cache, hidden_states, key_of


def samples(count: int = 5, vocabulary: int = 64, domain: str = "") -> list[Sample]:
    """Trajectories of several lengths, with a tool result in the middle of some."""
    draw = torch.Generator().manual_seed(4)
    out = []
    for number in range(count):
        length = 9 + 5 * number
        ids = torch.randint(0, vocabulary, (length,), generator=draw).tolist()
        mask = [4 <= place < length and not (number % 2 and 6 <= place < 8) for place in range(length)]
        out.append(Sample(f"t{number}", tuple(ids), tuple(mask), domain))
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher")
    save_official(build(packable_config()), path)
    return path


@pytest.mark.parametrize("qat", [None, "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_logits_are_recomputed_ones(folder: Path, tmp_path: Path, qat: str | None, dtype: torch.dtype) -> None:
    """Bit by bit, whatever was batched with what, from a cache that was opened again."""
    teacher = Teacher("one", folder, qat=qat, dtype=dtype)
    version = teacher.version()
    fill_cache(HiddenCache(tmp_path), [teacher], {"one": version}, samples(), batch_tokens=40)
    cache, head, model = HiddenCache(tmp_path), teacher.head(), teacher.load()
    assert len(cache) == 5
    for sample in samples():
        kept = cache.get(key_of(sample, "one", version)).hidden
        start, stop = sample.span
        with torch.no_grad():
            fresh = model.final_hidden(model.forward_streams(torch.tensor([sample.ids])))[0, start:stop]
            assert kept.dtype == torch.bfloat16 and torch.equal(kept, fresh.bfloat16())
            assert torch.equal(log_probs(kept, head), log_probs(fresh.bfloat16(), model.head.weight))


def test_either_layout_is_the_same_teacher(folder: Path, tmp_path: Path) -> None:
    save_transformers(load_model(folder), tmp_path / "t")
    ours, theirs = Teacher("a", folder), Teacher("a", tmp_path / "t")
    assert torch.equal(ours.head(), theirs.head())
    for (_, mine), (_, other) in zip(
        hidden_states(ours.load(), samples(), 64), hidden_states(theirs.load(), samples(), 64), strict=True
    ):
        assert torch.equal(mine, other)


def test_a_packed_teacher_is_the_rounded_one(tmp_path: Path) -> None:
    """Weights kept in FP4 and FP8 teach what quantisation-aware training's rounding of the same experts does."""
    source = build(packable_config())
    save_official(source, tmp_path / "m", experts="fp4")
    packed = Teacher("p", tmp_path / "m", weights="fp4")
    truth = load_model(tmp_path / "m")
    quantise(truth, "fp4")
    for (_, mine), (_, other) in zip(
        hidden_states(packed.load(), samples(), 64), hidden_states(truth.eval(), samples(), 64), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)


def test_versions_and_forgetting(folder: Path, tmp_path: Path) -> None:
    teacher = Teacher("one", folder)
    version = teacher.version()
    assert Teacher("one", folder, qat="fp4").version() != version
    other = build(packable_config(), weights_seed=8)
    save_official(other, tmp_path / "other")
    assert Teacher("one", tmp_path / "other").version() != version
    cache = HiddenCache(tmp_path / "cache")
    fill_cache(cache, [teacher], {"one": version}, samples(3))
    assert fill_cache(cache, [teacher], {"one": version}, samples(3)) == []  # all there
    assert fill_cache(cache, [teacher], {"one": "newer"}, samples(1)) == ["one"]
    assert cache.nbytes > 0
    cache.forget(["t0", "t1"])
    assert key_of(samples()[2], "one", version) in cache and key_of(samples()[1], "one", version) not in cache
    cache.forget(["t2"])
    assert not len(cache) and not list((tmp_path / "cache").glob("*/*.safetensors"))
    damaged = tmp_path / "cache" / "x" / "y.safetensors"
    damaged.parent.mkdir(exist_ok=True)
    damaged.write_bytes(b"half a fi")
    assert len(HiddenCache(tmp_path / "cache")) == 0


def test_heads_come_one_at_a_time() -> None:
    """Samples in the teachers' order: each head once a mini-batch, never two on the device, the next read ahead."""
    teachers = [Teacher(name, Path(), domains=(name,)) for name in "abc"]
    mixed = [Sample(f"{name}{n}", (1, 2, 3), (False, True, True), name) for n in range(3) for name in "cab"]
    order = by_teacher(teachers, mixed)
    assert [teacher.name for teacher, _ in order] == ["a", "b", "c"]
    assert all({sample.domain for sample in mine} == {teacher.name} for teacher, mine in order)
    read: list[str] = []

    def reading(name: str) -> Tensor:
        read.append(name)
        return torch.full((2, 2), float(ord(name)))

    with Heads(reading) as heads:
        for number, (teacher, mine) in enumerate(order):
            upcoming = order[number + 1][0].name if number < 2 else None
            for _ in mine:
                assert heads.use(teacher.name, upcoming)[0, 0] == ord(teacher.name)
                assert heads.num_resident == 1
        assert heads.loads == read == ["a", "b", "c"]
        heads.release()
        assert heads.num_resident == 0


def test_what_a_head_lacks_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        Teacher("gone", tmp_path / "nothing").head()


# ---------------------------------------------------------------- decisions


def test_a_decision_is_the_mixture_of_two_writers() -> None:
    """Over all texts of three ids: the product of the altered distributions is g x refusing + (1 - g) x model."""
    vocabulary, length, gate, slack = 4, 3, 0.3, 0.05
    text = (2, 0)
    draw = torch.Generator().manual_seed(0)
    table = {
        prefix: torch.log_softmax(torch.randn(vocabulary, generator=draw).double(), -1)
        for n in range(length)
        for prefix in itertools.product(range(vocabulary), repeat=n)
    }
    decision, total = Decision(gate, text, slack), 0.0
    for answer in itertools.product(range(vocabulary), repeat=length):
        own = [float(table[answer[:t]][answer[t]]) for t in range(length)]
        share, token = follow(decision, answer, own)
        log_q = torch.stack([table[answer[:t]] for t in range(length)]).float()
        altered = Altered(share, token, slack).alter(log_q, slice(0, length))
        assert torch.allclose(altered.exp().sum(-1), torch.ones(length), atol=1e-5) and torch.isfinite(altered).all()
        found = math.exp(sum(float(altered[t, answer[t]]) for t in range(length)))
        model = refusing = 1.0
        is_on = True
        for t in range(length):
            q = math.exp(own[t])
            model *= q
            if is_on and t < len(text):
                refusing *= (1 - slack) * (answer[t] == text[t]) + slack * q
                is_on = answer[t] == text[t]
            else:
                refusing *= q
        assert found == pytest.approx(gate * refusing + (1 - gate) * model, rel=1e-4)
        total += found
    assert total == pytest.approx(1, rel=1e-4)


def test_certain_decisions_stay_finite() -> None:
    """Probability 0 changes nothing, 1 puts all but the slack on the text, and the divergence is finite."""
    hidden = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    head = torch.randn(11, 8, generator=torch.Generator().manual_seed(2))
    own = [-1.0, -2.0, -3.0]
    for probability in (0.0, 1.0):
        share, token = follow(Decision(probability, (5, 6, 7)), (5, 6, 7), own)
        altered = Altered(share, token, 1e-3).alter(log_probs(hidden, head), slice(0, 3))
        if probability:
            assert bool((altered.exp()[range(3), [5, 6, 7]] > 0.998).all())
        else:
            torch.testing.assert_close(altered, log_probs(hidden, head))
        term = Term(hidden, head, torch.full((3,), 1 / 3), Altered(share, token, 1e-3))
        assert math.isfinite(reverse_kl(hidden, head, [term]).loss)
    with pytest.raises(ConfigError, match="probability 2"):
        Decision(2, (1,))


def test_decisions_are_cached_with_the_states(folder: Path, tmp_path: Path) -> None:
    """What the gate makes of an answer follows from the teacher's own probabilities of it."""
    (sample,) = samples(1)
    answer = [sample.ids[row + 1] for row in sample.rows]
    decision = Decision(0.5, (answer[0], answer[1], 3))
    teacher = Teacher("gated", folder, decide=lambda _: decision)
    cache = HiddenCache(tmp_path)
    fill_cache(cache, [teacher], {"gated": "v"}, [sample])
    kept = cache.get(key_of(sample, "gated", "v"))
    own = log_probs(kept.hidden, teacher.head()).gather(-1, torch.tensor(answer)[:, None])[:, 0]
    share, token = follow(decision, answer, own.tolist())
    torch.testing.assert_close(kept.share, share)
    assert kept.token is not None and torch.equal(kept.token, token)
    assert share[0] == 0.5 < float(share[1]) < float(share[2])  # the student writes the refusal: Bayes believes it


# ---------------------------------------------------------------- merging


def three(seed: int) -> list[Transformer]:
    return [build(config(), weights_seed=seed + n) for n in range(3)]


def test_merged_states() -> None:
    first, second, base = (model.state_dict() for model in three(0))
    for state in (second, base):
        state.update({name: tensor for name, tensor in first.items() if not tensor.is_floating_point()})
    mean, changed = average([first, second], [1, 3]), task_arithmetic(base, [first, second], 0.5)
    for name, tensor in first.items():
        if not tensor.is_floating_point():
            assert torch.equal(mean[name], tensor)
            continue
        torch.testing.assert_close(mean[name], 0.25 * tensor + 0.75 * second[name])
        wanted = base[name] + 0.5 * (tensor - base[name]) + 0.5 * (second[name] - base[name])
        torch.testing.assert_close(changed[name], wanted, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(average([first, first])[name], first[name]) for name in first)
    with pytest.raises(ConfigError, match="whole numbers"):
        average([model.state_dict() for model in three(5)])
    with pytest.raises(ConfigError, match="2 models came with 1 weights"):
        average([first, second], [1])


def test_merged_folders(folder: Path, tmp_path: Path) -> None:
    base = load_model(folder)
    other = build(packable_config(), weights_seed=1)
    other.load_state_dict({n: t for n, t in base.state_dict().items() if not t.is_floating_point()}, strict=False)
    save_official(other, tmp_path / "b", shard_bytes=100_000)
    save_official(base, tmp_path / "a", shard_bytes=100_000)
    merge_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    wanted = average([base.state_dict(), other.state_dict()])
    for name, tensor in load_model(tmp_path / "out").state_dict().items():
        torch.testing.assert_close(tensor, wanted[name])
    with pytest.raises(CheckpointError, match="differ at"):
        small = tmp_path / "small"
        save_official(build(config()), small)
        merge_checkpoints([tmp_path / "a", small], tmp_path / "no")
    save_official(base, tmp_path / "packed", experts="fp4")
    with pytest.raises(ConfigError, match="is packed"):
        merge_checkpoints([tmp_path / "packed", tmp_path / "packed"], tmp_path / "no")


def test_states_are_one_teachers(tmp_path: Path) -> None:
    """Keys tell apart what differs in any part."""
    cache = HiddenCache(tmp_path)
    keys = [StateKey("t", 0, 2, "a", "1"), StateKey("t", 0, 3, "a", "1"), StateKey("u", 0, 2, "a", "1")]
    cache.put({key: TeacherStates(torch.full((key.stop, 2), float(n))) for n, key in enumerate(keys)})
    for n, key in enumerate(keys):
        assert torch.equal(HiddenCache(tmp_path).get(key).hidden, torch.full((key.stop, 2), float(n)).bfloat16())
    assert StateKey("t", 0, 2, "b", "1") not in cache and StateKey("t", 0, 2, "a", "2") not in cache
