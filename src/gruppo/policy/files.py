"""Files written durably and read strictly: bytes, JSON and tensors.

Every failure is an OSError that names the path. Nothing here is a pickle, and nothing here knows
what a checkpoint holds (`checkpoint` does not either; its callers do).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

_CHUNK = 1 << 20
_NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


class CheckpointError(OSError):
    """A checkpoint that must not be loaded; the text names the folder, the file and the reason."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors`` as one safetensors file; values, dtypes and shapes come back exactly.

    Tensors that share memory (tied weights) are written once each.

    Raises:
        OSError: It could not be written; the path is named.
    """
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach().to("cpu").contiguous()
        storage = value.untyped_storage().data_ptr()
        plain[name] = value.clone() if storage in seen else value
        seen.add(storage)
    try:
        save_file(plain, path)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error})") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU.

    Raises:
        CheckpointError: The file is missing or no safetensors file.
    """
    try:
        return load_file(path)
    except _NO_FILE as error:
        raise damage(path.parent, path.name, "is missing") from error
    except SafetensorError as error:
        raise damage(path.parent, path.name, f"is no safetensors file ({error})") from error


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as ASCII JSON with sorted keys; floats come back to the last bit.

    Raises:
        ValueError: A number is not finite (JSON has no name for it).
        OSError: It could not be written.
    """
    path.write_bytes(encode_json(value))


def read_json(path: Path) -> object:
    """Read strict JSON: no NaN, no duplicate keys, nothing after the value.

    Raises:
        CheckpointError: The file is missing or not strict JSON.
    """
    try:
        return json.loads(
            path.read_bytes(), parse_constant=_no_constant, object_pairs_hook=_unique_keys
        )
    except _NO_FILE as error:
        raise damage(path.parent, path.name, "is missing") from error
    except (ValueError, RecursionError) as error:
        raise damage(path.parent, path.name, f"is not strict JSON ({error})") from error


def replace_file(path: Path, data: bytes) -> None:
    """Write one file durably: its name shows the old content or the new one, whole.

    Raises:
        OSError: A file system call failed; the path is named and its old content stands.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with naming(path):
        try:
            write_synced(temporary, data)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def hash_file(file: Path) -> str:
    """SHA-256 of the file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_synced(file: Path, data: bytes) -> None:
    """Write ``data`` and wait until it is on the disk."""
    with file.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def sync_file(file: Path) -> None:
    """Wait until a file that somebody else wrote is on the disk."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the folder's list of names is on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot sync a folder and say so; they order renames themselves.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def encode_json(value: object) -> bytes:
    """Render ``value`` as `write_json` does."""
    return json.dumps(value, allow_nan=False, sort_keys=True, indent=1).encode() + b"\n"


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is no JSON number")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("an object has the same key twice")
    return value


def damage(path: Path, name: str, reason: str) -> CheckpointError:
    """Make the error for file ``name`` of the checkpoint at ``path``."""
    return CheckpointError(f"checkpoint {path}: {name} {reason}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give every file system error a path: a failed fsync knows none, a failed rmtree half."""
    try:
        yield
    except SafetensorError as error:  # from a caller that wrote weights with another library
        raise OSError(f"{path}: cannot be written ({error})") from error
    except OSError as error:
        if error.errno is None or str(path.parent) in str(error.filename):
            raise
        raise OSError(error.errno, error.strerror or "cannot be written", str(path)) from error
