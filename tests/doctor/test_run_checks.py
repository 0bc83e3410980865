"""A real, short run of reading: doctor, replay and watch look at it, then at copies with one thing damaged."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from preceptor.cli import main
from preceptor.cli.watch import _table
from preceptor.doctor.forecast import _time
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
    """A copy whose last process has ended; the real one is this process, which lives."""
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    note = json.loads((copy / "run.lock").read_text())
    (copy / "run.lock").write_text(json.dumps({**note, "pid": 2**22 + 1}))  # above every process id of Linux
    return copy


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
    assert out.endswith("11 ok, 0 warn, 0 fail\n"), out
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
    assert failed == ["configuration", "metrics.jsonl", "checkpoint of step 2", "result", "torch"]
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


def test_the_tail_follows_a_resume_and_the_lock_tells_who_is_at_work(finished: Path, run: Path) -> None:
    assert is_at_work(finished)  # this process held it last
    assert not is_at_work(run)
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


@pytest.mark.slow
def test_before_a_run_the_first_steps_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = said(capsys, "doctor", "reading", "--preset", "smoke", "--threads", "1")
    assert code == 0
    assert "s a step, 4 steps in about" in out
    assert "ok    memory: " in out
    code, out = said(capsys, "doctor", "reading", "--model", "nowhere/at/all", "--no-forecast")
    assert code == 7
    assert "fail  model: " in out
