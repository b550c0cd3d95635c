"""A prompt of many thousand tokens beside short requests: nobody waits for it, it moves on, and no token changes."""

import threading
import time

import torch

from rorqual.engine import Engine, SamplingParams
from rorqual.engine.selftest import high_entropy, small_config
from rorqual.engine.selftest.subject import IdsOnly, plain_ids

LONG, SHORT, NEW, CHUNK = 12_000, 6, 60, 512


def test_a_long_prompt_neither_starves_nor_is_starved(one_thread: None) -> None:
    model = high_entropy(small_config())
    draw = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, 256, (9 + 40 * i,), generator=draw).tolist() for i in range(SHORT)]
    long = torch.randint(0, 256, (LONG,), generator=draw).tolist()
    greedy = SamplingParams(temperature=0, max_tokens=NEW)
    with Engine(model, IdsOnly(256), max_running=SHORT + 2, chunk=CHUNK, log_steps=4000) as engine:
        short = [engine.submit(prompt, greedy) for prompt in prompts]
        deadline = time.monotonic() + 60
        while not all(request.events for request in short) and time.monotonic() < deadline:
            time.sleep(0.001)
        alone = len(engine.step_log())
        begun = engine.submit(long, SamplingParams(temperature=0, max_tokens=2))
        late: list[int] = []

        def come_and_go() -> None:  # a queue that never runs dry must not keep the long prompt waiting either
            while not begun.finished:
                late.extend(engine.submit(prompts[0], greedy.replace(max_tokens=3)).result().ids[:1])

        thread = threading.Thread(target=come_and_go)
        thread.start()
        found = [list(request.result().ids) for request in short]
        ids = list(begun.result().ids)
        thread.join(60)
        steps = engine.step_log()
    mixed = [step for step in steps[alone:] if step.decoding and step.prompt_tokens]
    assert len(mixed) >= LONG // CHUNK // 2, "most of it was read while others decoded"
    assert all(step.prompt_tokens <= CHUNK for step in mixed), "what a decoding request waits for is bounded"
    assert all(step.decoding >= step.running - 2 for step in mixed), "all but the long one and a newcomer get a token"
    assert len(late) > 1, "questions were answered while the long prompt was read"
    assert found == [plain_ids(model, prompt, NEW) for prompt in prompts]
    assert ids == plain_ids(model, long, 2)
