"""Code of users that misbehaves in every way: one line that names function and line, and a run that can be resumed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from preceptor.cli import main
from preceptor.errors import ConfigError, DataError, Interrupted
from preceptor.runs.user_code import call, call_for_numbers
from preceptor.systems.curriculum.rewards import load_function

HEAD = "import sys, os, time, itertools\nimport json\n\n\ndef reward(prompts, continuations, references):\n"

MISBEHAVIOUR: dict[str, tuple[str, str]] = {
    "raises": ("    raise ValueError('no words')", "raised ValueError: no words (mine.py, line 6, in reward)"),
    "raises in several lines": ("    raise ValueError('a\\nb')", "raised ValueError: a b (mine.py, line 6"),
    "asserts": ("    assert False", "raised AssertionError (mine.py, line 6"),
    "raises deeper": ("    return [inner(c) for c in continuations]\n\n\ndef inner(c):\n    return c['x']",
                      "raised TypeError: string indices must be integers, not 'str' (mine.py, line 10, in inner)"),
    "raises in a library": ("    return [json.loads('{') for _ in continuations]", "(mine.py, line 6, in "),
    "divides by zero": ("    return [1 / 0]", "raised ZeroDivisionError: division by zero (mine.py, line 6"),
    "recurses": ("    return reward(prompts, continuations, references)", "raised RecursionError"),
    "has no memory": ("    raise MemoryError", "raised MemoryError (mine.py, line 6"),
    "exits": ("    sys.exit(0)", "left the process with 0 (mine.py, line 6"),
    "exits with a text": ("    raise SystemExit('bye')", "left the process with 'bye'"),
    "raises a base exception": ("    raise BaseException('odd')", "raised BaseException: odd"),
    "stops an iteration": ("    raise StopIteration", "raised StopIteration"),
    "raises one of ours": ("    from preceptor.errors import StorageError\n    raise StorageError('x')",
                           "raised StorageError: x (mine.py, line 7"),
    "returns None": ("    pass", "returned None, not a list of 2 numbers (mine.py, line 5, in reward)"),
    "returns text": ("    return '12'", "returned str '12', not a list of 2 numbers"),
    "returns bytes": ("    return b'12'", "returned bytes b'12', not a list"),
    "returns a number": ("    return 1.0", "returned float 1.0, not a list"),
    "returns a mapping": ("    return {0: 1.0, 1: 2.0}", "returned dict"),
    "returns a set": ("    return {1.0, 2.0}", "returned set"),
    "returns too few": ("    return [1.0]", "returned 1 numbers for 2 continuations"),
    "returns none": ("    return []", "returned 0 numbers for 2 continuations"),
    "returns too many": ("    return [1.0] * 3", "returned more numbers for 2 continuations"),
    "never ends returning": ("    return itertools.repeat(1.0)", "returned more numbers for 2 continuations"),
    "returns texts": ("    return ['1.0', '2.0']", "returned str '1.0' at place 0, not a number"),
    "returns a None": ("    return [1.0, None]", "returned None at place 1, not a number"),
    "returns lists": ("    return [[1.0], [2.0]]", "returned list [1.0] at place 0, not a number"),
    "returns complex numbers": ("    return [1j, 2j]", "returned complex 1j at place 0"),
    "returns a huge number": ("    return [10 ** 400, 1]", "at place 0, not a number"),
    "returns a generator that raises": ("    return (1 / 0 for _ in continuations)", "raised ZeroDivisionError"),
    "is a coroutine": ("    return (lambda: 0)", "returned function"),
    "never ends": ("    while True:\n        pass", "took longer than 0.3 s (mine.py, line "),
    "sleeps": ("    time.sleep(100)", "took longer than 0.3 s (mine.py, line 6"),
    "never ends and catches": ("    while True:\n        try:\n            time.sleep(100)\n"
                               "        except Exception:\n            pass", "took longer than 0.3 s"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISBEHAVIOUR)
def test_a_reward_that_misbehaves_is_named(kind: str, tmp_path: Path) -> None:
    body, message = MISBEHAVIOUR[kind]
    (tmp_path / "mine.py").write_text(HEAD + body + "\n")
    function = load_function(f"{tmp_path}/mine.py:reward")
    began = time.monotonic()
    with pytest.raises(DataError) as caught:
        call_for_numbers(
            "the reward mine.py:reward",
            function,
            [""],
            ["a", "b"],
            ["", ""],
            count=2,
            each="continuations",
            timeout=0.3,
        )
    said = str(caught.value)
    assert said.startswith("the reward mine.py:reward ")
    assert message in said
    assert said.endswith("; mend it and resume")
    assert "\n" not in said
    assert time.monotonic() - began < 8


@pytest.mark.parametrize(
    "good",
    ["[1, 2.5]", "(1.0, True)", "(x for x in (1.0, 2.0))", "numpy.array([1.0, 2.0])", "torch.tensor([1.0, 2.0])"],
)
def test_whatever_holds_numbers_will_do(good: str) -> None:
    function = eval(f"lambda: {good}", {"numpy": __import__("numpy"), "torch": __import__("torch")})
    assert len(call_for_numbers("it", function, count=2, each="texts", timeout=5)) == 2


def test_ctrl_c_is_no_misbehaviour() -> None:
    def stop() -> None:
        raise Interrupted("stopped", 2)

    with pytest.raises(Interrupted):
        call("it", stop, timeout=5)


MODULES = {
    "def f(:": "invalid syntax (line 1)",
    "\n1 / 0": "raised ZeroDivisionError: division by zero (line 2)",
    "import no_such_module": "No module named 'no_such_module'",
    "import sys\nsys.exit(3)": "left the process with 3 (line 2)",
}


@pytest.mark.parametrize("text", MODULES)
def test_a_module_that_fails_as_it_is_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ConfigError, match=r"reward '.*mine.py:f' cannot be imported: ") as caught:
        load_function(f"{tmp_path}/mine.py:f")
    assert MODULES[text] in str(caught.value)


SETTINGS = (
    "data.datasets=[{name: dialogue, location: 'builtin:dialogue'}]", "data.block_tokens=24", "update.steps=3",
    "update.batch_tokens=48", "ppo.prompts=2", "ppo.prompt_tokens=4", "ppo.continuation_tokens=4", "save_every=1",
    "controls.rules=[]", "controls.static_grid=none", "difficulty.sample_size=4", "validation.rows=2",
    "ppo.rewards=[{name: 'mine.py:reward', weight: 1.0, timeout: 0.5}]",
)  # fmt: skip
GOOD = "def reward(prompts, continuations, references):\n    return [1.0] * len(prompts)\n"


@pytest.mark.parametrize("body", ["raise KeyError('x')", "time.sleep(60)"])
def test_a_run_whose_reward_fails_is_mended_and_resumed(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    failing = f"import os, time\n\n\ndef reward(prompts, continuations, references):\n    {body}\n"
    Path("mine.py").write_text(failing)
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    assert main(["run", "curriculum", "--preset", "smoke", "--threads", "1", "--no-report", "--out", "run", *sets]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "the reward mine.py:reward " in line
    assert "(mine.py, line 5, in reward)" in line
    Path("mine.py").write_text(GOOD)
    assert main(["resume", "run", "--no-report"]) == 0
    rows: list[dict[str, Any]] = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["reward"] == 1.0
    capsys.readouterr()


def test_code_that_cannot_be_stopped_ends_the_process(tmp_path: Path) -> None:
    """In a process of its own: it is ended."""
    program = (
        "import time\nfrom preceptor.runs import user_code\nuser_code.GRACE_SECONDS = 0.5\n"
        "def stubborn():\n    while True:\n        try:\n            time.sleep(9)\n"
        "        except BaseException:\n            pass\n"
        "user_code.call('the reward x', stubborn, timeout=0.3)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "the reward x took longer than 0.3 s and does not let itself be stopped" in done.stderr
