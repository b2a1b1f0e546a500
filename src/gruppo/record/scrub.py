"""Keeps secrets and the home folder's name out of what is recorded.

Three kinds are replaced: values of environment variables whose names say that they are secret,
strings that look like a well-known kind of key, and passwords in URLs. It cannot know a secret
that is written in a recipe under an innocent name. Prompts and completions are not scrubbed: they
are recorded as they were, because their tokens would give them away all the same.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from gruppo.secret import names_secret

_MIN_LENGTH = 6  # shorter values ("1", "true", "none") would be replaced all over a text

_PATTERNS = (
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----", re.DOTALL),
    re.compile(
        r"(?<![A-Za-z0-9_-])"
        r"(?:sk-[A-Za-z0-9_-]{16,}|hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}"
        r"|github_pat_\w{16,}|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}"
        r"|AIza[\w-]{30,}|wandb_v1_\w{16,})"
    ),
    re.compile(r"(?<=[Bb]earer )[A-Za-z0-9._~+/-]{8,}=*"),
)
_URL_PASSWORD = re.compile(r"(?<=://)([^\s/@:\"']*):[^\s/@\"']+@")


def secrets(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Map each secret value of the environment to the name of its variable, longest first.

    A variable counts if one word of its name (parted by ``_``) is KEY, TOKEN, SECRET or the like,
    unless its value is short or names an existing file (a key file's path is no key).

    >>> secrets({"OPENAI_API_KEY": "abcdefgh", "TOKENIZERS_PARALLELISM": "disabled"})
    {'abcdefgh': 'OPENAI_API_KEY'}
    """
    values = os.environ if environment is None else environment
    found = {
        value: name
        for name, value in values.items()
        if len(value) >= _MIN_LENGTH and names_secret(name) and not _is_path(value)
    }
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def scrub(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Replace secrets by ``[redacted]`` and the home folder by ``~``.

    >>> scrub("GET https://me:pw@host/ with abcdefgh", {"MY_TOKEN": "abcdefgh"})
    'GET https://me:[redacted]@host/ with [redacted]'
    """
    for value in secrets(environment):
        text = text.replace(value, "[redacted]")
    for pattern in _PATTERNS:
        text = pattern.sub("[redacted]", text)
    text = _URL_PASSWORD.sub(r"\1:[redacted]@", text)
    return _hide_home(text)


def scrub_values(value: object, environment: Mapping[str, str] | None = None) -> object:
    """Scrub every string in nested mappings and lists, keys included. Tuples become lists."""
    match value:
        case str():
            return scrub(value, environment)
        case Mapping():
            return {
                scrub(str(key), environment): scrub_values(item, environment)
                for key, item in value.items()
            }
        case list() | tuple():
            return [scrub_values(item, environment) for item in value]
        case _:
            return value


def _is_path(value: str) -> bool:
    try:
        return value.startswith("/") and Path(value).exists()
    except (OSError, ValueError):  # too long for a file name, or it holds a NUL
        return False


def _hide_home(text: str) -> str:
    home = str(Path.home()).rstrip("/")
    if not home:
        return text
    return re.sub(rf"(?<![\w.~-]){re.escape(home)}(?![\w.-])", "~", text)
