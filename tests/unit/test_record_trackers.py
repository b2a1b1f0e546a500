"""Trackers: the same id after a resume, metrics and nothing else."""

import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from gruppo.record import RunDirectory, TensorBoard, Trackio, Wandb

METRICS = {"reward/total_mean": 0.5, "loss": math.nan, "adv/abs_max": 2}


class Session:
    """What a dashboard library would be told."""

    def __init__(self) -> None:
        self.inits: list[dict] = []
        self.logs: list[tuple] = []
        self.finished = 0

    def init(self, **options: object) -> "Session":
        self.inits.append(options)
        return self

    def log(self, metrics: dict, step: int | None = None) -> None:
        self.logs.append((metrics, step))

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.logs.append(("define", name, step_metric))

    def finish(self) -> None:
        self.finished += 1


def module(name: str, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ModuleType(name)
    vars(fake).update(init=session.init, finish=session.finish, Settings=SimpleNamespace)
    monkeypatch.setitem(sys.modules, name, fake)


def test_wandb_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session()
    module("wandb", session, monkeypatch)
    RunDirectory.create(tmp_path / "a", "").close()
    for step in (1, 2):
        with RunDirectory.open(tmp_path / "a") as run:
            tracker = Wandb(project="p", mode="offline").start(run, redone_from=step)
            tracker(step, [], METRICS)
            tracker.evaluated(step, {"pass@1": 0.25, "len": math.nan})
            tracker.close()
    first, second = session.inits
    assert first["id"] == second["id"]
    assert (first["name"], first["project"], first["resume"], first["mode"]) == (
        "a",
        "p",
        "allow",
        "offline",
    )
    assert first["dir"] == str(tmp_path / "a")
    assert first["save_code"] is False
    assert vars(first["settings"])["disable_git"] is True
    logs = [entry for entry in session.logs if entry[0] != "define"]
    sent = ({"reward/total_mean": 0.5, "adv/abs_max": 2.0}, {"eval/pass@1": 0.25})
    assert logs == [({**metrics, "step": step}, None) for step in (1, 2) for metrics in sent]
    assert session.finished == 2


def test_trackio_goes_on_under_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session()
    module("trackio", session, monkeypatch)
    RunDirectory.create(tmp_path / "a", "").close()
    for step in (1, 2):
        with RunDirectory.open(tmp_path / "a") as run:
            tracker = Trackio(project="p").start(run)
            tracker(step, [], METRICS)
            tracker.close()
    names = [options["name"] for options in session.inits]
    assert names[0] == names[1]
    assert names[0].startswith("a-")
    assert session.logs == [({"reward/total_mean": 0.5, "adv/abs_max": 2.0}, s) for s in (1, 2)]
    assert session.finished == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("redone_from", [3, 1, 0])
def test_tensorboard_draws_no_step_twice(tmp_path: Path, redone_from: int) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator
    with RunDirectory.create(tmp_path / "a", "") as run:
        for first, value in ((None, 1.0), (redone_from, 2.0)):
            tracker = TensorBoard().start(run, redone_from=first)
            if not first:
                tracker.evaluated(0, {"pass@1": value})
            for step in range(first or 1, 5):
                tracker(step, [], {"m": value * step, "nan": math.nan})
            tracker.close()
    events = accumulator(str(tmp_path / "a" / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["eval/pass@1", "m"]
    points = [(event.step, event.value) for event in events.Scalars("m")]
    assert points == [(n, n * (1.0 if n < redone_from else 2.0)) for n in (1, 2, 3, 4)]
    evaluated = [(event.step, event.value) for event in events.Scalars("eval/pass@1")]
    assert evaluated == [(0, 1.0 if redone_from else 2.0)]


@pytest.mark.parametrize(
    ("record", "name"), [(Wandb(), "wandb"), (Trackio(), "trackio"), (TensorBoard(), "tensorboard")]
)
def test_missing_extra_says_what_to_install(
    record: Wandb | Trackio | TensorBoard,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocked = "torch.utils.tensorboard" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, blocked, None)
    with (
        RunDirectory.create(tmp_path / "a", "") as run,
        pytest.raises(ImportError, match=rf'pip install "gruppo\[{name}\]"'),
    ):
        record.start(run)
