"""Python values as JSON: how arguments enter a box and results leave it.

Plain values are plain JSON; what JSON lacks is an object with one key that begins with "$":
``$tuple``, ``$set``, ``$frozenset``, ``$dict`` (pairs), ``$bytes`` (hex), ``$int`` (hex, beyond 53
bits), ``$float`` (nan, inf, -inf), ``$complex``. Types are exact: no subclass is a value.

The trusted side never rebuilds a value that came out of a box: it checks the JSON (``check``) and
compares JSON with JSON (``same``). So no ``__eq__`` of the box runs, and no set of numbers made to
collide is hashed. This file is also loaded inside the box and imports the standard library alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

MAX_DEPTH: Final = 64
MAX_NODES: Final = 200_000
MAX_BITS: Final = 1 << 16
_PLAIN_INT: Final = 1 << 53
_SEQUENCES: Final[dict[type, str]] = {tuple: "$tuple", set: "$set", frozenset: "$frozenset"}


class Unsendable(ValueError):
    """A value that has no JSON form here: an object, a subclass, too deep or too large."""


def encode(value: object) -> Any:
    """The JSON form of a value.

    >>> encode((1, 2.0)), encode({1: "a"}), encode(float("nan"))
    ({'$tuple': [1, 2.0]}, {'$dict': [[1, 'a']]}, {'$float': 'nan'})

    Raises:
        Unsendable: it has none.
    """
    return _encode(value, MAX_DEPTH, [MAX_NODES])


def decode(data: Any) -> Any:
    """The value that a JSON form stands for. Only for data that we made or read from a data set.

    >>> decode({"$dict": [[1, {"$tuple": [True]}]]})
    {1: (True,)}

    Raises:
        ValueError: it stands for none.
    """
    if isinstance(data, list):
        return [decode(entry) for entry in data]
    if not isinstance(data, dict):
        return data
    tag = _tag(data)
    if tag is None:
        return {key: decode(entry) for key, entry in data.items()}
    if tag not in _DECODERS:
        raise ValueError(f"{tag!r} is no tag of a value; there are {', '.join(_DECODERS)}")
    return _DECODERS[tag](data[tag])


def check(data: object) -> Any:
    """Return JSON that came out of a box if it is the form of some value.

    Raises:
        Unsendable: it is not, or is deeper or larger than ``encode`` makes them.
    """
    budget = [MAX_NODES]
    stack: list[tuple[object, int]] = [(data, MAX_DEPTH)]
    while stack:
        entry, depth = stack.pop()
        budget[0] -= 1
        if depth < 0 or budget[0] < 0:
            raise Unsendable("the value is too deep or too large")
        if isinstance(entry, list):
            stack += [(child, depth - 1) for child in entry]
        elif isinstance(entry, dict):
            stack += [(child, depth - 1) for child in _children(entry)]
        elif isinstance(entry, float) and not math.isfinite(entry):
            raise Unsendable("JSON has no such number")
    return data


def same(expected: Any, given: Any) -> bool:
    """Whether two JSON forms stand for values of equal types and contents.

    Sets and dictionaries are equal in any order; a number that is not one equals itself.

    >>> same(1, True), same(1, 1.0), same([1], {"$tuple": [1]})
    (False, False, False)
    >>> same({"$set": [1, 2]}, {"$set": [2, 1]}), same({"a": 1, "b": 2}, {"b": 2, "a": 1})
    (True, True)
    """
    return _ordered(expected) == _ordered(given)


def _encode(value: object, depth: int, budget: list[int]) -> Any:
    budget[0] -= 1
    if depth < 0 or budget[0] < 0:
        raise Unsendable("the value is too deep or too large")
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind in _SCALARS:
        return _SCALARS[kind](value)
    if kind is list:
        return [_encode(entry, depth - 1, budget) for entry in value]  # type: ignore[attr-defined]
    if kind in _SEQUENCES:
        entries = [_encode(entry, depth - 1, budget) for entry in value]  # type: ignore[attr-defined]
        return {_SEQUENCES[kind]: entries}
    if kind is dict:
        return _encode_dict(value, depth, budget)  # type: ignore[arg-type]
    raise Unsendable(f"a value of type {kind.__name__[:80]!r} cannot leave the box")


def _encode_dict(value: dict[Any, Any], depth: int, budget: list[int]) -> Any:
    if all(type(key) is str and not key.startswith("$") for key in value):
        return {key: _encode(entry, depth - 1, budget) for key, entry in value.items()}
    pairs = [
        [_encode(key, depth - 2, budget), _encode(entry, depth - 2, budget)]
        for key, entry in value.items()
    ]
    return {"$dict": pairs}


def _encode_int(value: Any) -> Any:
    if -_PLAIN_INT < value < _PLAIN_INT:
        return value
    if value.bit_length() > MAX_BITS:
        raise Unsendable(f"a whole number of {value.bit_length()} bits is too large")
    return {"$int": hex(value)}


def _encode_float(value: Any) -> Any:
    return value if math.isfinite(value) else {"$float": str(value)}


def _encode_bytes(value: Any) -> Any:
    return {"$bytes": value.hex()}


def _encode_complex(value: Any) -> Any:
    return {"$complex": [_encode_float(value.real), _encode_float(value.imag)]}


_SCALARS: Final[dict[type, Callable[[Any], Any]]] = {
    int: _encode_int,
    float: _encode_float,
    bytes: _encode_bytes,
    complex: _encode_complex,
}


def _decode_dict(pairs: Any) -> Any:
    return {decode(key): decode(entry) for key, entry in pairs}


def _decode_int(text: Any) -> Any:
    return int(text, 16)


def _decode_float(text: Any) -> Any:
    return float(text)


def _decode_tuple(entries: Any) -> Any:
    return tuple(decode(entries))


def _decode_set(entries: Any) -> Any:
    return set(decode(entries))


def _decode_frozenset(entries: Any) -> Any:
    return frozenset(decode(entries))


def _decode_complex(parts: Any) -> Any:
    return complex(*decode(parts))


_DECODERS: Final[dict[str, Callable[[Any], Any]]] = {
    "$tuple": _decode_tuple,
    "$set": _decode_set,
    "$frozenset": _decode_frozenset,
    "$dict": _decode_dict,
    "$bytes": bytes.fromhex,
    "$int": _decode_int,
    "$float": _decode_float,
    "$complex": _decode_complex,
}


def _tag(data: dict[str, Any]) -> str | None:
    """The "$" key of a form; None for a plain dictionary."""
    if len(data) == 1:
        key = next(iter(data))
        return key if key.startswith("$") else None
    return None


def _children(data: dict[str, Any]) -> list[Any]:
    """What a form holds, its own shape checked."""
    tag = _tag(data)
    if tag is None:
        if any(key.startswith("$") for key in data):
            raise Unsendable("a dictionary with a key that begins with $ must be $dict")
        return list(data.values())
    inner = data[tag]
    text = tag in ("$bytes", "$int", "$float")
    if tag not in _DECODERS or not isinstance(inner, str if text else list):
        raise Unsendable(f"{tag[:20]!r} is no form of a value")
    if tag == "$dict" and any(not isinstance(pair, list) or len(pair) != 2 for pair in inner):
        raise Unsendable("$dict must hold pairs")
    return list(inner) if isinstance(inner, list) else []


def _ordered(data: Any) -> str:
    """One text for all forms of equal values; ``True``, ``1`` and ``1.0`` have different ones."""
    return _text(_sorted(data))


def _sorted(data: Any) -> Any:
    if isinstance(data, list):
        return [_sorted(entry) for entry in data]
    if not isinstance(data, dict):
        return data + 0.0 if isinstance(data, float) else data  # -0.0 is 0.0
    inner = {key: _sorted(entry) for key, entry in data.items()}
    for tag in ("$set", "$frozenset", "$dict"):
        if tag in inner:
            inner[tag] = sorted(inner[tag], key=_text)
    return inner


def _text(data: Any) -> str:
    import json  # not above: nothing is compared in a box, where it is slow to import (WASI)

    return json.dumps(data, sort_keys=True)
