"""What a section may contain, read from the types of the records that make it up.

Three small questions about an annotation: which records may stand there, which one a given table
means, and which values need rewriting before validation (the text "none" for "no value", because
TOML has no null, and ``"cispo"`` for ``{kind = "cispo"}``). It validates nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from gruppo.recipe.custom import Custom, expand, is_custom

NONE: Final = "none"
"""How a recipe writes "no value" where a default has to be switched off."""


@functools.cache
def hints(record: type) -> Mapping[str, Any]:
    """Annotation of every field of a dataclass, in order."""
    resolved = get_type_hints(record, include_extras=True)
    return {entry.name: resolved[entry.name] for entry in fields(record)}


def choices(annotation: object) -> tuple[object, ...]:
    """The alternatives of an annotation, unions and ``Annotated`` taken apart.

    Example:
        >>> choices(int | None)
        (<class 'int'>, <class 'NoneType'>)
    """
    origin = get_origin(annotation)
    if origin is Annotated:
        return choices(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return tuple(choice for part in get_args(annotation) for choice in choices(part))
    return (annotation,)


def records(annotation: object) -> dict[str, type]:
    """The dataclasses that may stand at an annotation, by their ``kind`` ("" without one)."""
    found = [choice for choice in choices(annotation) if isinstance(choice, type)]
    return {kind_of(choice): choice for choice in found if is_dataclass(choice)}


def kind_of(record: type) -> str:
    """The default of the record's ``kind`` field; "" if it has none."""
    for entry in fields(record):
        if entry.name == "kind" and entry.default is not MISSING:
            return str(entry.default)
    return ""


def is_tagged(annotation: object) -> bool:
    """Whether ``kind`` chooses between several records here."""
    return len(records(annotation)) > 1


def record_for(annotation: object, data: object) -> type | None:
    """The record that a table means, None if it means none of them (or there is none)."""
    known = records(annotation)
    if len(known) == 1:
        return next(iter(known.values()))
    kind = data.get("kind") if isinstance(data, Mapping) else None
    return known.get(kind) if isinstance(kind, str) else None


def item_annotation(annotation: object, index: int) -> object:
    """Annotation of entry ``index`` of a list (``object`` if the annotation is no list)."""
    for choice in choices(annotation):
        if get_origin(choice) is tuple:
            arguments = get_args(choice)
            if len(arguments) == 2 and arguments[1] is Ellipsis:
                return arguments[0]
            return arguments[index] if index < len(arguments) else object
    return object


def normalise(annotation: object, data: object) -> object:
    """``data`` with "none" and bare kind names written out, as far as the types say what is meant.

    Example:
        >>> normalise(float | None, "none"), normalise(str, "none")
        (None, 'none')
    """
    if isinstance(data, str):
        return _normalise_text(annotation, data)
    if isinstance(data, list):
        return [normalise(item_annotation(annotation, i), entry) for i, entry in enumerate(data)]
    if not isinstance(data, dict):
        return data
    if is_custom(data) and Custom in choices(annotation):
        return expand(data)
    if is_custom(data) and "function" in records(annotation):
        data = {**data, "kind": "function", "function": data["kind"]}
    record = record_for(annotation, data)
    known = hints(record) if record is not None and record is not Custom else {}
    return {key: normalise(known.get(key, object), value) for key, value in data.items()}


def _normalise_text(annotation: object, text: str) -> object:
    alternatives = choices(annotation)
    words = [w for c in alternatives if get_origin(c) is Literal for w in get_args(c)]
    if str in alternatives or text in words:
        return text
    if text == NONE and NoneType in alternatives:
        return None
    if any(kind_of(record) for record in records(annotation).values()):
        return normalise(annotation, {"kind": text})
    return text
