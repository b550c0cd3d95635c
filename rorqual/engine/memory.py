"""What a sequence's state costs, from the number of its tokens: what a budget of bytes is shared out by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rorqual.engine.job import Job
from rorqual.errors import ConfigError
from rorqual.planner.cache import own_rows

if TYPE_CHECKING:
    from rorqual.engine.prefix_cache import PrefixCache


class Cost:
    """What states hold at most, in bytes. `alone(num_tokens)`: one that shares nothing, after so many tokens.

    A request's retrieval guard remembers its tokens too, and is counted with its state where states are (`of_guard`).
    """

    def __init__(self, alone: Callable[[int], int]) -> None:
        self._alone = alone

    def __call__(self, num_tokens: int) -> int:
        return self._alone(num_tokens)

    def together(self, jobs: Sequence[Job], gone: Sequence[Job] = ()) -> int:
        """Of these running jobs, with all tokens known of them. `gone`: the other ones that run, taken as ended."""
        return sum(self(job.num_tokens) + self.of_guard(job.guard, job.num_tokens) for job in jobs)

    def joining(self, job: Job, num_tokens: int) -> int:
        """What a waiting job adds when it runs up to so many tokens."""
        return self(num_tokens) + self.of_guard(job.guard, num_tokens)

    def of_guard(self, guard: Any, num_tokens: int) -> int:
        """What a guard holds after so many tokens, where it is counted; None is no guard."""
        return 0


def free_of_charge(num_tokens: int) -> int:
    """The cost of states where nobody counts it."""
    return 0


class StateCost(Cost):
    """Most bytes that a new state of `model` holds after so many tokens, whatever chunks they came in.

    Rings are of fixed size; entries, index keys and token ids double their room when it runs out (`LayerState.append`),
    so up to twice what is stored. Raises: ConfigError for a model whose states do not tell their size.
    """

    def __init__(self, model: Any) -> None:  # Any: a LanguageModel with Transformer's configuration and states
        try:
            empty = model.new_state(1)
            self._fixed = int(empty.nbytes()["total"])
            self._rows = own_rows(model.cfg, model.reference.dtype).growing(model.cfg)
        except AttributeError as error:
            raise ConfigError(
                f"max_state_bytes was given, but the states of {type(model).__name__} do not tell their size "
                f"({error}). Use a rorqual.Transformer, or leave the limit out."
            ) from None

    def __call__(self, num_tokens: int) -> int:
        total = self._fixed + 4 * max(64, 2 * num_tokens)  # ids are int32
        for ratio, row_bytes in self._rows:
            if entries := num_tokens // ratio:
                total += row_bytes * max(16, 2 * entries)
        return total

    def of_guard(self, guard: Any, num_tokens: int) -> int:
        return 0 if guard is None else int(guard.most_bytes(num_tokens))


class PagedCost(StateCost):
    """The same for states whose entries lie in the pages of `cache`: pages in use, shared ones once.

    Pages that only the store keeps for later requests are not counted; its own budget holds those.
    """

    def __init__(self, cache: PrefixCache) -> None:
        super().__init__(cache.model)
        self._cache, self._pool = cache, cache.pool

    def __call__(self, num_tokens: int) -> int:
        return self._rest(num_tokens) + self._pool.page_bytes * self._pages(num_tokens)

    def together(self, jobs: Sequence[Job], gone: Sequence[Job] = ()) -> int:
        pages = self._pool.num_in_use
        for job in gone:
            pages -= 0 if job.state is None else self._pool.num_held_once(job.state.table.pages)
        for job in jobs:
            held = self._shared(job) if job.state is None else len(job.state.table)
            pages += max(0, self._pages(job.num_tokens) - held)
        rest = sum(self._rest(job.num_tokens) + self.of_guard(job.guard, job.num_tokens) for job in jobs)
        return self._pool.page_bytes * pages + rest

    def joining(self, job: Job, num_tokens: int) -> int:
        rest = self._rest(num_tokens) + self.of_guard(job.guard, num_tokens)
        return rest + self._pool.page_bytes * (self._pages(num_tokens) - self._shared(job))

    def _shared(self, job: Job) -> int:
        """Pages that the job will find in use by others."""
        tree, request = self._cache.tree, job.request
        nodes = tree.match(request.prompt_array, tree.root_of(request.cache_scope)).nodes
        return self._pool.num_in_use_of([node.page for node in nodes])

    def _pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self._pool.page_tokens)

    def _rest(self, num_tokens: int) -> int:
        """Rings and token ids."""
        return self._fixed + 4 * max(64, 2 * num_tokens)
