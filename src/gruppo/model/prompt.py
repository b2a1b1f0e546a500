"""Text to token ids and back, and which ids end a completion.

An :class:`Encoder` is used once per prompt; completions are never re-tokenised. It knows no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from types import MappingProxyType
from typing import Any, cast

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from gruppo.model.turns import encode_pieces, pieces_after_turn
from gruppo.types import Message

_PROBE = "gruppo"


class Encoder:
    """Encodes messages by the tokenizer's chat template, or as plain text.

    ``stop_tokens`` are all ids that end a completion: the given ones (the end ids of the
    generation configuration, see :func:`end_ids`), the tokenizer's end token, and the token that
    the chat template puts after an assistant's turn (it may differ from the end token).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat: bool = True,
        template_options: Mapping[str, object] = MappingProxyType({}),
        stop_tokens: Iterable[int] = (),
        tools: Sequence[Mapping[str, object]] = (),
        instructions: str = "",
    ) -> None:
        """Take a tokenizer and how to use it.

        Args:
            tokenizer: A Hugging Face tokenizer.
            chat: Whether to use the chat template; False joins the contents by blank lines.
            template_options: Extra variables of the template (``enable_thinking``, say).
            stop_tokens: Further ids that end a completion.
            tools: JSON schemas of functions, for the template's ``tools``.
            instructions: What the system prompt says of them if the template takes no tools.

        Raises:
            ValueError: ``chat`` is asked for and the tokenizer has no template, or no end token
                is known at all; tools are given without ``chat``.
        """
        if chat and not tokenizer.chat_template:
            raise ValueError(
                "chat = true, but this tokenizer has no chat template (a base model?); set "
                "chat = false to send prompts as plain text"
            )
        self.tokenizer = tokenizer
        self.chat = chat
        self.template_options = dict(template_options)
        if tools and not chat:
            raise ValueError("tools are told by a chat template: set chat = true")
        self.takes_tools = chat and self._shows(tools)
        if self.takes_tools:
            self.template_options["tools"] = list(tools)
        self._instructions = "" if self.takes_tools else instructions
        ends = [*stop_tokens, tokenizer.eos_token_id, self._turn_end() if chat else None]
        self.stop_tokens = tuple(sorted({end for end in ends if end is not None}))
        if not self.stop_tokens:
            raise ValueError(
                "the tokenizer has no end token, so no completion would ever end: give stop_tokens"
            )

    @property
    def pad_token(self) -> int:
        """Id for padding; masked everywhere, so any id does."""
        pad = self.tokenizer.pad_token_id
        return self.stop_tokens[0] if pad is None else pad

    def render(self, messages: Sequence[Message]) -> str:
        """The text that :meth:`encode` tokenises.

        A last message of the assistant is left open, for the completion to continue it.
        """
        if not self.chat:
            return "\n\n".join(message.content for message in messages)
        shown = self._instructed(messages)
        if self._instructions:  # the template knows no tools: neither does it know their results
            shown = self._told(shown)
        turns = [{"role": m.role, "content": m.content} for m in shown]
        opened = bool(turns) and turns[-1]["role"] == "assistant"
        return self._template(
            turns, add_generation_prompt=not opened, continue_final_message=opened
        )

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of a prompt; it starts with one BOS token at most and has no EOS appended."""
        # A chat template writes its special tokens itself.
        ids = list(self.tokenizer.encode(self.render(messages), add_special_tokens=not self.chat))
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        while bos is not None and ids[:2] == [bos, bos]:
            del ids[0]
        if not self.chat and eos != bos and ids[-1:] == [eos]:
            del ids[-1]
        return tuple(ids)

    def continuation(self, messages: Sequence[Message], *, after: int) -> tuple[int, ...]:
        """Token ids of ``messages`` after an assistant's turn, and of the next turn's opening.

        Contents are encoded as text: what spells a control token in them is none. Results of tools
        go in a user's turn, each in ``<tool_response>`` tags, if the template takes no tools; those
        that follow one another go in one turn, because many templates want turns to alternate.

        Args:
            messages: What follows the turn; at least one.
            after: The turn's last token. If it is not the end of a turn that the template writes
                (a stop string cut the turn short, say), that end is put first.

        Raises:
            ValueError: Prompts are plain text, or the template cannot be cut after a turn.
        """
        if not self.chat:
            raise ValueError("a dialogue needs a chat template: set chat = true")
        pieces = pieces_after_turn(
            self._told(messages),
            lambda turns: self._template(turns, add_generation_prompt=True),
        )
        ids = encode_pieces(pieces, self.tokenizer)
        if after not in self.stop_tokens:  # an end that a stop string cut off, even if it equals
            return ids  # what the template puts before it (a line break, say)
        # the template may put white space before the end of a turn
        ends = (at for at in range(min(len(ids), 3)) if ids[at] == after)
        end = next((at for at in ends if not self.decode(ids[:at]).strip()), -1)
        return ids[end + 1 :]

    def written_call(self, name: str, arguments: Mapping[str, object]) -> str | None:
        """A turn that calls a tool as the template writes one, in the text that an engine gives.

        None if the template writes no such turn, or refuses this one.
        """
        function = {"name": name, "arguments": arguments}
        # Mistral's templates want names of nine letters
        call = {"id": "gruppo001", "type": "function", "function": function}
        turns: list[dict[str, Any]] = [{"role": "user", "content": "?"}]
        try:
            opening = self._template(turns, add_generation_prompt=True)
            closed = self._template(turns)
            whole = self._template(
                [*turns, {"role": "assistant", "content": "", "tool_calls": [call]}]
            )
        except (TemplateError, TypeError, ValueError):
            return None
        # the opening of a turn may hold more than a turn of the past does: a think tag, say
        start = next((text for text in (opening, closed) if whole.startswith(text)), whole)
        turn = whole[len(start) :]
        if name not in turn:
            return None
        return self.decode(self.tokenizer.encode(turn, add_special_tokens=False)).strip()

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of token ids, spaces exactly as the tokens have them."""
        text = self.tokenizer.decode(
            list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
        )
        return cast(str, text)

    def _instructed(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages, with what there is to say of tools in the system's."""
        if not self._instructions:
            return messages
        if messages and messages[0].role == "system":
            told = f"{messages[0].content}\n\n{self._instructions}"
            return (Message("system", told), *messages[1:])
        return (Message("system", self._instructions), *messages)

    def _told(self, messages: Sequence[Message]) -> list[Message]:
        """``messages`` as the template takes them, without halves of surrogate pairs."""
        texts = [Message(m.role, m.content.encode("utf-8", "replace").decode()) for m in messages]
        if self.takes_tools:
            return texts
        told: list[Message] = []
        for is_tool, run in groupby(texts, lambda message: message.role == "tool"):
            if not is_tool:
                told += run
                continue
            results = (f"<tool_response>\n{m.content}\n</tool_response>" for m in run)
            told.append(Message("user", "\n".join(results)))
        return told

    def _shows(self, tools: Sequence[Mapping[str, object]]) -> bool:
        """Whether the template writes anything of ``tools``."""
        if not tools:
            return False
        turns = [{"role": "user", "content": "?"}]
        given: dict[str, Any] = {**self.template_options, "tools": list(tools)}
        without = self._template(turns, add_generation_prompt=True)
        shown = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, **given
        )
        return shown != without

    def _template(self, turns: list[dict[str, Any]], **options: bool) -> str:
        settings: dict[str, Any] = {**options, **self.template_options}
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, **settings)
        return cast(str, text)

    def _turn_end(self) -> int | None:
        """The special token that follows an assistant's turn in the template, if there is one."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        try:
            text = self._template(turns)
        except TemplateError:
            return None
        rest = text.rpartition(_PROBE)[2].lstrip()
        ids = self.tokenizer.encode(rest, add_special_tokens=False)
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        return ids[0] if ids and ids[0] in special else None


def end_ids(generation: GenerationConfig | None) -> tuple[int, ...]:
    """The end-of-sequence ids of a generation configuration (none, one or several)."""
    ends = None if generation is None else generation.eos_token_id
    if ends is None:
        return ()
    return (ends,) if isinstance(ends, int) else tuple(int(end) for end in ends)
