"""The specification grammar of S-CODE: a sentence, its Python source, and an oracle, all from one small
tree.

The oracle computes the specified function with Python closures chosen here; it never runs source text. The
source is the same specification written out as code, so source and oracle can be checked against each
other.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rorqual.data.tasks.interpreter import Exceeded, Failed, Program, Unsupported, same_value

Function = Callable[..., Any]


@dataclass(frozen=True)
class Part:
    """A phrase, its code (with `x` for the element or `{0}` for the inner expression) and its meaning."""

    phrase: str
    code: str
    run: Function


@dataclass(frozen=True)
class Spec:
    """A function to write: name, parameters, docstring sentence, expression, loop form (if any), oracle."""

    kind: str
    name: str
    parameters: tuple[str, ...]
    sentence: str
    expression: str
    oracle: Function
    loop: str | None = None

    @property
    def signature(self) -> str:
        return f"{self.name}({', '.join(self.parameters)})"

    def source(self, *, style: str = "expression", docstring: bool = False) -> str:
        """The function as text; `loop` style falls back to the expression where there is none."""
        lines = [f"def {self.signature}:"]
        if docstring:
            lines.append(f'    """{self.sentence}"""')
        if style == "loop" and self.loop is not None:
            lines += ["    " + line for line in self.loop.split("\n")]
        else:
            lines.append(f"    return {self.expression}")
        return "\n".join(lines)


def _filters(rng: random.Random) -> Part:
    k = rng.randint(2, 9)
    return rng.choice(
        (
            Part("even numbers", "x % 2 == 0", lambda x: x % 2 == 0),
            Part("odd numbers", "x % 2 == 1", lambda x: x % 2 == 1),
            Part("positive numbers", "x > 0", lambda x: x > 0),
            Part("negative numbers", "x < 0", lambda x: x < 0),
            Part(f"numbers greater than {k}", f"x > {k}", lambda x: x > k),
            Part(f"numbers less than {k}", f"x < {k}", lambda x: x < k),
            Part(f"numbers equal to {k}", f"x == {k}", lambda x: x == k),
            Part(f"numbers divisible by {k}", f"x % {k} == 0", lambda x: x % k == 0),
        )
    )


def _maps(rng: random.Random) -> Part:
    k = rng.randint(2, 9)
    return rng.choice(
        (
            Part("the squares of ", "x * x", lambda x: x * x),
            Part("the absolute values of ", "abs(x)", abs),
            Part(f"{k} times ", f"x * {k}", lambda x: x * k),
            Part(f"{k} plus ", f"x + {k}", lambda x: x + k),
            Part("the negatives of ", "-x", lambda x: -x),
        )
    )


def list_spec(rng: random.Random) -> Spec:
    """Filter, map and reduce over a list of integers; any of the first two may be missing."""
    keep = _filters(rng) if rng.random() < 0.75 else None
    change = _maps(rng) if rng.random() < 0.4 else None
    name, reduce_phrase, shape, finish, start, step = rng.choice(
        (
            ("total", "the sum of ", "sum({0})", sum, "0", "result += {1}"),
            ("count", "how many there are of ", "len([{0}])", len, "0", "result += 1"),
            ("select", "the list of ", "[{0}]", list, "[]", "result += [{1}]"),
            (
                "largest",
                "the largest (0 if none) of ",
                "max([{0}], default=0)",
                lambda v: max(v, default=0),
                None,
                None,
            ),
            (
                "smallest",
                "the smallest (0 if none) of ",
                "min([{0}], default=0)",
                lambda v: min(v, default=0),
                None,
                None,
            ),
            ("ordered", "the sorted list of ", "sorted({0})", sorted, None, None),
        )
    )
    element = change.code if change else "x"
    inner = f"{element} for x in xs" + (f" if {keep.code}" if keep else "")
    loop = None
    if start is not None:
        add = str(step).replace("{1}", element)
        body = f"    if {keep.code}:\n        {add}" if keep else f"    {add}"
        loop = f"result = {start}\nfor x in xs:\n{body}\nreturn result"
    kept, changed = (keep.run if keep else None), (change.run if change else None)

    def oracle(xs: list[int]) -> Any:
        chosen = [x for x in xs if kept is None or kept(x)]
        return finish([changed(x) for x in chosen] if changed else chosen)

    things = (change.phrase if change else "") + (f"the {keep.phrase} in xs" if keep else "the numbers in xs")
    sentence = f"Return {reduce_phrase}{things}."
    return Spec("list", name, ("xs",), sentence, shape.replace("{0}", inner), oracle, loop)


def number_spec(rng: random.Random) -> Spec:
    """A formula over one or two integers."""
    k, m = rng.randint(2, 9), rng.randint(1, 9)
    one: tuple[tuple[str, str, str, Function], ...] = (
        ("scale", f"n times {k} plus {m}", f"n * {k} + {m}", lambda n: n * k + m),
        ("shift", f"n times {k} minus {m}", f"n * {k} - {m}", lambda n: n * k - m),
        ("square", f"the square of n plus {m}", f"n * n + {m}", lambda n: n * n + m),
        ("rest", f"the remainder of n divided by {k}", f"n % {k}", lambda n: n % k),
        ("check", f"True if n is divisible by {k}, else False", f"n % {k} == 0", lambda n: n % k == 0),
        ("above", f"True if n is greater than {k}, else False", f"n > {k}", lambda n: n > k),
        ("at_most", f"n, but at most {k}", f"min(n, {k})", lambda n: min(n, k)),
        ("at_least", f"n, but at least {k}", f"max(n, {k})", lambda n: max(n, k)),
        (
            "add_up",
            f"the sum of the numbers from 1 to n, times {k}",
            f"sum(range(1, n + 1)) * {k}",
            lambda n: sum(range(1, n + 1)) * k,
        ),
    )
    two: tuple[tuple[str, str, str, Function], ...] = (
        ("mix", f"a times {k} plus b", f"a * {k} + b", lambda a, b: a * k + b),
        ("blend", f"a plus b times {k}", f"a + b * {k}", lambda a, b: a + b * k),
        ("gap", f"the distance of a and b, plus {m}", f"abs(a - b) + {m}", lambda a, b: abs(a - b) + m),
        ("higher", f"the larger of a and b, plus {m}", f"max(a, b) + {m}", lambda a, b: max(a, b) + m),
        ("lower", f"the smaller of a and b, minus {m}", f"min(a, b) - {m}", lambda a, b: min(a, b) - m),
    )
    if rng.random() < 0.6:
        name, phrase, code, oracle = rng.choice(one)
        return Spec("number", name, ("n",), f"Return {phrase}.", code, oracle)
    name, phrase, code, oracle = rng.choice(two)
    return Spec("number", name, ("a", "b"), f"Return {phrase}.", code, oracle)


def text_spec(rng: random.Random) -> Spec:
    """A question about a string."""
    k, ch = rng.randint(2, 6), rng.choice("aeiourstln")
    options: tuple[tuple[str, str, str, Function], ...] = (
        ("backwards", f"s backwards, repeated {k} times", f"s[::-1] * {k}", lambda s: s[::-1] * k),
        ("head", f"the first {k} letters of s", f"s[:{k}]", lambda s: s[:k]),
        ("tail", f"the last {k} letters of s", f"s[-{k}:]", lambda s: s[-k:]),
        ("repeat", f"s repeated {k} times", f"s * {k}", lambda s: s * k),
        ("letters", f"how often {ch} is in s", f"len([c for c in s if c == '{ch}'])", lambda s: s.count(ch)),
        ("has", f"True if {ch} is in s, else False", f"'{ch}' in s", lambda s: ch in s),
        ("starts", f"True if s starts with {ch}, else False", f"s[:1] == '{ch}'", lambda s: s[:1] == ch),
        ("longer", f"True if s is longer than {k}, else False", f"len(s) > {k}", lambda s: len(s) > k),
        ("size", f"the length of s times {k}", f"len(s) * {k}", lambda s: len(s) * k),
        ("every", f"every {k}th letter of s, from the first on", f"s[::{k}]", lambda s: s[::k]),
    )
    name, phrase, code, oracle = rng.choice(options)
    return Spec("text", name, ("s",), f"Return {phrase}.", code, oracle)


KINDS: dict[str, Callable[[random.Random], Spec]] = {
    "list": list_spec,
    "number": number_spec,
    "text": text_spec,
}


def draw_arguments(rng: random.Random, spec: Spec) -> list[Any]:
    """Arguments of the right types, small, with edge cases among them."""
    if spec.kind == "list":
        return [[rng.randint(-9, 12) for _ in range(rng.choice((0, 1, 4, 6, 9)))]]
    if spec.kind == "text":
        return ["".join(rng.choices("aeiourstlnbd", k=rng.choice((0, 1, 2, 3, 5, 8))))]
    return [rng.randint(-3, 15) for _ in spec.parameters]


_MUTATIONS = (
    (" > ", " >= "),
    (" > ", " < "),
    (" < ", " <= "),
    (" == ", " != "),
    (" + ", " - "),
    (" - ", " + "),
    (" * ", " + "),
    (" % 2 == 0", " % 2 == 1"),
    (" % ", " // "),
    ("sum(", "max("),
    ("max(", "min("),
    ("min(", "max("),
    ("len(", "sum("),
    ("abs(", "("),
    ("sorted(", "list("),
    (" in s", " not in s"),
    ("range(1, n + 1)", "range(n)"),
    ("[::-1]", "[::]"),
    ("-x ", "x "),
)


def mutants(spec: Spec) -> list[str]:
    """Faulty sources, one small change each; some may be equivalent to the right one."""
    right = spec.source()
    found = [spec.source().replace(old, new, 1) for old, new in _MUTATIONS if old in spec.expression]
    for digit in range(10):
        if f" {digit}" in spec.expression:
            found.append(right.replace(f" {digit}", f" {digit + 1}", 1))
        if f"{digit}]" in spec.expression or f"{digit}:]" in spec.expression:
            found.append(right.replace(f"{digit}", f"{digit + 1}", 1))
    return [source for source in dict.fromkeys(found) if source != right]


def passes(source: str, name: str, tests: list[list[Any]]) -> tuple[bool, str]:
    """Whether `source` gives the expected result on every test `[arguments, expected]`, and why not.

    Raises: Unsupported when the code leaves the small language.
    """
    try:
        program = Program(source)
        for arguments, expected in tests:
            result = program.call(name, arguments)
            if not same_value(result, expected):
                shown = ", ".join(map(repr, arguments))
                return False, f"{name}({shown}) gave {result!r:.80}, expected {expected!r:.80}"
    except (Failed, Exceeded) as error:
        return False, str(error)
    return True, ""


def draw_tests(rng: random.Random, spec: Spec, *, count: int = 6) -> tuple[list[list[Any]], list[str], int]:
    """Tests `[arguments, expected]` chosen to tell the mutants from the right code.

    Returns the tests, the mutants they catch, and how many mutants escaped (equivalent ones among them).
    """
    tests = [[a, spec.oracle(*a)] for a in (draw_arguments(rng, spec) for _ in range(count))]
    caught: list[str] = []
    escaped = 0
    for mutant in mutants(spec):
        for _ in range(30):
            if not _passes_or_undecided(mutant, spec.name, tests):
                caught.append(mutant)
                break
            arguments = draw_arguments(rng, spec)
            case = [arguments, spec.oracle(*arguments)]
            if not _passes_or_undecided(mutant, spec.name, [case]):
                tests.append(case)
        else:
            escaped += 1
    return tests, caught, escaped


def _passes_or_undecided(source: str, name: str, tests: list[list[Any]]) -> bool:
    try:
        return passes(source, name, tests)[0]
    except Unsupported:
        return True
