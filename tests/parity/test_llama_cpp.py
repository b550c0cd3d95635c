"""llama.cpp itself reads our GGUF files: the same tokens for text, and nearly the same next-token probabilities.

It needs `pip install xllamacpp`, which has llama.cpp built for the CPU; skipped without. It runs in a process of its
own, because a failed assertion of llama.cpp ends the process. Its products of F32 matrices are exact up to summation
order, but some of its state is kept in F16, and with random weights a near tie in a router or indexer then falls the
other way now and then: hence a median, and a share.
"""

import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rorqual import checkpoint
from rorqual.checkpoint.gguf_export import export_gguf
from rorqual.config import ModelConfig
from rorqual.model import Transformer
from rorqual.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed"),
]
torch.set_num_threads(1)

MINKE = checkpoint.ASSETS / "minke"
LENGTHS = (1, 2, 3, 4, 5, 8, 9, 63, 64, 65, 100, 127, 128, 129, 200, 256, 257, 300, 384, 400)
TEXTS = [
    "Hello, world!",
    "I'm 12345 years old",
    "été e\u0301 한국어 😀",
    "<｜User｜>Hi<｜Assistant｜><think>a</think>b",
    "a\n\n  b",
]

ASK = """
import json, os, sys, urllib.request, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_gpu_layers, params.cpuparams.n_threads = sys.argv[1], 1024, 0, 1
params.cache_type_k = params.cache_type_v = 0  # F32
server = xllamacpp.Server(params)
def ask(path, body):
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(),
                                     {"content-type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=100))
asked, answers, tokens = json.load(open(sys.argv[2])), [], []
for ids in asked["prompts"]:
    body = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": 30, "cache_prompt": False}
    found = ask("/completion", body).get("completion_probabilities")  # none for half a character
    answers.append(found and [(one["id"], one["logprob"]) for one in found[0]["top_logprobs"]])
for text in asked["texts"]:
    tokens.append(ask("/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"])
json.dump({"answers": answers, "tokens": tokens}, open(sys.argv[3], "w"))
os._exit(0)
"""


def test_llama_cpp_agrees(tmp_path: Path):
    cfg = ModelConfig.from_file(MINKE / "config.json").replace(
        index_head_dim=128, num_nextn_predict_layers=0, compress_ratios=(0, 0, 4, 128, 4, 128)
    )
    model, generator = Transformer(cfg, seed=5).eval(), torch.Generator().manual_seed(6)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.05)
    checkpoint.save_official(model, tmp_path / "a")
    shutil.copyfile(MINKE / "tokenizer.json", tmp_path / "a" / "tokenizer.json")
    file = export_gguf(tmp_path / "a", tmp_path / "a.gguf").path
    prompts = [torch.randint(0, 4080, (n,), generator=generator).tolist() for n in LENGTHS]
    (tmp_path / "asked.json").write_text(json.dumps({"prompts": prompts, "texts": TEXTS}))
    (tmp_path / "ask.py").write_text(ASK)
    command = [sys.executable, tmp_path / "ask.py", file, tmp_path / "asked.json", tmp_path / "told.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads((tmp_path / "told.json").read_text())
    tokenizer = Tokenizer.from_folder(tmp_path / "a")
    assert told["tokens"] == [tokenizer.encode(text) for text in TEXTS]
    differences, same = [], 0
    for ids, answer in zip(prompts, told["answers"], strict=True):
        if answer is not None:
            with torch.no_grad():
                expected = torch.log_softmax(model(torch.tensor([ids]))[0, -1].double(), -1)
            differences.append(max(abs(float(expected[token]) - logprob) for token, logprob in answer))
            same += int(expected.argmax()) == answer[0][0]
    assert len(differences) >= len(LENGTHS) - 3
    assert statistics.median(differences) < 0.02 and same >= 0.85 * len(differences), (differences, same)
