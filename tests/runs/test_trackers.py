from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from preceptor.errors import ConfigError, MissingExtraError, ServiceError
from preceptor.runs.trackers import check_trackers, open_tracker


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=True)
    reader.Reload()
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra 'tensorboard'")
    first = open_tracker("tensorboard", tmp_path, first_step=1, config={})
    for step in range(1, 8):
        first.log(step, {"reward": float(step), "parts": [1.0, 2.0], "name": "x", "flag": True})
    first.close()
    second = open_tracker("tensorboard", tmp_path, first_step=5, config={})  # the last checkpoint was at step 4
    for step in range(5, 10):
        second.log(step, {"reward": float(step)})
    second.close()
    shown = scalars(tmp_path)
    assert shown["reward"] == [(step, float(step)) for step in range(1, 10)]
    assert set(shown) == {"reward", "flag"}


class FakeWandB(types.ModuleType):
    """The service's side of ``wandb``: runs by id that keep their rows between processes and ignore earlier steps."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)
        self.rows: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self.refuse = False

    def init(self, *, id: str, resume: str, **_: Any) -> FakeWandB.Session:
        if self.refuse:
            raise self.Error("permission denied")
        assert resume == "allow"
        return self.Session(self.rows.setdefault(id, []))

    class Session:
        def __init__(self, rows: list[tuple[int, dict[str, float]]]) -> None:
            self.rows = rows
            self.step = rows[-1][0] + 1 if rows else 0
            self.finished = False

        def log(self, row: dict[str, float], *, step: int) -> None:
            assert step >= self.step, "the service warns about and drops steps that it has"
            self.rows.append((step, row))

        def finish(self) -> None:
            self.finished = True


def test_wandb_goes_on_in_the_same_run_without_double_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", service)
    for first_step, last_step in ((1, 7), (5, 9)):
        tracker = open_tracker("wandb", tmp_path, first_step=first_step, config={"seed": 1})
        for step in range(first_step, last_step + 1):
            tracker.log(step, {"reward": float(step), "parts": [1.0]})
        tracker.close()
        assert tracker._run.finished
    assert list(service.rows) == [(tmp_path / "wandb-id").read_text()]
    assert next(iter(service.rows.values())) == [(step, {"reward": float(step)}) for step in range(1, 10)]
    service.refuse = True
    with pytest.raises(ServiceError, match="W&B refused the run: permission denied; log in with: wandb login"):
        open_tracker("wandb", tmp_path, first_step=1, config={})


class FakeTrackio(types.ModuleType):
    """The database's side of ``trackio``: runs by name that keep their rows between processes."""

    def __init__(self) -> None:
        super().__init__("trackio")
        self.__spec__ = importlib.util.spec_from_loader("trackio", loader=None)
        self.rows: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self.storage = types.ModuleType("trackio.sqlite_storage")
        self.storage.SQLiteStorage = self  # type: ignore[attr-defined]

    def get_max_step_for_run(self, project: str, run: str) -> int | None:
        assert project == "preceptor"
        return max((step for step, _ in self.rows.get(run, [])), default=None)

    def init(self, *, project: str, name: str, resume: str, **_: Any) -> FakeTrackio.Session:
        assert (project, resume) == ("preceptor", "allow")
        print("* greeting")
        return self.Session(self.rows.setdefault(name, []))

    class Session:
        def __init__(self, rows: list[tuple[int, dict[str, float]]]) -> None:
            self.rows = rows

        def log(self, row: dict[str, float], *, step: int) -> None:
            self.rows.append((step, row))

        def finish(self) -> None:
            pass


def test_trackio_goes_on_in_the_same_run_without_double_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    database = FakeTrackio()
    monkeypatch.setitem(sys.modules, "trackio", database)
    monkeypatch.setitem(sys.modules, "trackio.sqlite_storage", database.storage)
    for first_step, last_step in ((1, 7), (5, 9)):
        tracker = open_tracker("trackio", tmp_path, first_step=first_step, config={"seed": 1})
        for step in range(first_step, last_step + 1):
            tracker.log(step, {"reward": float(step), "parts": [1.0]})
        tracker.close()
    assert list(database.rows) == [(tmp_path / "trackio-name").read_text()]
    assert next(iter(database.rows.values())) == [(step, {"reward": float(step)}) for step in range(1, 10)]
    assert capsys.readouterr().out == ""


def test_what_is_missing_or_unknown_is_told_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"tracking with wandb needs .* pip install 'preceptor\[wandb\]'"):
        check_trackers(["wandb"])
    with pytest.raises(ConfigError, match=r"tracker 'tensorbord' is not known \(did you mean 'tensorboard'\?\)"):
        check_trackers(["tensorbord"])
    check_trackers([])
