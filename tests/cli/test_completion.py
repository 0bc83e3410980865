from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from preceptor.cli import main
from preceptor.cli.completion import SCRIPTS, candidates


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["re"], ["resume", "replay", "report"]),
        (["run", "rea"], ["reading"]),
        (["run", "reading", "--pre"], ["--preset"]),
        (["run", "reading", "--preset", "sm"], ["smoke"]),
        (["run", "reading", "--set", "update.lea"], ["update.learning_rate="]),
        (["compare", "reading", "--arms", "learned,untr"], ["learned,untrained"]),
        (["run", "reading", "--tracker", "tensorboard", "w"], ["wandb"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["report", "runs/"], []),  # files, which the shell knows
        (["rn", "x"], []),
        (["run", "nowhere", "--preset", ""], []),
    ],
)
def test_what_can_come_next(words: list[str], expected: list[str]) -> None:
    assert candidates(words) == expected


@pytest.mark.parametrize("shell", sorted(SCRIPTS))
def test_the_script_is_one_that_its_shell_reads(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    if (program := shutil.which(shell)) is None:
        pytest.skip(f"{shell} is not installed")
    assert subprocess.run([program, "-n", str(script)], capture_output=True, timeout=20).returncode == 0


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes(tmp_path: Path) -> None:
    (tmp_path / "preceptor").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m preceptor "$@"\n')
    (tmp_path / "preceptor").chmod(0o755)
    program = SCRIPTS["bash"] + (
        f"PATH={tmp_path}:$PATH\nCOMP_WORDS=(preceptor run reading --preset sm); COMP_CWORD=4\n_preceptor\n"
        'echo "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "smoke\n", done.stderr
