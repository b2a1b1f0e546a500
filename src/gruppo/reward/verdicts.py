"""What a grading model is asked for, as a JSON schema, and the check that it kept to it.

The whole answer must be one JSON object of the form asked for, at most in a code fence or after a
thought. An object somewhere in a text is not looked for: the grading model may be quoting the
completion.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

_FENCE = "```"
_MOST = 20_000


class WrongAnswer(ValueError):
    """The grading model's answer is not of the form asked for."""


@dataclass(frozen=True, slots=True)
class Grade:
    """``{"reason": text, "score": number from low to high}``."""

    low: float
    high: float

    @property
    def schema(self) -> dict[str, object]:
        """As a JSON schema."""
        return _schema("score", {"type": "number", "minimum": self.low, "maximum": self.high})

    def read(self, text: str) -> float:
        """The score, as a share of the range.

        Raises:
            WrongAnswer: anything else than asked for.

        Example:
            >>> Grade(0, 10).read('{"reason": "fine", "score": 7}')
            0.7
        """
        score = _object(text, "score")["score"]
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise WrongAnswer(f"score = {score!r:.40} is no number")
        if not (self.low <= score <= self.high and math.isfinite(score)):
            raise WrongAnswer(f"score = {score!r:.40} is not within {self.low:g} and {self.high:g}")
        return (score - self.low) / (self.high - self.low)


@dataclass(frozen=True, slots=True)
class Choice:
    """``{"reason": text, "verdict": one of the words}``; each word is worth its number."""

    worth: Mapping[str, float]

    @property
    def schema(self) -> dict[str, object]:
        """As a JSON schema."""
        return _schema("verdict", {"type": "string", "enum": list(self.worth)})

    def read(self, text: str) -> float:
        """What the chosen word is worth.

        Raises:
            WrongAnswer: anything else than asked for.

        Example:
            >>> Choice({"yes": 1.0, "no": 0.0}).read('{"verdict": "yes"}')
            1.0
        """
        word = _object(text, "verdict")["verdict"]
        if not isinstance(word, str) or word not in self.worth:
            raise WrongAnswer(f"verdict = {word!r:.40} is none of {', '.join(self.worth)}")
        return self.worth[word]


def _schema(key: str, kind: dict[str, object]) -> dict[str, object]:
    return {
        "type": "object",
        "properties": {"reason": {"type": "string"}, key: kind},
        "required": ["reason", key],
        "additionalProperties": False,
    }


def _object(text: str, key: str) -> dict[str, object]:
    """The JSON object that is the whole answer, with ``key`` and nothing but a reason beside it."""
    if len(text) > _MOST:
        raise WrongAnswer(f"the answer has {len(text)} characters")
    _, closed, rest = text.rpartition("</think>")
    text = _unfenced((rest if closed else text).strip())
    try:
        found = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except WrongAnswer:
        raise
    except (ValueError, RecursionError) as error:
        raise WrongAnswer(f"no JSON object: {text!r:.80}") from error
    if not isinstance(found, dict) or key not in found or not found.keys() <= {key, "reason"}:
        raise WrongAnswer(f"no object of a reason and a {key}: {text!r:.80}")
    if not isinstance(found.get("reason", ""), str):
        raise WrongAnswer("the reason is no text")
    return found


def _unfenced(text: str) -> str:
    """What stands in the code fence around the whole of ``text``, or the text itself.

    Without a regular expression: the text is not ours, and one for this can take cubic time.
    """
    if not (text.startswith(_FENCE) and text.endswith(_FENCE) and len(text) > 2 * len(_FENCE)):
        return text
    head, _, body = text[len(_FENCE) : -len(_FENCE)].partition("\n")
    return body if head.strip() in ("", "json") else text


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise WrongAnswer("a key occurs twice")
    return dict(pairs)


def _refuse(name: str) -> object:
    raise WrongAnswer(f"{name} is no number")


def message_of(body: bytes) -> str:
    """The text of the one message in an OpenAI-compatible chat completion.

    Raises:
        WrongAnswer: it is no such thing, or was cut at its token limit.
    """
    try:
        choice = json.loads(body)["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise WrongAnswer(f"no chat completion: {body[:80]!r}") from error
    if finish == "length":
        raise WrongAnswer("the answer was cut at model.max_tokens; raise it")
    if not isinstance(text, str):
        raise WrongAnswer(f"the message holds no text but {type(text).__name__}")
    return text
