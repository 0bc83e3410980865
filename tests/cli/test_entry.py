"""The command line: what it accepts, what it says, and the exit codes, on a small system made up for the purpose."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import preceptor.systems
from preceptor.api import cache_dir
from preceptor.cli import main
from preceptor.config import load_config, schema
from preceptor.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Interrupted,
    LockedError,
    MissingExtraError,
    ModelError,
    NumericError,
    ServiceError,
    ShapeError,
)
from preceptor.systems import find_system, known_systems
from preceptor.systems.base import Services

SYSTEMS = ("reading", "bandit", "curriculum", "surgery", "pretrain")
TOY = """
from __future__ import annotations
from collections.abc import Iterator
from pathlib import Path
from pydantic import Field
from preceptor.config import Options
from preceptor.systems.base import System, lazy

class Data(Options):
    title: str | None = Field(None, description="100 % text.")
    words: int = Field(3, description="Words of a lesson.")
    folders: tuple[str, ...] = Field((), description="Where to look.")

class ToyConfig(Options):
    seed: int = Field(0, description="Seed of every random stream.")
    save_every: int = Field(1, description="Steps between checkpoints.")
    data: Data = Data()
    steps: int = Field(2, description="Steps.")

    def conflicts(self) -> Iterator[str]:
        if self.steps < 0:
            yield f"`steps` must be at least 0, got {self.steps}"

SYSTEM = System(
    name="toy",
    summary="learns nothing",
    Config=ToyConfig,
    streams=("toy",),
    train=lazy("toy_system.loop:train"),
    flags={"seed": "seed", "words": "data.words", "title": "data.title", "folders": "data.folders"},
    inputs={"titles": "data.title"},
    choices={"arms": {"learned": "as it learns", "random": "by chance"}},
    extendable=("steps",),
    presets=Path(__file__).parent / "presets",
)
"""
LOOP = """
failure = None
seen = []

class State:
    def state_dict(self): return {}
    def load_state_dict(self, state): pass

def train(config, run, services):
    seen.append((config, services))
    for step in run.loop(config.steps, State()):
        if failure is not None and step == config.steps:
            raise failure
        run.log(step, {"reward": float(step)})
    return {"system": "toy", "status": "finished"}
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Makes `toy` the only system, with a preset `smoke`, a made-up report, and an empty folder to work in."""
    package = tmp_path / "source" / "toy_system"
    (package / "presets").mkdir(parents=True)
    (package / "__init__.py").write_text(TOY)
    (package / "loop.py").write_text(LOOP)
    (package / "presets" / "smoke.yaml").write_text("# quick, to see that all works\ndata: {words: 1}\nsteps: 1\n")
    work = tmp_path / "work"
    work.mkdir()

    page = ModuleType("preceptor.report.page")
    page.build_report = lambda folder, sections=None: written(folder / "report.html", "<p>")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "preceptor.report.page", page)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setattr(preceptor.systems, "OWN", {"toy": "toy_system:SYSTEM"})
    known_systems.cache_clear()
    monkeypatch.chdir(work)
    for name in ("", ".loop"):
        monkeypatch.delitem(sys.modules, f"toy_system{name}", raising=False)
    import toy_system.loop

    yield toy_system.loop
    known_systems.cache_clear()


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What is said when ``argv`` is refused, in exactly one line, with exit code 2 and nothing on stdout."""
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("preceptor: error: ")
    return said.err.removeprefix("preceptor: error: ").rstrip("\n")


# ---- what is accepted ----


def test_a_run_from_start_to_report(toy: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "toy", "--preset", "smoke", "--seed", "7", "--threads", "1", "--device", "cpu"]) == 0
    (folder,) = Path("runs").iterdir()
    assert json.loads((folder / "result.json").read_text())["status"] == "finished"
    assert (folder / "report.html").is_file()
    out = capsys.readouterr().out
    assert f"results: {folder}\n" in out
    assert f"report:  {folder}/report.html\n" in out
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["seed"], manifest["system"], manifest["streams"]) == (7, "toy", ["toy"])
    assert (manifest["device"], manifest["environment"]["threads"]) == ("cpu", 1)


def test_layers_from_preset_to_set(toy: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("data: {words: 5, title: mine}\n")
    layers = ["--preset", "smoke", "--config", "mine.yaml", "--words", "6", "--set", "data.words=7", "--print-config"]
    for end, words, title in ((2, 1, "null"), (4, 5, "mine"), (6, 6, "mine"), (8, 7, "mine")):
        assert main(["run", "toy", *layers[:end], "--print-config"]) == 0
        out = capsys.readouterr().out
        assert f"  words: {words}  # Words of a lesson.\n" in out
        assert f"  title: {title}  # 100 % text.\n" in out
        assert "steps: 1  # Steps.\n" in out
    assert list(Path().iterdir()) == [Path("mine.yaml")]  # printing makes no run


def test_a_printed_configuration_is_a_file_for_config(toy: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["run", "toy", "--title", "no: 'x' # 1984", "--folders", "a b", "c,d", "--folders", "é", "--print-config"]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    Path("mine.yaml").write_text(printed)
    assert main(["run", "toy", "--config", "mine.yaml", "--print-config"]) == 0
    assert capsys.readouterr().out == printed
    assert """folders: [a b, 'c,d', é]""" in printed


def test_the_environment_is_read_here_and_passed_down(
    toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost/v1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("PRECEPTOR_CACHE_DIR", raising=False)
    assert main(["run", "toy", "--no-report"]) == 0
    monkeypatch.setenv("PRECEPTOR_CACHE_DIR", str(tmp_path / "own"))
    assert main(["run", "toy", "--no-report"]) == 0
    assert [services for _, services in toy.seen] == [
        Services(tmp_path / "xdg" / "preceptor", "sk-canary", "http://localhost/v1"),
        Services(tmp_path / "own", "sk-canary", "http://localhost/v1"),
    ]
    files = [path for path in Path().rglob("*") if path.is_file()]
    assert len(files) >= 8
    assert not [path for path in files if b"sk-canary" in path.read_bytes()]


def test_a_relative_or_missing_xdg_folder_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    for environ in ({}, {"XDG_CACHE_HOME": "relative"}, {"XDG_CACHE_HOME": "", "PRECEPTOR_CACHE_DIR": ""}):
        assert cache_dir(environ) == Path("/home/someone/.cache/preceptor")


def test_resume_goes_on_with_the_same_configuration(toy: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["run", "toy", "--out", "r", "--title", "1e5", "--folders", "a", "--set", "steps=3"]
    toy.failure = Interrupted("stopped at step 1; resume with: preceptor resume r", signal.SIGTERM)
    assert main(argv) == 143
    assert "preceptor: stopped at step 1; resume with: preceptor resume r\n" in capsys.readouterr().err
    toy.failure = None
    assert main(["resume", "r"]) == 0
    first, second = (config for config, _ in toy.seen)
    assert first == second
    assert second.data.title == "1e5"
    assert [json.loads(row)["step"] for row in Path("r/metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    assert "report.html" in capsys.readouterr().out


def test_resume_goes_on_past_the_planned_end(toy: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "toy", "--out", "r", "--no-report"]) == 0
    assert main(["resume", "r", "--set", "steps=4", "--no-report"]) == 0
    assert [json.loads(row)["step"] for row in Path("r/metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    capsys.readouterr()
    assert refusal(capsys, "resume", "r", "--set", "data.words=4").startswith("`data.words` cannot change in a run")


def test_a_run_of_a_system_that_is_gone_is_refused(toy: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "toy", "--out", "r", "--no-report"]) == 0
    capsys.readouterr()
    manifest = Path("r/manifest.json")
    manifest.write_text(manifest.read_text().replace('"toy"', '"gone"', 1))
    assert refusal(capsys, "resume", "r") == "unknown system 'gone'; there are toy"


def test_name_tags_and_project_are_recorded(toy: ModuleType) -> None:
    words = [
        "--name",
        "first",
        "--tag",
        "a",
        "--tag",
        "b",
        "--project",
        "mine",
        "--group",
        "ten",
        "--log-level",
        "info",
    ]
    assert main(["run", "toy", "--out", "r", "--no-report", *words]) == 0
    manifest = json.loads(Path("r/manifest.json").read_text())
    assert (manifest["name"], manifest["tags"], manifest["project"]) == ("first", ["a", "b"], "mine")
    assert manifest["group"] == "ten"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_trackers_get_the_result_and_the_page(toy: ModuleType) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra 'tensorboard'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(["run", "toy", "--out", "r", "--tracker", "tensorboard"]) == 0
    reader = EventAccumulator("r/tensorboard")
    reader.Reload()
    tags = ("configuration", "result", "page")
    shown = {tag: reader.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode() for tag in tags}
    assert shown["page"] == f"`{Path('r/report.html').resolve()}`"
    assert '"steps"' in shown["configuration"]
    assert shown["result"].startswith(json.loads(Path("r/result.json").read_text()).get("verdict", ""))


def test_options_may_stand_before_the_system(toy: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--print-config", "--preset", "smoke", "--set", "steps=5", "toy"]) == 0
    out = capsys.readouterr().out
    assert "  words: 1 " in out
    assert "steps: 5 " in out


def test_a_renamed_key_is_said_and_read(capsys: pytest.CaptureFixture[str]) -> None:
    done = python("-m", "preceptor", "run", "reading", "--set", "update.optimiser=adam", "--print-config")
    assert done.returncode == 0
    assert "optimizer: adam " in done.stdout
    assert done.stderr == ("preceptor: `update.optimiser` is now called `update.optimizer`; the old name still works\n")


def test_list_names_systems_and_presets(toy: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    shown = [line.split(maxsplit=1) for line in out.splitlines()]
    assert shown[:4] == [
        ["toy", "learns nothing"],
        ["presets"],
        ["default", "the defaults"],
        ["smoke", "quick, to see that all works"],
    ]
    assert "learned               as it learns" in out
    assert main(["list", "toy", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "toy": {
            "description": "learns nothing",
            "presets": {"default": "the defaults", "smoke": "quick, to see that all works"},
            "arms": {"learned": "as it learns", "random": "by chance"},
        }
    }
    assert refusal(capsys, "list", "toi") == "unknown system 'toi' (did you mean 'toy'?)"


def test_help_teaches(toy: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--help"], ["run", "-h"], ["run", "toy", "--help"], ["resume", "--help"], ["report", "-h"]):
        assert main(argv) == 0
        out = capsys.readouterr().out
        for code in (2, 3, 4, 5, 6, 130):
            assert f"  {code:<5}" in out
    assert main(["run", "toy", "--help"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"--words WORDS +Words of a lesson\.\n", out)
    assert re.search(r"--title TITLE +100 % text\.\n", out)
    headings = [line for line in out.splitlines() if re.fullmatch(r"[A-Z].*:", line)]
    assert headings == ["Options of toy:", "Configuration:", "Execution:", "Options:"]
    assert main(["doctor", "toy", "--help"]) == 0
    assert "--no-forecast" in capsys.readouterr().out
    assert main(["compare", "toy", "--help"]) == 0
    assert re.search(r"--titles TITLES +A run for each: 100 % text\.\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    "words",
    [
        *(
            "",
            "run",
            "resume",
            "watch",
            "replay",
            "report",
            "export",
            "repair",
            "pretrain",
            "list",
            "doctor",
            "compare",
            "tune",
        ),
        *(
            "completion",
            *(f"{command} {system}" for command in ("run", "doctor", "compare", "tune") for system in SYSTEMS),
        ),
    ],
)
def test_help_fits_eighty_columns_and_shows_only_what_belongs(
    words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*words.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert not [line for line in out.splitlines() if len(line) > 80]
    assert "..." not in out.replace("RUN...", "").replace("A,B,...", "")  # no text was cut
    assert ("--article " in out) == (words in ("", "run reading", "doctor reading"))  # the first is an example


# ---- what is refused ----


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "missing command; see preceptor --help"),
        (["rn"], "unknown command 'rn' (did you mean 'run'?)"),
        (
            ["zzz"],
            "unknown command 'zzz'; there are run, resume, compare, tune, watch, replay, study, report, export, "
            "repair, list, doctor, completion",
        ),
        (["--hlp"], "unknown option '--hlp' (did you mean '--help'?)"),
        (["run"], "missing SYSTEM; see preceptor run --help"),
        (["run", "toi"], "unknown system 'toi' (did you mean 'toy'?)"),
        (["run", "zzz"], "unknown system 'zzz'; there are toy"),
        (["run", "toy", "--preset", "smok"], "unknown preset 'smok' of toy (did you mean 'smoke'?)"),
        (["run", "toy", "--preset", "../x"], "unknown preset '../x' of toy; there are default, smoke"),
        (["run", "toy", "--word", "3"], "unknown option '--word' (did you mean '--words'?)"),
        (["run", "--presett=smoke", "toy"], "unknown option '--presett' (did you mean '--preset'?)"),
        (["run", "toy", "--qqq"], "unknown option '--qqq'; see preceptor run toy --help"),
        (["run", "toy", "extra"], "unexpected argument 'extra'; see preceptor run toy --help"),
        (["run", "toy", "--seed"], "option '--seed' requires an argument"),
        (["run", "toy", "--seed", "x"], "`seed` must be a whole number, got 'x'"),
        (
            ["run", "toy", "--threads", "x"],
            "invalid value for '--threads': must be a whole number from 1 to 1024, got 'x'; see",
        ),
        (["run", "toy", "--set", "data.word=3"], "unknown key 'data.word' (did you mean 'data.words'?)"),
        (["run", "toy", "--set", "steps=-1"], "`steps` must be at least 0, got -1"),
        (["run", "toy", "--tracker", "wandbb"], "tracker 'wandbb' is not known (did you mean 'wandb'?); "),
        (["run", "toy", "--device", "gpu"], "device gpu is not available"),
        (["run", "toy", "--api-key", "x"], "unknown option '--api-key'; see preceptor run toy --help"),
        (["run", "toy", "--title", "a\0"], "argument 'a\\x00' is not valid UTF-8 text"),
        (["run", "toy", "--title", "a\udcff"], "argument 'a\\udcff' is not valid UTF-8 text"),
        (["resume", "nowhere"], "nowhere is not a run folder (no manifest.json)"),
        (["run", "toy", "--log-level", "x"], "invalid value for '--log-level': must be one of debug, info, warning,"),
        (["run", "toy", "--", "x"], "unexpected argument 'x'; see preceptor run toy --help"),
        (["export", "nowhere"], "missing option '--to'; see preceptor export --help"),
        (["export", "nowhere", "--to", "x"], "nowhere"),
        (["compare"], "missing SYSTEM|RUN...; see preceptor compare --help"),
        (["compare", "toi"], "'toi' is neither a folder nor a system (did you mean 'toy'?)"),
        (["compare", "toy"], "a sweep needs a folder; give --out DIR"),
        (["compare", "toy", "--out", "s"], "a sweep needs seeds; give --seeds 0-9"),
        (
            ["compare", "toy", "--out", "s", "--seeds", "5-3"],
            "--seeds must be numbers or ranges such as 0-9, got '5-3'",
        ),
        (
            ["compare", "toy", "--out", "s", "--seeds", "1", "--", "--seed", "2"],
            "--seed cannot stand after --; a sweep",
        ),
        (
            ["compare", "toy", "--out", "s", "--seeds", "1", "--", "--wrds", "2"],
            "after --: unknown option '--wrds' (did you mean '--words'?)",
        ),
        (["compare", "toy", "--out", "s", "--seeds", "1", "--", "--set", "steps=-1"], "`steps` must be at least 0"),
        (["compare", "."], ". is not a run folder (no manifest.json); give the folders of finished runs"),
        (["replay", "nowhere"], "nowhere is not a run folder (no manifest.json)"),
        (["doctor", "x" * 5_000], "'" + "x" * 56 + "... is longer than"),
        (["compare", "x" * 5_000], "'" + "x" * 56 + "... is longer than"),
        (
            ["replay", "x", "--tolerance", "nan"],
            "invalid value for '--tolerance': must be a number of at least 0, got 'nan'",
        ),
        (["watch", "nowhere"], "nowhere is not a run folder (no manifest.json)"),
        (["doctor", "toi"], "'toi' is neither a run folder nor a system (did you mean 'toy'?)"),
        (["doctor", "."], ". is not a run folder (no manifest.json); give the folder of a run or a system"),
        (["completion", "tcsh"], "a shell is needed, one of bash, zsh, fish, powershell; got 'tcsh'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    toy: ModuleType, capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    assert refusal(capsys, *argv).startswith(said)
    runs = Path("runs")
    assert not runs.exists() or not list(runs.iterdir())  # no empty run folder stays behind


def test_every_fault_of_a_configuration_has_its_line(toy: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("sed: 1\ndata:\n  words: many\n")
    assert main(["run", "toy", "--config", "mine.yaml", "--set", "steps=-3", "--print-config"]) == 2
    assert capsys.readouterr().err == (
        "preceptor: error: mine.yaml:1: unknown key 'sed' (did you mean 'seed'?)\n"
        "preceptor: error: mine.yaml:3: `data.words` must be a whole number, got 'many'\n"
        "preceptor: error: `steps` must be at least 0, got -3\n"
    )


@pytest.mark.parametrize(
    ("failure", "exit_code", "said"),
    [
        (DataError("too short"), 2, "preceptor: error: too short\n"),
        (ModelError("two\nlines \x1b[31m"), 2, "preceptor: error: two lines  [31m\n"),
        (ShapeError("shape"), 2, "preceptor: error: shape\n"),
        (
            MissingExtraError("LoRA", package="peft", extra="lora"),
            2,
            "install it with: pip install 'preceptor[lora]'\n",
        ),
        (NumericError("NaN"), 3, "preceptor: error: NaN\n"),
        (LockedError("in use"), 4, "preceptor: error: in use\n"),
        (CheckpointError("damaged"), 5, "preceptor: error: damaged\n"),
        (OSError(errno.ENOSPC, "No space left on device", "f"), 5, "preceptor: error: disk full: f; what was saved"),
        (PermissionError(errno.EACCES, "Permission denied", "f"), 5, "preceptor: error: Permission denied: f; what"),
        (ServiceError("refused"), 6, "preceptor: error: refused\n"),
        (KeyboardInterrupt(), 130, "preceptor: stopped by Ctrl-C\n"),
        (Interrupted("stopped", signal.SIGINT), 130, "preceptor: stopped\n"),
    ],
)
def test_errors_end_as_one_line_and_their_exit_code(
    toy: ModuleType, capsys: pytest.CaptureFixture[str], failure: BaseException, exit_code: int, said: str
) -> None:
    toy.failure = failure
    assert main(["run", "toy", "--out", "r"]) == exit_code
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    toy.failure = None
    assert main(["resume", "r"]) == 0  # the run was closed: its lock is free


@pytest.mark.parametrize("failure", [ZeroDivisionError("ours"), OSError(errno.EBADF, "ours"), RuntimeError("ours")])
def test_a_bug_keeps_its_traceback(toy: ModuleType, capsys: pytest.CaptureFixture[str], failure: Exception) -> None:
    toy.failure = failure
    assert main(["run", "toy"]) == 1
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert "toy_system/loop.py" in error
    assert error.endswith("preceptor: this is a bug of Preceptor; please report it with the lines above\n")


# ---- the process ----


def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    options = {"capture_output": True, "text": True, "timeout": 60, "env": environment} | options
    return subprocess.run([sys.executable, *arguments], check=False, **options)


def test_help_answers_in_half_a_second() -> None:
    # Processor time, not the clock: other work on this machine is not the command's fault, and nothing in it waits.
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert python("-m", "preceptor", "--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert 0 < min(seconds) < 0.5


@pytest.mark.parametrize(
    "argv", [["--help"], ["run", "--help"], ["list"], ["run", "reading", "--print-config"], ["rn"]]
)
def test_no_torch_before_a_run_begins(argv: list[str]) -> None:
    code = f"import sys; from preceptor.cli import main; main({argv}); sys.exit('torch' in sys.modules)"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_exit_codes_of_the_process() -> None:
    for argv, exit_code in ((["list"], 0), (["rn"], 2), (["run", "reading", "--set", "x=1"], 2), ([], 2)):
        done = python("-m", "preceptor", *argv)
        assert done.returncode == exit_code
        assert "Traceback" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_under_the_output_is_said() -> None:
    with open("/dev/full", "w") as full:
        done = python("-m", "preceptor", "list", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 5
    assert done.stderr == "preceptor: error: disk full; what was saved is safe\n"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = python("-m", "preceptor", "list", capture_output=False, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode == 141
    assert done.stderr == ""


def test_a_terminal_without_utf_8_is_no_error(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    argv = ["run", "reading", "--article", "Zoë", "--print-config"]
    done = python("-m", "preceptor", *argv, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Zo\\xeb" in done.stdout


# ---- the real systems ----


def test_what_the_systems_promise_is_there() -> None:
    checked = 0
    for system in map(find_system, SYSTEMS):
        keys = schema(system.Config)
        assert {"seed", "save_every"} <= keys.keys()
        assert all(field.description for field in keys.values())
        for flag, key in (*system.flags.items(), *system.inputs.items()):
            checked += 1
            assert key in keys, f"--{flag} stands for {key}, which is no key"
        assert set(system.extendable) <= keys.keys()
    assert checked >= 6


def test_help_texts_are_sentences() -> None:
    texts = [field.description or "" for name in SYSTEMS for field in schema(find_system(name).Config).values()]
    assert len(texts) > 200
    assert [text for text in texts if not re.fullmatch(r"['A-Z{M][^\n]*\.", text) and not text[0].islower()] == []
    assert [text for text in texts if text.lower().startswith("of ")] == []


def test_extreme_numbers_are_judged_and_never_crash_the_judgement() -> None:
    tried = 0
    for cls in (find_system(name).Config for name in SYSTEMS):
        for key, setting in schema(cls).items():
            for value in ("0", "-1", "1", "1000000000000") if setting.annotation in (int, float) else ():
                tried += 1
                with contextlib.suppress(ConfigError):
                    load_config(cls, overrides=[f"{key}={value}"])
    assert tried > 150


# ---- hostile input ----


def test_a_thousand_fuzzed_command_lines_leave_no_traceback(
    toy: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(11)
    words = (
        "run resume compare watch replay report export pretrain list doctor completion toy reading -h --help --version"
    )
    words += " --preset --config --set --print-config"
    words += " --seed --out --device --threads --tracker --no-report --words --title --folders --allow-inexact -- -x -"
    words += " smoke default mine.yaml 3 -1 1e-5 nan cpu cuda:9 tensorboard data.words=2 steps=1 seed= =1 data={a: data"
    values = [
        *words.split(" "),
        "",
        " ",
        "=",
        "\n",
        "[",
        "{a: [",
        "\x1b[2J",
        "x" * 5000,
        "9" * 5000,
        "é\u202e",
        "%s",
        "@f",
    ]
    values += [
        "--set=a",
        "--seed=",
        "--threads=9999999999999999999999",
        "\0",
        "\udc80",
        "--words=\n",
        "data.folders=[a",
    ]
    Path("mine.yaml").write_text("data: {words: 2}\n")
    before = {path for path in tmp_path.rglob("*") if "work" not in path.parts}
    codes: dict[int, int] = {}
    for _ in range(1000):
        argv = [chance.choice(values) for _ in range(chance.randrange(0, 5))]
        if chance.random() < 0.8:
            argv = ["run", "toy", "--out", f"r{chance.randrange(40)}", *argv]
        if chance.random() < 0.7:
            argv.append("--print-config")
        began = time.process_time()
        code = main(argv)
        assert time.process_time() - began < 5, argv
        error = capsys.readouterr().err
        assert code in (0, 2, 5), (argv, error)
        assert "Traceback" not in error, argv
        assert len(error) < 5000
        if code:
            lines = error.rstrip("\n").split("\n")
            assert all(line.startswith("preceptor: ") and line.isprintable() for line in lines), (argv, error)
        codes[code] = codes.get(code, 0) + 1
    assert codes[0] > 100
    assert codes[2] > 300
    assert {path for path in tmp_path.rglob("*") if "work" not in path.parts} - before <= set(
        (tmp_path / "source").rglob("*")
    )


def test_the_charts_of_a_page_are_written_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    estimate = {"mean": 1.0, "low": None, "high": None, "unit": "nats", "n": 1}
    (tmp_path / "result.json").write_text(json.dumps({"arms": {name: {"gain": estimate} for name in ("a", "b")}}))
    assert main(["report", str(tmp_path), "--figures", str(tmp_path / "figures")]) == 0
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["gain.svg"]
    assert f"figures: 1 in {tmp_path / 'figures'}" in capsys.readouterr().out
