"""How a chat goes on after an assistant's turn: the part of a template that stands there.

A template renders whole chats only. So it is rendered with marks in the place of contents, and cut
at them. What fills the places is text and nothing else: where it spells a control token, it is
encoded in pieces, so that no tool can end a turn or begin one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from gruppo.types import Message

Render = Callable[[list[dict[str, Any]]], str]
_TURN: Final = "gruppo0turn0"
_MARK: Final = "gruppo0mark{}0"


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a rendered chat; ``is_content``: it came out of a message."""

    text: str
    is_content: bool


def pieces_after_turn(messages: Sequence[Message], render: Render) -> list[Piece]:
    """What the template puts after an assistant's turn when ``messages`` follow it.

    Args:
        messages: what follows; at least one.
        render: renders a chat with the opening of the next turn.

    Raises:
        ValueError: the template cannot be cut between a turn and what follows.
    """
    head = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _TURN}]
    marks = [_MARK.format(index) for index in range(len(messages))]

    def after_turn(contents: Sequence[str]) -> str:
        tail = [
            {"role": message.role, "content": content}
            for message, content in zip(messages, contents, strict=True)
        ]
        try:
            text = render([*head, *tail])
        except TemplateError as error:
            raise _uncuttable(f"it refuses such a chat ({error})", messages) from error
        _, found, after = text.partition(_TURN)
        if not found:
            raise _uncuttable("it does not write an assistant's turn as it is", messages)
        return after

    marked = after_turn(marks)
    if _TURN in marked:  # in a content it may stand: contents come later
        raise _uncuttable("it writes an assistant's turn twice", messages)
    frame = _split(marked, marks, messages)
    shown = []
    for index, message in enumerate(messages):
        contents = [*marks[:index], message.content, *marks[index + 1 :]]
        before, after = _around(frame, marks, index)
        text = after_turn(contents)
        if len(text) < len(before + after) or not (
            text.startswith(before) and text.endswith(after)
        ):
            raise _uncuttable("it writes other things for other contents", messages)
        shown.append(text[len(before) : len(text) - len(after)])
    pieces = [Piece(frame[0], False)]
    for content, between in zip(shown, frame[1:], strict=True):
        pieces += [Piece(content, True), Piece(between, False)]
    return pieces


def _split(text: str, marks: Sequence[str], messages: Sequence[Message]) -> list[str]:
    """What stands before, between and after the marks."""
    frame = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise _uncuttable("it does not write a message's content once", messages)
        frame.append(before)
    return [*frame, text]


def _around(frame: Sequence[str], marks: Sequence[str], index: int) -> tuple[str, str]:
    """The rendered text before and after content ``index``, marks in the other places."""
    before = "".join(text + mark for text, mark in zip(frame[:index], marks[:index], strict=True))
    rest = zip(marks[index + 1 :], frame[index + 2 :], strict=True)
    return before + frame[index], frame[index + 1] + "".join(mark + text for mark, text in rest)


def _uncuttable(reason: str, messages: Sequence[Message]) -> ValueError:
    roles = ", ".join(sorted({message.role for message in messages}))
    return ValueError(
        f"the chat template cannot go on after an assistant's turn with a message of role {roles}: "
        f"{reason}. Use a model whose chat template takes several turns (and this role)"
    )


def encode_pieces(pieces: Sequence[Piece], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids of a text in which control tokens count in the template's own parts only.

    As long as no content spells a control token the text is encoded as a whole.
    """
    text = "".join(piece.text for piece in pieces)
    controls = tokenizer.added_tokens_decoder
    names = [str(token) for token in controls.values()]
    cuts = [0, *_cuts(pieces, names), len(text)]
    parts = [text[start:end] for start, end in pairwise(cuts)]
    ids = [i for part in parts for i in _encode(part, tokenizer)]
    wanted = [i for p in pieces if not p.is_content for i in _encode(p.text, tokenizer)]
    if [i for i in ids if i in controls] == [i for i in wanted if i in controls]:
        return tuple(ids)
    # a tokenizer that reads control tokens out of other spellings: leave them out of contents
    return tuple(
        i
        for piece in pieces
        for i in _encode(piece.text, tokenizer)
        if not (piece.is_content and i in controls)
    )


def _cuts(pieces: Sequence[Piece], names: Collection[str]) -> list[int]:
    """Where the text must be cut so that no control token that touches a content is whole."""
    text = "".join(piece.text for piece in pieces)
    cuts: set[int] = set()
    start = 0
    for piece in pieces:
        end = start + len(piece.text)
        if piece.is_content and piece.text:
            cuts |= _spelled(text, names, start, end)
        start = end
    return sorted(cuts)


def _spelled(text: str, names: Collection[str], start: int, end: int) -> set[int]:
    """Positions inside every name that overlaps ``text[start:end]``."""
    found = set()
    for name in names:
        if len(name) < 2:  # it cannot be cut, and is no more than a character
            continue
        at = text.find(name, max(0, start - len(name) + 1))
        while 0 <= at < end:
            found.add(at + 1)
            at = text.find(name, at + 1)
    return found


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False)) if text else []
