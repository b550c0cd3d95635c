"""The bundled model through the whole stack: what a person sees after `make up`."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Browser, find_chromium
from chat_page import ask, open_fresh, set_field
from live_server import live

from rorqual import Engine, SamplingParams, load
from rorqual.checkpoint import ASSETS
from rorqual.data.tasks import World, families, posttraining_families
from rorqual.server import create_app

openai = pytest.importorskip("openai", reason="needs the openai SDK (test extra)")
ASK: Any = [{"role": "user", "content": "Hello! Who are you?"}]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    model, tokenizer = load("minke")
    with Engine(model, tokenizer) as engine:
        yield engine


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    with live(create_app(engine, "minke")) as url:
        yield url


def test_it_is_small_and_complete() -> None:
    folder = Path(ASSETS) / "minke"
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "world.json"} <= names
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 16e6
    assert World.from_dict(json.loads((folder / "world.json").read_text())).people
    model, tokenizer = load("minke")
    assert model.cfg.vocab_size == tokenizer.vocab_size
    assert model.load_report.missing == [] and model.load_report.unexpected == []  # type: ignore[union-attr]
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize("thinking", [True, False])
def test_it_answers_a_stream_of_the_openai_sdk(url: str, thinking: bool) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    kind = "enabled" if thinking else "disabled"
    stream = client.chat.completions.create(
        model="minke", messages=ASK, stream=True, temperature=0, extra_body={"thinking": {"type": kind}}
    )
    reasoning = content = ""
    for chunk in stream:
        delta = chunk.choices[0].delta
        reasoning += getattr(delta, "reasoning_content", None) or ""
        content += delta.content or ""
        finish = chunk.choices[0].finish_reason
    assert bool(reasoning) == thinking
    assert "Minke" in content and finish == "stop"


def test_it_fills_in_the_middle(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/beta", api_key="unused", max_retries=0)
    found = client.completions.create(
        model="minke", prompt="def total(xs):\n    return ", suffix="\n", max_tokens=24, temperature=0
    )
    assert found.choices[0].text and "｜" not in found.choices[0].text


def test_it_knows_its_trade(engine: Engine) -> None:
    """Far above chance where docs/minke.md says so: functions of its grammar, on fresh items."""
    family = families()["code"]
    items = [item for _, item in zip(range(12), family.items("test", 99), strict=False)]
    outputs = engine.generate(
        [engine.tokenizer.encode(item.prompt_text()) for item in items],
        SamplingParams(temperature=0, max_tokens=128),
    )
    right = sum(
        family.grade(item, engine.tokenizer.decode(list(out.ids))).passed
        for item, out in zip(items, outputs, strict=True)
    )
    assert right >= 9


@pytest.mark.slow
@pytest.mark.skipif(find_chromium() is None, reason="no Chromium found (Debian: apt-get install chromium)")
def test_its_page_answers_in_a_browser(url: str, tmp_path: Path) -> None:
    with Browser(find_chromium() or "", tmp_path) as page:
        open_fresh(page, url)
        set_field(page, "#temperature", "0")
        ask(page, "Hello! Who are you?", 1)
        assert "Minke" in page.text(".answer")
        assert page.text(".reasoning")
        assert page.errors == []


def test_the_specialist_adds_by_columns_and_is_stored_as_the_real_ones_are() -> None:
    """Operands of up to 8 digits at effort high, where docs/minke-posttraining.md has 96 %; experts in FP4."""
    config = json.loads((Path(ASSETS) / "minke-skills" / "config.json").read_text())
    assert config["expert_dtype"] == "fp4" and config["quantization_config"]["fmt"] == "e4m3"
    assert sum(path.stat().st_size for path in (Path(ASSETS) / "minke-skills").iterdir()) <= 8e6
    model, tokenizer = load("minke-skills")
    family = posttraining_families()["arith-columns"]
    items = [item for item in islice(family.items("test", 99), 90) if item.stratum["effort"] == "high"]
    with Engine(model, tokenizer) as engine:
        outputs = engine.generate(
            [tokenizer.encode(item.prompt_text()) for item in items], SamplingParams(temperature=0, max_tokens=160)
        )
    right = [
        family.grade(item, tokenizer.decode(list(output.ids))).passed
        for item, output in zip(items, outputs, strict=True)
    ]
    assert sum(right) >= 0.8 * len(items), f"{sum(right)} of {len(items)}"
