"""Text to token ids and back, and which ids end a completion.

An :class:`Encoder` is used once per prompt; completions are never re-tokenised. It knows no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

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
    ) -> None:
        """Take a tokenizer and how to use it.

        Args:
            tokenizer: A Hugging Face tokenizer.
            chat: Whether to use the chat template; False joins the contents by blank lines.
            template_options: Extra variables of the template (``enable_thinking``, say).
            stop_tokens: Further ids that end a completion.

        Raises:
            ValueError: ``chat`` is asked for and the tokenizer has no template, or no end token
                is known at all.
        """
        if chat and not tokenizer.chat_template:
            raise ValueError(
                "chat = true, but this tokenizer has no chat template (a base model?); set "
                "chat = false to send prompts as plain text"
            )
        self.tokenizer = tokenizer
        self.chat = chat
        self.template_options = dict(template_options)
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
        turns = [{"role": m.role, "content": m.content} for m in messages]
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

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of token ids, spaces exactly as the tokens have them."""
        text = self.tokenizer.decode(
            list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
        )
        return cast(str, text)

    def _template(self, turns: list[dict[str, str]], **options: bool) -> str:
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
