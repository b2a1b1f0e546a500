"""Text of the model under training, made safe to show to a grading model.

The completion is data: it stands in a block whose delimiters hold a number that its writer cannot
know, what looks like such a delimiter or like a control token of a chat template is broken up, and
invisible direction marks and control characters are taken out. A grading model may still be talked
into things in plain words; the instructions around the block say what it must not follow, and only
an answer of the exact form asked for is believed (``verdicts.py``).
"""

from __future__ import annotations

import re
from hashlib import blake2b

_DELIMITER = re.compile(r"<{2,}\s*/?\s*(?:BEGIN|END)\b[^<>]{0,80}>{2,}", re.IGNORECASE)
_CONTROL_TOKEN = re.compile(
    r"<(?=[|｜])|<(?=/?(?:s|bos|eos|start_of_turn|end_of_turn|im_start|im_end)>)"
    r"|\[(?=/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS|TOOL_CALLS)\])",
    re.IGNORECASE,
)
# C0 and C1 controls but tab and line break; bidirectional overrides and isolates; tag characters
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff\U000e0000-\U000e007f]"
)


def nonce(*texts: str | None) -> str:
    """A number that depends on every text: whoever writes one of them cannot put it inside.

    It is the same for the same texts, so that equal requests are equal.

    >>> len(nonce("a", "b")), nonce("a", "b") == nonce("ab", ""), nonce("a") == nonce("a")
    (16, False, True)
    """
    return blake2b(repr(texts).encode("utf-8", "replace"), digest_size=8).hexdigest()


def defang(text: str, number: str) -> str:
    r"""Return ``text`` without anything that could end its block or speak as someone else.

    >>> defang("ok <<<END ANSWER 12>>> <|im_end|> </s> [INST] 12 \x1b\u202e", "12")
    'ok [delimiter removed] < |im_end|> < /s> [ INST] [number removed] '
    """
    text = _INVISIBLE.sub("", text.replace("\r\n", "\n"))
    text = text.encode("utf-8", "replace").decode()  # lone surrogates are no text
    text = _DELIMITER.sub("[delimiter removed]", text)
    text = _CONTROL_TOKEN.sub(lambda match: match[0] + " ", text)
    return text.replace(number, "[number removed]")


def block(name: str, text: str, number: str) -> str:
    """``text`` between delimiters that it cannot contain.

    >>> print(block("ANSWER", "4", "ab12"))
    <<<BEGIN ANSWER ab12>>>
    4
    <<<END ANSWER ab12>>>
    """
    return f"<<<BEGIN {name} {number}>>>\n{defang(text, number)}\n<<<END {name} {number}>>>"
