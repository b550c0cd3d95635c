"""How fast a network can be at most on a machine, and which resource says so.

A step cannot end before each resource has done its part, were everything else free:

    memory bandwidth   every weight that the step uses and every cached row that it reads, once
    arithmetic         every operation, at the peak rate of its number format
    interconnect       vectors of tokens to experts on other chips (FP8) and back (bf16), each chip's links at once

and sequences must find room (capacity). Work, weights and cache are taken to lie evenly on the chips, and all three
resources to work at the same time. Of the experts a step is taken to read those that its tokens choose when each
chooses evenly and by itself; a token's vector goes once to each other chip that holds one of its experts, on average.
So these are upper bounds: software, uneven load, activations, latency and reading rows twice all make it slower.
Drafting (MTP) is not counted; with it a sequence can be faster than the bound for single tokens.
"""

import math
from dataclasses import dataclass
from typing import Literal

from rorqual.planner.bandwidth import ELEMENT_BYTES
from rorqual.planner.hardware import Machine
from rorqual.planner.work import Network, Work

Resource = Literal["memory bandwidth", "arithmetic", "interconnect", "capacity"]
PREFILL_TOKENS = 8192
"""Tokens of a prompt that one step runs; each step reads the weights once."""


@dataclass(frozen=True)
class Bound:
    """A step's least time by resource, and the tokens that it yields."""

    num_tokens: int
    seconds_by_resource: dict[Resource, float]

    @property
    def seconds(self) -> float:
        """Least time of the step."""
        return max(self.seconds_by_resource.values())

    @property
    def binding(self) -> Resource:
        """The resource that is needed longest."""
        return max(self.seconds_by_resource, key=lambda resource: self.seconds_by_resource[resource])

    @property
    def tokens_per_s(self) -> float:
        """Most tokens a second, of all sequences together."""
        return self.num_tokens / self.seconds


def decode_bound(network: Network, machine: Machine, context: int, batch: int) -> Bound:
    """One step of `batch` sequences that hold `context` tokens each and get one more."""
    weights = network.weights.always + network.weights.routed * network.experts.read_share(batch)
    nbytes = weights + batch * network.cache_read(context)
    return _bound(network, machine, network.decode(context), batch, nbytes)


def prefill_bound(network: Network, machine: Machine, num_tokens: int) -> Bound:
    """A prompt of `num_tokens` tokens, none of them cached."""
    steps, last = divmod(num_tokens, PREFILL_TOKENS)
    full = network.weights.always + network.weights.routed * network.experts.read_share(PREFILL_TOKENS)
    nbytes = steps * full + network.cache_bytes(num_tokens)
    if last:
        nbytes += network.weights.always + network.weights.routed * network.experts.read_share(last)
    return _bound(network, machine, network.prefill(num_tokens), num_tokens, nbytes)


def _bound(network: Network, machine: Machine, work: Work, num_tokens: int, nbytes: float) -> Bound:
    chip, count = machine.chip, machine.count
    seconds: dict[Resource, float] = {
        "memory bandwidth": nbytes / (count * chip.bandwidth),
        "arithmetic": num_tokens * sum(part.flops / chip.rate(part.number) for part in work) / count,
    }
    if count > 1 and chip.link is not None:
        seconds["interconnect"] = num_tokens * exchange_bytes(network, count) / (count * chip.link)
    return Bound(num_tokens, seconds)


def exchange_bytes(network: Network, chips: int) -> float:
    """Bytes that one token sends and gets back in all layers, its experts spread evenly over so many chips."""
    experts = network.experts
    others = (chips - 1) * (1 - (1 - 1 / chips) ** experts.chosen)
    return experts.layers * others * experts.hidden_size * (ELEMENT_BYTES["fp8"] + ELEMENT_BYTES["bf16"])


def room(machine: Machine, reserve: float) -> float:
    """Bytes for weights and caches: all memory without the share that is kept for everything else."""
    return machine.count * machine.chip.memory * (1 - reserve)


def max_batch(network: Network, machine: Machine, context: int, reserve: float) -> int:
    """How many sequences of `context` tokens find room beside the weights; 0 where the weights alone do not fit."""
    left = room(machine, reserve) - network.weights.total
    return max(0, math.floor(left / network.cache_bytes(context)))


def chips_needed(network: Network, machine: Machine, context: int, reserve: float, batch: int = 1) -> int:
    """Least number of such chips that hold the weights and `batch` sequences."""
    needed = network.weights.total + batch * network.cache_bytes(context)
    return math.ceil(needed / room(Machine(machine.chip, 1), reserve))


def batch_within(network: Network, machine: Machine, context: int, seconds: float, most: int) -> int:
    """The largest batch, `most` at most, whose step can take no longer than `seconds`; 0 where not even one can."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if decode_bound(network, machine, context, middle).seconds <= seconds:
            low = middle
        else:
            high = middle - 1
    return low
