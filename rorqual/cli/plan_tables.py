"""What `rorqual plan` prints for people."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rorqual.planner.adapters import AdapterPlan
    from rorqual.planner.bounds import Bound, Resource
    from rorqual.planner.compare import PriceClaim, SpeedClaim
    from rorqual.planner.hardware import Chip, Machine
    from rorqual.planner.hardware import Table as Chips
    from rorqual.planner.plan import Fit, NetworkPlan, Plan
    from rorqual.planner.report import Figure
    from rorqual.planner.work import NumberFormat

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
        yield from speeds(claims)
    if prices:
        yield from price_rows(prices)


def adapter(found: "AdapterPlan", tokens: int, machine: "Machine | None", reserve: float) -> Iterator[Any]:
    """What training an adapter holds in memory, and whether that fits."""
    table = new_table(
        f"An adapter on {found.modules:,} matrices: {found.parameters:,} numbers, {found.share:.2%} of the model's",
        "in memory, all chips together", "bytes",
    )  # fmt: skip
    for label, nbytes in (
        ("frozen weights", found.weights), ("adapter, fp32", found.adapter), ("gradients", found.gradients),
        ("optimizer (AdamW)", found.optimizer), (f"activations of {tokens:,} tokens, recomputed", found.activations),
        ("logits of a chunk", found.logits), ("all of it", found.total), ("a checkpoint", found.saved),
    ):  # fmt: skip
        table.add_row(label, size(nbytes))
    yield table
    if machine is not None:
        memory = machine.count * machine.chip.memory
        word = "fits" if found.fits(memory, reserve) else "does not fit"
        yield Text(f"It {word} {machine.label} ({size(memory)}, of which {reserve:.0%} is kept for the rest).")


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
    formats: tuple[NumberFormat, ...] = ("fp4", "fp8", "bf16")
    for number in formats:
        table.add_row(f"  in {number}", *(figure(network.work.in_format(number) / 1e9) for network in networks))
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
        f"Weights, {inventory.weights}: {len(inventory.tensors):,} tensors, {inventory.nbytes:,} bytes",
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
    title = f"At most, on {found.machine.label}"
    table = new_table(title, "", *(network.name for network in found.networks))
    fits = [network.fit for network in found.networks]

    def add(label: str, value: "Callable[[Fit], str]") -> None:
        table.add_row(label, *(NONE if fit is None else value(fit) for fit in fits))

    add("chips needed at least", lambda fit: f"{fit.chips_needed:,}")
    add("sequences that fit", lambda fit: f"{fit.max_batch:,}")
    add("sequences at once", lambda fit: f"{fit.batch:,}")
    add("more are held up by", lambda fit: fit.limited_by or NONE)
    for label, part in (("decode", "decode"), ("decode, alone", "alone"), ("prefill", "prefill")):
        bounds = [None if fit is None else getattr(fit, part) for fit in fits]
        unit, scale = ("s a prompt", 1.0) if part == "prefill" else ("ms a step", 1e3)
        held_up = [NONE if fit is None else fit.limited_by or NONE for fit in fits]
        for words, values in bound_rows(bounds, held_up, label, unit, scale):
            if set(values) != {NONE} or words.endswith("tokens/s"):
                table.add_row(words, *values)
    if any(fit is not None and fit.costs is not None for fit in fits):
        add("$ a million prompt tokens", lambda fit: NONE if fit.costs is None else usd(fit.costs.miss))
        add("$ a million output tokens", lambda fit: NONE if fit.costs is None else usd(fit.costs.output))
        share, hit = found.workload.output_share, found.workload.cache_hit
        add(
            f"$ a million, {share:.0%} out, {hit:.0%} hits",
            lambda fit: NONE if fit.costs is None else usd(fit.costs.mean),
        )
    return table


def bound_rows(
    bounds: "Sequence[Bound | None]", held_up: Sequence[str], label: str, unit: str, scale: float
) -> Iterator[tuple[str, list[str]]]:
    """Rows of one kind of step: the rate, what binds it, and the least time by resource.

    `held_up`: what keeps a network from running at all, where it has no bound.
    """

    def row(value: "Callable[[Bound], str]") -> list[str]:
        return [NONE if bound is None else value(bound) for bound in bounds]

    yield f"{label}: tokens/s", row(lambda bound: figure(bound.tokens_per_s))
    yield "  bound by", [held if bound is None else bound.binding for bound, held in zip(bounds, held_up, strict=True)]
    yield f"  {unit}", row(lambda bound: figure(bound.seconds * scale))
    resources: tuple[Resource, ...] = ("memory bandwidth", "arithmetic", "interconnect")
    for resource in resources:
        seconds = [None if bound is None else bound.seconds_by_resource.get(resource) for bound in bounds]
        yield f"    {resource}", [NONE if each is None else figure(each * scale) for each in seconds]


def notes(found: "Plan", machine: "Machine") -> Iterator[str]:
    """Where figures come from, and which of them are estimates."""
    chip = machine.chip
    yield f"Upper bounds; {found.reserve:.0%} of the memory is kept free."
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


def speeds(claims: "Sequence[SpeedClaim]") -> Iterator[Any]:
    """Published speeds beside the bounds for the same machine and context."""
    table = new_table(
        "Published speeds beside these bounds, tokens/s",
        "machine",
        "context",
        "of",
        "claimed",
        "bound",
        "share",
        "bound by",
    )
    for number, claim in enumerate(claims, 1):
        at = f"a {claim.per}" if claim.tpot_ms is None else f"a {claim.per} at {claim.tpot_ms:g} ms"
        table.add_row(
            f"[{number}] {claim.model} on {claim.hardware}", f"{claim.context:,}", at,
            figure(claim.claimed), figure(claim.bound), f"{claim.share:.0%}", claim.binding,
        )  # fmt: skip
    yield table
    yield sources([f"{one.source}{f' (assumed: {one.assumed})' if one.assumed else ''}" for one in claims])


def price_rows(prices: "Sequence[PriceClaim]") -> Iterator[Any]:
    """Published ratios of prices beside those of list prices and of the plan's least cost."""
    table = new_table("Published prices", "claim", "by list price", "by this plan's least cost")
    for number, price in enumerate(prices, 1):
        by_plan = NONE if price.by_plan is None else f"1/{figure(price.by_plan)}"
        claim = f"[{number}] {price.claim} of {price.against} ({price.basis})"
        table.add_row(claim, f"1/{figure(price.by_list)}", by_plan)
    yield table
    yield sources([price.source for price in prices])


def sources(words: Sequence[str]) -> Text:
    """Numbered sources, those of neighbours that are the same together."""
    lines: list[str] = []
    for number, source in enumerate(words, 1):
        if lines and lines[-1].endswith(f"] {source}"):
            lines[-1] = lines[-1].replace("] ", f"] [{number}] ", 1)
        else:
            lines.append(f"[{number}] {source}")
    return Text("\n".join(lines), style="dim")


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
        "Hardware: memory in GB, bandwidth and links (each way) in GB/s, dense TFLOP/s",
        "name", "memory", "bandwidth", "bf16", "fp8", "fp4", "links", "$/h",
    )  # fmt: skip
    for key, chip in chips.items():
        table.add_row(key, *_row(chip))
    yield table
    yield Text("~ marks an estimate; a format that a chip has not runs at the next wider one's rate.")
    yield Text("\n".join(f"{key}: {chip.name}. {chip.source}." for key, chip in chips.items()), style="dim")


def _row(chip: "Chip") -> list[str]:
    def cell(name: str, scale: float) -> str:
        value = getattr(chip, name)
        return NONE if value is None else ("~" if name in chip.estimated else "") + _short(value / scale)

    units = {"memory": 1e9, "bandwidth": 1e9, "bf16": 1e12, "fp8": 1e12, "fp4": 1e12, "link": 1e9}
    return [*(cell(name, scale) for name, scale in units.items()), cell("usd_per_hour", 1.0)]


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.4g}"
