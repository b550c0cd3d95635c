"""Rollouts on several machines: one engine and one log on each Ray node, groups sent out, tokens told as they come.

Where a node is lost, the groups that it had go on elsewhere behind the last token that was heard of; since a rollout's
draws go by its id, they become what they would have become. Ray places engines and restarts them; correctness does not
rest on it. Rewards are given where the trainer is. Source: training specification, section 13.1; extra `cluster`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from rorqual import log as logs
from rorqual.engine import Engine, SamplingParams
from rorqual.errors import MissingExtraError, RequestError, RorqualError
from rorqual.folders import data_folder
from rorqual.posttrain.rollout_log import Drawn, RolloutLog
from rorqual.posttrain.rollouts import Prompt, Reward, Rollout, RolloutWorker, check_prompts, rollout_id

logger = logs.get(__name__)

POLL_S = 0.2
"""How often a node tells what was drawn."""
RESTART_S = 60.0
"""How long all nodes may be gone before rollouts fail."""


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError(
            "rollouts on several machines need Ray, which is not installed. Run: pip install 'rorqual[cluster]'"
        ) from error
    return ray


@dataclass(frozen=True)
class News:
    """What a node has to tell: groups that are whole by their prompt's id, errors, and what was drawn of the others."""

    whole: dict[str, list[Rollout]]
    failed: dict[str, Exception]
    drawn: dict[str, Drawn]


class RolloutNode:
    """The engine of one node, with its log. Lives in a Ray actor; methods return at once, or within POLL_S."""

    def __init__(self, make_engine: Callable[[], Engine], folder: str, options: Mapping[str, Any]) -> None:
        self.engine = make_engine()
        self.log = RolloutLog(folder, take_over=True)
        self.worker = RolloutWorker(self.engine, log=self.log, **options)
        self._done: queue.SimpleQueue[tuple[str, list[Rollout] | Exception]] = queue.SimpleQueue()
        self._told: dict[str, tuple[int, int]] = {}

    def version(self) -> int:
        """Of the weights that it has."""
        return self.engine.policy_version

    def load_weights(self, weights: Mapping[str, Tensor], version: int, keep_states: bool) -> None:
        """See `Engine.load_weights`; returns once they are in use."""
        self.engine.load_weights(weights, version, keep_states=keep_states).result()

    def begin(self, prompt: Prompt, size: int, sampling: SamplingParams, begun: Mapping[int, Drawn]) -> None:
        """Generate a group; `begun` is what was drawn of it elsewhere, by the rollout's index."""
        for index, drawn in begun.items():
            self.worker.adopt(prompt, index, sampling, drawn)
            self._told[rollout_id(prompt.id, index)] = len(drawn.ids), drawn.num_routed

        def run() -> None:
            try:
                [group] = self.worker.generate([prompt], size, sampling)
                self._done.put((prompt.id, group))
            except Exception as error:
                self._done.put((prompt.id, error))

        threading.Thread(target=run, name="rorqual-group", daemon=True).start()

    def news(self) -> News:
        """What happened since this was last asked; waits a little for a group to become whole."""
        whole: dict[str, list[Rollout]] = {}
        failed: dict[str, Exception] = {}
        wait_s = POLL_S
        while True:
            try:
                id, made = self._done.get(timeout=wait_s)
            except queue.Empty:
                break
            wait_s = 0.0
            if isinstance(made, Exception):
                failed[id] = made
            else:
                whole[id] = made
        drawn = self.worker.drawn_since(self._told)
        for id, part in drawn.items():
            tokens, routed = self._told.get(id, (0, 0))
            self._told[id] = tokens + len(part.ids), routed + part.num_routed
        return News(whole, failed, drawn)


@dataclass(eq=False)
class _Node:
    id: str
    actor: Any
    groups: set[str] = field(default_factory=set)
    asked: Any = None
    is_alive: bool = True


class ClusterRollouts:
    """Makes rollouts on all nodes of a Ray cluster.

    make_engine: called once on each node. folder: where each node keeps its log, on its own disk. groups_a_node: sent
    to a node at a time. address: of a running cluster ("auto" finds it); None uses the one Ray is connected to, or
    starts one here. options: seed, keep_masks, keep_routing and in_flight, as for `RolloutWorker`.
    Raises: MissingExtraError without the extra `cluster`.
    """

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        *,
        folder: str | Path | None = None,
        reward: Reward | None = None,
        groups_a_node: int = 4,
        address: str | None = None,
        **options: Any,
    ) -> None:
        ray = _ray()
        self._ray, self.reward, self._groups_a_node = ray, reward, groups_a_node
        self._weights: tuple[Any, int, bool] | None = None
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False)
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        root = Path(folder) if folder is not None else data_folder() / "rollouts"
        actor = ray.remote(max_restarts=-1, max_task_retries=0, num_cpus=0, max_concurrency=8)(RolloutNode)
        self._nodes: list[_Node] = []
        for node in ray.nodes():
            if node["Alive"]:
                id = node["NodeID"]
                place = NodeAffinitySchedulingStrategy(node_id=id, soft=False)
                made = actor.options(scheduling_strategy=place).remote(make_engine, str(root / id), options)
                self._nodes.append(_Node(id, made))
        self.lost = 0
        """How often a node was lost with groups on it."""

    @property
    def actors(self) -> dict[str, Any]:
        """The Ray actors by node."""
        return {node.id: node.actor for node in self._nodes}

    def update_weights(self, weights: Mapping[str, Tensor], version: int, *, keep_states: bool = False) -> None:
        """New weights for all engines, between two tokens of whatever runs; sent once. A node that is gone gets them
        when it comes back.
        """
        self._weights = (
            self._ray.put({name: tensor.detach().cpu() for name, tensor in weights.items()}),
            version,
            keep_states,
        )
        for node in self._nodes:
            self._call(node, node.actor.load_weights.remote(*self._weights))

    def generate(
        self, prompts: Sequence[Prompt], group_size: int, sampling: SamplingParams | None = None
    ) -> Iterator[list[Rollout]]:
        """Groups as they become whole. Raises: what an engine raised; RequestError when all nodes stay away."""
        check_prompts(prompts, group_size)
        sampling = sampling or SamplingParams()
        place = {prompt.id: number for number, prompt in enumerate(prompts)}
        waiting = deque(prompts)
        heard: dict[str, Drawn] = {}
        left, gone_since = len(prompts), None
        while left:
            alive = self._look()
            if not alive:
                gone_since = gone_since or time.monotonic()
                if time.monotonic() - gone_since > RESTART_S:
                    raise RequestError("no node of the cluster answers, so rollouts cannot go on.", status=503)
                time.sleep(POLL_S)
                continue
            gone_since = None
            self._send(alive, waiting, group_size, sampling, heard)
            for node in alive:
                news = self._news(node)
                if news is None:
                    lost = [prompt for prompt in prompts if prompt.id in node.groups]
                    self.lost += bool(lost)
                    waiting.extendleft(reversed(lost))
                    node.groups.clear()
                    continue
                for id, part in news.drawn.items():
                    heard.setdefault(id, Drawn()).extend(part)
                for error in news.failed.values():
                    raise error
                for id, group in news.whole.items():
                    if id not in place or id not in node.groups:
                        continue  # of a call that was given up
                    node.groups.discard(id)
                    left -= 1
                    for rollout in group:
                        heard.pop(rollout.id, None)
                        rollout.group = place[id]
                        if self.reward is not None:
                            rollout.reward = self.reward(prompts[place[id]], rollout)
                    yield group

    def close(self) -> None:
        """End the engines; Ray itself is left as it was."""
        for node in self._nodes:
            self._ray.kill(node.actor)
        self._nodes.clear()

    def __enter__(self) -> ClusterRollouts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _look(self) -> list[_Node]:
        """The nodes that answer; those that were gone get the newest weights first."""
        for node in self._nodes:
            if not node.is_alive:
                node.is_alive = self._call(node, node.actor.version.remote(), timeout_s=POLL_S) is not None
                if node.is_alive and self._weights is not None:
                    self._call(node, node.actor.load_weights.remote(*self._weights))
        return [node for node in self._nodes if node.is_alive]

    def _send(
        self,
        alive: list[_Node],
        waiting: deque[Prompt],
        size: int,
        sampling: SamplingParams,
        heard: Mapping[str, Drawn],
    ) -> None:
        """Give groups to the nodes that have fewest."""
        while waiting:
            node = min(alive, key=lambda one: len(one.groups))
            if len(node.groups) >= self._groups_a_node:
                return
            prompt = waiting[0]
            ids = {index: rollout_id(prompt.id, index) for index in range(size)}
            begun = {index: heard[id] for index, id in ids.items() if id in heard}
            if self._call(node, node.actor.begin.remote(prompt, size, sampling, begun), is_void=True) is None:
                return  # it is looked at again before anything is sent
            node.groups.add(prompt.id)
            waiting.popleft()

    def _news(self, node: _Node) -> News | None:
        """What a node tells; None when it is lost."""
        if not node.is_alive:
            return None
        news: News | None = self._call(node, node.actor.news.remote())
        return news

    def _call(self, node: _Node, asked: Any, *, timeout_s: float | None = None, is_void: bool = False) -> Any:
        """An actor's answer (True for one without), or None when it is gone. Raises: what it raised."""
        errors = self._ray.exceptions
        try:
            answer = self._ray.get(asked, timeout=timeout_s)
        except (errors.RayActorError, errors.GetTimeoutError) as error:
            if node.is_alive:
                logger.warning("the rollout node %s is gone: %s", node.id, type(error).__name__)
            node.is_alive = False
            return None
        except errors.RayTaskError as error:
            cause = error.cause if hasattr(error, "cause") else error
            raise cause if isinstance(cause, RorqualError) else error from None
        return True if is_void else answer
