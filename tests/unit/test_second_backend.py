"""Models, states and the engine on a second device (`tests/support/second_backend.py`), against the CPU.

A back end can be registered once a process and then shows everywhere, so these tests run in a process of their own,
with other files of the suite: `test_parts_of_the_suite_run_there` starts it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import second_backend
import torch
from mock_model import byte_tokenizer
from small_models import TOLERANCE, build, config, gap, some_tokens

from rorqual.engine import Engine, SamplingParams
from rorqual.model import Transformer
from rorqual.ops import device

TESTS = Path(__file__).parents[1]
needs_the_device = pytest.mark.skipif(not second_backend.is_registered(), reason="for a process with the second device")
needs_torch = pytest.mark.skipif(not second_backend.AVAILABLE, reason="this torch takes no back ends written in Python")

QUICK = (
    "unit/test_second_backend.py",
    "unit/test_engine.py",
    "unit/test_sampler.py::test_suppressed_tokens_are_never_chosen_and_the_logits_stay_untouched",
    "unit/test_sampler.py::test_rows_of_a_step_are_chosen_as_each_alone",
    "property/test_state.py::test_bytes_and_back",
)
WIDE = ("unit/test_model.py", "unit/test_sampler.py", "property/test_state.py", "property/test_segments.py")
LEFT_OUT = (
    "unit/test_model.py::test_a_state_crosses_inference_mode_and_gradients",  # back ends in Python know no such tensors
    "property/test_segments.py::test_memories_of_token_runs_stay_within_their_sequence",  # needs streams of the device
)


def run_there(files: tuple[str, ...], examples: int) -> None:
    """The tests in `files` pass in a process whose tensors and models lie on the second device."""
    command = [sys.executable, "-m", "pytest", "-p", "second_backend", "-p", "no:xdist", "-q", "-m", "not slow"]
    command += [str(TESTS / file) for file in files]
    for test in LEFT_OUT:
        command += ["--deselect", f"tests/{test}"]
    folders = [str(TESTS.parent), str(TESTS / "support"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "RORQUAL_TEST_EXAMPLES": str(examples)}
    done = subprocess.run(command, cwd=TESTS.parent, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@needs_torch
@pytest.mark.slow
def test_parts_of_the_suite_run_there() -> None:
    run_there(QUICK, 1)


@needs_torch
@pytest.mark.slow
def test_more_of_the_suite_runs_there() -> None:
    run_there(WIDE, 2)


@pytest.fixture(scope="module")
def pair() -> tuple[Transformer, Transformer]:
    """The same weights on the CPU and on the device."""
    return build(config()).to("cpu"), build(config())


@needs_the_device
def test_the_device_is_the_accelerator(pair: tuple[Transformer, Transformer]) -> None:
    assert device.accelerator() == torch.device(second_backend.NAME)
    assert {p.device.type for p in pair[1].parameters()} == {second_backend.NAME}
    with pytest.raises(RuntimeError, match="same device"):
        _ = torch.ones(3) + torch.ones(3, device="cpu")
    with pytest.raises(RuntimeError, match="no address"):
        torch.ones(3).data_ptr()


@needs_the_device
def test_logits_in_one_pass_and_in_chunks(pair: tuple[Transformer, Transformer]) -> None:
    here, there = pair
    tokens = some_tokens(here, 1, 40)
    with torch.no_grad():
        want = here(tokens.cpu())
        found = there(tokens)
        state = there.new_state()
        parts = [there(part, state=state) for part in tokens.split([7, 1, 1, 31], 1)]
    assert found.device.type == second_backend.NAME
    assert gap(found.cpu(), want) < TOLERANCE
    assert gap(torch.cat(parts, 1).cpu(), want) < TOLERANCE


@needs_the_device
def test_a_state_goes_to_the_other_device_and_back(pair: tuple[Transformer, Transformer]) -> None:
    """Bytes taken on one device go on on the other."""
    here, there = pair
    tokens = some_tokens(here, 1, 30)
    with torch.no_grad():
        want = here(tokens.cpu())[:, 20:]
        state = there.new_state()
        there(tokens[:, :20], state=state)
        moved = here.restore(state.snapshot())
        assert gap(here(tokens[:, 20:].cpu(), state=moved), want) < TOLERANCE
        first = here.new_state()
        here(tokens[:, :20].cpu(), state=first)
        back = there.restore(first.snapshot())
        assert gap(there(tokens[:, 20:], state=back).cpu(), want) < TOLERANCE


@needs_the_device
def test_gradients(pair: tuple[Transformer, Transformer]) -> None:
    here, there = pair
    tokens = some_tokens(here, 1, 24)
    here(tokens.cpu()).square().mean().backward()
    there(tokens).square().mean().backward()
    for (name, a), (_, b) in zip(here.named_parameters(), there.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            assert gap(a.grad, b.grad.cpu()) < TOLERANCE * max(1.0, float(a.grad.abs().max())), name


@needs_the_device
def test_the_engine_generates_what_it_generates_on_the_cpu() -> None:
    """Greedy and drawn, several requests at once, with a prefix that is met again."""
    cfg = config(vocab_size=300)
    prompts = [[5 + i % 90 for i in range(length)] for length in (3, 20, 37, 20)]
    params = [SamplingParams(max_tokens=6, temperature=t, seed=3) for t in (0.0, 0.0, 0.9, 0.0)]
    found = []
    for model in (build(cfg).to("cpu"), build(cfg)):
        with Engine(model, byte_tokenizer(), max_running=3, chunk=16) as engine:
            found.append([out.ids for out in engine.generate(prompts, params)])
    assert found[0] == found[1] and all(len(ids) == 6 for ids in found[0])
