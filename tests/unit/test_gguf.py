"""GGUF files: blocks by hand, what is in them, numbers read back with the gguf package, refusals, a full disk."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import build

from rorqual import checkpoint
from rorqual.checkpoint.gguf_export import export_gguf, to_mxfp4
from rorqual.checkpoint.gguf_names import gguf_name
from rorqual.cli import main
from rorqual.config import ModelConfig
from rorqual.errors import CheckpointError, ConfigError
from rorqual.ops import quant

gguf = pytest.importorskip("gguf")
torch.set_num_threads(1)

MINKE = checkpoint.ASSETS / "minke"
CONFIG = ModelConfig.from_file(MINKE / "config.json").replace(
    index_head_dim=64, num_hidden_layers=4, compress_ratios=(0, 4, 128, 4, 0), n_routed_experts=4
)


def saved(folder: Path, experts: Any = None, cfg: ModelConfig = CONFIG) -> Path:
    checkpoint.save_official(build(cfg), folder, experts=experts)
    shutil.copyfile(MINKE / "tokenizer.json", folder / "tokenizer.json")
    return folder


def test_an_mxfp4_block_by_hand():
    """Channels 0..31 get codes i % 16; byte j then holds channel j low and channel j + 16 high, after the scale."""
    codes = torch.tensor([[(2 * j % 16) | ((2 * j + 1) % 16) << 4 for j in range(16)]], dtype=torch.uint8)
    scale = torch.tensor([[125]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    block = to_mxfp4(codes.view(torch.int8), scale)
    assert block.tolist() == [[[125, *(j | j << 4 for j in range(16))]]]
    read = gguf.quants.dequantize(block.reshape(1, -1).numpy(), gguf.GGMLQuantizationType.MXFP4)
    assert np.array_equal(read, quant.dequantize_weight_fp4(codes.view(torch.int8), scale).numpy())


@pytest.mark.parametrize("experts", [None, "fp4", "fp8"])
def test_every_number_is_in_the_file(tmp_path: Path, experts: Any):
    source = saved(tmp_path / "a", experts)
    done = export_gguf(source, tmp_path / "a.gguf")
    model = checkpoint.load_official(source)
    reader = gguf.GGUFReader(done.path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("mtp.")}
    assert len(found) == len(state) == done.verified and done.left_out == ["mtp"]
    for name, tensor in state.items():
        one = found[gguf_name(name)]
        plain = one.tensor_type.name in ("F32", "I32")
        numbers = one.data if plain else gguf.quants.dequantize(one.data, one.tensor_type)
        assert one.shape.tolist() == list(reversed(tensor.shape)), name
        assert np.array_equal(np.asarray(numbers, dtype=np.float64), tensor.double().numpy()), name
    kinds = {gguf_name(name): found[gguf_name(name)].tensor_type.name for name in state}
    expert = kinds["blk.1.ffn_gate_exps.weight"]
    assert expert == {None: "F32", "fp4": "MXFP4", "fp8": "BF16"}[experts]
    assert kinds["blk.1.attn_q_a.weight"] == ("F32" if experts is None else "BF16")
    assert kinds["blk.0.ffn_gate_tid2eid.weight"] == "I32"
    assert {kinds[f"blk.1.{one}.weight"] for one in ("hc_attn_fn", "attn_sinks", "attn_norm", "ffn_gate_inp")} == {
        "F32"
    }
    fields = reader.fields
    assert fields["general.architecture"].contents() == "deepseek4"
    assert fields["deepseek4.attention.compress_ratios"].contents() == [0, 4, 128, 4]
    assert fields["deepseek4.attention.indexer.key_length"].contents() == 64
    words = json.loads((source / "tokenizer.json").read_text())
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == CONFIG.vocab_size and all(tokens[i] == word for word, i in words["model"]["vocab"].items())


def test_what_llama_cpp_could_not_run_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="heads are 32 wide.*64 channels at a time"):
        export_gguf(MINKE, tmp_path / "x.gguf")
    odd = saved(tmp_path / "odd", cfg=CONFIG.replace(compress_ratios=(0, 4, 8, 4, 0)))
    with pytest.raises(ConfigError, match="knows 0, 4 and 128 only"):
        export_gguf(odd, tmp_path / "x.gguf")
    source = saved(tmp_path / "a")
    text = (source / "tokenizer.json").read_text().replace(r"\\p{N}{1,1}", r"\\p{N}{1,2}")
    (source / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match="splits text in another way than V4's"):
        export_gguf(source, tmp_path / "x.gguf")
    (source / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="holds the vocabulary"):
        export_gguf(source, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = saved(tmp_path / "a", "fp4")

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["convert", str(source), str(tmp_path / "a.gguf"), "--to", "gguf", *arguments])
        return int(ended.value.code or 0), *capsys.readouterr()

    code, _, err = run("--experts", "fp4")
    assert code == 2 and "keeps what is stored" in err
    code, out, _ = run()
    assert code == 0 and "12 MXFP4" in out and "left out" in out and list(tmp_path.glob(".*")) == []
    code, _, err = run("--json")
    assert code == 1 and "is there already" in err
