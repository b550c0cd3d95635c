"""The words of docs/ablations.md: what each study compares. What it found is put in by the figures, not here."""

from ablation_stats import LIMIT, Comparison

PAGE = """# Ablations: what each ingredient is worth at Minke size

<!-- Written by benchmarks/ablations.py --docs from its results; change the script, not this page. -->

Each part of the recipe is switched off by itself, and the network gets the saved compute back as wider experts, so that
all arms train on the same tokens with the same forward FLOPs per token (within 1 %, MTP not counted unless an arm says
so). All numbers and verdicts on this page are computed from the runs.

| | |
| --- | --- |
| Base | the `minke` preset: CSA and HCA, mHC with four streams, one hash-routed layer, MTP, Muon |
| Data | the Python sources of the running interpreter with their tests |
| Length | {tokens} tokens per run in {steps} steps of {step}, rows of {seq_len} |
| Learning rate | {lr} to a tenth of it, 10 % warm-up, cosine from 70 % on; the optimiser study searches its own |
| Measured | cross-entropy on {held_out} tokens of held-out files after the last step |
| Seeds | {seeds}, paired: all arms of a seed read the same rows in the same order |
| Machine | {processor}, one thread per run, torch {torch} |

```console
$ python benchmarks/ablations.py --out runs/ablations --jobs 2
$ python benchmarks/ablations.py --out runs/ablations --docs
```

A difference counts when it exceeds {limit} pooled standard deviations of single runs. With so few seeds that estimate
is itself rough, so a difference just beyond the limit is weak evidence and one within it is no evidence of equality.
The runs are short: what pays only later, with more depth, longer rows or more tokens does not show here."""

STUDY_TEXT = {
    "optimizer": (
        "Muon against AdamW",
        """The same network; AdamW takes over Muon's matrices, with the same decay. Each optimiser runs at the best
learning rate of a search on the first seed (the grid is extended while the best lies at its edge), then with all seeds.
Everything else on this page was trained by Muon at the common learning rate.""",
    ),
    "residual": (
        "mHC against a plain sum and unconstrained hyper-connections",
        """`plain` is one stream and x + f(x); `hc` has four streams and the hyper-connections paper's coefficients
without bounds or Sinkhorn. Both get wider experts for what mHC's projections and mixing cost. Six layers are too few
for what mHC is meant for; the depth study below looks at that.""",
    ),
    "attention": (
        "CSA and HCA against full attention",
        """`full-attention` reads the whole row in every layer and pays for it with narrower experts. Rows are short
here; compressed attention exists for long ones, where full attention's share of the FLOPs keeps growing.""",
    ),
    "hash": (
        "Hash routing",
        "`no-hash` gives the first layer a learned router like all others. The FLOPs are the same.",
    ),
    "mtp": (
        "Multi-token prediction",
        """The loss compared is the main one. `no-mtp` leaves the module out: the network that remains is the same, but
its training is cheaper. `no-mtp-wide` spends the module's training FLOPs on wider experts instead.""",
    ),
    "engram": (
        "Engram",
        """`engram` is the `minke-engram` preset: four experts of each layer less, and a memory of token runs in the
second layer whose tables bring it back to the same number of parameters. FLOPs are equal too. `ngram` is no network but
an interpolated Kneser-Ney 5-gram model counted in the tokens that the arms of that seed train on: what a table of token
runs reaches by itself.""",
    ),
    "qat": (
        "FP4 training",
        """`qat-fp4` trains with the experts quantised as they will be exported. Less loss is not its aim; no more loss
is.""",
    ),
    "depth": (
        "A deep, narrow network",
        """{layers} layers of width 64, window and HCA layers by turns, the same but for the residual path (not matched
in FLOPs). Signal: root mean square of the streams after the last layer over that of the embeddings. Gradient: norm of
the loss's gradient at the first layer's streams over that at the last. Gain: largest absolute row sum (forward) and
column sum (backward) of the composed mix of all sublayers, mean over tokens and, in brackets, the largest. Largest
gradient norm: of all steps, before clipping, over all weights.""",
    ),
}


CLAIMS = {
    "adamw": ("Muon over AdamW", "higher"),
    "plain": ("mHC over a plain sum", "higher"),
    "hc": ("mHC over unconstrained hyper-connections", "higher"),
    "full-attention": ("CSA and HCA over full attention", "higher"),
    "no-hash": ("a hash-routed first layer over a learned one", "higher"),
    "no-mtp": ("MTP over the same network without it", "higher"),
    "no-mtp-wide": ("MTP over as many FLOPs in wider experts", "higher"),
    "engram": ("Engram over more experts", "lower"),
    "ngram": ("the base over a 5-gram table", "higher"),
    "qat-fp4": ("FP4 training over full precision", "lower"),
}
"""What a variant's loss says: the claim, and whether a higher or a lower loss of the variant speaks for it."""


def sentence(arm: str, base: str, comparison: Comparison) -> str:
    """What may be said of one comparison."""
    size = abs(comparison.difference)
    direction = "higher" if comparison.difference > 0 else "lower"
    if comparison.units is None:
        return f"- `{arm}`: {size:.4f} nats/token {direction} than `{base}`; too few seeds to say more."
    far = f"{abs(comparison.units):.1f} pooled standard deviations"
    if comparison.verdict == "same":
        return f"- `{arm}`: {size:.4f} nats/token {direction} than `{base}`, {far}: within {LIMIT:g}, no claim."
    word = "worse" if direction == "higher" else "better"
    return f"- `{arm}`: **{word}** than `{base}` by {size:.4f} nats/token, {far}."
