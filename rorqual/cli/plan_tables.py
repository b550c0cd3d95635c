"""What `rorqual plan` prints for people."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rorqual.planner.bounds import Bound
    from rorqual.planner.compare import PriceClaim, SpeedClaim
    from rorqual.planner.hardware import Chip, Machine
    from rorqual.planner.hardware import Table as Chips
    from rorqual.planner.plan import Fit, NetworkPlan, Plan
    from rorqual.planner.report import Figure

NONE = "-"


def new_table(title: str, *columns: str) -> Table:
    """A table of one column of words and others of figures."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    return table


def size(nbytes: float) -> str:
    """`159.61 GB`; units of 1000, as data sheets have."""
    for power, unit in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        if nbytes >= 10**power:
            return f"{nbytes / 10**power:,.2f} {unit}"
    return f"{nbytes:,.0f} B"


def figure(number: float) -> str:
    """At least three digits, no more behind the point than they need."""
    return f"{number:,.0f}" if number >= 100 else f"{number:,.1f}" if number >= 10 else f"{number:,.2f}"


def usd(amount: float) -> str:
    """Dollars with three digits that matter."""
    return f"{amount:,.2f}" if amount >= 1 else f"{amount:.3g}"


# ---------------------------------------------------------------- a plan


def plan(found: "Plan", claims: "Sequence[SpeedClaim]", prices: "Sequence[PriceClaim]") -> Iterator[Any]:
    """Needs; the stored weights; on a machine what fits, how fast and why; what others have published."""
    yield needs(found)
    yield stored(found)
    if found.machine is not None:
        yield on_machine(found)
        yield Text("\n".join(notes(found, found.machine)), style="dim")
    if claims:
        yield speeds(claims)
    if prices:
        yield price_table(prices)


def needs(found: "Plan") -> Table:
    """Bytes and operations of each network."""
    networks = found.networks
    table = new_table(f"At {found.workload.context:,} tokens", "", *(network.name for network in networks))

    def add(label: str, value: "Callable[[NetworkPlan], str]") -> None:
        table.add_row(label, *(value(network) for network in networks))

    add("weights", lambda n: size(n.weights.total))
    add("  read by every step", lambda n: size(n.weights.always))
    add("  routed experts", lambda n: size(n.weights.routed))
    add("  tables looked up", lambda n: size(n.weights.lookup))
    add("  drafting (MTP)", lambda n: size(n.weights.drafting))
    add("cache of a token", lambda n: f"{n.cache_bytes_per_token:,.2f} B")
    add("cache of a sequence", lambda n: size(n.cache_bytes))
    add("  read for the next token", lambda n: size(n.cache_read))
    add("GFLOP for the next token", lambda n: figure(n.work.flops / 1e9))
    for number in ("fp4", "fp8", "bf16"):
        add(f"  in {number}", lambda n, number=number: figure(n.work.in_format(number) / 1e9))  # type: ignore[misc]
    add("  as the V4 report weighs them", lambda n: figure(n.fp8_equivalent / 1e9))
    add("GFLOP a token of a prompt", lambda n: figure(n.prefill_work.flops / 1e9))
    return table


def stored(found: "Plan") -> Table:
    """Bytes of each component, with the formats that they are stored in."""
    inventory = found.stored
    formats: dict[str, set[str]] = defaultdict(set)
    for tensor in inventory.tensors:
        formats[tensor.component].add(tensor.dtype)
    table = new_table(
        f"Weights of {found.networks[0].name}, {inventory.weights}: {len(inventory.tensors):,} tensors, "
        f"{inventory.nbytes:,} bytes",
        "component", "bytes", "stored in",
    )  # fmt: skip
    for name, (_, nbytes) in inventory.by_component.items():
        table.add_row(name.replace("_", " "), f"{nbytes:,}", ", ".join(sorted(formats[name])))
    for name, (_, nbytes) in inventory.by_dtype.items():
        table.add_row(f"  all {name}", f"{nbytes:,}", "")
    return table


def on_machine(found: "Plan") -> Table:
    """What fits, how fast, why, and the cost."""
    assert found.machine is not None
    title = f"On {found.machine.label}, {found.reserve:.0%} of its memory kept free: upper bounds"
    table = new_table(title, "", *(network.name for network in found.networks))
    fits = [network.fit for network in found.networks]

    def add(label: str, value: "Callable[[Fit], str]") -> None:
        table.add_row(label, *(NONE if fit is None else value(fit) for fit in fits))

    def of(part: str, value: "Callable[[Bound], str]") -> "Callable[[Fit], str]":
        return lambda fit: NONE if getattr(fit, part) is None else value(getattr(fit, part))

    add("chips needed at least", lambda fit: f"{fit.chips_needed:,}")
    add("sequences that fit", lambda fit: f"{fit.max_batch:,}")
    add("sequences at once", lambda fit: f"{fit.batch:,}")
    add("more are held up by", lambda fit: fit.limited_by or NONE)
    for label, part in (("decode", "decode"), ("decode, one sequence alone", "alone"), ("prefill", "prefill")):
        add(f"{label}: tokens/s", of(part, lambda bound: figure(bound.tokens_per_s)))
        add("  bound by", of(part, lambda bound: bound.binding))
        unit, scale = ("s a prompt", 1.0) if part == "prefill" else ("ms a step", 1e3)
        add(f"  {unit}", of(part, lambda bound, scale=scale: figure(bound.seconds * scale)))
        for resource in ("memory bandwidth", "arithmetic", "interconnect"):
            add(
                f"    {resource}",
                of(part, lambda b, r=resource, s=scale: figure(b.seconds_by_resource[r] * s)  # type: ignore[misc]
                   if r in b.seconds_by_resource else NONE),
            )  # fmt: skip
    if found.usd_per_hour is not None:
        add("$ a million prompt tokens", lambda fit: NONE if fit.costs is None else usd(fit.costs.miss))
        add("$ a million output tokens", lambda fit: NONE if fit.costs is None else usd(fit.costs.output))
        share, hit = found.workload.output_share, found.workload.cache_hit
        add(
            f"$ a million, {share:.0%} output, {hit:.0%} hits",
            lambda fit: NONE if fit.costs is None else usd(fit.costs.mean),
        )
    return table


def notes(found: "Plan", machine: "Machine") -> Iterator[str]:
    """Where figures come from, and which of them are estimates."""
    chip = machine.chip
    yield f"{chip.name}: {chip.source}."
    if chip.estimated:
        yield f"Estimated: {', '.join(chip.estimated)}."
    if found.usd_per_hour is not None:
        own = found.usd_per_hour == chip.usd_per_hour and chip.price_source
        yield f"${found.usd_per_hour:g} a chip and hour{': ' + chip.price_source if own else ''}."
    if found.link_bytes_per_s is not None and machine.count > 1 and chip.link is not None:
        yield (
            f"The exchange of experts hides behind FP8 arithmetic from {found.link_bytes_per_s / 1e9:,.0f} GB/s of "
            f"links each way on; a chip has {chip.link / 1e9:,.0f}."
        )


# ---------------------------------------------------------------- what others say


def speeds(claims: "Sequence[SpeedClaim]") -> Table:
    """Published speeds beside the bounds for the same machine and context."""
    table = new_table(
        "Published speeds beside these bounds, tokens/s",
        "claim", "context", "claimed", "bound", "share", "bound by",
    )  # fmt: skip
    for claim in claims:
        at = "" if claim.tpot_ms is None else f" at {claim.tpot_ms:g} ms"
        words = f"{claim.model}, {claim.hardware}, a {claim.per}{at}"
        assumed = f" Assumed: {claim.assumed}." if claim.assumed else ""
        table.add_row(
            words, f"{claim.context:,}", figure(claim.claimed), figure(claim.bound), f"{claim.share:.0%}", claim.binding
        )  # fmt: skip
        table.add_row(Text(f"  {claim.source}.{assumed}", style="dim"))
    return table


def price_table(prices: "Sequence[PriceClaim]") -> Table:
    """Published ratios of prices beside those of list prices and of the plan's least cost."""
    table = new_table("Published prices", "claim", "by list price", "by this plan's least cost")
    for price in prices:
        by_plan = NONE if price.by_plan is None else f"1/{figure(price.by_plan)}"
        table.add_row(f"{price.claim} of {price.against} ({price.basis})", f"1/{figure(price.by_list)}", by_plan)
        table.add_row(Text(f"  {price.source}", style="dim"))
    return table


def report(figures: "Sequence[Figure]") -> Iterator[Any]:
    """The V4 report's efficiency figures beside ours."""
    table = new_table(
        "The V4 report's figures at 1,000,000 tokens", "model", "what", "printed", "computed", "exactly", ""
    )
    for one in figures:
        table.columns[1].justify = "left"
        exactly = f"{one.value * 100:.3f}%" if one.claim.endswith("%") else f"{one.value:.3f}x"
        table.add_row(one.model, one.what, one.claim, one.rounded, exactly, "agrees" if one.agrees else "DIFFERS")
    yield table


def hardware(chips: "Chips") -> Iterator[Any]:
    """Every chip of a table; `~` marks what is estimated."""
    table = new_table(
        "Hardware, figures for one chip",
        "name", "chip", "memory", "bandwidth", "bf16", "fp8", "fp4", "links each way", "$/h",
    )  # fmt: skip
    table.columns[1].justify = "left"
    for key, chip in chips.items():
        table.add_row(key, chip.name, *_row(chip))
        table.add_row("", Text(chip.source, style="dim"))
    yield table
    yield Text(
        "Rates are dense FLOP/s; ~ marks an estimate; a format that is missing runs at the next wider one's rate."
    )


def _row(chip: "Chip") -> list[str]:
    def cell(name: str, value: float | None, words: Callable[[float], str]) -> str:
        return NONE if value is None else ("~" if name in chip.estimated else "") + words(value)

    def rate(flops: float) -> str:
        return f"{figure(flops / 1e12)} T"

    return [
        cell("memory", chip.memory, size),
        cell("bandwidth", chip.bandwidth, lambda value: f"{size(value)}/s"),
        *(cell(name, getattr(chip, name), rate) for name in ("bf16", "fp8", "fp4")),
        cell("link", chip.link, lambda value: f"{size(value)}/s"),
        cell("usd_per_hour", chip.usd_per_hour, usd),
    ]
