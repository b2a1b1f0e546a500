"""The run directory: everything one training run leaves behind, in one folder.

    recipe.toml   the resolved recipe, as the user could write it again
    run.json      the run's id, versions, git commit, platform
    run.sqlite    metrics, groups, completions, findings, events (`database`)
    checkpoints/  one folder per saved step (`gruppo.policy.checkpoint`)
    dumps/        steps that were refused because a number was not finite (`dump`)
    trackers.json ids of this run at TensorBoard, W&B, trackio

It decides where things lie and that one process at a time writes them; it knows no recipe (the
text is opaque here) and no training.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from gruppo.policy.checkpoint import CheckpointError, read_json, replace_file
from gruppo.policy.files import encode_json
from gruppo.record.lock import acquire, release
from gruppo.record.scrub import scrub, scrub_values
from gruppo.record.surroundings import describe

FORMAT = 1  # of run.json

_RECIPE = "recipe.toml"
_RUN = "run.json"
_LOCK = ".lock"
_TRACKERS = "trackers.json"
_FOLDERS = ("checkpoints", "dumps")


class RunDirectory:
    """A run's folder, locked while it is open. Close it, or use it in a ``with`` statement.

    Attributes:
        path: The folder.
        id: The run's own id: 16 hexadecimal digits, the same after every resume.
        info: What run.json holds (``versions``, ``git``, ``platform``, the caller's ``meta``).
    """

    def __init__(self, path: Path, info: Mapping[str, object], lock: int | None) -> None:
        self.path = path
        self.info = info
        self.id = str(info["id"])
        self._lock = lock

    @classmethod
    def create(
        cls, path: Path, recipe_text: str, *, meta: Mapping[str, object] | None = None
    ) -> RunDirectory:
        """Make the folder of a new run, write recipe.toml and run.json, and lock it.

        Secrets in the text and in ``meta`` are replaced by ``[redacted]``, the home folder by
        ``~`` (who reads a path from recipe.toml expands it).

        Args:
            path: The folder to make; its last part is the run's name.
            recipe_text: The resolved recipe as TOML.
            meta: More to remember, plain JSON (the command line, say).

        Raises:
            ValueError: The name is unusable, or the folder is not empty, or in use.
            OSError: The folder cannot be made or written.
        """
        if not (path / _LOCK).exists():
            check_unused(path)  # before a lock file is left in a folder that is none of ours
        path.mkdir(parents=True, exist_ok=True)
        lock = acquire(path / _LOCK)
        try:
            check_unused(path)
            info = _describe(path.name, meta or {})
            for folder in _FOLDERS:
                (path / folder).mkdir(exist_ok=True)
            replace_file(path / _RUN, encode_json(info))
            text = _heading(info) + scrub(recipe_text)
            replace_file(path / _RECIPE, text.encode(errors="backslashreplace"))
        except BaseException:
            release(lock)
            raise
        return cls(path, info, lock)

    @classmethod
    def open(cls, path: Path, *, lock: bool = True) -> RunDirectory:
        """Open the folder of an earlier run.

        Args:
            path: The folder.
            lock: False to look on while a run may be writing (report, export).

        Raises:
            ValueError: It is no run folder, or another process has it open.
            OSError: It cannot be read, or a newer gruppo made it.
        """
        if not (path / _RECIPE).is_file() or not (path / _RUN).is_file():
            raise ValueError(f"run folder: {path} holds no run; give the folder of a started run")
        handle = acquire(path / _LOCK) if lock else None
        try:
            info = read_json(path / _RUN)
            if not isinstance(info, dict) or not {"format", "id"} <= info.keys():
                raise CheckpointError(f"run folder: {path / _RUN} is damaged")
            if info["format"] > FORMAT:
                raise CheckpointError(
                    f"run folder: {path} was made by a newer gruppo (format {info['format']}, "
                    f"this one reads {FORMAT}); upgrade gruppo"
                )
        except BaseException:
            if handle is not None:
                release(handle)
            raise
        return cls(path, info, handle)

    @property
    def name(self) -> str:
        """The run's name: the last part of its path."""
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def dumps(self) -> Path:
        """Folder of the dumped steps."""
        return self.path / "dumps"

    @property
    def database(self) -> Path:
        """File of the database."""
        return self.path / "run.sqlite"

    def recipe_text(self) -> str:
        """Text of recipe.toml, comments included."""
        return (self.path / _RECIPE).read_text()

    def tracker_id(self, tracker: str) -> str:
        """Id of this run at an experiment tracker: made once, the same after every resume."""
        file = self.path / _TRACKERS
        ids = read_json(file) if file.exists() else {}
        if not isinstance(ids, dict):
            raise CheckpointError(f"run folder: {file} is damaged; delete it to start new ids")
        if tracker not in ids:
            ids = {**ids, tracker: uuid.uuid4().hex[:16]}
            replace_file(file, encode_json(ids))
        return str(ids[tracker])

    def remember(self, name: str, value: object) -> None:
        """Put plain JSON into ``meta`` of run.json, scrubbed as at the start.

        Raises:
            OSError: the file cannot be written; the old one is whole.
        """
        meta = self.info["meta"]
        known = meta if isinstance(meta, Mapping) else {}
        info = {**self.info, "meta": {**known, name: scrub_values(value)}}
        replace_file(self.path / _RUN, encode_json(info))
        self.info = info

    def close(self) -> None:
        """Unlock the folder. Calling it twice is fine."""
        if self._lock is not None:
            release(self._lock)
            self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def check_name(name: str) -> None:
    """Refuse run names that a terminal, a file manager or an archive would trip over.

    Raises:
        ValueError: Empty, over 200 bytes, hidden, or holding anything but printable characters.
    """
    if not name or name.startswith("."):
        raise ValueError(f"run name {name!r}: it must not be empty or begin with a dot")
    if not name.isprintable() or "\\" in name:
        raise ValueError(f"run name {name!r}: use printable characters and no backslash")
    if len(name.encode()) > 200:
        raise ValueError(f"run name {name[:40]!r}...: {len(name.encode())} bytes, at most 200")


def check_unused(path: Path) -> None:
    """Refuse a path that no new run can have; nothing is written.

    Raises:
        ValueError: The name is unusable, it is a file, or the folder holds anything but what a
            start that was cut short leaves.
    """
    check_name(path.name)
    if path.exists() and not path.is_dir():
        raise ValueError(f"run folder: {path} is no folder; choose another name")
    if not path.exists():
        return
    known = {*_FOLDERS, _RUN}
    present = sorted(entry.name for entry in path.iterdir() if entry.name[0] != ".")
    if present and (_RECIPE in present or not known.issuperset(present)):
        raise ValueError(
            f"run folder: {path} is not empty (it holds {present[0]}); continue that run with "
            f"`gruppo resume {path}` or choose another name"
        )


def _describe(name: str, meta: Mapping[str, object]) -> dict[str, object]:
    seen = {**describe(Path.cwd()), "meta": meta}
    scrubbed = scrub_values(seen)
    assert isinstance(scrubbed, dict)
    return {**scrubbed, "format": FORMAT, "id": uuid.uuid4().hex[:16], "name": name}


def _heading(info: Mapping[str, object]) -> str:
    versions = info["versions"]
    assert isinstance(versions, Mapping)
    lines = [
        f"run {info['name']} ({info['id']})",
        ", ".join(f"{package} {version}" for package, version in versions.items()),
        f"git {info['git'] or 'none'}; {info['platform']}",
    ]
    return "".join(f"# {line}\n" for line in lines) + "\n"
