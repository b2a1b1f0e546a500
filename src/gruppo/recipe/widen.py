"""Records with further keys: the type of a flat table that holds a record's fields and more.

``[[reward.parts]]`` is a reward's settings beside a name and a weight, ``[[data.train]]`` a source
beside a weight. The types are made from the records, so that no field is repeated here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from functools import cached_property, reduce
from operator import or_
from typing import Annotated, Any

from pydantic import Discriminator

from gruppo.recipe.fields import hints


@dataclass(frozen=True, kw_only=True)
class Wide:
    """How a record is widened.

    Args:
        record: a frozen dataclass; its own checks run when the wide one is made.
        own: annotation and default of each further field (``dataclasses.MISSING``: required).
        renamed: fields of the record that have another name in the table.
        optional: required fields of the record that may be left out of the table: then its
            checks wait for ``make``.
    """

    record: type
    own: Mapping[str, tuple[Any, Any]]
    renamed: Mapping[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()

    @cached_property
    def type(self) -> type:
        """The frozen dataclass of the flat table."""
        ours = [(key, kind, _default(default)) for key, (kind, default) in self.own.items()]
        theirs = [self._field(entry) for entry in fields(self.record)]
        names = [entry[0] for entry in (*ours, *theirs)]
        assert len(set(names)) == len(names), f"{self.record.__name__}: a key twice in {names}"
        check = self._check

        def post_init(table: Any) -> None:
            check(table)

        return make_dataclass(
            f"Wide{self.record.__name__}",
            [*ours, *theirs],
            namespace={"__pydantic_config__": {"extra": "forbid"}, "__post_init__": post_init},
            frozen=True,
            kw_only=True,
            slots=True,
        )

    def make(self, table: Any, **missing: Any) -> Any:
        """The record that a flat table means; ``missing`` fills optional fields left out."""
        settings = self._settings(table)
        known = {key: value for key, value in missing.items() if settings.get(key, 0) is None}
        return self.record(**{**settings, **known})

    def extra(self, table: Any) -> dict[str, Any]:
        """The further keys of a flat table, by name."""
        return {key: value_of(table, key) for key in self.own}

    def _settings(self, table: Any) -> dict[str, Any]:
        names = [entry.name for entry in fields(self.record)]
        return {name: value_of(table, self.renamed.get(name, name)) for name in names}

    def _check(self, table: Any) -> None:
        settings = self._settings(table)
        if all(settings.get(name, 0) is not None for name in self.optional):
            self.record(**settings)

    def _field(self, entry: Field[Any]) -> tuple[str, Any, Any]:
        name = entry.name
        annotation: Any = hints(self.record)[name]
        shown = self.renamed.get(name, name)
        if entry.default_factory is not MISSING:
            return shown, annotation, field(default_factory=entry.default_factory)
        if name in self.optional and entry.default is MISSING:
            return shown, annotation | None, field(default=None)
        return shown, annotation, _default(entry.default)


def one_of(types: Iterable[type]) -> Any:
    """Annotation of a field that holds one of ``types``, told apart by ``kind``."""
    union: Any = reduce(or_, types)
    return Annotated[union, Discriminator("kind")]


def value_of(record: Any, name: str) -> Any:
    """A field's value by its name."""
    return object.__getattribute__(record, name)


def _default(default: Any) -> Any:
    return field() if default is MISSING else field(default=default)
