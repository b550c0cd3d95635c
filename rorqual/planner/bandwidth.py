"""How much interconnect a chip needs so that expert parallelism costs no time.

Source: V4 report, expert parallelism. Communication hides behind computation when V_comm / B <= V_comp / C, that is

    C / B <= V_comp / V_comm

with C the chip's rate (FLOP/s), B its bandwidth (bytes/s, each way) and, for one token at one expert of another rank,

    V_comp    three products of hidden_size x moe_intermediate_size, 2 operations each:  6 h d
    V_comm    the token's vector there (h elements of `dispatch`) and the answer back (h elements of `combine`)

The model's width h cancels: wider experts relax the network, wider models do not. A share of the pairs stays on its own
rank and a token may go once to a rank that holds several of its experts (`parallel/routes.py`); both only help. The
backward pass computes twice as much for the same traffic in wider formats, see `passes`.
"""

from dataclasses import dataclass

from rorqual.config import ModelConfig
from rorqual.errors import ConfigError

ELEMENT_BYTES = {"fp8": 1.0, "bf16": 2.0, "fp32": 4.0}
"""What an element takes on the wire, scales apart."""

SCALE_BYTES = {"ue8m0": 1.0, "fp32": 4.0}


@dataclass(frozen=True)
class Bandwidth:
    """The balance of one model's experts with the interconnect."""

    flops: float
    """V_comp: operations for one token at one expert."""
    nbytes: float
    """V_comm: bytes there and back."""
    peak_flops_per_s: float | None = None

    @property
    def flops_per_byte(self) -> float:
        """The largest C / B at which communication hides: operations to do per byte that travels."""
        return self.flops / self.nbytes

    @property
    def tflops_per_s_per_gb_per_s(self) -> float:
        """The same as the report says it: how many TFLOP/s one GB/s of interconnect feeds."""
        return self.flops_per_byte / 1e3

    @property
    def gb_per_s(self) -> float | None:
        """The bandwidth, GB/s (10^9 bytes) each way, that a chip of `peak_flops_per_s` needs."""
        return None if self.peak_flops_per_s is None else self.peak_flops_per_s / self.flops_per_byte / 1e9


def expert_bandwidth(
    config: ModelConfig,
    *,
    dispatch: str = "fp8",
    combine: str = "bf16",
    scale_group: int = 0,
    scale: str = "ue8m0",
    peak_flops_per_s: float | None = None,
    passes: str = "forward",
) -> Bandwidth:
    """What the experts of `config` ask of the interconnect.

    `dispatch` and `combine` are `fp8`, `bf16` or `fp32`. `scale_group`: every so many channels of a dispatched vector
    carry one scale of format `scale` (`ue8m0`, `fp32`); 0 leaves scales out, as the report does. `passes`: `forward`,
    or `training`, which adds a backward pass of twice the operations whose vectors travel both ways as `combine` does.
    Raises: ConfigError for an unknown format or a figure that cannot be.
    """
    for word, known in ((dispatch, ELEMENT_BYTES), (combine, ELEMENT_BYTES), (scale, SCALE_BYTES)):
        if word not in known:
            raise ConfigError(f"There is no wire format {word!r} to count bytes of. Use one of {', '.join(known)}.")
    if passes not in ("forward", "training"):
        raise ConfigError(f"passes is {passes!r}; use 'forward' or 'training'.")
    if scale_group < 0 or (peak_flops_per_s is not None and peak_flops_per_s <= 0):
        raise ConfigError(
            f"scale_group is {scale_group} and peak_flops_per_s {peak_flops_per_s}, but a group cannot be negative and "
            "a chip's rate must be above 0. Correct them."
        )
    h, d = config.hidden_size, config.moe_intermediate_size
    flops, nbytes = 3.0 * 2 * h * d, h * (ELEMENT_BYTES[dispatch] + ELEMENT_BYTES[combine])
    if scale_group:
        nbytes += -(-h // scale_group) * SCALE_BYTES[scale]
    if passes == "training":
        flops, nbytes = 3 * flops, nbytes + 2 * h * ELEMENT_BYTES[combine]
    return Bandwidth(flops, nbytes, peak_flops_per_s)
