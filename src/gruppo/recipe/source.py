"""Reading a recipe's TOML, from a file or from the package, and applying ``--set`` overrides.

The outcome is plain nested dictionaries. What the keys mean, and whether they are right, is not
known here. Nothing is written and nothing but the one file is opened.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Final

from gruppo.recipe.mistakes import Mistake, RecipeError, did_you_mean, mistake, nearest

_MAX_BYTES: Final = 1 << 20  # a recipe is a page of text; more is some other file
_MAX_INTEGER: Final = 1 << 53  # beyond it a float can no longer hold the number


def packaged() -> dict[str, str]:
    """Text of every recipe that ships with gruppo, by name, sorted.

    Example:
        >>> "quickstart" in packaged()
        True
    """
    folder = resources.files("gruppo") / "recipes"
    entries = [entry for entry in folder.iterdir() if entry.name.endswith(".toml")]
    texts = {entry.name.removesuffix(".toml"): entry.read_text("utf-8") for entry in entries}
    return dict(sorted(texts.items()))


def read(name: str) -> str:
    """Text of the recipe file at path ``name``, or of the packaged recipe of that name.

    A file of that name is preferred. Raises RecipeError if there is neither, or no text in it.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return _read_file(path)
    known = packaged()
    if name in known:
        return known[name]
    if path.exists():
        raise RecipeError([mistake("", "is not a regular file; give a .toml file")], name)
    close = nearest(name, known)
    hint = f"did you mean {close!r}?" if close else "`gruppo recipes` lists the packaged ones."
    raise RecipeError([mistake("", f"no such file, and no packaged recipe; {hint}")], name)


def _read_file(path: Path) -> str:
    if path.stat().st_size > _MAX_BYTES:
        raise RecipeError([mistake("", "is larger than 1 MiB: not a recipe")], str(path))
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise RecipeError([mistake(f"line {line}", "is not UTF-8 text")], str(path)) from error


def parse(text: str, source: str = "recipe") -> dict[str, object]:
    r"""TOML text as nested dictionaries. Raises RecipeError with the line of a syntax error.

    Example:
        >>> parse("[train]\nsteps = 3")
        {'train': {'steps': 3}}
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError([mistake("", f"not valid TOML: {error}")], source) from error


def override(data: Mapping[str, object], settings: Iterable[str]) -> dict[str, object]:
    """A copy of ``data`` with every ``key.path=value`` of ``settings`` put in, in order.

    Values are TOML (``50``, ``[1, 8]``, ``{kind = "rloo"}``); anything that is not is taken as a
    string. An entry of a list is named by its number or by its ``name``. Raises RecipeError with
    all malformed settings at once.

    Example:
        >>> override({"train": {"steps": 3}}, ["train.steps=50", "model.name=some/model"])
        {'train': {'steps': 50}, 'model': {'name': 'some/model'}}
    """
    result = _copy_table(data)
    mistakes: list[Mistake] = []
    for setting in settings:
        path, equals, text = setting.partition("=")
        keys = [key.strip() for key in path.split(".")]
        if not equals or not all(keys):
            mistakes.append(mistake("--set", "must read section.key=value", setting))
            continue
        try:
            _put(result, keys, _value(text.strip()))
        except ValueError as error:
            mistakes.append(mistake(path.strip(), str(error)))
    if mistakes:
        raise RecipeError(mistakes, "--set")
    return result


def find_unusable_numbers(data: object, path: str = "") -> list[Mistake]:
    """Numbers that no key of a recipe can mean: nan, infinity, and integers beyond 2^53."""
    if isinstance(data, dict):
        parts = [(f"{path}.{key}" if path else str(key), value) for key, value in data.items()]
    elif isinstance(data, list):
        parts = [(f"{path}.{index}", value) for index, value in enumerate(data)]
    else:
        return _judge_number(data, path)
    return [found for where, value in parts for found in find_unusable_numbers(value, where)]


def _judge_number(value: object, path: str) -> list[Mistake]:
    if isinstance(value, float) and not math.isfinite(value):
        return [mistake(path, 'must be finite; "none" switches an optional number off', value)]
    if isinstance(value, int) and abs(value) > _MAX_INTEGER:
        return [mistake(path, "is too large", value)]
    return []


def _value(text: str) -> object:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError as error:
        if text[:1] in {"[", "{", '"', "'"}:
            raise ValueError(f"{text} is not valid TOML: {error}") from error
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _put(table: dict[str, object], keys: list[str], value: object) -> None:
    current: object = table
    for depth, key in enumerate(keys[:-1]):
        if isinstance(current, dict):
            current = current.setdefault(key, {})
        else:
            current = _entry(current, key, ".".join(keys[:depth]))
    if isinstance(current, dict):
        current[keys[-1]] = value
    elif isinstance(current, list):
        index = _entry_index(current, keys[-1], ".".join(keys[:-1]))
        current[index] = value
    else:
        raise ValueError(f"{'.'.join(keys[:-1])} holds a value, not a table")


def _entry(current: object, key: str, path: str) -> object:
    if not isinstance(current, list):
        raise ValueError(f"{path} holds a value, not a table")
    return current[_entry_index(current, key, path)]


def _entry_index(entries: list[object], key: str, path: str) -> int:
    names = [str(entry["name"]) for entry in entries if isinstance(entry, dict) and "name" in entry]
    if key.isdecimal() and int(key) < len(entries):
        return int(key)
    for index, entry in enumerate(entries):
        if isinstance(entry, dict) and entry.get("name") == key:
            return index
    raise ValueError(f"{path} has no entry {key!r}: {did_you_mean(key, names, 'name')}")


def _copy_table(data: Mapping[str, object]) -> dict[str, object]:
    return {key: _copy(value) for key, value in data.items()}


def _copy(value: object) -> object:
    if isinstance(value, dict):
        return _copy_table(value)
    return [_copy(entry) for entry in value] if isinstance(value, list) else value
