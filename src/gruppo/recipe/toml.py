"""Writing TOML: as much of it as a recipe needs (the standard library only reads it).

Tables become sections, lists of tables become ``[[section]]``, everything else is one line. It
does not keep comments or order beyond what it is given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Final

_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")


def write_toml(data: Mapping[str, object]) -> str:
    r"""TOML text of nested mappings of text, numbers, booleans, lists and mappings.

    Example:
        >>> print(write_toml({"train": {"steps": 3, "k": [1, 8]}}), end="")
        [train]
        steps = 3
        k = [1, 8]
    """
    return "\n".join(_table((), data)).lstrip("\n") + "\n"


def _table(path: tuple[str, ...], table: Mapping[str, object]) -> Iterator[str]:
    """Plain values first: below a sub-table's header they would belong to it."""
    for key, value in table.items():
        if not isinstance(value, Mapping) and not _is_tables(value):
            yield f"{_key(key)} = {_value(value)}"
    for key, value in table.items():
        inner = (*path, key)
        name = ".".join(_key(part) for part in inner)
        if isinstance(value, Mapping):
            yield from ["", f"[{name}]", *_table(inner, value)]
        elif isinstance(value, list | tuple) and _is_tables(value):
            for entry in value:
                yield from ["", f"[[{name}]]", *_table(inner, entry)]


def _is_tables(value: object) -> bool:
    is_list = isinstance(value, list | tuple) and len(value) > 0
    return is_list and all(isinstance(entry, Mapping) for entry in value)


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _text(key)


def _value(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case float():
            return repr(value)  # the shortest text that reads back as the same number
        case str():
            return _text(value)
        case list() | tuple():
            return f"[{', '.join(_value(entry) for entry in value)}]"
        case Mapping():
            inner = ", ".join(f"{_key(key)} = {_value(entry)}" for key, entry in value.items())
            return f"{{{inner}}}"
        case _:
            raise ValueError(f"{value!r} has no TOML form")


def _text(text: str) -> str:
    """A basic string. JSON's escapes are TOML's, but for DEL, which TOML wants escaped too."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
