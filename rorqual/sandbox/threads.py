"""Blocking work in a thread for callers that may be cancelled: a thread cannot be broken off, so its end is awaited."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


async def in_thread(work: Callable[..., T], *args: Any, undo: Callable[[T], object], **keywords: Any) -> T:
    """`work` in a thread. When the caller is cancelled meanwhile, `undo` takes back what it made, and then it ends."""
    task = asyncio.ensure_future(asyncio.to_thread(work, *args, **keywords))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await _to_the_end(task)
        if not task.cancelled() and task.exception() is None:
            await _to_the_end(asyncio.ensure_future(asyncio.to_thread(undo, task.result())))
        raise


async def _to_the_end(task: asyncio.Future[Any]) -> None:
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):  # the caller is being cancelled already
            await asyncio.wait({task})
