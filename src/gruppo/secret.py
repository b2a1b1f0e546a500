"""Which environment variables hold secrets, by their names. Their values are not looked at."""

from __future__ import annotations

_SECRET_WORDS = frozenset(
    {
        "APIKEY",
        "AUTH",
        "COOKIE",
        "CREDENTIAL",
        "CREDENTIALS",
        "DSN",
        "KEY",
        "KEYS",
        "PASS",
        "PASSPHRASE",
        "PASSWD",
        "PASSWORD",
        "PAT",
        "PWD",
        "SECRET",
        "SECRETS",
        "TOKEN",
        "TOKENS",
    }
)
_NOT_SECRET = frozenset({"PWD", "OLDPWD"})  # the shell's working directories

_SECRET_ENDS = ("APIKEY", "ACCESSKEY", "SECRETKEY", "PASS", "PASSWORD", "SECRET", "TOKEN")


def names_secret(name: str) -> bool:
    """Whether a variable of this name holds a secret: a word of it is KEY, TOKEN or the like.

    >>> names_secret("OPENAI_API_KEY"), names_secret("MYTOKEN"), names_secret("KEYBOARD")
    (True, True, False)
    """
    words = name.upper().split("_")
    return name not in _NOT_SECRET and (
        not _SECRET_WORDS.isdisjoint(words) or words[-1].endswith(_SECRET_ENDS)
    )
