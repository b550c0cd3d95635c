"""Where the memory of a run of tokens lies: several hashes of its last n ids, each into a table of its own.

    h_1 = x_t a_0,   h_n = h_{n-1} XOR x_{t-n+1} a_{n-1},   row[n, j] = h_n mod p[n, j] + offset[n, j]

x are compressed ids (spellings that differ only in case, accents or spacing share one), a odd random multipliers, p
primes that occur once in the whole model. Everything is int64 and stays below 2^63, so no product wraps around and
no remainder is negative. The constants are buffers: they travel with the weights, which mean nothing without them.
Source: Engram paper, section 2; constants as its released code draws them (NumPy's generator, seed + 10007 layer).

B batch, S tokens, V vocabulary, H tables of this layer (orders x heads).
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from rorqual.config_engram import EngramConfig
from rorqual.errors import CheckpointError
from rorqual.model.layout import Layout

LAYER_STRIDE = 10007
_LIMIT = 2**63 - 1


def is_prime(n: int) -> bool:
    """Whether n is prime: Miller-Rabin with bases that decide every n below 3.3e24."""
    bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)
    if n < 2 or any(n % p == 0 for p in bases):
        return n in bases
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in bases:
        x = pow(base, odd, n)
        if x in (1, n - 1):
            continue
        if not any((x := x * x % n) == n - 1 for _ in range(twos - 1)):
            return False
    return True


def primes_from(lowest: int) -> Iterator[int]:
    """The primes from `lowest` on."""
    n = lowest
    while True:
        if is_prime(n):
            yield n
        n += 1


def table_sizes(engram: EngramConfig, layer: int) -> list[int]:
    """Rows of each table of block `layer`, order by order: primes from `rows` on, in the order of layers, orders and
    heads, so that no two tables of the model share one (equal sizes would make their collisions the same).
    """
    per_layer = len(engram.orders) * engram.heads
    primes = primes_from(engram.rows)
    every = [next(primes) for _ in range(per_layer * (engram.layers.index(layer) + 1))]
    return every[-per_layer:]


def draw_multipliers(engram: EngramConfig, layer: int, num_ids: int) -> list[int]:
    """One odd number per place in a run, so small that its product with an id below `num_ids` stays below 2^63."""
    half = max(1, _LIMIT // num_ids // 2)
    generator = np.random.default_rng(engram.seed + LAYER_STRIDE * layer)
    return [2 * int(r) + 1 for r in generator.integers(0, half, size=engram.max_order, dtype=np.int64)]


class NgramHash(nn.Module):
    """The addresses of one block's memory. Buffers: `compression` [V], `multipliers`, `sizes` and `offsets` [H]."""

    compression: Tensor
    multipliers: Tensor
    sizes: Tensor
    offsets: Tensor

    def __init__(self, engram: EngramConfig, layer: int, vocab_size: int) -> None:
        super().__init__()
        self.engram, self.layer = engram, layer
        sizes = table_sizes(engram, layer)
        self.num_rows = sum(sizes)
        self.register_buffer("compression", torch.arange(vocab_size))
        self.register_buffer("multipliers", torch.tensor(draw_multipliers(engram, layer, vocab_size)))
        self.register_buffer("sizes", torch.tensor(sizes))
        self.register_buffer("offsets", torch.tensor([sum(sizes[:i]) for i in range(len(sizes))]))

    @torch.no_grad()
    def install(self, compression: Tensor) -> None:
        """Use a compressed vocabulary, [V] -> ids from 0; multipliers are drawn anew for its size.

        Raises: CheckpointError when it is not a map of this vocabulary.
        """
        if compression.shape != self.compression.shape or int(compression.min()) < 0:
            raise CheckpointError(
                f"The vocabulary map has shape {tuple(compression.shape)} and smallest id {int(compression.min())}, "
                f"but this model needs {tuple(self.compression.shape)} ids from 0. Build it from the model's tokenizer."
            )
        self.compression.copy_(compression)
        multipliers = draw_multipliers(self.engram, self.layer, int(compression.max()) + 1)
        self.multipliers.copy_(torch.tensor(multipliers))

    def check(self, where: str) -> None:
        """Raise CheckpointError when loaded constants could not have come from such a memory (damage, overflow)."""
        sizes, multipliers = self.sizes.tolist(), self.multipliers.tolist()
        low, high = int(self.compression.min()), int(self.compression.max())
        faults = []
        if sizes != table_sizes(self.engram, self.layer):
            faults.append(f"its table sizes {sizes[:4]}... are not the primes from {self.engram.rows} on")
        if self.offsets.tolist() != [sum(sizes[:i]) for i in range(len(sizes))]:
            faults.append("its offsets are not the sums of the sizes before them")
        if low < 0 or any(a < 1 or a % 2 == 0 or a * high > _LIMIT for a in multipliers):
            faults.append(f"its multipliers {multipliers} or compressed ids ({low} to {high}) leave 63 bits")
        if faults:
            raise CheckpointError(
                f"{where} has unusable hash constants: {'; '.join(faults)}. Every row would be looked up in the wrong "
                "place. Copy the checkpoint again."
            )

    def compress(self, tokens: Tensor) -> Tensor:
        """Raw ids -> compressed ids, same shape."""
        return self.compression[tokens]

    def forward(self, ids: Tensor, past: Tensor, layout: Layout) -> Tensor:
        """Compressed ids of this call [B, S] and of the max_order - 1 tokens before it -> rows int64 [B, S, H].

        What lies before a token's document counts as the pad token; for `v41` also what lies before a pad token.
        """
        pad = self.compression[self.engram.pad_token_id]
        span, num_tokens = past.shape[1], ids.shape[1]
        every = torch.cat([past, ids], 1)
        outside = torch.zeros_like(ids, dtype=torch.bool)
        mixed = torch.zeros_like(ids)
        rows = []
        for back in range(self.engram.max_order):
            x = every[:, span - back : span - back + num_tokens]
            outside = outside | (layout.positions < back)
            if self.engram.flavour == "v41":
                outside = outside | (x == pad)
            mixed = mixed ^ (torch.where(outside, pad, x) * self.multipliers[back])
            if back + 1 in self.engram.orders:
                at = self.engram.orders.index(back + 1) * self.engram.heads
                rows.append(mixed.unsqueeze(-1) % self.sizes[at : at + self.engram.heads])
        return torch.cat(rows, -1) + self.offsets
