"""The checkpoint store: what comes back, what is newest, what is deleted, what is refused."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from gruppo.policy import checkpoint


def writer(text: str) -> Callable[[Path], None]:
    """A write function for two small files, one of them in a sub-folder."""

    def write(folder: Path) -> None:
        (folder / "model.txt").write_text(text)
        (folder / "optimizer").mkdir()
        (folder / "optimizer" / "moments.txt").write_text(text * 2)

    return write


def damage(path: Path) -> None:
    (path / "model.txt").write_text("XXX")


def test_manifest_states_every_file(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "c", writer("abc"), step=7, meta={"best": 0.1})
    assert path == tmp_path / "c" / "00000007"
    manifest = checkpoint.read_manifest(path)
    assert manifest.step == 7
    assert manifest.meta == {"best": 0.1}
    assert [(e.name, e.length, e.sha256) for e in manifest.files] == [
        ("model.txt", 3, hashlib.sha256(b"abc").hexdigest()),
        ("optimizer/moments.txt", 6, hashlib.sha256(b"abcabc").hexdigest()),
    ]
    checkpoint.verify(path)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["00000007"]


def test_tensors_come_back_to_the_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shared = torch.randn(4, 3)
    tensors = {
        "f32": torch.randn(3, 5),
        "f64": torch.randn(2, dtype=torch.float64),
        "bf16": torch.randn(7).to(torch.bfloat16),
        "i64": torch.tensor([-(2**62), 2**62]),
        "u8": torch.arange(5, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
        "scalar": torch.tensor(3.5),
        "none": torch.zeros(0, 4),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "grad": torch.randn(2, requires_grad=True),
        "tied_a": shared,
        "tied_b": shared,
        "view": shared[1:3],
    }
    checkpoint.write_tensors(tmp_path / "t.safetensors", tensors)
    back = checkpoint.read_tensors(tmp_path / "t.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].shape == tensor.shape
        plain = tensor.detach().contiguous()
        assert (
            back[name].numpy(force=True).tobytes() == plain.numpy(force=True).tobytes()
            if (tensor.dtype != torch.bfloat16)
            else torch.equal(back[name], plain)
        )


def test_json_floats_come_back_to_the_bit(tmp_path: Path) -> None:
    value = {"a": [0.1, 1e-308, -0.0, 1 / 3], "n": None, "big": 2**80, "s": "\ud800é"}
    checkpoint.write_json(tmp_path / "v.json", value)
    back = checkpoint.read_json(tmp_path / "v.json")
    assert back == value
    assert str(back["a"][2]) == "-0.0"


def test_json_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.write_json(tmp_path / "v.json", {"loss": float("nan")})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("NaN", "NaN is no JSON number"),
        ('{"a": 1, "a": 2}', "same key twice"),
        ("{} {}", "Extra data"),
        ("", "Expecting value"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_json_is_read_strictly(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "v.json").write_text(text)
    with pytest.raises(checkpoint.CheckpointError, match=rf"v\.json is not strict JSON.*{reason}"):
        checkpoint.read_json(tmp_path / "v.json")


def test_newest_is_the_highest_step_whatever_the_clock_says(tmp_path: Path) -> None:
    for step in (9, 10, 2):
        path = checkpoint.save(tmp_path, writer(str(step)), step=step)
        os.utime(path, (2_000_000_000 - step, 2_000_000_000 - step))
    assert checkpoint.steps(tmp_path) == [2, 9, 10]
    assert checkpoint.latest(tmp_path) == (tmp_path / "00000010", [])


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "missing") == (None, [])
    assert checkpoint.latest(tmp_path) == (None, [])
    assert checkpoint.steps(tmp_path) == []


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, writer("old"), step=3)
    path = checkpoint.save(tmp_path, writer("new"), step=3)
    checkpoint.verify(path)
    assert (path / "model.txt").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["00000003"]


def test_failed_write_leaves_nothing_and_keeps_the_old(tmp_path: Path) -> None:
    old = checkpoint.save(tmp_path, writer("old"), step=3)

    def fails(folder: Path) -> None:
        writer("new")(folder)
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        checkpoint.save(tmp_path, fails, step=3)
    assert [p.name for p in tmp_path.iterdir()] == ["00000003"]
    checkpoint.verify(old)
    assert (old / "model.txt").read_text() == "old"


def test_another_librarys_write_error_is_an_os_error_with_the_path(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        raise SafetensorError("I/O error: No space left on device")

    with pytest.raises(OSError, match=r"00000003: cannot be written .*No space left"):
        checkpoint.save(tmp_path, fails, step=3)


def test_manifest_name_and_links_are_refused(tmp_path: Path) -> None:
    def writes_manifest(folder: Path) -> None:
        (folder / "manifest.json").write_text("{}")

    def links(folder: Path) -> None:
        (folder / "weights").symlink_to("/etc")

    with pytest.raises(ValueError, match="written by the store"):
        checkpoint.save(tmp_path, writes_manifest, step=1)
    with pytest.raises(checkpoint.CheckpointError, match="weights is no regular file"):
        checkpoint.save(tmp_path, links, step=1)
    assert list(tmp_path.iterdir()) == []


def test_space_is_checked_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint.save(tmp_path, writer("a" * 100_000), step=1)
    size = sum(f.stat().st_size for f in path.rglob("*"))
    need = size + size // 20 + (1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=need - 1))
    with pytest.raises(OSError, match=f"needs {need} bytes, {need - 1} are free") as caught:
        checkpoint.save(tmp_path, lambda _: pytest.fail("written"), step=2)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path)
    with pytest.raises(OSError, match=f"needs {22 * 2**20} bytes"):
        checkpoint.save(tmp_path, lambda _: pytest.fail("written"), step=2, need=20 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=need))
    assert checkpoint.save(tmp_path, writer("b"), step=2).name == "00000002"


def test_prune_keeps_the_last_and_the_named(tmp_path: Path) -> None:
    for step in range(1, 8):
        checkpoint.save(tmp_path, writer(str(step)), step=step)
    assert checkpoint.prune(tmp_path, 2, keep={1, 3}) == [2, 4, 5]
    assert checkpoint.steps(tmp_path) == [1, 3, 6, 7]
    assert checkpoint.prune(tmp_path, 2, keep={1, 3}) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{s:08d}" for s in (1, 3, 6, 7)]
    with pytest.raises(ValueError, match="keep_last = 0"):
        checkpoint.prune(tmp_path, 0)


def test_prune_never_deletes_the_newest_intact_one(tmp_path: Path) -> None:
    for step in range(1, 6):
        path = checkpoint.save(tmp_path, writer(str(step)), step=step)
        if step > 3:
            damage(path)
    assert checkpoint.prune(tmp_path, 2) == [1, 2]
    assert checkpoint.latest(tmp_path)[0] == tmp_path / "00000003"


def test_prune_trusts_the_one_just_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [checkpoint.save(tmp_path, writer(str(step)), step=step) for step in (1, 2)]
    monkeypatch.setattr(checkpoint, "verify", lambda _: pytest.fail("read again"))
    assert checkpoint.prune(tmp_path, 1, intact=paths[1]) == [1]


def test_sweep_clears_what_dead_processes_left_only(tmp_path: Path) -> None:
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    pid = int(dead.stdout)
    checkpoint.save(tmp_path, writer("5"), step=5)
    for name in (f".tmp-00000006-{pid}", f".trash-00000001-{pid}", f".old-00000005-{pid}"):
        (tmp_path / name / "deep").mkdir(parents=True)
    ours = tmp_path / f".tmp-00000006-{os.getpid()}"
    ours.mkdir()
    alive = tmp_path / f".tmp-00000006-{os.getppid()}"
    alive.mkdir()
    checkpoint.sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [alive.name, "00000005"]


def test_a_checkpoint_that_was_moved_aside_is_found_and_gets_its_name_back(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, writer("5"), step=5)
    aside = tmp_path / f".old-00000005-{os.getpid()}"
    path.rename(aside)
    assert checkpoint.latest(tmp_path) == (aside, [])
    checkpoint.sweep(tmp_path)
    assert checkpoint.latest(tmp_path) == (path, [])


def reseal(path: Path, **changes: object) -> None:
    """Rewrite a manifest with changed values and the hash that belongs to them."""
    value = json.loads((path / "manifest.json").read_text())
    value.pop("sha256")
    value |= changes
    plain = (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()
    value["sha256"] = hashlib.sha256(plain).hexdigest()
    (path / "manifest.json").write_text(json.dumps(value, sort_keys=True, indent=1) + "\n")


def test_newer_format_is_refused_and_not_fallen_back_over(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, writer("1"), step=1)
    newer = checkpoint.save(tmp_path, writer("2"), step=2)
    reseal(newer, format=2)
    with pytest.raises(checkpoint.NewerFormatError, match=r"format 2 is newer .* \(1\); upgrade"):
        checkpoint.verify(newer)
    with pytest.raises(checkpoint.NewerFormatError):
        checkpoint.latest(tmp_path)


def test_this_releases_format_stays_readable(tmp_path: Path) -> None:
    """A checkpoint of format 1, byte for byte: every later release must load it."""
    path = tmp_path / "00000002"
    path.mkdir()
    (path / "a.txt").write_bytes(b"hello")
    (path / "manifest.json").write_text(
        "{\n"
        ' "files": [\n'
        "  {\n"
        '   "length": 5,\n'
        '   "name": "a.txt",\n'
        '   "sha256": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"\n'
        "  }\n"
        " ],\n"
        ' "format": 1,\n'
        ' "meta": {\n'
        '  "seed": 0\n'
        " },\n"
        ' "sha256": "d4f10e437a08245eeeac12cc17939f34bea15b5c788b47d6c9ed05952d3bcdfd",\n'
        ' "step": 2\n'
        "}\n"
    )
    assert checkpoint.latest(tmp_path) == (path, [])
    assert checkpoint.read_manifest(path).meta == {"seed": 0}


def test_renamed_checkpoint_is_not_taken_for_another_step(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, writer("1"), step=1)
    checkpoint.save(tmp_path, writer("2"), step=2).rename(tmp_path / "00000009")
    found, damaged = checkpoint.latest(tmp_path)
    assert found == tmp_path / "00000001"
    assert damaged == [f"checkpoint {tmp_path / '00000009'}: manifest.json is that of step 2"]
    shutil.copytree(tmp_path / "00000001", tmp_path / "exported")
    checkpoint.verify(tmp_path / "exported")


def test_replace_file_is_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "f"
    checkpoint.replace_file(file, b"old")

    def fails(source: object, target: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(OSError, match="Input/output") as caught:
            checkpoint.replace_file(file, b"new")
    assert caught.value.filename == str(file)
    assert file.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    checkpoint.replace_file(file, b"new")
    assert file.read_bytes() == b"new"
