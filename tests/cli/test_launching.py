"""The options that say where runs take place, of ``preceptor compare`` and ``preceptor tune``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from preceptor.cli import launching, main
from preceptor.cli.launching import _visible_gpus, launch_of, launched
from preceptor.comparison.sweep import Local

SWEEP = ["compare", "bandit", "--preset", "smoke", "--seeds", "0-1"]
TUNE = ["tune", "bandit", "--preset", "smoke", "--metric", "reward", "--search", "update.learning_rate=1e-5:1e-3:log"]


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--launcher", "rai"], "unknown launcher 'rai' (did you mean 'ray'?)"),
        (["--jobs", "0"], "--jobs must be a whole number from 1, got '0'"),
        (["--cpus", "2"], "--cpus belongs to --launcher ray or slurm, not to local"),
        (["--memory", "2GiB"], "--memory belongs to --launcher ray or slurm, not to local"),
        (["--launcher", "slurm", "--address", "auto"], "--address belongs to --launcher ray, not to slurm"),
        (["--launcher", "ray", "--slurm", "time=3"], "--slurm belongs to --launcher slurm, not to ray"),
        (["--launcher", "ray", "--gpus", "-1"], "--gpus must be a number from 0 to 9999, got '-1'"),
        (["--launcher", "ray", "--memory", "8"], "must be a size such as 8GiB or 500MiB, got '8'"),
        (["--launcher", "slurm", "--slurm", "gpu"], "--slurm needs KEY=VALUE such as partition=gpu, got 'gpu'"),
        (["--launchr", "ray"], "unknown option '--launchr' (did you mean '--launcher'?)"),
    ],
)
@pytest.mark.parametrize("command", [SWEEP, TUNE], ids=["compare", "tune"])
def test_what_is_refused_before_anything_is_written(
    command: list[str], words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refusal(capsys, *command, "--out", str(tmp_path / "s"), *words)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--search", "update.learning_rat=1:2"], "(did you mean 'update.learning_rate'?)"),
        (["--search", "update.learning_rate=1:2", "--metric", "reward"], "--out DIR"),
        (["--search", "update.learning_rate=1:2", "--out", "s"], "give --metric NAME"),
        (["--search", "update.learning_rate=-1:2", "--metric", "reward", "--out", "s"], "update.learning_rate"),
        (["--search", "update.baseline=none,mean", "--metric", "reward", "--out", "s"], "update.baseline"),
        (["--search", "update.learning_rate=1:2", "--metric", "r", "--out", "s", "--direction", "up"], "max or min"),
        (["--search", "update.learning_rate=1:2", "--metric", "r", "--out", "s", "--trials", "0"], "--trials must be"),
        (["--search", "update.learning_rate=1:2", "--metric", "r", "--out", "s", "--seed", "x"], "--seed must be"),
        (["--search", "update.learning_rate=1:2", "--metric", "r", "--out", "s", "--", "--seed", "1"], "cannot stand"),
        (["bandits"], "unexpected argument 'bandits'"),
    ],
)
def test_searches_that_are_refused(
    words: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refusal(capsys, "tune", "bandit", *words)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_system_of_a_search_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown system 'bandid' (did you mean 'bandit'?)" in refusal(capsys, "tune", "bandid")


@pytest.mark.parametrize(
    ("visible", "gpus"), [("0,1", ("0", "1")), ("GPU-a, GPU-b", ("GPU-a", "GPU-b")), ("", ()), ("-1", ())]
)
def test_the_gpus_are_those_that_the_user_made_visible(
    visible: str, gpus: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _visible_gpus() == gpus
    launch = launch_of("local", jobs=None, cpus=None, gpus=None, memory=None, address=None, slurm=None)
    # A device with a number is the user's own choice.
    for device, handed in (("auto", gpus), ("cuda", gpus), ("cuda:1", ()), ("cpu", ())):
        with launched(launch, tmp_path, device=device) as launcher:
            assert isinstance(launcher, Local)
            assert launcher._gpus == handed


def test_without_a_word_from_the_user_the_driver_names_the_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho GPU-11\necho GPU-22\n")
    program.chmod(0o755)
    assert _visible_gpus() == ("GPU-11", "GPU-22")
    program.write_text("#!/bin/sh\necho 'no driver'\nexit 9\n")
    assert _visible_gpus() == ()


def test_what_a_run_asks_of_a_scheduler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setattr(
        "preceptor.comparison.slurm_launcher.SlurmLauncher.__init__",
        lambda self, root, resources, **rest: asked.append((tuple(resources), rest)),
    )
    monkeypatch.setattr("preceptor.comparison.slurm_launcher.SlurmLauncher.close", lambda self: None)
    given = {"jobs": "3", "address": None, "slurm": ["partition=gpu", "time=90"]}
    for device, cpus, gpus, memory in (("cuda", None, None, None), ("auto", "4", "2", 2**33)):
        launch = launch_of("slurm", cpus=cpus, gpus=gpus, memory=memory, **given)  # type: ignore[arg-type]
        with launched(launch, tmp_path, device=device):
            pass
    settings = {"settings": {"partition": "gpu", "time": 90}, "num_jobs": 3}
    assert asked == [((1.0, 1.0, 2**31), settings), ((4.0, 2.0, 2**33), settings)]
    assert launching.device_of(("bandit", "--device", "cuda:1")) == "cuda:1"


def test_printed_cells_are_shell_lines_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "s"
    assert main([*SWEEP, "--out", str(out), "--print", "--", "--device", "cpu"]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert [line.split(" then ")[0] for line in lines] == [f"if [ -e {out}/seed{s}/manifest.json ];" for s in (0, 1)]
    assert all(subprocess.run(["sh", "-n", "-c", line]).returncode == 0 for line in lines)
    assert "--device cpu --seed 1 --threads 1" in lines[1]
    assert "2 of 2 runs are missing; when all have ended, the same command without --print compares them" in said.err
    assert not out.exists()


@pytest.mark.slow
def test_real_runs_by_hand_by_ray_by_slurm_and_here_give_the_same_bytes(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}
    program = tmp_path / "preceptor"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m preceptor "$@"\n')
    program.chmod(0o755)

    def preceptor(*words: str) -> str:
        done = subprocess.run([str(program), *words], env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    found = {}
    for name, words in {
        "local": [],
        "by hand": ["--print"],
        "ray": ["--launcher", "ray"],
        "slurm": ["--launcher", "slurm", "--slurm", "cluster=local"],
    }.items():
        out = tmp_path / name / "s"
        said = preceptor(*SWEEP, "--out", str(out), *words)
        if name == "by hand":
            subprocess.run(["sh", "-ec", said], env=environment, check=True, cwd=tmp_path, capture_output=True)
            preceptor(*SWEEP, "--out", str(out))
        found[name] = (out / "comparison.json").read_bytes()
    assert len(set(found.values())) == 1, found.keys()


@pytest.mark.slow
def test_a_real_search_ends_in_commands_that_run(tmp_path: Path) -> None:
    def preceptor(*words: str) -> str:
        done = subprocess.run([sys.executable, "-m", "preceptor", *words], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = preceptor(*TUNE, "--trials", "2", "--out", "t")
    assert "The best of 2 trials (2 finished) is trial " in said
    assert "biased" in said
    commands = {line.partition(": ")[0]: line.partition(": ")[2].split() for line in said.splitlines() if ": " in line}
    assert commands["and compare"] == ["preceptor", "compare", "t-fresh", "t-usual"]
    for name in ("measure it", "beside"):
        assert commands[name][:4] == ["preceptor", "compare", "bandit", "--seeds"]
        preceptor(*(word if word != "1-10" else "1-2" for word in commands[name][1:]))
    assert "update.learning_rate=" in preceptor(*commands["and compare"][1:])
    preceptor(*commands["run it"][1:], "--out", "best")
