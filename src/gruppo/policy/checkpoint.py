"""An atomic, verified store of checkpoint folders.

A checkpoint appears under its name only when every byte of it is on the disk, together with a
manifest of the length and SHA-256 of each file; a crash at any moment leaves the older state or
the newer one, whole. A damaged checkpoint is never loaded: `latest` falls back over it and says
so. Checkpoints are ordered by step number, never by the clock.

The store knows no model: what goes in is the caller's business. It does not lock its folder (the
run directory does), and it reads and writes no pickles: tensors are safetensors, the rest JSON.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from gruppo.policy.files import (
    CheckpointError,
    damage,
    encode_json,
    hash_file,
    naming,
    read_json,
    read_tensors,
    replace_file,
    sync_file,
    sync_folder,
    write_json,
    write_synced,
    write_tensors,
)

__all__ = [
    "CheckpointError",
    "Entry",
    "Manifest",
    "NewerFormatError",
    "check_space",
    "latest",
    "prune",
    "read_json",
    "read_manifest",
    "read_tensors",
    "replace_file",
    "save",
    "steps",
    "sweep",
    "verify",
    "write_json",
    "write_tensors",
]

FORMAT = 1  # of the manifest; raised when an older gruppo could misread what is written
MANIFEST = "manifest.json"

_HIDDEN = re.compile(r"\.(tmp|old|trash)-(\d+)-(\d+)")
_MARGIN = 1 << 20  # for the manifest and the folders' own blocks


class NewerFormatError(CheckpointError):
    """An intact checkpoint of a newer gruppo: to upgrade, not to fall back over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One file of a checkpoint: relative POSIX path, length in bytes, hexadecimal SHA-256."""

    name: str
    length: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint consists of. ``meta`` is the caller's, plain JSON."""

    step: int
    files: tuple[Entry, ...]
    meta: Mapping[str, object]


# Saving ---------------------------------------------------------------------------------------


def save(
    folder: Path,
    write: Callable[[Path], None],
    *,
    step: int,
    meta: Mapping[str, object] | None = None,
    need: int | None = None,
) -> Path:
    """Store what ``write`` puts into the folder it is given as ``<folder>/<step>``, or nothing.

    A checkpoint of the same step is replaced; until the new one is whole, the old one stays.

    Args:
        folder: Home of the checkpoints; made if missing.
        write: Writes the files (sub-folders allowed, no links, no manifest.json) and closes them.
        step: Number of the last finished step, at least 0.
        meta: Plain JSON values kept in the manifest.
        need: Bytes that must be free first; by default the size of the newest checkpoint here.

    Returns:
        The finished checkpoint's folder.

    Raises:
        OSError: Not enough space, or a file system call failed. The text names the path; older
            checkpoints are as they were.
    """
    assert step >= 0
    final = folder / f"{step:08d}"
    temporary = folder / f".tmp-{step:08d}-{os.getpid()}"
    with naming(final):
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        check_space(folder, need)
        try:
            temporary.mkdir()
            write(temporary)
            _seal(temporary, step, dict(meta or {}))
            _publish(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return final


def sweep(folder: Path) -> None:
    """Clear what a killed process left: unfinished and half-deleted checkpoints, swapped names."""
    for entry in sorted(folder.iterdir()):
        match = _HIDDEN.fullmatch(entry.name)
        if match is None or _alive_elsewhere(int(match[3])):
            continue
        final = folder / f"{int(match[2]):08d}"
        if match[1] == "old" and not final.exists():
            os.rename(entry, final)
            sync_folder(folder)
        else:
            shutil.rmtree(entry, ignore_errors=True)


def prune(
    folder: Path, keep_last: int, *, keep: Set[int] = frozenset(), intact: Path | None = None
) -> list[int]:
    """Delete all but the newest ``keep_last`` checkpoints and those whose step is in ``keep``.

    The newest intact one stays in any case, even if ``keep_last`` newer ones are damaged.

    Args:
        folder: Home of the checkpoints.
        keep_last: How many of the newest to keep, at least 1.
        keep: Steps that stay whatever their age (the best one, say).
        intact: A checkpoint known to be intact (just saved), which saves reading it again.

    Returns:
        The steps that were deleted, oldest first.

    Raises:
        ValueError: ``keep_last`` below 1.
        OSError: A folder could not be moved or deleted; the path is named.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last = {keep_last}: keep at least 1 checkpoint")
    found = _checkpoints(folder)
    doomed = [(step, path) for step, path in found[keep_last:] if step not in keep]
    if not doomed:
        return []
    good = intact if intact is not None else latest(folder)[0]
    doomed = [(step, path) for step, path in doomed if path != good]
    for step, path in doomed:
        trash = folder / f".trash-{step:08d}-{os.getpid()}"
        with naming(path):
            os.rename(path, trash)  # from here on nobody takes it for a checkpoint
            sync_folder(folder)
            shutil.rmtree(trash)
    return sorted(step for step, _ in doomed)


# Loading --------------------------------------------------------------------------------------


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in ``folder``, oldest first, damaged ones included."""
    return sorted(step for step, _ in _checkpoints(folder))


def latest(folder: Path) -> tuple[Path | None, list[str]]:
    """Find the newest intact checkpoint; reads every byte of it. Writes nothing.

    Returns:
        Its folder (None if there is none), and for each newer damaged one what is wrong with it.

    Raises:
        NewerFormatError: The newest intact one was written by a newer gruppo.
        OSError: The folder cannot be read for a reason that is no damage (permissions, say).
    """
    damaged: list[str] = []
    for _, path in _checkpoints(folder):
        try:
            verify(path)
        except NewerFormatError:
            raise
        except CheckpointError as error:
            damaged.append(str(error))
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            damaged.append(f"checkpoint {path}: cannot be read ({error})")
        else:
            return path, damaged
    return None, damaged


def verify(path: Path) -> None:
    """Read the whole checkpoint and compare it with its manifest.

    Raises:
        CheckpointError: A file is missing, left over, too short or long, or altered; the text
            names the folder, the file and the reason.
        NewerFormatError: The checkpoint is of a newer gruppo.
    """
    manifest = read_manifest(path)
    entries = {entry.name: entry for entry in manifest.files}
    present = {name: file for name, file in _files(path) if name != MANIFEST}
    for name in sorted(entries.keys() - present.keys()):
        raise damage(path, name, "is missing")
    for name in sorted(present.keys() - entries.keys()):
        raise damage(path, name, "is not in the manifest")
    for name, entry in entries.items():
        length = present[name].stat().st_size
        if length != entry.length:
            raise damage(path, name, f"has {length} bytes, not {entry.length}")
        if hash_file(present[name]) != entry.sha256:
            raise damage(path, name, "does not have the SHA-256 of its manifest entry")


def read_manifest(path: Path) -> Manifest:
    """Read the manifest alone, checked against its own hash (the files are not read).

    Raises:
        CheckpointError: It is missing, altered, or of another step than the folder's name says.
        NewerFormatError: It is intact and of a newer format.
    """
    value = read_json(path / MANIFEST)
    # Compared byte for byte: what JSON forgives (spaces, order) would hide an altered manifest.
    # A newer format keeps this hash, so that "newer" can be told from "damaged".
    if not isinstance(value, dict) or "sha256" not in value:
        raise damage(path, MANIFEST, "is no manifest")
    stored = value.pop("sha256")
    if (path / MANIFEST).read_bytes() != _render(value) or stored != _self_hash(value):
        raise damage(path, MANIFEST, "does not have the SHA-256 that it states")
    if value["format"] > FORMAT:
        raise NewerFormatError(
            f"checkpoint {path}: format {value['format']} is newer than this gruppo reads "
            f"({FORMAT}); upgrade gruppo"
        )
    if re.fullmatch(r"\d{8,}", path.name) and int(path.name) != value["step"]:
        raise damage(path, MANIFEST, f"is that of step {value['step']}")
    files = tuple(Entry(**entry) for entry in value["files"])
    return Manifest(step=value["step"], files=files, meta=value["meta"])


# Inside ---------------------------------------------------------------------------------------


def _seal(folder: Path, step: int, meta: dict[str, object]) -> None:
    """Bring every file and sub-folder to the disk, then write the manifest and sync that too."""
    entries = []
    for name, file in _files(folder):
        if name == MANIFEST:
            raise ValueError(f"{file}: a checkpoint's manifest is written by the store; rename it")
        entries.append({"name": name, "length": file.stat().st_size, "sha256": hash_file(file)})
        sync_file(file)
    value = {"format": FORMAT, "step": step, "files": entries, "meta": meta}
    write_synced(folder / MANIFEST, _render(value))
    for parent, _, _ in os.walk(folder, topdown=False, onerror=_raise):
        sync_folder(Path(parent))


def _publish(temporary: Path, final: Path) -> None:
    """Give a sealed folder its name. An older one of that name is moved aside, then deleted."""
    aside = final.with_name(f".old-{final.name}-{os.getpid()}")
    if not final.exists():
        os.rename(temporary, final)
        sync_folder(final.parent)
        return
    try:
        os.rename(final, aside)
        os.rename(temporary, final)
    except BaseException:
        if aside.exists() and not final.exists():
            os.rename(aside, final)
        raise
    sync_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """All checkpoints, newest first. One that was moved aside counts while its name is free."""
    if not folder.is_dir():
        return []
    found: dict[int, Path] = {}
    for entry in folder.iterdir():
        match = _HIDDEN.fullmatch(entry.name)
        if match is not None and match[1] == "old":
            found.setdefault(int(match[2]), entry)
        elif re.fullmatch(r"\d{8,}", entry.name):
            found[int(entry.name)] = entry
    return sorted(found.items(), reverse=True)


def check_space(folder: Path, need: int | None = None) -> None:
    """Refuse to begin what the disk of ``folder`` cannot hold.

    Args:
        folder: A folder that exists.
        need: Bytes to be written; by default the size of the newest checkpoint in it.

    Raises:
        OSError: Too little is free; the text says how much is and how much it takes.
    """
    if need is None:
        newest = [path for _, path in _checkpoints(folder)[:1]]
        need = sum(file.lstat().st_size for path in newest for file in path.rglob("*"))
    need += need // 20 + _MARGIN
    have = shutil.disk_usage(folder).free
    if have < need:
        text = f"a checkpoint needs {need} bytes, {have} are free; free space or keep fewer"
        raise OSError(errno.ENOSPC, text, str(folder))


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Relative name and path of every file below ``folder``, in a fixed order."""
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders.sort()
        for name in sorted(names) + [n for n in folders if (Path(parent) / n).is_symlink()]:
            file = Path(parent) / name
            if not stat.S_ISREG(file.lstat().st_mode):
                raise damage(folder, file.relative_to(folder).as_posix(), "is no regular file")
            yield file.relative_to(folder).as_posix(), file


def _raise(error: OSError) -> None:
    """For `os.walk`, which skips folders that it cannot list unless told otherwise."""
    raise error


def _alive_elsewhere(pid: int) -> bool:
    """True if another process of that number runs. Our own number means an earlier life's."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _self_hash(value: Mapping[str, object]) -> str:
    return hashlib.sha256(encode_json(value)).hexdigest()


def _render(value: Mapping[str, object]) -> bytes:
    return encode_json({**value, "sha256": _self_hash(value)})
