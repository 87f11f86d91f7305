"""Properties in the format of the verification competition, VNN-LIB 1 (Demarchi et al. 2023), and its answers.

A property says what a counter-example is: inputs in a box whose outputs satisfy linear constraints. Numbers are
decimal; they are kept as fractions, so that a counter-example can be checked exactly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Context, Decimal
from fractions import Fraction
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from ...errors import UserError

_BYTES, _DEPTH, _CASES, _INPUTS = 2**26, 40, 10_000, 10**6
_LONGEST, _EXPONENT, _LARGEST = 60, 300, 10**30  # of a number that is read, and of one that is computed
_TOKEN = re.compile(r"[()]|;[^\n]*|[^\s();]+")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,3})?", re.IGNORECASE)
_NAME = re.compile(r"([XY])_(0|[1-9]\d{0,6})")

Expression = str | list["Expression"]
Terms = dict[str, Fraction]  # a number for each variable, and for "" what is added
Box = tuple[tuple[Fraction, ...], tuple[Fraction, ...]]


@dataclass(frozen=True)
class Case:
    """A counter-example has inputs in the box, low to high, and outputs with Σ row[k]·Y_k ≤ limit for each row."""

    box: Box
    rows: tuple[tuple[dict[int, Fraction], Fraction], ...]

    def satisfied(self, y: Tensor) -> bool:
        """Return whether outputs (classes,) satisfy all rows, exactly."""
        values = [Fraction(v) if abs(v) < float("inf") else None for v in y.tolist()]
        if None in values:
            return False
        return all(sum(c * (values[k] or 0) for k, c in row.items()) <= limit for row, limit in self.rows)


@dataclass(frozen=True)
class Property:
    """A property: an input is a counter-example if it satisfies any of the cases."""

    inputs: int
    outputs: int
    cases: tuple[Case, ...]


def read_vnnlib(path: Path | str) -> Property:
    """Read a property; raise UserError for a damaged file, for VNN-LIB 2, and for what is not supported."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist")
    if Path(path).stat().st_size > _BYTES:
        raise UserError(f"{path} is larger than 64 MiB, the limit of a property file")
    try:
        return _Reader(str(path)).read(Path(path).read_text("ascii"))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a VNN-LIB file: it has characters that are not ASCII") from None


@dataclass
class _Term:
    """A conjunction: bounds of inputs, and rows of outputs."""

    low: dict[int, Fraction] = field(default_factory=dict)
    high: dict[int, Fraction] = field(default_factory=dict)
    rows: list[tuple[dict[int, Fraction], Fraction]] = field(default_factory=list)

    def meet_(self, other: _Term) -> _Term:
        for at, value in other.low.items():
            self.low[at] = max(self.low.get(at, value), value)
        for at, value in other.high.items():
            self.high[at] = min(self.high.get(at, value), value)
        self.rows += other.rows
        return self

    def copy(self) -> _Term:
        return _Term(dict(self.low), dict(self.high), list(self.rows))


class _Reader:
    def __init__(self, path: str) -> None:
        self.path, self.declared = path, {"X": set[int](), "Y": set[int]()}

    def refuse(self, reason: str) -> UserError:
        return UserError(f"{self.path}: {reason}")

    def read(self, text: str) -> Property:
        terms = [_Term()]
        for command in self.commands(text):
            match command:
                case ["declare-const", str(name), "Real"] | ["declare-fun", str(name), [], "Real"]:
                    self.declare_(name)
                case ["assert", formula]:
                    terms = self.met(terms, self.terms(formula))
                case ["set-logic" | "set-info" | "check-sat" | "exit", *_]:
                    pass
                case [str(word), *_] if "network" in word or word.startswith("vnnlib-version"):
                    raise self.refuse(
                        f"({word} ...) is VNN-LIB 2, which is not supported; give the property in VNN-LIB 1"
                    )
                case _:
                    raise self.refuse(f"{_shown(command)} is neither a declaration of a Real nor an assertion")
        inputs, outputs = len(self.declared["X"]), len(self.declared["Y"])
        if not inputs or not outputs:
            raise self.refuse(f"it declares {inputs} inputs X_i and {outputs} outputs Y_i; a property has both")
        for letter, found in self.declared.items():
            if max(found) != len(found) - 1:
                raise self.refuse(f"it declares {letter}_{max(found)}, but not every {letter}_i before it")
        return Property(inputs, outputs, self.cases(terms, inputs))

    def commands(self, text: str) -> Iterator[Expression]:
        """Yield what is in parentheses at the outermost level, as nested lists."""
        open_: list[list[Expression]] = []
        for token in _TOKEN.findall(text):
            if token[0] == ";":
                continue
            if token == "(":
                if len(open_) == _DEPTH:
                    raise self.refuse(f"parentheses are nested more than {_DEPTH} deep")
                open_.append([])
            elif token != ")" and open_:
                open_[-1].append(token)
            elif token == ")" and len(open_) > 1:
                open_[-2].append(open_.pop())
            elif token == ")" and open_:
                yield open_.pop()
            else:
                raise self.refuse(f"'{token[:_LONGEST]}' is outside of parentheses; this is not a VNN-LIB file")
        if open_:
            raise self.refuse("a parenthesis is not closed: the file is truncated")

    def declare_(self, name: str) -> None:
        known = _NAME.fullmatch(name)
        if known is None or int(known[2]) >= _INPUTS:
            raise self.refuse(f"'{name[:_LONGEST]}' is declared; variables are X_0, X_1, ... and Y_0, Y_1, ...")
        self.declared[known[1]].add(int(known[2]))

    def terms(self, formula: Expression) -> list[_Term]:
        """Return a formula as a disjunction of conjunctions."""
        match formula:
            case ["and", *parts]:
                return reduce(lambda found, part: self.met(found, self.terms(part)), parts, [_Term()])
            case ["or", *parts]:
                return self.counted([term for part in parts for term in self.terms(part)])
            case ["<=", low, high]:
                return [self.atom(low, high)]
            case [">=", high, low]:
                return [self.atom(low, high)]
            case [str(word), *_]:
                raise self.refuse(f"{_shown(formula)}: formulas use and, or, <= and >=, not '{word[:_LONGEST]}'")
        raise self.refuse(f"{_shown(formula)} is not a formula")

    def met(self, one: list[_Term], two: list[_Term]) -> list[_Term]:
        """Return the disjunction of all conjunctions of a term of each; `one` may be changed."""
        if len(two) == 1:
            return [term.meet_(two[0]) for term in one]
        if len(one) * len(two) > _CASES:
            raise self.refuse(f"it has more than {_CASES} cases")
        return [first.copy().meet_(second) for first in one for second in two]

    def counted(self, terms: list[_Term]) -> list[_Term]:
        if len(terms) > _CASES:
            raise self.refuse(f"it has more than {_CASES} cases")
        return terms

    def atom(self, low: Expression, high: Expression) -> _Term:
        """Return low ≤ high."""
        terms = _sum(self.linear(low), self.linear(high), Fraction(-1))
        added = terms.pop("", Fraction(0))
        named = {(name[0], int(name[2:])): value for name, value in terms.items() if value}
        letters = {letter for letter, _ in named}
        if max(map(abs, [added, *named.values()])) > _LARGEST:
            raise self.refuse(f"(<= {_shown(low)} {_shown(high)}) has numbers above 1e30")
        if letters == {"Y"}:
            return _Term(rows=[({at: value for (_, at), value in named.items()}, -added)])
        if letters != {"X"} or len(named) != 1:
            what = "inputs and outputs" if len(letters) == 2 else "several inputs" if letters else "no variable"
            raise self.refuse(
                f"(<= {_shown(low)} {_shown(high)}) has {what}; a bound names one input, a constraint outputs only"
            )
        ((_, at), factor) = next(iter(named.items()))
        bound = {at: max(min(-added / factor, Fraction(_LARGEST)), Fraction(-_LARGEST))}
        return _Term(high=bound) if factor > 0 else _Term(low=bound)

    def linear(self, expression: Expression) -> Terms:
        match expression:
            case str():
                return self.symbol(expression)
            case ["+", *parts]:
                return reduce(_sum, map(self.linear, parts), Terms())
            case ["-", part]:
                return _sum({}, self.linear(part), Fraction(-1))
            case ["-", first, *parts]:
                return reduce(lambda a, b: _sum(a, b, Fraction(-1)), map(self.linear, parts), self.linear(first))
            case ["*", one, two]:
                left, right = self.linear(one), self.linear(two)
                if not set(left) <= {""}:
                    left, right = right, left
                if set(left) <= {""}:
                    return _sum({}, right, left.get("", Fraction(0)))
        raise self.refuse(f"{_shown(expression)} is not a linear expression of +, - and *")

    def symbol(self, token: str) -> Terms:
        known = _NAME.fullmatch(token)
        if known is not None:
            if int(known[2]) not in self.declared[known[1]]:
                raise self.refuse(f"'{token}' is used before it is declared")
            return {token: Fraction(1)}
        if len(token) > _LONGEST or _NUMBER.fullmatch(token) is None or abs(Decimal(token).adjusted()) > _EXPONENT:
            raise self.refuse(
                f"'{token[:_LONGEST]}' is neither a variable nor a number within 1e-{_EXPONENT} and 1e{_EXPONENT}"
            )
        return {"": Fraction(token)}

    def cases(self, terms: Sequence[_Term], inputs: int) -> tuple[Case, ...]:
        """Return the conjunctions with boxes, one object for equal ones; those with an empty box hold nowhere."""
        seen, found = dict[Box, Box](), list[Case]()
        for term in terms:
            for name, bounds in (("lower", term.low), ("upper", term.high)):
                if len(bounds) < inputs:
                    at = next(i for i in range(inputs) if i not in bounds)
                    raise self.refuse(f"X_{at} has no {name} bound in one of the cases; every input needs both")
            low, high = (tuple(bounds[i] for i in range(inputs)) for bounds in (term.low, term.high))
            if all(a <= b for a, b in zip(low, high, strict=True)):
                box = seen.setdefault((low, high), (low, high))
                found.append(Case(box, tuple(term.rows)))
        return tuple(found)


def _sum(one: Terms, two: Terms, factor: Fraction = Fraction(1)) -> Terms:
    """Return one + factor · two."""
    result = dict(one)
    for name, value in two.items():
        result[name] = result.get(name, Fraction(0)) + factor * value
    return result


def _shown(expression: Expression) -> str:
    """Return the beginning of an expression as it was written."""
    if isinstance(expression, str):
        return expression[:_LONGEST]
    text = f"({' '.join(_shown(part) for part in expression[:4])}{' ...' if len(expression) > 4 else ''})"
    return text if len(text) <= 2 * _LONGEST else f"{text[: 2 * _LONGEST]} ..."


def outward(box: Box) -> tuple[Tensor, Tensor]:
    """Return the box in float64, rounded outwards."""
    low, high = (torch.tensor([float(v) for v in side], dtype=torch.float64) for side in box)
    inf = torch.tensor(torch.inf, dtype=torch.float64)
    above = torch.tensor([Fraction(float(v)) > v for v in box[0]])
    below = torch.tensor([Fraction(float(v)) < v for v in box[1]])
    return torch.where(above, low.nextafter(-inf), low), torch.where(below, high.nextafter(inf), high)


def inward(box: Box) -> tuple[Tensor, Tensor]:
    """Return the float32 numbers in the box; if there is none between two bounds, the one nearest to the lower."""
    low, high = (torch.tensor([float(v) for v in side]) for side in box)
    inf = torch.tensor(torch.inf)
    below = torch.tensor([Fraction(v) < bound for v, bound in zip(low.tolist(), box[0], strict=True)])
    above = torch.tensor([Fraction(v) > bound for v, bound in zip(high.tolist(), box[1], strict=True)])
    floor = torch.where(below, low.nextafter(inf), low)
    ceiling = torch.where(above, high.nextafter(-inf), high)
    return torch.where(floor > ceiling, low, floor), torch.where(floor > ceiling, low, ceiling)


def results_text(status: str, x: Tensor | None = None, y: Tensor | None = None, box: Box | None = None) -> str:
    """Return the text of a results file of the competition: unsat, unknown, or sat with inputs and outputs.

    Inputs x are float32 (inputs,); they are written as decimals in the box that round to them.
    """
    if x is None or y is None or box is None:
        return {"verified": "unsat"}.get(status, "unknown") + "\n"
    places = zip(x.flatten().tolist(), *box, strict=True)
    inputs = (_decimal(min(max(Fraction(value), low), high)) for value, low, high in places)
    values = [*(f"(X_{i} {v})" for i, v in enumerate(inputs)), *(f"(Y_{k} {v})" for k, v in enumerate(y.tolist()))]
    return "sat\n(" + "\n ".join(values) + ")\n"


def _decimal(value: Fraction) -> str:
    digits = Context(prec=1200)  # decimals and floats end before
    return format(digits.divide(Decimal(value.numerator), Decimal(value.denominator)), "f")
