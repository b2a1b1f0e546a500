"""Parts from outside gruppo, named in a recipe as ``kind = "package.module:NAME"``.

The name is looked up when the recipe is read, so that a wrong one is refused with the rest of
the mistakes. What the object does is not checked here: the layer that calls it does that.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Custom:
    """An object by import path: ``name`` is "package.module:NAME", ``options`` go to its call.

    With options, NAME is called with them (it is a class or a factory); without, a class is
    called with none and any other object is used as it is. Raises ValueError if there is no such
    module or name.

    Example:
        >>> Custom(name="fractions:Fraction", options={"numerator": 3}).build()
        Fraction(3, 1)
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["custom"] = "custom"
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.find()

    def find(self) -> object:
        """The named object itself."""
        module_name, colon, name = self.name.partition(":")
        if not colon or not module_name or not name:
            raise ValueError(f"{self.name!r} must read package.module:NAME")
        try:
            module = importlib.import_module(module_name)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"cannot import {module_name!r} ({error}); write package.module:NAME and make "
                "sure the package is installed or on PYTHONPATH"
            ) from error
        if name not in vars(module):
            raise ValueError(f"module {module_name!r} has no {name!r}")
        return vars(module)[name]

    def build(self) -> Any:
        """The part that the recipe means: NAME called with the options, or NAME itself."""
        found = self.find()
        if not self.options and not isinstance(found, type):
            return found
        if not callable(found):
            raise ValueError(f"{self.name} takes no options: it is not callable")
        try:
            return found(**self.options)
        except TypeError as error:
            raise ValueError(f"{self.name} refuses its options: {error}") from error


def expand(table: Mapping[str, object]) -> dict[str, object]:
    """``{kind = "a.b:C", x = 1}`` written out as the table of a ``Custom``.

    Example:
        >>> expand({"kind": "a.b:C", "x": 1})
        {'kind': 'custom', 'name': 'a.b:C', 'options': {'x': 1}}
    """
    options = {key: value for key, value in table.items() if key != "kind"}
    if list(options) == ["options"] and isinstance(options["options"], dict):
        options = options["options"]
    return {"kind": "custom", "name": table["kind"], "options": options}


def is_custom(table: object) -> bool:
    """Whether a table names a part from outside."""
    return isinstance(table, dict) and isinstance(table.get("kind"), str) and ":" in table["kind"]
