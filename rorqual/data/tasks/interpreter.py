"""Runs a small subset of Python by walking its syntax tree: how code from a model is judged without
executing it.

Nothing of the graded code reaches Python's own `exec`, `eval` or `compile` to bytecode. Text is parsed with
`ast` and every node is evaluated here, by a whitelist. The language has no attribute access, no imports, no
classes, no decorators, no exceptions, no global state, no way to change a list in place, and no calls but
to the listed builtins and to functions the text itself defines. Values are integers, floats, booleans,
None, strings, lists and tuples. Numbers, texts and nested lists are bounded in size and each call in steps,
so that evaluation always ends soon.

Differences to Python that a grader's reader should know: comprehensions and generator expressions are
evaluated at once, `reversed`, `enumerate` and `zip` return lists, and `x += [1]` makes a new list. Code
that uses anything else is not wrong, it is `Unsupported`, and cannot be decided here; a sandbox is the
place for it.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Sequence
from typing import Any

MAX_SOURCE = 4000  # characters
MAX_STEPS = 20_000  # per call
MAX_ITEMS = 5000  # elements of a value, nested ones counted
MAX_BITS = 2048  # of an integer
MAX_DEPTH = 30  # nested calls


class Unsupported(Exception):
    """The code uses something outside the small language; it may still be right."""


class Exceeded(Exception):
    """A limit on steps, size or depth was passed."""


class Failed(Exception):
    """The code is malformed or raised an error while running."""


class _Return(Exception):
    def __init__(self, value: Any) -> None:
        self.value = value


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
_UNARY: dict[type, Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
    ast.Invert: operator.invert,
}
_BUILTINS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "all": all,
    "any": any,
    "bool": bool,
    "divmod": divmod,
    "enumerate": lambda values, start=0: list(enumerate(values, start)),
    "int": int,
    "len": len,
    "list": list,
    "max": max,
    "min": min,
    "range": range,
    "reversed": lambda values: list(reversed(values)),
    "round": round,
    "sorted": sorted,
    "str": str,
    "sum": sum,
    "tuple": tuple,
    "zip": lambda *values: list(zip(*values, strict=False)),
}
_KEYWORDS = {
    "sorted": {"reverse"},
    "max": {"default"},
    "min": {"default"},
    "enumerate": {"start"},
    "sum": {"start"},
}
_ERRORS = (ArithmeticError, IndexError, KeyError, TypeError, ValueError)


class Program:
    """Parsed functions, ready to be called.

    >>> Program("def f(n):\\n    return n + 1").call("f", [2])
    3
    """

    def __init__(self, source: str) -> None:
        """Parse `source`. Raises: Failed when it is not Python, Exceeded when too long or deep,
        Unsupported.
        """
        if len(source) > MAX_SOURCE:
            raise Exceeded(f"source has {len(source)} characters, the limit is {MAX_SOURCE}")
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError) as error:
            raise Failed(f"not Python: {error}") from error
        except (RecursionError, MemoryError) as error:
            raise Exceeded("nested too deeply") from error
        self.functions: dict[str, ast.FunctionDef] = {}
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                _check_signature(node)
                self.functions[node.name] = node
            elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                raise Unsupported(f"{type(node).__name__} outside a function")

    def call(self, name: str, arguments: Sequence[Any]) -> Any:
        """The result of `name(*arguments)`. Raises: Failed, Exceeded, Unsupported."""
        if name not in self.functions:
            raise Failed(f"no function called {name}")
        try:
            return _Run(self.functions).call(self.functions[name], list(arguments))
        except (RecursionError, MemoryError, OverflowError) as error:
            raise Exceeded(str(error) or "nested too deeply") from error
        except _ERRORS as error:
            raise Failed(f"{type(error).__name__}: {error}") from error


def _check_signature(node: ast.FunctionDef) -> None:
    a = node.args
    if node.decorator_list or a.vararg or a.kwarg or a.kwonlyargs or a.posonlyargs or a.defaults:
        raise Unsupported("only plain parameters and no decorators")


class _Run:
    """One call with its step budget."""

    def __init__(self, functions: dict[str, ast.FunctionDef]) -> None:
        self.functions = functions
        self.steps = 0
        self.depth = 0

    def tick(self, count: int = 1) -> None:
        self.steps += count
        if self.steps > MAX_STEPS:
            raise Exceeded(f"more than {MAX_STEPS} steps")

    def checked(self, value: Any) -> Any:
        """`value` if it is of an allowed type and within the size limits (nested elements are counted)."""
        budget = MAX_ITEMS
        stack = [value]
        while stack:
            top = stack.pop()
            if isinstance(top, int):
                if top.bit_length() > MAX_BITS:
                    raise Exceeded(f"an integer of more than {MAX_BITS} bits")
            elif isinstance(top, str | range):
                budget -= len(top) - 1 if len(top) else 0
            elif isinstance(top, list | tuple):
                stack.extend(top)
                self.tick(1 + len(top) // 8)
            elif not (top is None or isinstance(top, float)):
                raise Unsupported(f"a value of type {type(top).__name__}")
            budget -= 1
            if budget < 0 or len(stack) > MAX_ITEMS:
                raise Exceeded(f"a value of more than {MAX_ITEMS} elements")
        return value

    def call(self, function: ast.FunctionDef, arguments: list[Any]) -> Any:
        names = [a.arg for a in function.args.args]
        if len(names) != len(arguments):
            raise Failed(f"{function.name} takes {len(names)} arguments, got {len(arguments)}")
        if self.depth >= MAX_DEPTH:
            raise Exceeded(f"more than {MAX_DEPTH} nested calls")
        self.depth += 1
        try:
            self.block(function.body, dict(zip(names, arguments, strict=True)))
        except _Return as returned:
            return returned.value
        except (_Break, _Continue):
            raise Failed("break or continue outside a loop") from None
        finally:
            self.depth -= 1
        return None

    # -- statements --

    def block(self, body: list[ast.stmt], scope: dict[str, Any]) -> None:
        for node in body:
            self.statement(node, scope)

    def statement(self, node: ast.stmt, scope: dict[str, Any]) -> None:
        self.tick()
        if isinstance(node, ast.Return):
            raise _Return(None if node.value is None else self.value(node.value, scope))
        if isinstance(node, ast.Assign):
            value = self.value(node.value, scope)
            for target in node.targets:
                self.assign(target, value, scope)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self.assign(node.target, self.value(node.value, scope), scope)
        elif isinstance(node, ast.AugAssign):
            if not isinstance(node.target, ast.Name):
                raise Unsupported("changing a value in place")
            left = self.lookup(node.target.id, scope)
            scope[node.target.id] = self.binary(node.op, left, self.value(node.value, scope))
        elif isinstance(node, ast.If):
            self.block(node.body if self.value(node.test, scope) else node.orelse, scope)
        elif isinstance(node, ast.For):
            self.loop(node, scope)
        elif isinstance(node, ast.While):
            self.while_loop(node, scope)
        elif isinstance(node, ast.Expr):
            self.value(node.value, scope)
        elif isinstance(node, ast.Break):
            raise _Break
        elif isinstance(node, ast.Continue):
            raise _Continue
        elif not isinstance(node, ast.Pass):
            raise Unsupported(type(node).__name__)

    def assign(self, target: ast.expr, value: Any, scope: dict[str, Any]) -> None:
        if isinstance(target, ast.Name):
            scope[target.id] = value
        elif isinstance(target, ast.Tuple | ast.List):
            parts = list(self.iterable(value))
            if len(parts) != len(target.elts):
                raise Failed(f"cannot unpack {len(parts)} values into {len(target.elts)}")
            for element, part in zip(target.elts, parts, strict=True):
                self.assign(element, part, scope)
        else:
            raise Unsupported("assignment to anything but a name")

    def loop(self, node: ast.For, scope: dict[str, Any]) -> None:
        for value in self.iterable(self.value(node.iter, scope)):
            self.tick()
            self.assign(node.target, value, scope)
            if self.is_broken_off(node.body, scope):
                return
        self.block(node.orelse, scope)

    def while_loop(self, node: ast.While, scope: dict[str, Any]) -> None:
        while self.value(node.test, scope):
            self.tick()
            if self.is_broken_off(node.body, scope):
                return
        self.block(node.orelse, scope)

    def is_broken_off(self, body: list[ast.stmt], scope: dict[str, Any]) -> bool:
        """Run the body of a loop once; whether it said `break`."""
        try:
            self.block(body, scope)
        except _Break:
            return True
        except _Continue:
            pass
        return False

    # -- expressions --

    def lookup(self, name: str, scope: dict[str, Any]) -> Any:
        if name in scope:
            return scope[name]
        raise Failed(f"name {name} is not defined")

    def iterable(self, value: Any) -> Any:
        if not isinstance(value, str | list | tuple | range):
            raise Failed(f"cannot iterate over {type(value).__name__}")
        return value

    def value(self, node: ast.expr, scope: dict[str, Any]) -> Any:
        self.tick()
        if isinstance(node, ast.Constant):
            return self.checked(node.value)
        if isinstance(node, ast.Name):
            return self.lookup(node.id, scope)
        if isinstance(node, ast.BinOp):
            return self.binary(node.op, self.value(node.left, scope), self.value(node.right, scope))
        if isinstance(node, ast.UnaryOp):
            return self.checked(_UNARY[type(node.op)](self.value(node.operand, scope)))
        if isinstance(node, ast.BoolOp):
            stop_on = isinstance(node.op, ast.Or)
            result: Any = None
            for part in node.values:
                result = self.value(part, scope)
                if bool(result) is stop_on:
                    break
            return result
        if isinstance(node, ast.Compare):
            return self.compare(node, scope)
        if isinstance(node, ast.IfExp):
            return self.value(node.body if self.value(node.test, scope) else node.orelse, scope)
        if isinstance(node, ast.List | ast.Tuple):
            parts = [self.value(part, scope) for part in node.elts]
            return self.checked(parts if isinstance(node, ast.List) else tuple(parts))
        if isinstance(node, ast.ListComp | ast.GeneratorExp):
            found: list[Any] = []
            self.comprehend(node.generators, node.elt, dict(scope), found)
            return self.checked(found)
        if isinstance(node, ast.Subscript):
            return self.subscript(node, scope)
        if isinstance(node, ast.Call):
            return self.call_node(node, scope)
        raise Unsupported(type(node).__name__)

    def binary(self, op: ast.operator, left: Any, right: Any) -> Any:
        if type(op) not in _BINARY:
            raise Unsupported(type(op).__name__)
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if isinstance(op, ast.Pow):
            if not numbers or abs(right) > 256 or (isinstance(left, int) and left.bit_length() * abs(right) > MAX_BITS):
                raise Exceeded("a power too large")
            if left < 0 and isinstance(right, float):
                raise Failed("complex result")
        elif isinstance(op, ast.Mult) and not numbers:
            for part, times in ((left, right), (right, left)):
                if isinstance(part, str | list | tuple) and isinstance(times, int) and len(part) * times > MAX_ITEMS:
                    raise Exceeded(f"a value of more than {MAX_ITEMS} elements")
        elif isinstance(op, ast.Mod) and not numbers:
            raise Unsupported("formatting with %")
        return self.checked(_BINARY[type(op)](left, right))

    def compare(self, node: ast.Compare, scope: dict[str, Any]) -> bool:
        left = self.value(node.left, scope)
        for op, right_node in zip(node.ops, node.comparators, strict=True):
            right = self.value(right_node, scope)
            if isinstance(left, list | tuple | str):
                self.tick(len(left) // 8)
            if isinstance(right, list | tuple | str):
                self.tick(len(right) // 8)
            if not _COMPARE[type(op)](left, right):
                return False
            left = right
        return True

    def comprehend(
        self, generators: list[ast.comprehension], element: ast.expr, scope: dict[str, Any], found: list[Any]
    ) -> None:
        if not generators:
            found.append(self.value(element, scope))
            if len(found) > MAX_ITEMS:
                raise Exceeded(f"a value of more than {MAX_ITEMS} elements")
            return
        first, rest = generators[0], generators[1:]
        if first.is_async:
            raise Unsupported("async")
        for value in self.iterable(self.value(first.iter, scope)):
            self.tick()
            self.assign(first.target, value, scope)
            if all(self.value(test, scope) for test in first.ifs):
                self.comprehend(rest, element, scope, found)

    def subscript(self, node: ast.Subscript, scope: dict[str, Any]) -> Any:
        value = self.iterable(self.value(node.value, scope))
        if isinstance(node.slice, ast.Slice):
            bounds = [
                None if part is None else self.value(part, scope)
                for part in (node.slice.lower, node.slice.upper, node.slice.step)
            ]
            result = value[slice(*bounds)]
            return self.checked(result)
        return value[self.value(node.slice, scope)]

    def call_node(self, node: ast.Call, scope: dict[str, Any]) -> Any:
        if not isinstance(node.func, ast.Name):
            raise Unsupported("a call of anything but a name")
        name = node.func.id
        if any(isinstance(a, ast.Starred) for a in node.args):
            raise Unsupported("star arguments")
        arguments = [self.value(a, scope) for a in node.args]
        if name in self.functions and name not in scope:
            if node.keywords:
                raise Unsupported("keyword arguments")
            return self.call(self.functions[name], arguments)
        if name in scope or name not in _BUILTINS:
            raise Unsupported(f"a call of {name}")
        keywords = {}
        for keyword in node.keywords:
            if keyword.arg not in _KEYWORDS.get(name, set()):
                raise Unsupported(f"{name} with the argument {keyword.arg}")
            keywords[keyword.arg] = self.value(keyword.value, scope)
        return self.builtin(name, arguments, keywords)

    def builtin(self, name: str, arguments: list[Any], keywords: dict[Any, Any]) -> Any:
        """Call a whitelisted builtin; arguments are already bounded, so its work is too."""
        for argument in (*arguments, *keywords.values()):
            if isinstance(argument, str | list | tuple | range):
                self.tick(len(argument))
        if (
            name == "sum"
            and (len(arguments) > 1 or keywords)
            and isinstance((*arguments[1:], *keywords.values())[0], list)
        ):
            raise Unsupported("sum of lists")
        if name == "str" and (len(arguments) != 1 or not isinstance(arguments[0], str | int | float)):
            raise Unsupported("str of anything but a number or text")
        if name == "round" and len(arguments) > 1 and not -99 <= arguments[1] <= 99:
            raise Exceeded("rounding to so many places")  # round(5, -10**9) would compute 10**10**9
        if name == "range":
            if not all(isinstance(a, int) for a in arguments):
                raise Failed("range needs integers")
            made = range(*arguments)
            if abs(made.stop - made.start) > MAX_ITEMS * max(1, abs(made.step)):
                raise Exceeded(f"a range of more than {MAX_ITEMS} elements")
            return made
        result = _BUILTINS[name](*arguments, **keywords)
        return self.checked(result)


def same_value(left: Any, right: Any) -> bool:
    """Equality that tells 1, 1.0 and True apart, also inside lists; a list and a tuple differ."""
    if type(left) is not type(right):
        return False
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(same_value(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)
