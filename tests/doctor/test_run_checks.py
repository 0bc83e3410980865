"""A real, short run of reading: doctor, replay and watch look at it, then at copies with one thing damaged."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import preceptor
from preceptor.cli import main, replay
from preceptor.cli.watch import _table
from preceptor.doctor.forecast import _memory, _time
from preceptor.errors import ConfigError, StorageError
from preceptor.runs.files import FolderLock, is_locked
from preceptor.runs.watching import MetricsTail, is_at_work, planned_steps

QUICK = ["--set", "update.steps=2", "--set", "evaluation.num_episodes=2", "--set", "save_every=1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "r"
    assert (
        main(["run", "reading", "--preset", "smoke", "--threads", "1", "--no-report", "--out", str(folder), *QUICK])
        == 0
    )
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def edit(path: Path, number: int, change: Callable[[dict[str, Any]], object]) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows[number])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def said(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str]:
    code = main([str(word) for word in argv])
    return code, capsys.readouterr().out


def test_a_whole_run_passes_every_check(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    code, out = said(capsys, "doctor", run)
    assert code == 0
    assert out.endswith("12 ok, 0 warn, 0 fail\n"), out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_every_damage_has_its_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = run / "checkpoints" / "step-000002" / "policy.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("steps: 2", "steps: 3"))
    edit(run / "metrics.jsonl", 1, lambda row: row.update(step=1))
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["environment"]["torch"] = "2.9.1"
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "result.json").write_text('{"rec')
    code, out = said(capsys, "doctor", run)
    assert code == 7
    failed = [line.split(":")[0].removeprefix("fail").strip() for line in out.splitlines() if line.startswith("fail")]
    assert failed == ["configuration", "metrics.jsonl", "checkpoint of step 2", "result", "seal", "torch"]
    assert "warn  environment: torch 2.9.1 → " in out
    assert "update.steps 2 → 3" in out


def test_a_run_replays_to_its_own_rewards(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = said(capsys, "replay", run)
    assert code == 0
    assert "all equal within 0.0001" in out
    assert "numbers recomputed" in out


def swap_two_pairs(row: dict[str, Any]) -> None:
    first, second = [span for span in row["policy_spans"] if span["kind"] == "value"][:2]
    first["pair"], second["pair"] = second["pair"], first["pair"]


@pytest.mark.parametrize(
    "tamper",
    [
        swap_two_pairs,
        lambda row: row.update(reward=row["reward"] + 1e-3),
        lambda row: row["reader_token_ids"].__setitem__(5, 7),
        lambda row: row["policy_token_ids"].__setitem__(-1, 7),
        lambda row: row["reader_spans"][1]["log_probs"].__setitem__(0, -1.0),
    ],
)
def test_a_tampered_decision_is_found_and_named(
    run: Path, capsys: pytest.CaptureFixture[str], tamper: Callable[[dict[str, Any]], object]
) -> None:
    edit(run / "decisions.jsonl", 3, tamper)
    code, out = said(capsys, "replay", run)
    assert code == 7
    assert out.startswith("parted: step 1, episode 3 of learned")
    assert "episode 4" not in out


def test_as_many_partings_as_are_shown_leave_none_unsaid(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in (0, 1):
        edit(run / "decisions.jsonl", index, lambda row: row.update(reward=row["reward"] + 1e-3))
    for shown, further in ((1, " (1 further places are not shown)"), (2, "")):
        monkeypatch.setattr(replay, "SHOWN", shown)
        code, out = said(capsys, "replay", run)
        assert code == 7
        assert out.count("parted: ") == shown
        assert out.splitlines()[-1].endswith(f"part by more than 0.0001{further}")


def test_a_decision_that_cannot_be_executed_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(run / "decisions.jsonl", 0, lambda row: row["policy_spans"][2].update(pair=99))
    assert main(["replay", str(run)]) == 2
    assert "episode 0 of learned: pairs [99, " in capsys.readouterr().err
    edit(run / "decisions.jsonl", 0, lambda row: row.pop("policy_spans"))
    assert main(["replay", str(run)]) == 2
    assert "malformed (KeyError('policy_spans'))" in capsys.readouterr().err


def test_watch_prints_a_line_a_step_and_ends_with_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = said(capsys, "watch", run, "--metrics", "reward", "query_kl")
    assert code == 0
    lines = out.splitlines()
    assert [line.split()[:3] for line in lines[:2]] == [["step", "1", "reward"], ["step", "2", "reward"]]
    assert lines[2] == f"finished at step 2; results: {run}"


def test_the_lock_and_the_result_tell_who_is_at_work(run: Path) -> None:
    assert not is_at_work(run)
    (run / "result.json").rename(run / "aside")
    note = {"pid": os.getpid(), "host": "another", "since": "2026-01-01T00:00:00+00:00"}
    (run / "run.lock").write_text(json.dumps(note))  # of a run that was copied here while it was at work there
    assert not is_at_work(run)
    lock = FolderLock(run)
    assert is_at_work(run)
    (run / "aside").rename(run / "result.json")
    assert not is_at_work(run)
    lock.release()
    assert not is_at_work(run)


def test_a_run_begins_while_others_look_on(run: Path) -> None:
    """Looking takes the lock for an instant; who wants it in earnest tries again."""
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            is_locked(run)

    onlookers = [threading.Thread(target=look) for _ in range(3)]
    for onlooker in onlookers:
        onlooker.start()
    try:
        for _ in range(100):
            FolderLock(run).release()
    finally:
        stop.set()
        for onlooker in onlookers:
            onlooker.join()


def test_the_tail_follows_a_resume(run: Path) -> None:
    tail = MetricsTail(run / "metrics.jsonl")
    assert tail.look()
    assert not tail.look()
    assert [row["step"] for row in tail.rows] == [1, 2]
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(f"{lines[0]}\n")
    assert tail.look()
    assert [row["step"] for row in tail.rows] == [1]


def test_a_run_says_how_many_steps_it_will_have(run: Path) -> None:
    assert planned_steps(run) == 2
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(_table(run, [{"step": 1, "reward": 0.5}], []))
    assert "copy: step 1 of 2" in console.export_text()
    (run / "plan.json").unlink()
    assert planned_steps(run) is None


def test_the_forecast_is_the_pace_after_the_first_step() -> None:
    """Three steps in 3 s after the first, which took longer; then ten more at that pace."""
    assert (
        _time([(1, 20.0), (2, 21.5), (4, 23.0)], 13).line().startswith("ok    time: 1 s a step, 13 steps in about 0:13")
    )
    assert _time([(1, 20.0), (2, 21.0)], None).line() == "ok    time: 1 s a step"
    assert _time([(3, 20.0)], 13).status == "warn"


def test_memory_is_told_of_the_machines_and_a_fifth_is_left_for_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 1,000 MiB, in pages of 4 KiB."""
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 256_000}.__getitem__)
    assert _memory([{}, {}], 799 * 2**20).line() == "ok    memory: 799 MiB after 2 steps, of 1,000 MiB"
    assert _memory([{"peak_memory_mib": 801.0}], 0).status == "warn"


# ---- the seal -------------------------------------------------------------------------------------------------------

SEALED = ("metrics.jsonl", "decisions.jsonl", "result.json", "manifest.json", "config.yaml", "articles.json")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, flip) for name in (*SEALED, "model/model.safetensors", "seal.json")),
        *(("metrics.jsonl", change) for change in (empty, shorten, Path.unlink)),
        *(("seal.json", change) for change in (empty, Path.unlink)),
        ("model/config.json", shorten),
    ],
)
def test_a_change_after_the_end_is_told_by_all(
    run: Path, capsys: pytest.CaptureFixture[str], name: str, change: Callable[[Path], None]
) -> None:
    change(run / name)
    code, out = said(capsys, "doctor", run)
    if name == "manifest.json" and code == 7:
        assert out.startswith("fail  manifest") or "fail  seal: manifest.json" in out
        return
    if name == "seal.json" and change is Path.unlink:
        assert "warn  seal: there is none" in out
        return
    assert code == 7
    assert "fail  seal: " in out
    line = next(line for line in out.splitlines() if line.startswith("fail  seal"))
    assert name in line or name == "seal.json"
    if "/" not in name:  # the models are read by what loads them
        for command in ("report", "compare"):
            assert main([command, str(run)]) in (2, 5)
            said_so = capsys.readouterr().err
            assert "Traceback" not in said_so
        with pytest.raises((StorageError, ConfigError)):
            preceptor.load(run)
    else:
        with pytest.raises(StorageError, match=re.escape(name)):
            preceptor.load(run).model()


def test_a_replay_of_emptied_metrics_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty(run / "metrics.jsonl")
    code, out = said(capsys, "replay", run)
    assert code == 7
    assert "changed since the run ended: metrics.jsonl has changed (size " in out


def test_without_its_seal_a_run_is_used_as_it_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shorten(run / "notices.log")
    with pytest.raises(StorageError, match=r"notices\.log has changed \(size .*remove seal\.json"):
        preceptor.load(run)
    (run / "seal.json").unlink()
    assert preceptor.load(run).records


def test_a_resume_seals_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "result.json").unlink()
    assert main(["resume", str(run), "--no-report"]) == 0
    capsys.readouterr()
    assert preceptor.load(run).records


@pytest.mark.slow
def test_memory_is_forecast_within_15_per_cent_and_linear_in_the_episodes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Doctor's figure after its first steps against the peak of the whole training, for 8, 16 and 32 episodes."""
    sizes, peaks = (8, 16, 32), []
    for size in sizes:
        words = ["--threads", "1", "--set", f"episode.batch_size={size}", "--set", "update.steps=6"]
        code, out = said(capsys, "doctor", "reading", *words)
        assert code == 0
        forecast = float(re.search(r"memory: ([\d,]+) MiB", out)[1].replace(",", ""))  # type: ignore[index]
        # In a process of its own, since a peak is of a process.
        command = [
            sys.executable,
            "-m",
            "preceptor",
            "run",
            "reading",
            "--no-report",
            "--out",
            str(tmp_path / f"{size}"),
        ]
        subprocess.run([*command, *words], check=True, capture_output=True)
        rows = (tmp_path / f"{size}" / "metrics.jsonl").read_text().splitlines()
        peaks.append(json.loads(rows[-1])["peak_memory_mib"])
        assert forecast == pytest.approx(peaks[-1], rel=0.15)
    slope = (peaks[2] - peaks[0]) / (sizes[2] - sizes[0])
    assert peaks[1] == pytest.approx(peaks[0] + slope * (sizes[1] - sizes[0]), rel=0.05)


def test_a_model_over_bytes_is_no_name_on_the_hub(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = said(capsys, "doctor", "curriculum", "--preset", "teacher", "--no-forecast")
    assert code == 0
    assert "made from random weights by the run itself" in out


@pytest.mark.slow
def test_before_a_run_the_first_steps_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = said(capsys, "doctor", "reading", "--preset", "smoke", "--threads", "1")
    assert code == 0
    assert "s a step, 4 steps in about" in out
    assert "ok    memory: " in out
    code, out = said(capsys, "doctor", "reading", "--model", "nowhere/at/all", "--no-forecast")
    assert code == 7
    assert "fail  model: " in out
