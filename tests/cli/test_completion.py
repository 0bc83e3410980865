from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from preceptor.cli import main
from preceptor.cli.completion import SHELLS, VARIABLE


def candidates(*words: str) -> list[str]:
    """What the program answers when bash asks what can stand in the place of the last of ``words``."""
    line = " ".join(["preceptor", *words])
    environment = os.environ | {VARIABLE: "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words))}
    done = subprocess.run(
        [sys.executable, "-m", "preceptor"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["re"], ["resume", "replay", "report", "repair"]),
        (["run", "rea"], ["reading"]),
        (["run", "reading", "--pre"], ["--preset"]),
        (["run", "reading", "--preset", "sm"], ["smoke"]),
        (["run", "reading", "--set", "update.lea"], ["update.learning_rate="]),
        (["compare", "reading", "--arms", "learned,untr"], ["learned,untrained"]),
        (["run", "reading", "--tracker", "w"], ["wandb"]),
        (["list", "cu"], ["curriculum"]),
        (["compare", "reading", "--launcher", ""], ["local", "ray", "slurm"]),
        (["compare", "reading", "--add"], ["--address"]),
        (["tune", "rea"], ["reading"]),
        (["tune", "reading", "--search", "update.lea"], ["update.learning_rate="]),
        (["tune", "reading", "--direction", "m"], ["max", "min"]),
        (["run", "nowhere", "--pre"], []),
    ],
)
def test_what_can_come_next(words: list[str], expected: list[str]) -> None:
    assert candidates(*words) == expected


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_one_that_its_shell_reads(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    assert VARIABLE in script.read_text()
    if (program := shutil.which(shell)) is None:
        pytest.skip(f"{shell} is not installed")
    assert subprocess.run([program, "-n", str(script)], capture_output=True, timeout=20).returncode == 0
