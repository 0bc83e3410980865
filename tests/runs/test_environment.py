from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from preceptor.runs import environment as env


def test_every_exact_field_is_recorded_as_json() -> None:
    record = env.environment(torch.device("cpu"), 1)
    assert set(env.EXACT) <= set(record)
    assert json.loads(json.dumps(record)) == record
    assert record["torch"] == torch.__version__
    assert record["device"] == "cpu"
    assert record["threads"] == 1


def test_changes_are_listed_with_both_values() -> None:
    old = {"threads": 1, "torch": "2.13", "python": "3.11", "gone": 1}
    new = {"threads": 2, "torch": "2.14", "python": "3.12"}
    assert env.changes(old, new, ["threads", "torch"]) == ["threads 1 → 2", "torch 2.13 → 2.14"]
    assert env.changes(old, new)[-1] == "gone 1 → absent"
    assert env.changes(old, old) == []


def test_nested_configurations_get_dotted_names() -> None:
    config = {"a": 1, "b": {"c": [1, 2], "d": {"e": None}}}
    assert env.flattened(config) == {"a": 1, "b.c": [1, 2], "b.d.e": None}


def test_commit_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "__init__.py"
    package.write_text("")
    monkeypatch.setattr(env, "__file__", str(tmp_path / "run" / "environment.py"))
    unknown = {"commit": None, "dirty": None}
    assert env.code_version() == unknown, "no repository"
    git("init", "-q")
    assert env.code_version() == unknown, "inside somebody's repository, but not a part of it"
    git("add", ".")
    git("commit", "-q", "-m", "first")
    assert env.code_version() == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    package.write_text("x = 1\n")
    assert env.code_version()["dirty"] is True
    monkeypatch.setenv("PATH", "")
    assert env.code_version() == unknown, "no git on this machine"
