"""Validation of a recipe's sections: all mistakes at once, in words.

pydantic does the type work on each section by itself. Its first pass cannot see behind a mistake
(a record with an unknown key is never made, so its own checks do not run), hence the mistakes
are taken out and the rest is validated again until nothing new is found.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from gruppo.recipe.fields import hints, is_tagged, item_annotation, normalise, record_for, records
from gruppo.recipe.mistakes import Mistake, did_you_mean, mistake, nearest

_MAX_PASSES: Final = 20  # each pass removes a mistake; more passes than that teach nobody

_WORDS: Final = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text in quotes",
    "tuple_type": "must be a list, such as [1, 8]",
    "list_type": "must be a list",
    "dict_type": "must be a table of key = value",
    "dataclass_type": "must be a table of key = value",
    "none_required": 'must be "none"',
    "missing": "is required",
    "too_long": "has too many entries",
}

_ABSENT: Final = frozenset({"missing", "union_tag_not_found"})


@dataclass(frozen=True, slots=True)
class Checked:
    """Outcome of one section: the record, or None and what is wrong."""

    value: Any
    mistakes: tuple[Mistake, ...]


def check_section(name: str, record: type, data: object) -> Checked:
    """Validate one section's table against its record, collecting every mistake in it."""
    if not isinstance(data, dict):
        return Checked(None, (mistake(name, "must be a table: [" + name + "]", data),))
    rest = normalise(record, data)
    found: dict[str, Mistake] = {}
    for attempt in range(_MAX_PASSES):
        try:
            text = json.dumps(rest, default=str)
            value = _adapter(record).validate_json(text, strict=True)
        except ValidationError as error:
            places = [_place(record, rest, details["loc"]) for details in error.errors()]
            for place, details in zip(places, error.errors(), strict=True):
                if attempt > 0 and details["type"] in _ABSENT:
                    continue  # absent because a mistake was taken out
                entry = _explain(name, place, details)
                found.setdefault(entry.path, entry)
            before, rest = rest, _without(rest, [place.keys for place in places])
            if before == rest:
                break
        else:
            return Checked(None if found else value, tuple(found.values()))
    return Checked(None, tuple(found.values()))


@cache
def _adapter(record: type) -> TypeAdapter:
    return TypeAdapter(record)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a mistake is: real keys (no union tags), the annotation there, the known siblings."""

    keys: tuple[str | int, ...]
    annotation: object
    siblings: tuple[str, ...]
    value: object


def _place(record: type, data: object, location: Sequence[str | int]) -> _Place:
    """Follow pydantic's location, which also holds union tags, through the data and its types."""
    keys: list[str | int] = []
    annotation: object = record
    siblings: tuple[str, ...] = ()
    todo = list(location)
    while todo:
        if isinstance(data, dict) and is_tagged(annotation):
            todo.pop(0)  # the tag
            if not todo:
                break
        if not isinstance(data, (dict, list)):
            break  # what is left names the alternatives of a union of plain types
        key = todo.pop(0)
        keys.append(key)
        if isinstance(data, list):
            assert isinstance(key, int), "lists are entered by number"
            annotation, data = item_annotation(annotation, key), _item(data, key)
            continue
        chosen = record_for(annotation, data)
        known = hints(chosen) if chosen is not None else {}
        annotation, siblings = known.get(str(key), object), tuple(known)
        data = data.get(str(key))
    return _Place(tuple(keys), annotation, siblings, data)


def _item(data: list[Any], index: int) -> object:
    return data[index] if index < len(data) else None


def _explain(section: str, place: _Place, details: Mapping[str, Any]) -> Mistake:
    path = ".".join([section, *map(str, place.keys)])
    match details["type"]:
        case "unexpected_keyword_argument":
            reason = did_you_mean(place.keys[-1], place.siblings, "key")
            return mistake(path, reason, details["input"])
        case "union_tag_invalid":
            kind = place.value.get("kind") if isinstance(place.value, dict) else place.value
            known = [name for name in records(place.annotation) if name]
            return mistake(f"{path}.kind", did_you_mean(kind, known, "kind"), kind)
        case "union_tag_not_found":
            known = ", ".join(sorted(name for name in records(place.annotation) if name))
            return mistake(f"{path}.kind", f"is required: one of {known}")
        case "missing":
            return mistake(path, "is required")
        case "literal_error":
            return mistake(path, _literal_reason(details), details["input"])
        case "value_error":
            reason = str(details["ctx"]["error"])
            return Mistake(path=path, value="", reason=reason)
        case other:
            return mistake(path, _WORDS.get(other, details["msg"]), details["input"])


def _literal_reason(details: Mapping[str, Any]) -> str:
    expected = str(details["ctx"]["expected"])
    known = [word.strip(" '") for word in expected.replace(" or ", ", ").split(",")]
    close = nearest(details["input"], known)
    hint = f'; did you mean "{close}"?' if close else ""
    return f"must be one of {expected}{hint}"


def _without(data: Any, places: Sequence[tuple[str | int, ...]]) -> Any:
    """A copy of ``data`` with the mistaken keys taken out, deepest and last list entries first."""
    copy = json.loads(json.dumps(data, default=str))
    order = sorted(set(places), key=lambda keys: [(str(type(k)), k) for k in keys], reverse=True)
    for keys in order:
        if not keys:
            return {}
        parent: Any = copy
        for key in keys[:-1]:
            parent = parent[key] if _has(parent, key) else {}
        if _has(parent, keys[-1]):
            del parent[keys[-1]]
        elif len(keys) > 1:  # a required key is absent: give up the table that lacks it
            copy = _without(copy, [keys[:-1]])
    return copy


def _has(container: Any, key: str | int) -> bool:
    if isinstance(container, dict):
        return key in container
    return isinstance(container, list) and isinstance(key, int) and key < len(container)
