"""Arguments of a tool call against the tool's JSON schema.

Only what the schemas of typed Python functions use: types, ``nullable``, ``enum``, ``anyOf``,
items, properties and ``required``. A call is refused with a reason that a model can act on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def mistake_in(arguments: object, schema: Mapping[str, object]) -> str | None:
    """What is wrong with ``arguments`` (parsed JSON), or None.

    >>> schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    >>> mistake_in({"n": 1}, schema), mistake_in({"m": 1}, schema)
    (None, "argument 'n' is missing")
    >>> mistake_in({"n": "1"}, schema)
    "argument 'n' must be of type integer, not string"
    """
    if not isinstance(arguments, dict):
        return f"arguments must be a JSON object, not {_name(arguments)}"
    properties = _table(schema, "properties")
    required = schema.get("required", [])
    for name in required if isinstance(required, list) else []:
        if name not in arguments:
            return f"argument {name!r} is missing"
    for name, value in arguments.items():
        if name not in properties:
            known = ", ".join(properties) or "none"
            return f"argument {name[:80]!r} is unknown; there are: {known}"
        if wrong := _mistake(value, _table(properties, name), f"argument {name!r}"):
            return wrong
    return None


def _mistake(value: object, schema: Mapping[str, object], where: str) -> str | None:
    if value is None and schema.get("nullable"):
        return None
    options = schema.get("anyOf")
    if isinstance(options, list):
        if all(_mistake(value, option, where) for option in options):
            return f"{where} is of none of the allowed types"
        return None
    wrong = _wrong_type(value, schema.get("type"))
    if wrong is not None:
        return f"{where} must be of type {wrong}, not {_name(value)}"
    allowed = schema.get("enum")
    if isinstance(allowed, list) and value not in allowed:
        return f"{where} must be one of {', '.join(map(str, allowed))}"
    return _mistake_inside(value, schema, where)


def _mistake_inside(value: object, schema: Mapping[str, object], where: str) -> str | None:
    items = _table(schema, "items")
    if isinstance(value, list) and items:
        found = (_mistake(entry, items, f"{where}[{n}]") for n, entry in enumerate(value))
        return next((wrong for wrong in found if wrong), None)
    if isinstance(value, dict) and "properties" in schema:
        wrong = mistake_in(value, schema)
        return None if wrong is None else f"{where}: {wrong}"
    values = _table(schema, "additionalProperties")
    if isinstance(value, dict) and values:
        found = (_mistake(entry, values, f"{where}[{key[:40]!r}]") for key, entry in value.items())
        return next((wrong for wrong in found if wrong), None)
    return None


def _wrong_type(value: object, wanted: object) -> str | None:
    """The types wanted, if ``value`` is of none of them."""
    if wanted is None or wanted == "any":
        return None
    names = [wanted] if isinstance(wanted, str) else list(wanted)  # pyrefly: ignore
    if any(_is_a(value, name) for name in names):
        return None
    return " or ".join(map(str, names))


def _is_a(value: object, name: object) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if isinstance(value, float):
        return name == "number" and math.isfinite(value)
    return isinstance(value, _TYPES.get(str(name), (object,)))


def _table(table: Mapping[str, object], key: str) -> Mapping[str, object]:
    found = table.get(key)
    return found if isinstance(found, dict) else {}


def _name(value: object) -> str:
    if isinstance(value, bool):
        return "boolean"
    return next((name for name, kinds in _TYPES.items() if isinstance(value, kinds)), "number")
