r"""Worker side of the math reward: tells if two LaTeX answers are equal, by math-verify's rules.

Runs inside ``child.py``, never imported by the trainer. Each check has a CPU and a wall-clock
timer whose signals keep their default action (the process ends), and an address space limit set
once per process, so no input can hold a worker. No text is evaluated as Python: answers go through
the LaTeX grammar alone.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import NormalizationConfig, latex2sympy, normalize_latex
from math_verify.grader import should_treat_as_complex, verify

FORK = True

# sympy's own annotations deny most of what its objects can do.
Expr = Any

# Equal numbers may be given with 6 digits ("0.333333" for 1/3, math-verify's rounding), no fewer.
_TOLERANCE: Expr = sympy.Rational(1, 10**5)
_DIGITS = 30
# Where two formulas are compared as numbers: positive, unequal, and no roots of small equations.
_POINTS = (("0.7320508", "1.3195079"), ("2.2360679", "0.5877853"))


def make(settings: dict) -> tuple[Callable[[bytes], object], dict]:
    """Return the handler: ``{"gold", "answer"}`` as JSON in, ``{"equal"}`` or a reason out."""
    logging.disable(logging.CRITICAL)
    cpu, wall, memory = settings["cpu_s"], settings["wall_s"], settings["memory_bytes"]
    compare(r"\frac{1}{2}+x", r"x+\frac{2}{4}")  # fills the grammar's caches before the first fork

    def handle(payload: bytes) -> dict:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        request = json.loads(payload)
        signal.setitimer(signal.ITIMER_PROF, cpu)
        signal.setitimer(signal.ITIMER_REAL, wall)
        try:
            return compare(request["gold"], request["answer"])
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)

    return handle, {}


def compare(gold: str, answer: str) -> dict:
    """Return ``{"equal": bool}``, or ``{"gold": why}`` / ``{"answer": why}`` if unreadable."""
    parsed = []
    for name, text in (("gold", gold), ("answer", answer)):
        try:
            parsed.append(read(text))
        except (MemoryError, RecursionError):
            raise
        except Exception as error:
            return {name: f"{type(error).__name__}: {error}"[:200]}
    expected, given = _as_sets(*parsed)
    if not verify(_side(expected), _side(given), timeout_seconds=None):
        return {"equal": False}
    factors = (1, 100, sympy.Rational(1, 100)) if "%" in gold + answer else (1,)
    return {"equal": not _far_apart(expected, given, factors)}


@lru_cache(maxsize=4096)
def read(text: str) -> Expr:
    """Parse the whole of a LaTeX answer; whatever the grammar does not know is an error."""
    config = NormalizationConfig(
        basic_latex=True,
        units=True,
        malformed_operators=True,
        nits=True,
        boxed="none",
        equations=False,
    )
    normal = normalize_latex(text, config)
    if not normal.strip():
        raise ValueError("nothing is left of the answer")
    return latex2sympy(
        normal,
        is_real=not should_treat_as_complex(normal),
        convert_degrees=False,
        normalization_config=None,
    )


def _side(expr: Expr) -> Expr:
    """Return the right side of an equation of numbers: any two true ones would else be equal."""
    if isinstance(expr, sympy.Eq) and not expr.free_symbols:
        return expr.rhs
    return expr


def _as_sets(gold: Expr, given: Expr) -> tuple[Expr, Expr]:
    """Turn a chain of inequalities (0 <= x < 1) into its set where the other side is one."""
    sides = (gold, given)
    if not any(isinstance(side, sympy.Set) for side in sides):
        return sides
    return tuple(
        side.as_set() if isinstance(side, sympy.And) and len(side.free_symbols) == 1 else side
        for side in sides
    )


def _far_apart(gold: Expr, given: Expr, factors: tuple) -> bool:
    """True if the two are not equal as numbers, where they can be evaluated.

    ``factors`` are the readings of a percentage. math-verify rounds to 6 decimals and chops small
    terms, so that 1/2**99 "equals" 1/2**98.
    """
    symbols = sorted(gold.free_symbols | given.free_symbols, key=str)
    for low, step in _POINTS:
        start: Expr = sympy.Rational(low)
        width: Expr = sympy.Rational(step)
        point = {symbol: start + width * (i + 1) for i, symbol in enumerate(symbols)}
        left, right = _numbers(gold, point), _numbers(given, point)
        if left is None or right is None or len(left) != len(right):
            continue
        if not all(_near(a, b, factors) for a, b in zip(left, right, strict=True)):
            return True
    return False


def _numbers(expr: Expr, point: dict) -> list[Expr] | None:
    """Evaluate an expression, or the items of a tuple, set or matrix; None if it has no value."""
    expr = _side(expr)
    if isinstance(expr, sympy.Eq) and isinstance(expr.lhs, sympy.Symbol):
        expr = expr.rhs
    if isinstance(expr, sympy.MatrixBase):
        items = list(expr.flat())
    elif isinstance(expr, sympy.Tuple | sympy.FiniteSet):
        items = list(expr.args)
    else:
        items = [expr]
    if not all(isinstance(item, sympy.Expr) for item in items):
        return None
    values = [sympy.N(item.subs(point).doit(), _DIGITS) for item in items]
    if not all(value.is_number and value.is_finite for value in values):
        return None
    if isinstance(expr, sympy.FiniteSet):
        values.sort(key=lambda value: tuple(map(float, value.as_real_imag())))
    return values


def _near(a: Expr, b: Expr, factors: tuple) -> bool:
    """True if a = b * factor to the relative tolerance, for one of the factors."""
    size = max(abs(a), abs(b))
    return any(abs(a - b * factor) <= _TOLERANCE * size for factor in factors)
