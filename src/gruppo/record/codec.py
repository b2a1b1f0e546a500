"""How values become database columns and come back equal. Knows no table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from gruppo.record.plain import decode_interaction
from gruppo.record.scrub import scrub
from gruppo.types import Failure, Interaction, Message


def pack_text(text: str) -> str | bytes:
    r"""A string as SQLite can hold it: itself, or bytes where it is no valid Unicode.

    >>> pack_text("a"), pack_text("\ud800")
    ('a', b'\xed\xa0\x80')
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="surrogatepass")
    return text


def unpack_text(value: str | bytes) -> str:
    """Inverse of `pack_text`."""
    return value if isinstance(value, str) else value.decode(errors="surrogatepass")


def pack_optional(text: str | None) -> str | bytes | None:
    """`pack_text`, with None as NULL."""
    return None if text is None else pack_text(text)


def unpack_optional(value: str | bytes | None) -> str | None:
    """Inverse of `pack_optional`."""
    return None if value is None else unpack_text(value)


def pack_ints(values: Sequence[int]) -> bytes:
    """Token ids as little-endian int32.

    Raises:
        OverflowError: An id does not fit.
    """
    return np.asarray(values, dtype="<i4").tobytes()


def unpack_ints(blob: bytes) -> tuple[int, ...]:
    """Inverse of `pack_ints`."""
    return tuple(np.frombuffer(blob, dtype="<i4").tolist())


def pack_floats(values: Sequence[float]) -> bytes:
    """Log-probabilities or advantages as little-endian float32, NaN included."""
    return np.asarray(values, dtype="<f4").tobytes()


def unpack_floats(blob: bytes) -> tuple[float, ...]:
    """Inverse of `pack_floats`, up to rounding to float32."""
    return tuple(np.frombuffer(blob, dtype="<f4").tolist())


def pack_bools(values: Sequence[bool]) -> bytes:
    """A mask as one byte per token."""
    return np.asarray(values, dtype=np.bool_).tobytes()


def unpack_bools(blob: bytes) -> tuple[bool, ...]:
    """Inverse of `pack_bools`."""
    return tuple(np.frombuffer(blob, dtype=np.bool_).tolist())


def pack_messages(messages: Sequence[Message]) -> str:
    """A prompt as a JSON list of {"role", "content"}; ASCII, so that any string survives."""
    return json.dumps([{"role": m.role, "content": m.content} for m in messages])


def unpack_messages(text: str) -> tuple[Message, ...]:
    """Inverse of `pack_messages`."""
    return tuple(Message(item["role"], item["content"]) for item in json.loads(text))


def pack_parts(parts: Mapping[str, float | None]) -> str:
    """Reward parts as a JSON object; what is not finite becomes null."""
    plain = {
        name: value if value is not None and math.isfinite(value) else None
        for name, value in parts.items()
    }
    return json.dumps(plain)


def pack_failure(failure: Failure | None) -> str | None:
    """A failure as JSON, its text scrubbed: error texts quote environments."""
    if failure is None:
        return None
    return json.dumps({"kind": failure.kind, "fault": failure.fault, "text": scrub(failure.text)})


def unpack_failure(text: str | None) -> Failure | None:
    """Inverse of `pack_failure`."""
    return None if text is None else Failure(**json.loads(text))


def pack_interaction(episode: Interaction | None) -> str | None:
    """An episode as JSON, its error scrubbed; ASCII, so that any string survives."""
    if episode is None:
        return None
    error = None if episode.error is None else scrub(episode.error)
    return json.dumps({**asdict(episode), "error": error})


def unpack_interaction(text: str | None) -> Interaction | None:
    """Inverse of `pack_interaction`."""
    return None if text is None else decode_interaction(json.loads(text))


def finite(value: object) -> object:
    """Numbers that are not finite as the texts "nan", "inf", "-inf": JSON has no name for them.

    >>> finite({"loss": [float("nan"), 1.5]})
    {'loss': ['nan', 1.5]}
    """
    match value:
        case float():
            return value if math.isfinite(value) else str(value)
        case Mapping():
            return {key: finite(item) for key, item in value.items()}
        case list() | tuple():
            return [finite(item) for item in value]
        case _:
            return value
