"""From a row's columns to a prompt: system text, worked examples, question template.

It makes messages, not token ids, and knows no chat template: that is the tokenizer's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import ClassVar

from gruppo.types import Message


def placeholders(template: str) -> tuple[str, ...]:
    """Column names that ``template`` uses, in order.

    Only plain ``{column}`` is allowed: no attributes, indices, conversions or format
    specifications, so that a template can print a column and nothing else.

    Raises:
        ValueError: on anything else, naming it.
    """
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"template: {template!r} is not a template ({error}); write {{{{ and }}}} for braces"
        ) from None
    names = []
    for _, name, spec, conversion in parsed:
        if name is None:
            continue
        if not name.strip() or spec or conversion or "[" in name:
            shown = "{" + name + (f"!{conversion}" if conversion else "")
            shown += (f":{spec}" if spec else "") + "}"
            raise ValueError(
                f"template: {shown} is not a column; write {{{{ and }}}} where braces are meant"
            )
        names.append(name)
    return tuple(names)


def as_text(value: object) -> str:
    """Text of a column's value: strings as they are, integers and finite floats in digits.

    Raises:
        ValueError: for null, booleans, lists and tables, whose text would be a guess.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or value is None:
        shown = "null" if value is None else str(value).lower()
        raise ValueError(f"is {shown}, not text; write it in quotes")
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"is {value}, not a finite number; remove the row or write a text")
        return repr(value)
    raise ValueError(f"is a {type(value).__name__}, not text; write it in quotes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompting:
    """How a row becomes a chat prompt.

    Args:
        system: text of the system message; None for no such message.
        template: text of the user message; ``{column}`` is replaced by that column's value,
            ``{{`` and ``}}`` are literal braces. ``question`` is the mapped question column.
        examples: worked examples (question, answer) shown before as user and assistant turns. The
            question goes through the template too, so examples look like the problem.

    Raises:
        ValueError: if the template has a bad placeholder, or examples cannot fill it.

    >>> ask = Prompting(system="Solve it.", template="Q: {question}", examples=(("1 + 1", "2"),))
    >>> [(m.role, m.content) for m in ask({"question": "2 + 3"})]
    [('system', 'Solve it.'), ('user', 'Q: 1 + 1'), ('assistant', '2'), ('user', 'Q: 2 + 3')]
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    system: str | None = None
    template: str = "{question}"
    examples: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        names = placeholders(self.template)
        if not names:
            raise ValueError(
                f"template: {self.template!r} has no placeholder, so every prompt would be the "
                "same; add {question}"
            )
        others = [name for name in names if name != "question"]
        if self.examples and others:
            raise ValueError(
                f"examples: they give a question only, but the template needs {{{others[0]}}}; "
                "remove it from the template, or the examples"
            )

    def __call__(self, columns: Mapping[str, object]) -> tuple[Message, ...]:
        """Make the prompt of one row.

        Args:
            columns: the row's values by column name; the question under ``question``.

        Raises:
            ValueError: if a placeholder names a column that the row lacks, or one without text.
        """
        head = [] if self.system is None else [Message("system", self.system)]
        for question, answer in self.examples:
            head += [
                Message("user", self._fill({"question": question})),
                Message("assistant", answer),
            ]
        return (*head, Message("user", self._fill(columns)))

    def chat(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """Make the prompt of a row whose question is a chat already: it is kept as it is.

        The system text is put in front unless the chat has one.

        Raises:
            ValueError: if a template or examples are set, which a whole chat has no place for.
        """
        if self.template != "{question}" or self.examples:
            raise ValueError(
                "is a chat, which a template and worked examples cannot be applied to; remove "
                "them, or map the question to a text column"
            )
        if self.system is None or any(message.role == "system" for message in messages):
            return tuple(messages)
        return (Message("system", self.system), *messages)

    def _fill(self, columns: Mapping[str, object]) -> str:
        pieces = []
        for literal, name, _, _ in Formatter().parse(self.template):
            pieces.append(literal)
            if name is None:
                continue
            if name not in columns:
                raise ValueError(
                    f"field {name!r}: the template asks for it, but the row has only "
                    f"{', '.join(sorted(columns))}; rename the placeholder or add the column"
                )
            try:
                pieces.append(as_text(columns[name]))
            except ValueError as error:
                raise ValueError(f"field {name!r}: {error}") from None
        return "".join(pieces)
