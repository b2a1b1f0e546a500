r"""Where a completion gives its answer: a template taken apart, and filled in many ways.

A template such as ``<think>{answer}</think><answer>{answer}</answer>`` is a thinking part (up to
the last ``</think>``) and a place for the answer. Nothing here knows a reward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

PLACE: Final = "{answer}"

USUAL: Final = (
    PLACE,
    f"<think>{PLACE}</think><answer>{PLACE}</answer>",
    f"<think>\n{PLACE}\n</think>\n<answer>\n{PLACE}\n</answer>",
    f"<answer>{PLACE}</answer>",
    r"\boxed{" + PLACE + "}",
    f"#### {PLACE}",
    f"The answer is {PLACE}",
)
"""Layouts tried on a reward that does not say where it reads the answer."""

_END: Final = "</think>"
_CLOSERS: Final = ("</", "}")


@dataclass(frozen=True, slots=True)
class Layout:
    """A completion with ``{answer}`` in place of the answer.

    Example:
        >>> layout = Layout("<think>{answer}</think><answer>{answer}</answer>")
        >>> layout.say("7"), layout.place
        ('<think>Let me see.</think><answer>7</answer>', '<answer>{answer}</answer>')
        >>> layout.own("7")
        '<think>7</think><answer>7</answer>'
    """

    template: str

    @property
    def thinking(self) -> str:
        """Everything up to the end of the thinking; empty if there is none."""
        before, end, _ = self.template.rpartition(_END)
        return before + end

    @property
    def place(self) -> str:
        """What follows the thinking."""
        return self.template.rpartition(_END)[2]

    @property
    def is_marked(self) -> bool:
        """Whether the answer's place is told by more than that it is said."""
        return self.place.replace(PLACE, "").strip() != ""

    def own(self, answer: str) -> str:
        """The golden completion: the template with ``answer`` wherever it asks for it."""
        return self.template.replace(PLACE, answer)

    def say(self, answer: str, thought: str = "Let me see.") -> str:
        """``answer`` in its place, ``thought`` as the thinking (before it, where there is none)."""
        return self.think(thought) + self.mark(answer)

    def mark(self, answer: str) -> str:
        """The place alone, with ``answer`` in it."""
        return self.place.replace(PLACE, answer)

    def think(self, thought: str) -> str:
        """The thinking part alone; empty in a layout without one."""
        thinking = self.thinking
        if PLACE in thinking:
            return thinking.replace(PLACE, thought)
        return thinking.replace(_END, thought + _END)

    def say_at_length(self, answer: str, words: str) -> str:
        """``answer`` in its place after ``words``, inside the thinking if there is one."""
        return self.say(answer, words) if self.thinking else f"{words}\n{self.mark(answer)}"

    def cut_short(self, answer: str) -> str:
        """The completion cut in the middle of what closes the answer; whole if nothing does."""
        whole = self.say(answer)
        ends = [at for closer in _CLOSERS if (at := whole.rfind(closer)) > whole.rfind(answer)]
        return whole[: min(ends) + 1].removesuffix("}") if ends else whole
