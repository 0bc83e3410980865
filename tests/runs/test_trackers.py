from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from preceptor.errors import ConfigError, MissingExtraError, ServiceError
from preceptor.runs.trackers import check_trackers, open_tracker

GOLDEN = Path(__file__).parents[1] / "golden"
MANIFEST = {"name": "first", "tags": ["a", "b"], "project": "mine", "group": "ten", "config": {"seed": 1}}
ESTIMATE = {"mean": 0.25, "low": None, "high": 0.5, "unit": "nats", "n": 1}
RESULT = {
    "verdict": "The learned order beats random.",
    "table": ["gain"],
    "arms": {"learned": {"gain": ESTIMATE, "calls": ESTIMATE}, "a|b": {"gain": ESTIMATE}},
}


def golden_rows(system: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (GOLDEN / system / "metrics.jsonl").read_text().splitlines()]


def reader(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), purge_orphaned_data=True, size_guidance={"tensors": 0, "scalars": 0})
    found.Reload()
    return found


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = reader(folder)
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def text(folder: Path, tag: str) -> str:
    (value,) = reader(folder).Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val
    return str(value.decode())


@pytest.fixture
def tensorboard() -> None:
    pytest.importorskip("tensorboard", reason="needs the extra 'tensorboard'")


@pytest.mark.usefixtures("tensorboard")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
class TestTensorBoard:
    """Its real event files, read back with its own reader."""

    def test_no_step_is_shown_twice_after_a_resume(self, tmp_path: Path) -> None:
        first = open_tracker("tensorboard", tmp_path, first_step=1, manifest=MANIFEST)
        for step in range(1, 8):
            first.log(step, {"reward": float(step), "parts": [1.0, 2.0], "name": "x", "flag": True})
        first.close()
        second = open_tracker("tensorboard", tmp_path, first_step=5, manifest=MANIFEST)  # last saved at step 4
        for step in range(5, 10):
            second.log(step, {"reward": float(step)})
        second.conclude(RESULT, None)
        second.close()
        shown = scalars(tmp_path / "tensorboard")
        assert shown["reward"] == [(step, float(step)) for step in range(1, 10)]
        assert set(shown) == {"reward", "flag"}

    @pytest.mark.parametrize(("system", "own_step"), [("curriculum", "arm_step"), ("surgery", "stretch_step")])
    def test_each_method_is_a_curve_over_its_own_steps(self, tmp_path: Path, system: str, own_step: str) -> None:
        rows = golden_rows(system)
        tracker = open_tracker("tensorboard", tmp_path, first_step=1, manifest=MANIFEST)
        for row in rows:
            tracker.log(row["step"], row)
        tracker.close()
        methods = {row["arm"] for row in rows}
        assert {path.name for path in (tmp_path / "tensorboard").iterdir() if path.is_dir()} == methods
        for method in methods:
            own = [row for row in rows if row["arm"] == method]
            shown = scalars(tmp_path / "tensorboard" / method)
            assert [step for step, _ in shown["tokens"]] == [row[own_step] for row in own]
            assert [value for _, value in shown["tokens"]] == [row["tokens"] for row in own]
            assert not {"step", own_step, "arm_number"} & shown.keys()
            if system == "surgery":  # what a row holds under its method's name
                entropy = [row[method]["entropy"] for row in own if "entropy" in row[method]]
                assert [value for _, value in shown.get("entropy", [])] == pytest.approx(entropy)

    def test_a_resume_in_another_method_doubles_nothing(self, tmp_path: Path) -> None:
        rows = golden_rows("curriculum")
        begun = open_tracker("tensorboard", tmp_path, first_step=1, manifest=MANIFEST)
        for row in rows[:11]:  # killed in the third method, saved in the second
            begun.log(row["step"], row)
        begun.close()
        resumed = open_tracker("tensorboard", tmp_path, first_step=7, manifest=MANIFEST)
        for row in rows[6:]:
            resumed.log(row["step"], row)
        resumed.close()
        for method in {row["arm"] for row in rows}:
            shown = scalars(tmp_path / "tensorboard" / method)["tokens"]
            assert [step for step, _ in shown] == [row["arm_step"] for row in rows if row["arm"] == method]

    def test_configuration_verdict_methods_and_page_are_text(self, tmp_path: Path) -> None:
        page = tmp_path / "report.html"
        tracker = open_tracker("tensorboard", tmp_path, first_step=1, manifest=MANIFEST)
        tracker.log(1, {"reward": 1.0})
        tracker.close()
        for _ in range(2):  # a run that was stopped in its evaluation concludes in a process that logs no row
            later = open_tracker("tensorboard", tmp_path, first_step=2, manifest=MANIFEST)
            later.conclude(RESULT, page)
            later.close()
        assert '"seed": 1' in text(tmp_path / "tensorboard", "configuration")
        shown = text(tmp_path / "tensorboard", "result")
        assert shown.startswith("The learned order beats random.")
        assert "| learned | gain | 0.25 |  | 0.5 | nats |" in shown
        assert "| a\\|b | gain |" in shown
        assert "calls" not in shown  # a metric that the run's own table leaves out
        assert str(page) in text(tmp_path / "tensorboard", "page")
        assert scalars(tmp_path / "tensorboard")["reward"] == [(1, 1.0)]


class FakeWandB(types.ModuleType):
    """The service's side of ``wandb``: runs by id that keep their rows between processes and ignore earlier steps."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)
        self.rows: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self.settings: dict[str, Any] = {}
        self.refuse = False

    def init(self, *, id: str, resume: str, **settings: Any) -> FakeWandB.Session:
        if self.refuse:
            raise self.Error("permission denied")
        assert resume == "allow"
        self.settings = settings
        return self.Session(id, self.rows.setdefault(id, []))

    class Table:
        def __init__(self, *, columns: list[str], data: list[list[Any]]) -> None:
            self.rows = [dict(zip(columns, row, strict=True)) for row in data]

    class Artifact:
        def __init__(self, name: str, *, type: str) -> None:
            self.name, self.type = name, type
            self.entries: dict[str, Any] = {}

        def add(self, entry: Any, name: str) -> None:
            self.entries[name] = entry

        def add_file(self, path: str) -> None:
            self.entries[Path(path).name] = Path(path).read_text()

    class Session:
        def __init__(self, id: str, rows: list[tuple[int, dict[str, float]]]) -> None:
            self.id, self.rows = id, rows
            self.step = rows[-1][0] + 1 if rows else 0
            self.finished = False
            self.x_axes: dict[str, str | None] = {}
            self.summary: dict[str, Any] = {}
            self.artifacts: list[FakeWandB.Artifact] = []

        def define_metric(self, name: str, *, step_metric: str | None = None, hidden: bool | None = None) -> None:
            self.x_axes[name] = step_metric

        def log(self, row: dict[str, float], *, step: int) -> None:
            assert step >= self.step, "the service warns about and drops steps that it has"
            self.rows.append((step, row))

        def log_artifact(self, artifact: FakeWandB.Artifact) -> None:
            self.artifacts.append(artifact)

        def finish(self) -> None:
            self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandB:
    service = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", service)
    return service


def test_wandb_goes_on_in_the_same_run_without_double_steps(tmp_path: Path, wandb: FakeWandB) -> None:
    for first_step, last_step in ((1, 7), (5, 9)):
        tracker = open_tracker("wandb", tmp_path, first_step=first_step, manifest=MANIFEST)
        for step in range(first_step, last_step + 1):
            tracker.log(step, {"reward": float(step), "parts": [1.0]})
        tracker.close()
        assert tracker._run.finished  # type: ignore[attr-defined]
    assert list(wandb.rows) == [(tmp_path / "wandb-id").read_text()]
    assert next(iter(wandb.rows.values())) == [(step, {"reward": float(step)}) for step in range(1, 10)]
    wandb.refuse = True
    with pytest.raises(ServiceError, match="W&B refused the run: permission denied; log in with: wandb login"):
        open_tracker("wandb", tmp_path, first_step=1, manifest=MANIFEST)


def test_wandb_is_told_name_tags_project_group_and_configuration(tmp_path: Path, wandb: FakeWandB) -> None:
    open_tracker("wandb", tmp_path, first_step=1, manifest=MANIFEST)
    assert wandb.settings == {**MANIFEST, "dir": str(tmp_path)}
    open_tracker("wandb", tmp_path, first_step=1, manifest={"config": {}})  # a run of before it had these
    assert (wandb.settings["project"], wandb.settings["name"]) == ("preceptor", tmp_path.name)


def test_each_method_is_a_curve_at_wandb(tmp_path: Path, wandb: FakeWandB) -> None:
    rows = golden_rows("curriculum")
    tracker = open_tracker("wandb", tmp_path, first_step=1, manifest=MANIFEST)
    for row in rows:
        tracker.log(row["step"], row)
    sent = next(iter(wandb.rows.values()))
    assert [step for step, _ in sent] == [row["step"] for row in rows]  # the service's own steps only grow
    for method in {row["arm"] for row in rows}:
        curve = [(row[f"{method}/step"], row[f"{method}/tokens"]) for _, row in sent if f"{method}/tokens" in row]
        assert curve == [(row["arm_step"], row["tokens"]) for row in rows if row["arm"] == method]
        assert tracker._run.x_axes[f"{method}/*"] == f"{method}/step"  # type: ignore[attr-defined]


def test_wandb_gets_verdict_methods_and_page(tmp_path: Path, wandb: FakeWandB) -> None:
    (tmp_path / "report.html").write_text("<p>page</p>")
    tracker = open_tracker("wandb", tmp_path, first_step=1, manifest=MANIFEST)
    tracker.conclude(RESULT, tmp_path / "report.html")
    session = tracker._run  # type: ignore[attr-defined]
    assert session.summary == {"verdict": "The learned order beats random."}
    (artifact,) = session.artifacts
    assert (artifact.name, artifact.type) == (f"result-{session.id}", "result")
    assert artifact.entries["report.html"] == "<p>page</p>"
    assert artifact.entries["methods"].rows[0] == {
        **{"method": "learned", "metric": "gain", "mean": 0.25, "low": None, "high": 0.5, "unit": "nats"}
    }
    assert session.rows == []  # no step is taken up, so that a run that goes on has its next one free


class FakeTrackio(types.ModuleType):
    """The database's side of ``trackio``: runs by name that keep their rows between processes."""

    def __init__(self) -> None:
        super().__init__("trackio")
        self.__spec__ = importlib.util.spec_from_loader("trackio", loader=None)
        self.rows: dict[str, list[tuple[int | None, dict[str, Any]]]] = {}
        self.settings: dict[str, Any] = {}
        self.Markdown = str
        self.Api = lambda: self

    def runs(self, project: str) -> list[Any]:
        if not self.rows:
            raise ValueError(f"Project '{project}' does not exist")
        assert project == "mine"
        return [types.SimpleNamespace(name=name, delete=lambda name=name: self.rows.pop(name)) for name in self.rows]

    def init(self, *, name: str, **settings: Any) -> FakeTrackio.Session:
        assert name not in self.rows, "a run of this name is there already"
        print("* greeting")
        self.settings = settings
        return self.Session(self.rows.setdefault(name, []))

    class Session:
        def __init__(self, rows: list[tuple[int | None, dict[str, Any]]]) -> None:
            self.rows = rows

        def log(self, row: dict[str, Any], *, step: int | None = None) -> None:
            self.rows.append((step, row))

        def finish(self) -> None:
            pass


def test_trackio_is_written_anew_by_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    database = FakeTrackio()
    monkeypatch.setitem(sys.modules, "trackio", database)
    rows = {step: {"step": step, "reward": float(step), "parts": [1.0]} for step in range(1, 10)}
    for first_step, last_step in ((1, 7), (5, 9)):
        kept = [json.dumps(row) for step, row in rows.items() if step <= first_step]  # the first row is written already
        (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in kept))
        tracker = open_tracker("trackio", tmp_path, first_step=first_step, manifest=MANIFEST)
        for step in range(first_step, last_step + 1):
            tracker.log(step, rows[step])
        tracker.close()
    tracker.conclude(RESULT, None)
    name = (tmp_path / "trackio-name").read_text()
    assert list(database.rows) == [name]
    assert name.startswith("first-")
    assert database.rows[name][:-1] == [(step, {"reward": float(step)}) for step in range(1, 10)]
    assert database.rows[name][-1][1]["result"].startswith("The learned order beats random.")
    assert (database.settings["project"], database.settings["group"]) == ("mine", "ten")
    assert database.settings["config"] == {"seed": 1, "tags": ["a", "b"]}
    assert capsys.readouterr().out == ""


def test_what_is_missing_or_unknown_is_told_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"tracking with wandb needs .* pip install 'preceptor\[wandb\]'"):
        check_trackers(["wandb"])
    with pytest.raises(ConfigError, match=r"tracker 'tensorbord' is not known \(did you mean 'tensorboard'\?\)"):
        check_trackers(["tensorbord"])
    check_trackers([])
