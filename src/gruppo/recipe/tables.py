"""From records back to the tables that would make them; the inverse of validation.

Every field is written out, so that a dumped recipe does not change with a later default. It
writes no text: ``toml`` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from gruppo.recipe.custom import Custom
from gruppo.recipe.fields import NONE


def to_table(record: object) -> dict[str, Any]:
    """The table of a record. A field without value is left out, or "none" if its default has one.

    Example:
        >>> to_table(Custom(name="math:pi"))
        {'kind': 'math:pi'}
    """
    if isinstance(record, Custom):
        return {"kind": record.name} | ({"options": dict(record.options)} if record.options else {})
    assert is_dataclass(record), "only records become tables"
    table: dict[str, Any] = {}
    for entry in fields(record):
        value = object.__getattribute__(record, entry.name)
        if value is not None:
            table[entry.name] = _plain(value)
        elif entry.default is not None:
            table[entry.name] = NONE
    return table


def _plain(value: object) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return to_table(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` on top of ``under``: tables of one kind are merged key by key, all else replaces.

    A table that names no ``kind`` changes the one below it; one of another kind replaces it.

    Example:
        >>> merge({"a": {"kind": "x", "p": 1, "q": 2}}, {"a": {"q": 3}, "b": 4})
        {'a': {'kind': 'x', 'p': 1, 'q': 3}, 'b': 4}
        >>> merge({"a": {"kind": "x", "p": 1}}, {"a": {"kind": "y"}})
        {'a': {'kind': 'y'}}
    """
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(value, dict) and isinstance(below, dict) and _same_kind(below, value):
            result[key] = merge(below, value)
        else:
            result[key] = value
    return result


def _same_kind(below: Mapping[str, Any], above: Mapping[str, Any]) -> bool:
    return "kind" not in above or above["kind"] == below.get("kind")
