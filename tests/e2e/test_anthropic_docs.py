"""Every example of `docs/api-anthropic.md`, pasted and run against a live server over a scripted model."""

import contextlib
import io
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import live
from mock_model import ScriptModel, byte_tokenizer
from scripted_api import CALL

from rorqual.engine import Engine
from rorqual.server import create_app
from rorqual.server.anthropic import schema

pytest.importorskip("anthropic", reason="needs the anthropic SDK (clients extra)")

PAGE = (Path(__file__).parents[2] / "docs" / "api-anthropic.md").read_text(encoding="utf-8")
PRINTED = ["Hm. It is 13.", "Noon.\n"]
SHOWN = "http://127.0.0.1:8000"


def reply(prompt: str) -> str:
    if "call the clock" in prompt:
        answer = "Noon." if "<tool_result>12:00</tool_result>" in prompt else CALL
    else:
        answer = "It is 13."
    return f"Hm. </think>{answer}" if prompt.endswith("<think>") else answer


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with Engine(ScriptModel(reply), byte_tokenizer()) as engine, live(create_app(engine, "minke")) as url:
        yield url


def examples(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("code", "printed"), list(zip(examples("python"), PRINTED, strict=True)))
def test_python(url: str, code: str, printed: str) -> None:
    out = io.StringIO()
    names: dict[str, Any] = {}
    assert SHOWN in code
    with contextlib.redirect_stdout(out):
        exec(code.replace(SHOWN, url), names)
    names["client"].close()
    assert out.getvalue() == printed


def test_every_field_is_told_of() -> None:
    for model in (schema.MessagesRequest, schema.Tool, schema.ThinkingConfig, schema.OutputConfig, schema.ToolChoice):
        for name in model.model_fields:
            assert re.search(rf"\b{name}\b", PAGE), f"{model.__name__}.{name}"


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(url: str) -> None:
    [line] = [example for example in examples("console") if "curl" in example]
    words = shlex.split(line.removeprefix("$ ").replace("\\\n", " ").replace(SHOWN, url))
    answer = subprocess.run([*words, "--silent"], capture_output=True, text=True, timeout=60, check=True)
    assert '"text":"It is 13."' in answer.stdout
