"""Whose tokenizer lies beside the weights: V4's, V3's, another with V4's markers, or something else."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from mock_model import byte_tokenizer

from rorqual import checkpoint
from rorqual.checkpoint.summary import check_tokenizer
from rorqual.cli import main
from rorqual.config import ModelConfig
from rorqual.model import Transformer
from rorqual.tokenizer import Tokenizer, identify
from rorqual.tokenizer.identify import V4_IDS, V4_VOCABULARY
from rorqual.tokenizer.special import END_THINK, THINK

V3_TOOLS = "<｜tool▁calls▁begin｜>"


@cache
def released(markers: tuple[tuple[str, int], ...], size: int) -> str:
    """A tokenizer.json of `size` ids with these markers: three specials, 256 bytes, fillers up to 128,000, added
    tokens after them, as in the released files (whose merges decide nothing here).
    """
    content = json.loads(byte_tokenizer().to_json())
    ids, at = dict(markers), {token_id: name for name, token_id in markers}
    symbols = [name for name in content["model"]["vocab"] if len(name) == 1]
    base = [at.get(i, "") for i in range(3)] + symbols
    base += [f"x{i}" for i in range(len(base), 128_000)]
    content["model"]["vocab"] = {name: i for i, name in enumerate(base)}
    content["model"]["merges"] = []
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    names = {i: at.get(i, f"<｜place▁holder▁no▁{i}｜>") for i in [*range(3), *range(128_000, size)]}
    content["added_tokens"] = [{"id": i, "content": name, "special": i < 3, **flags} for i, name in names.items()]
    assert all(ids[name] == i for i, name in names.items() if name in ids)
    return json.dumps(content)


def v4() -> str:
    return released(tuple(V4_IDS.items()), V4_VOCABULARY)


def v3(thinks: bool = True) -> str:
    moved = {THINK: 128798, END_THINK: 128799} if thinks else {}
    kept = {name: i for name, i in V4_IDS.items() if name not in (THINK, END_THINK, "｜DSML｜")}
    return released(tuple({**kept, **moved, V3_TOOLS: 128806}.items()), 128_815)


def test_families():
    assert identify(Tokenizer.from_json(v4())).family == "v4"
    assert identify(Tokenizer.from_json(v3())).family == "v3"
    assert identify(Tokenizer.from_json(v3(thinks=False))).family == "v3"
    assert identify(byte_tokenizer()).family == "own"
    assert identify(Tokenizer.from_folder(checkpoint.ASSETS / "minke")).family == "own"


def verdict(folder: Path, text: str | None, **changes: int) -> tuple[bool | None, str]:
    (folder / "tokenizer.json").unlink(missing_ok=True)
    if text is not None:
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    found = check_tokenizer(folder, ModelConfig.preset("minke").replace(**{"vocab_size": V4_VOCABULARY, **changes}))
    return found.is_right, found.words


def test_beside_v4_weights(tmp_path: Path):
    assert verdict(tmp_path, v4())[0] is True
    is_right, words = verdict(tmp_path, v3())
    assert is_right is False and "DeepSeek-V3" in words and "128798" in words and "128821" in words
    is_right, words = verdict(tmp_path, v3(thinks=False))
    assert is_right is False and "DeepSeek-V3" in words
    is_right, words = verdict(tmp_path, byte_tokenizer().to_json())
    assert is_right is False and "another vocabulary" in words and "129280" in words
    assert verdict(tmp_path, None)[0] is None
    is_right, words = verdict(tmp_path, v4()[:1000])
    assert is_right is False and "not JSON" in words


def test_beside_weights_of_our_own(tmp_path: Path):
    text = byte_tokenizer().to_json()
    size = byte_tokenizer().vocab_size
    assert verdict(tmp_path, text, vocab_size=size)[0] is True
    is_right, words = verdict(tmp_path, text, vocab_size=size - 1)
    assert is_right is False and f"{size - 1} embeddings" in words
    is_right, words = verdict(tmp_path, text, vocab_size=size, eos_token_id=7)
    assert is_right is False and "the config with 0 and 7" in words


def test_inspect_names_it_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cfg = ModelConfig.preset("minke").replace(vocab_size=V4_VOCABULARY, n_routed_experts=4, hidden_size=32)
    checkpoint.save_official(Transformer(cfg), tmp_path, dtype=torch.bfloat16)
    for text, code in ((v4(), 0), (v3(), 1)):
        (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit) as ended:
            main(["inspect", str(tmp_path), "--json"])
        found = json.loads(capsys.readouterr().out)["checkpoint"]
        assert ended.value.code == code and found["fits"] and found["tokenizer"]["is_right"] is (code == 0)
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path)])
    out = " ".join(capsys.readouterr().out.split())
    assert "does NOT fit: DeepSeek-V3's" in out or "DeepSeek-V3 has it" in out
    by_component = found["by_component"]
    stored = checkpoint.summarise(tmp_path).stored
    assert sum(n for shares in by_component.values() for n in shares.values()) == sum(n for _, _, n in stored)
    assert by_component["embedding"] == {"BF16": V4_VOCABULARY * 32 * 2}
    assert by_component["hash_tables"] == {"I64": V4_VOCABULARY * cfg.num_experts_per_tok * 8 * cfg.num_hash_layers}
