"""`rorqual plan`: tables for people, JSON for machines, words for wrong requests."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rorqual.cli import main
from rorqual.cli.plan_tables import figure, size, usd
from rorqual.config import ModelConfig
from rorqual.errors import ConfigError
from rorqual.planner import own_rows
from rorqual.sizes import parse_bytes, parse_tokens


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *arguments])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    code, out, err = plan(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_v4_flash_on_eight_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "v4-flash", "--context", "1M", "--hardware", "8xH200", "--cache-hit", "0.8")
    ours, v32, gqa = found["networks"]
    assert found["workload"]["context"] == 10**6 and found["machine"]["count"] == 8
    assert found["stored"]["nbytes"] == ours["weight_bytes"]["total"] == 159_609_485_896
    assert (ours["cache_bytes_per_token"], v32["cache_bytes_per_token"], gqa["cache_bytes_per_token"]) == (
        3514.25, 48068, 176128
    )  # fmt: skip
    for network in found["networks"]:
        fit = network["fit"]
        assert fit["max_batch"] > 0
        assert fit["limited_by"] in ("memory bandwidth", "arithmetic", "interconnect", "capacity")
        for part in ("decode", "alone", "prefill"):
            times = fit[part]["seconds_by_resource"]
            assert fit[part]["seconds"] == max(times.values()) == times[fit[part]["binding"]]
    room = 8 * 141e9 * 0.9 - ours["weight_bytes"]["total"]
    assert ours["fit"]["max_batch"] == room // ours["cache_bytes"]
    assert found["speed_claims"] and all(claim["claimed"] < claim["bound"] for claim in found["speed_claims"])


def test_tables_for_people(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    code, out, _ = plan(capsys, "minke", "--context", "4096", "--hardware", "2xh100")
    assert code == 0
    for words in ("At 4,096 tokens", "routed experts", "2 x NVIDIA H100 SXM", "bound by", "memory bandwidth",
                  "$ a million output tokens", "Upper bounds", "data sheet", "DeepSeek-V3.2", "GQA-8"):  # fmt: skip
        assert words in out, words
    code, out, _ = plan(capsys, "minke", "--hardware", "laptop")
    assert code == 0 and "Estimated: bf16" in out
    code, out, _ = plan(capsys, "blue", "--hardware", "rtx-5090", "--weights", "fp32")
    assert code == 0 and re.search(r"bound by +capacity +capacity", out) and "ms a step" not in out


def test_an_adapter(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    one = as_json(capsys, "v4-flash", "--adapter", "16", "--hardware", "1xH200")
    assert one["fits"] is False and one["weights"] == 159_609_485_896
    parts = ("weights", "adapter", "gradients", "optimizer", "activations", "logits")
    assert one["total"] == sum(one[part] for part in parts)
    wider = as_json(capsys, "minke", "--adapter", "8", "--adapter-targets", "attn.*, experts.w?")
    assert wider["fits"] is None and wider["parameters"] > as_json(capsys, "minke", "--adapter", "8")["parameters"]
    code, out, _ = plan(capsys, "v4-flash", "--adapter", "16", "--hardware", "2xH200")
    assert code == 0 and "frozen weights" in out and "It fits 2 x" in out
    code, _, err = plan(capsys, "minke", "--adapter", "8", "--adapter-targets", "nothing")
    assert code == 2 and "names no module" in err


def test_the_report(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    code, out, _ = plan(capsys, "--table", "report")
    assert code == 0 and out.count("agrees") == 10 and "DIFFERS" not in out
    found = as_json(capsys, "--table", "report")
    assert [row["rounded"] for row in found] == [row["claim"] for row in found]


def test_lists(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    code, out, _ = plan(capsys, "--hardware", "list")
    assert code == 0 and "ascend-950dt" in out and "~500" in out and "Huawei Connect keynote" in out
    assert as_json(capsys, "--hardware", "list")["h200"]["memory"] == 141e9
    code, out, _ = plan(capsys, "--table", "claims")
    assert code == 0 and "4,700" in out and "8,099" in out and "assumed: 64 cards" in out


def test_weights_and_cache_as_asked(capsys: pytest.CaptureFixture[str]) -> None:
    plain = as_json(capsys, "minke", "--context", "1024")
    assert plain["stored"]["weights"] == "fp32" or plain["stored"]["weights"] == "bf16"
    packed = as_json(capsys, "minke", "--context", "1024", "--weights", "official", "--cache", "fp8")
    assert packed["stored"]["nbytes"] < plain["stored"]["nbytes"]
    cfg = ModelConfig.preset("minke").replace(cache_format="fp8")
    assert packed["networks"][0]["cache_bytes"] == own_rows(cfg).sequence(cfg, 1024).total
    assert packed["networks"][0]["fit"] is None and packed["machine"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["minke", "--context", "1Gi"], "no number of tokens"),
        (["minke", "--hardware", "3xfoo"], "there is no hardware '3xfoo'"),
        (["nonesuch"], "nothing called 'nonesuch'"),
        (["minke", "--cache-hit", "2"], "cache_hit is 2"),
        (["minke", "--context", "2000M"], "positions"),
        (["minke", "--hardware-table", "absent.toml"], "no table of hardware"),
    ],
)
def test_wrong_requests(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = plan(capsys, *arguments)
    assert code == 2 and words in err


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("8192", 8192), ("128K", 128_000), ("1M", 10**6), ("1Mi", 1 << 20), ("1.1k", 1100), ("1_000", 1000)],
)
def test_lengths(text: str, tokens: int) -> None:
    assert parse_tokens(text, "--context") == tokens


@pytest.mark.parametrize("text", ["", "i", "1.0005K", "0", "many", "-1", "9" * 5000])
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--context"):
        parse_tokens(text, "--context")
    with pytest.raises(ConfigError, match="--shard-bytes"):
        parse_bytes("9" * 5000, "--shard-bytes")


def test_the_page_shows_what_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line of `docs/plan.md`'s outputs is a line of the commands' output."""
    monkeypatch.setenv("COLUMNS", "100")
    printed: set[str] = set()
    for arguments in (["v4-flash", "--context", "1M", "--hardware", "8xH200", "--cache-hit", "0.8"],
                      ["--table", "report"], ["--table", "claims"]):  # fmt: skip
        printed |= {line.rstrip() for line in plan(capsys, *arguments)[1].splitlines()}
    page = (Path(__file__).parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
    shown = [
        block
        for block in re.findall(r"^```text\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
        if "tokens/s" in block or "agrees" in block
    ]
    assert len(shown) == 3
    for line in "".join(shown).splitlines():
        assert line in printed, line


def test_figures_for_people() -> None:
    assert [size(n) for n in (12, 3_514_250_000, 864_704_792_696)] == ["12 B", "3.51 GB", "864.70 GB"]
    assert [figure(n) for n in (0.123, 12.34, 123456.7)] == ["0.12", "12.3", "123,457"]
    assert [usd(n) for n in (0.01234, 12.345)] == ["0.0123", "12.35"]
