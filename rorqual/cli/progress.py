"""A progress bar over bytes, with speed and time left, on terminals only."""

import contextlib
from collections.abc import Callable, Iterator

Show = Callable[[str, int, int], None]
"""What is being done, bytes done, bytes there are."""


@contextlib.contextmanager
def byte_progress(shown: bool, labels: dict[str, str]) -> Iterator[Show]:
    """Yields the function that moves the bar; each new word of `labels` (word -> what people read) gets a line."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not shown or not console.is_terminal) as bar:
        tasks = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(labels.get(what, what), total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield show
