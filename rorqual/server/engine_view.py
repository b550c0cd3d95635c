"""What the page's engine view shows: the engine's moment in numbers, and what the indexer picked for an answer.

Numbers say nothing about what anybody wrote; where keys are asked for, a key sees single requests of its own only.
Picks come with the text they point at, so they are told only to who knows the answer's id, which is random and was
given with the answer, and asks with the key that it was made for; and only for the last answers of this process.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rorqual.engine import Engine, Request
from rorqual.engine.picks import LayerPicks, Picks, check_picks, find_picks
from rorqual.engine.watch import RequestView
from rorqual.errors import RequestError
from rorqual.model import Transformer
from rorqual.server.metadata import statistics
from rorqual.server.served import ServedModel

if TYPE_CHECKING:
    from rorqual.server.service import Service

MOST_KEPT, MOST_KEPT_TOKENS = 32, 1 << 20
"""Answers whose picks can be asked for, and the tokens of their prompts and outputs together."""


class Recent:
    """The last answers that were begun, by id. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: deque[tuple[ServedModel, Request, str]] = deque(maxlen=MOST_KEPT)

    def add(self, served: ServedModel, request: Request, account: str = "") -> None:
        """Remember an answer of an account, and forget old ones beyond the bounds."""
        with self._lock:
            self._kept.append((served, request, account))
            tokens = sum(_num_tokens(one) for _, one, _ in self._kept)
            while len(self._kept) > 1 and tokens > MOST_KEPT_TOKENS:
                tokens -= _num_tokens(self._kept.popleft()[1])

    def find(self, id: str, account: str = "") -> tuple[ServedModel, Request]:
        """Raises: RequestError (404) for an id that is not, or no more, known, or another account's."""
        with self._lock:
            found = next((one[:2] for one in self._kept if (one[1].id, one[2]) == (id, account)), None)
        if found is None:
            raise RequestError(
                f"Nothing is known of an answer {id!r}: the last {MOST_KEPT} answers of this process are kept. "
                "Ask again, and use the new answer's id.",
                status=404,
                param="request",
            )
        return found


def _num_tokens(request: Request) -> int:
    return len(request.prompt_ids) + len(request.events)


def engine_view(service: Service, account: str = "") -> dict[str, Any]:
    """Every model's moment; of single requests those of `account`, all where there are none.

    Raises: RequestError (404) where the view is switched off.
    """
    _check_on(service)
    models = {name: _model_view(model, account) for name, model in service.models.items()}
    return {"time": time.time(), "models": models}


def _check_on(service: Service) -> None:
    if service.recent is None:
        raise RequestError(
            "The engine view is switched off on this server, so nothing is kept that it could show. Start the server "
            "without --no-engine-view to see it.",
            status=404,
        )


def _model_view(served: ServedModel, account: str) -> dict[str, Any]:
    engine, numbers = served.engine, statistics(served)
    cache = engine.prefix_cache
    if cache is not None:
        numbers["cache"] |= {
            "page_tokens": cache.pool.page_tokens,
            "pages": len(cache.tree),
            "bytes": {**_page_bytes(cache.pool, len(cache.tree)), "checkpoints": cache.tree.point_bytes},
        }
    steps = [
        {"number": one.number, "decoding": one.decoding, "prompt": one.prompt_tokens, "ms": round(one.seconds * 1e3, 3)}
        for one in engine.step_log()
        if one.tokens
    ]
    return {
        **numbers,
        "context_limit": engine.context_limit,
        "max_running": engine.max_running,
        "speculates": engine.speculation is not None,
        "layers": _layers(engine.model),
        "requests": [
            _request(one) for one in engine.requests() if one.scope.startswith(f"{account}/" if account else "")
        ],
        "steps": steps,
    }


def _request(view: RequestView) -> dict[str, Any]:
    told = {**asdict(view), "age_s": round(view.age_s, 3)}
    del told["scope"]
    return told


def _page_bytes(pool: Any, pages: int) -> dict[str, int]:
    """Bytes of so many pages by kind."""
    out: dict[str, int] = {}
    for part in pool.parts:
        out[part.name] = out.get(part.name, 0) + part.nbytes * pages
    return out


def _layers(model: Any) -> list[dict[str, Any]]:  # Any: a LanguageModel
    if not isinstance(model, Transformer):
        return []
    return [{"layer": one.index, "kind": one.kind, "entry_tokens": one.compress_ratio} for one in model.cfg.layers]


async def engine_picks(service: Service, id: str, account: str = "") -> dict[str, Any]:
    """The heat map of one answer. Raises: RequestError for an unknown (404) or running one, or one that is too long."""
    _check_on(service)
    assert service.recent is not None
    served, request = service.recent.find(id, account)
    output = [event.id for event in list(request.events) if event.id is not None]
    if not request.finished:
        raise RequestError("The answer is still being written. Ask for its picks when it has ended.", param="request")
    model, prompt = served.engine.model, request.prompt_ids
    check_picks(model, len(prompt), len(output))
    assert isinstance(model, Transformer)
    engine = served.engine
    guard = engine.guards.of(request.params.guard, request.params.pin) if isinstance(engine, Engine) else None
    began = time.perf_counter()
    picks: Picks = await asyncio.wrap_future(served.engine.aside(find_picks(model, prompt, output, guard)))
    tokens = [*prompt, *output]
    width, height, first = picks.block_tokens, picks.row_tokens, picks.prompt_tokens
    blocks = [(at, min(at + width, len(tokens))) for at in range(0, len(tokens), width)]
    rows = [(at, min(at + height, len(tokens))) for at in range(first, len(tokens), height)]
    return {
        "request": id,
        "model": served.name,
        "prompt_tokens": picks.prompt_tokens,
        "output_tokens": picks.output_tokens,
        "window": model.cfg.sliding_window,
        "top_k": picks.top_k,
        "blocks": [_stretch(served, tokens, *one) for one in blocks],
        "rows": [_stretch(served, tokens, *one) for one in rows],
        "layers": [_layer(one) for one in picks.layers],
        "seconds": round(time.perf_counter() - began, 3),
    }


def _stretch(served: ServedModel, tokens: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"begin": begin, "end": end, "text": served.tokenizer.decode(tokens[begin:end])}


def _layer(picks: LayerPicks) -> dict[str, Any]:
    """`share` [rows][blocks]: of the entries that could be seen, how many were picked; null where none could be.
    `mass`: the part of a row's attention over all entries that the block would get; null likewise.
    """
    share = picks.picked.double() / picks.seen
    cells = [[None if seen == 0 else round(value, 4) for value, seen in zip(*row, strict=True)]
             for row in zip(share.tolist(), picks.seen.tolist(), strict=True)]  # fmt: skip
    has_choice = bool((picks.picked.sum(1) < picks.seen.sum(1)).any())
    part = picks.mass / picks.mass.sum(1, keepdim=True).clamp_min(1e-30)
    mass = [[None if seen == 0 else round(value, 4) for value, seen in zip(*row, strict=True)]
            for row in zip(part.tolist(), picks.seen.tolist(), strict=True)]  # fmt: skip
    told = {"layer": picks.layer, "entry_tokens": picks.entry_tokens, "has_choice": has_choice}
    return {**told, "share": cells, "mass": mass}
