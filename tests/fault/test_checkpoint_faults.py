"""Checkpoints under kill -9, failing file systems and damaged files."""

import errno
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gruppo.policy import checkpoint

CHILD = Path(__file__).with_name("checkpoint_child.py")
FOUND = {"save": {1.0, 2.0}, "replace": {1.0, 2.0}, "prune": {2.0}}


def walk(how: str, tmp_path: Path, *works: str) -> list[dict]:
    done = subprocess.run(
        [sys.executable, str(CHILD), how, str(tmp_path / "c"), *works],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(line: dict) -> None:
    """The state found after a point is whole, nothing is damaged, and saving goes on cleanly."""
    assert line["found"] in FOUND[line["work"]], line
    assert line["damaged"] == [], line
    assert line["after"] == 3.0, line
    assert all(re.fullmatch(r"\d{8}", name) for name in line["names"]), line


@pytest.mark.slow
def test_kill_at_every_file_system_call_of_the_interpreter(tmp_path: Path) -> None:
    lines = walk("hooks", tmp_path, "save", "replace", "prune")
    for line in lines:
        check(line)
    for work in FOUND:
        mine = [line for line in lines if line["work"] == work]
        assert [line["status"] for line in mine] == [-9] * (len(mine) - 1) + [0]
        assert {line["found"] for line in mine} == FOUND[work]  # both sides of the rename
        assert len(mine) > 15


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("work", FOUND)
def test_kill_and_errors_at_every_system_call(work: str, tmp_path: Path) -> None:
    lines = walk("strace", tmp_path, work)
    hits = [line for line in lines if line["hit"]]
    assert len(hits) > 40
    for line in hits:
        check(line)
        if line["effect"] == "signal=KILL":
            assert line["status"] == -9, line
        elif line["status"] == 0:  # an error that did not matter: then the work was done
            assert line["found"] == 2.0, line
        else:
            assert line["status"] == 3, line
            assert str(tmp_path / "c") in line["error"][1], line


def write(value: float) -> Callable[[Path], None]:
    def files(folder: Path) -> None:
        checkpoint.write_tensors(folder / "model.safetensors", {"w": torch.full((99,), value)})
        checkpoint.write_json(folder / "state.json", {"value": value, "list": list(range(30))})
        (folder / "sub").mkdir()
        (folder / "sub" / "tokenizer.json").write_bytes(bytes(range(256)))

    return files


class Broken:
    """Fails the n-th call of any of the patched functions, and counts them."""

    def __init__(self, number: int, fail_at: int) -> None:
        self.number = number
        self.left = fail_at

    def tick(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError(self.number, os.strerror(self.number))

    def wrap(self, function: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            self.tick()
            return function(*args, **kwargs)

        return call

    def wrap_open(self, function: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            self.tick()
            stream = function(*args, **kwargs)
            if "b" in stream.mode and stream.writable():
                return Stream(stream, self)
            return stream

        return call


class Stream(io.BufferedIOBase):
    """A file whose writes can fail."""

    def __init__(self, inner: io.BufferedWriter, broken: Broken) -> None:
        self.inner = inner
        self.broken = broken

    def write(self, data: bytes) -> int:
        self.broken.tick()
        return self.inner.write(data)

    def flush(self) -> None:
        if not self.inner.closed:
            self.inner.flush()

    def fileno(self) -> int:
        return self.inner.fileno()

    def close(self) -> None:
        self.inner.close()
        super().close()


def error_of(run: Callable[[], object]) -> OSError | None:
    try:
        run()
    except OSError as error:
        return error
    return None


@pytest.mark.parametrize("code", ["ENOSPC", "EIO", "EMFILE", "EROFS"])
@pytest.mark.parametrize("step", [1, 2], ids=["replace", "new"])
def test_every_failing_call_is_an_os_error_with_the_path(
    code: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = vars(errno)[code]
    fail_at, failures = 0, 0
    while True:
        fail_at += 1
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        checkpoint.save(tmp_path / "c", write(1.0), step=1)
        broken = Broken(number, fail_at)
        with monkeypatch.context() as patch:
            for name in ("fsync", "rename", "replace", "mkdir", "open"):
                patch.setattr(os, name, broken.wrap(vars(os)[name]))
            patch.setattr(io, "open", broken.wrap_open(io.open))
            error = error_of(lambda: checkpoint.save(tmp_path / "c", write(2.0), step=step))
        if error is not None:
            assert error.errno == number
            assert str(tmp_path / "c") in str(error)
            failures += 1
        path, damaged = checkpoint.latest(tmp_path / "c")
        assert damaged == []
        value = checkpoint.read_json(path / "state.json")["value"]
        assert value in ((2.0,) if error is None else (1.0, 2.0))
        if broken.left > 0:
            assert failures >= 15
            return


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    for step in (1, 2):
        checkpoint.save(folder, write(float(step)), step=step)
    return folder


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def refusal(folder: Path) -> str:
    """Why the newest checkpoint is refused, its path cut off; the older one must be found."""
    bad = folder / "00000002"
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.verify(bad)
    assert checkpoint.latest(folder) == (folder / "00000001", [str(caught.value)])
    return str(caught.value).removeprefix(f"checkpoint {bad}: ")


@pytest.fixture
def folder(two_checkpoints: Path, tmp_path: Path) -> Path:
    return shutil.copytree(two_checkpoints, tmp_path / "c")


def test_no_flipped_bit_loads_silently(folder: Path) -> None:
    draw = random.Random(0)
    files = files_of(folder / "00000002")
    caught = 0
    for number in range(200):
        file = files[number % len(files)]
        good = file.read_bytes()
        bad = bytearray(good)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        file.write_bytes(bad)
        path, damaged = checkpoint.latest(folder)
        assert path == folder / "00000001"
        assert len(damaged) == 1
        assert f"{folder / '00000002'}: {file.relative_to(folder / '00000002')}" in damaged[0]
        caught += 1
        file.write_bytes(good)
    assert caught == 200
    assert checkpoint.latest(folder) == (folder / "00000002", [])


def test_no_truncated_file_loads_silently(folder: Path) -> None:
    draw = random.Random(1)
    files = files_of(folder / "00000002")
    for number in range(50):
        file = files[number % len(files)]
        good = file.read_bytes()
        file.write_bytes(good[: draw.randrange(len(good))])
        path, damaged = checkpoint.latest(folder)
        assert path == folder / "00000001"
        assert str(file.relative_to(folder / "00000002")) in damaged[0]
        file.write_bytes(good)
    assert checkpoint.latest(folder) == (folder / "00000002", [])


@pytest.mark.parametrize(
    "name", ["manifest.json", "model.safetensors", "state.json", "sub/tokenizer.json"]
)
def test_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / "00000002" / name).unlink()
    assert refusal(folder).startswith(f"{name} is missing")


def test_extra_file_is_named(folder: Path) -> None:
    (folder / "00000002" / "sub" / "pickle.bin").write_bytes(b"")
    assert refusal(folder).startswith("sub/pickle.bin is not in the manifest")


def test_swapped_files_are_named(folder: Path) -> None:
    bad = folder / "00000002"
    (bad / "sub" / "tokenizer.json").write_bytes((bad / "state.json").read_bytes())
    assert re.match(r"sub/tokenizer.json has \d+ bytes, not 256", refusal(folder))


def test_file_of_another_checkpoint_is_named(folder: Path) -> None:
    name = "model.safetensors"
    shutil.copy(folder / "00000001" / name, folder / "00000002" / name)
    assert refusal(folder).startswith(f"{name} does not have the SHA-256")


def test_link_in_place_of_a_file_is_named(folder: Path) -> None:
    file = folder / "00000002" / "state.json"
    file.rename(folder / "elsewhere.json")
    file.symlink_to(folder / "elsewhere.json")
    assert refusal(folder).startswith("state.json is no regular file")


def test_folder_in_place_of_the_manifest_is_named(folder: Path) -> None:
    manifest = folder / "00000002" / "manifest.json"
    manifest.unlink()
    manifest.mkdir()
    assert refusal(folder).startswith("manifest.json is missing")


def test_all_damaged_is_told_and_none_is_found(folder: Path) -> None:
    for step in (1, 2):
        (folder / f"{step:08d}" / "state.json").write_text("{}")
    path, damaged = checkpoint.latest(folder)
    assert path is None
    assert [text[: text.index(" has")] for text in damaged] == [
        f"checkpoint {folder / '00000002'}: state.json",
        f"checkpoint {folder / '00000001'}: state.json",
    ]


def test_unreadable_disk_block_is_damage_but_a_full_descriptor_table_is_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EIO falls back; EMFILE would make the next run throw good work away, so it is raised."""
    real = io.open

    def failing(number: int) -> Callable:
        def call(path: object, *args: object, **kwargs: object) -> object:
            if str(path).endswith("00000002/model.safetensors"):
                raise OSError(number, os.strerror(number), str(path))
            return real(path, *args, **kwargs)

        return call

    monkeypatch.setattr(io, "open", failing(errno.EIO))
    path, damaged = checkpoint.latest(folder)
    assert path == folder / "00000001"
    assert "00000002: cannot be read ([Errno 5]" in damaged[0]
    monkeypatch.setattr(io, "open", failing(errno.EMFILE))
    with pytest.raises(OSError, match="Too many open files"):
        checkpoint.latest(folder)
