"""The examples on mixing datasets run as printed, and a Trainer that is interrupted goes on as if it had not been."""

from __future__ import annotations

import importlib.util
import multiprocessing
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from preceptor import mixtures
from preceptor.errors import CheckpointError, ConfigError
from preceptor.runs.world import World
from tests.worlds import in_processes

EXAMPLES = Path(__file__).parents[2] / "examples"
MIXTURES = ("mixture_torch", "mixture_trainer", "mixture_trl")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", MIXTURES)
def test_examples_are_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 60


def test_mixture_in_a_loop_of_ones_own(capsys):
    weights = load("mixture_torch").main(num_steps=7, every=3)
    assert sum(weights.values()) == pytest.approx(1)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["0", "3", "6"]
    assert max(weights.values()) - min(weights.values()) > 0.05


# The shard progress of saving a model goes to stderr; nothing else is said.
def test_interrupted_trainer_goes_on_as_if_it_had_not_been(tmp_path):
    example = load("mixture_trainer")
    whole = example.main(str(tmp_path / "whole"), num_steps=6, every=2)
    assert [row["step"] for row in whole.history] == [0, 2, 4, 6]
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    resumed = example.main(str(tmp_path / "resumed"), num_steps=6, every=2, resume=True)
    assert resumed.history == whole.history
    assert resumed.state() == whole.state()
    files = [tmp_path / name / "checkpoint-6" / "model.safetensors" for name in ("whole", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()

    # What was trained on is what a sampler of its own says: 6 steps of 8 rows, though a batch more was read.
    sampler = whole.dataset.sampler
    assert sampler.num_drawn > 48
    assert sum(whole.state()["attributes"]["sampler"]["counts"].values()) == 48


def in_two_processes(example: ModuleType, *runs: dict) -> list[list]:
    """The example in two processes of half the batch each: the callback's history after each run, of each process."""
    arguments = example.TrainingArguments
    example.TrainingArguments = lambda **given: arguments(**given | {"per_device_train_batch_size": 4})

    def trained(rank: int) -> list:
        from accelerate.state import AcceleratorState

        # The forked process remembers a Trainer of the test's own process, which was alone.
        AcceleratorState._reset_state(reset_partial_state=True)
        multiprocessing.current_process()._config["daemon"] = False  # it may have loader workers
        callbacks = [example.main(**run) for run in runs]
        # The first process draws the rows and saves.
        states = [None if rank else callback.state() for callback in callbacks]
        return [
            (each.history, each.mixture.weights.tolist(), state) for each, state in zip(callbacks, states, strict=True)
        ]

    return in_processes(2, trained)


def test_two_processes_have_the_weights_of_one_and_resume_exactly(tmp_path):
    steps = {"num_steps": 4, "every": 2}
    alone = load("mixture_trainer").main(str(tmp_path / "alone"), **steps).history
    whole, again = tmp_path / "whole", tmp_path / "again"
    first, second = in_two_processes(load("mixture_trainer"), {"folder": str(whole), **steps})
    ((history, weights, state),) = first
    assert [(history, weights)] == [each[:2] for each in second]
    for row, expected in zip(history, alone, strict=True):
        assert row["step"] == expected["step"]
        for name in ("loss", "weight"):
            assert row[name] == pytest.approx(expected[name], abs=1e-4)
    assert len({row["weight"]["code"] for row in history}) == 3  # weights that move

    shutil.copytree(whole / "checkpoint-2", again / "checkpoint-2")
    first, second = in_two_processes(load("mixture_trainer"), {"folder": str(again), **steps, "resume": True})
    assert first == [(history, weights, state)]
    assert [each[:2] for each in second] == [(history, weights)]
    files = [folder / "checkpoint-4" / "model.safetensors" for folder in (whole, again)]
    assert files[0].read_bytes() == files[1].read_bytes()


def reading_by(example: ModuleType, num_workers: int, lookahead: int | None = 2, **given: object) -> ModuleType:
    """The example with loader workers, a batch ahead each, and new weights after ``lookahead`` batches more."""
    arguments = example.TrainingArguments
    given |= {"dataloader_prefetch_factor": 1 if num_workers else None}
    example.TrainingArguments = lambda **own: arguments(**own | {"dataloader_num_workers": num_workers} | given)
    example.mixtures = SimpleNamespace(**vars(mixtures))
    example.mixtures.MixtureCallback = partial(mixtures.MixtureCallback, lookahead=lookahead)
    return example


LONG = {"num_steps": 8, "every": 2}
"""The weights of step 2 hold from the rows of step 6 on, two batches and the one held back later."""


@pytest.fixture(scope="module")
def without_workers(tmp_path_factory):
    """The callback and the folder of a run whose weights come two batches later, as with two workers."""
    folder = tmp_path_factory.mktemp("without")
    return reading_by(load("mixture_trainer"), 0).main(str(folder), **LONG), folder


# torch warns of forks beside threads; its loaders fork.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_trainer_with_loader_workers_is_that_without_and_resumes_exactly(tmp_path, without_workers):
    alone, folder = without_workers
    found = reading_by(load("mixture_trainer"), 2).main(str(tmp_path / "2"), **LONG)
    assert found.history == alone.history
    assert found.state() == alone.state()
    # In one worker, from a checkpoint of two; a change of the weights was on its way.
    shutil.copytree(tmp_path / "2" / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    resumed = reading_by(load("mixture_trainer"), 1).main(str(tmp_path / "again"), **LONG, resume=True)
    assert resumed.state() == alone.state()
    models = {
        (run / "checkpoint-8" / "model.safetensors").read_bytes()
        for run in (folder, tmp_path / "2", tmp_path / "again")
    }
    assert len(models) == 1


def test_weights_that_come_later_change_what_is_read(tmp_path, without_workers):
    sooner = reading_by(load("mixture_trainer"), 0, lookahead=None).main(str(tmp_path), **LONG)
    assert sooner.state()["attributes"]["sampler"] != without_workers[0].state()["attributes"]["sampler"]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_weights_that_do_not_reach_the_workers_are_seen(tmp_path, monkeypatch, without_workers):
    """The fault of copies: each worker draws under the weights that held when it was started."""
    monkeypatch.setattr(mixtures.MixtureDataset, "post", lambda self: None)
    found = reading_by(load("mixture_trainer"), 2).main(str(tmp_path), **LONG)
    assert found.history != without_workers[0].history


def test_a_trainer_that_reads_in_no_order_is_refused(tmp_path):
    for given, what in (
        ({"dataloader_persistent_workers": True}, "persistent_workers"),
        ({"dataloader_in_order": False}, "in_order"),
    ):
        with pytest.raises(ConfigError, match=what):
            reading_by(load("mixture_trainer"), 1, **given).main(str(tmp_path), num_steps=1)
    with pytest.raises(ConfigError, match=r"`lookahead` must be at least 2 batches for 2 workers.*got 1"):
        reading_by(load("mixture_trainer"), 2, lookahead=1).main(str(tmp_path), num_steps=1)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_two_processes_with_loader_workers_are_those_without(tmp_path):
    steps = {"num_steps": 5, "every": 1}
    given = [
        in_two_processes(
            reading_by(load("mixture_trainer"), workers), {"folder": str(tmp_path / str(workers)), **steps}
        )
        for workers in (0, 2)
    ]
    assert given[0] == given[1]
    files = [tmp_path / name / "checkpoint-5" / "model.safetensors" for name in ("0", "2")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_process_that_measures_for_itself_is_seen(tmp_path, monkeypatch):
    # The fault: each process measures its own part of the samples and does not tell the other.
    monkeypatch.setattr(World, "gathered_lists", lambda self, lengths, compute: compute(self.shard(len(lengths))))
    with pytest.raises(AssertionError, match="process"):
        in_two_processes(load("mixture_trainer"), {"folder": str(tmp_path), "num_steps": 2, "every": 1})


@pytest.mark.slow
def test_the_example_under_its_launcher(tmp_path):
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    done = subprocess.run(
        [sys.executable, "-m", *launch, str(EXAMPLES / "mixture_trainer.py"), "20"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if "'code'" in line] == ["0", "10", "20"]


def test_trainer_that_would_skip_data_is_refused(tmp_path, monkeypatch):
    example = load("mixture_trainer")
    example.main(str(tmp_path), num_steps=1, every=1)
    arguments = example.TrainingArguments
    monkeypatch.setattr(example, "TrainingArguments", lambda **given: arguments(**given | {"ignore_data_skip": False}))
    with pytest.raises(ConfigError, match="ignore_data_skip=True"):
        example.main(str(tmp_path), num_steps=2, every=1, resume=True)


def test_checkpoint_without_the_callback_is_refused(tmp_path):
    example = load("mixture_trainer")
    example.main(str(tmp_path), num_steps=1, every=1)
    state = tmp_path / "checkpoint-1" / "trainer_state.json"
    state.write_text(state.read_text().replace('"MixtureCallback"', '"AnotherCallback"'))
    with pytest.raises(CheckpointError, match="no state of a MixtureCallback"):
        example.main(str(tmp_path), num_steps=2, every=1, resume=True)


# transformers 5 announces the end of an argument that TRL still sets.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
def test_mixture_in_trl(tmp_path):
    pytest.importorskip("trl", reason="needs TRL, of the extra test")
    callback = load("mixture_trl").main(str(tmp_path), num_steps=4, every=2)
    assert [row["step"] for row in callback.history] == [0, 2, 4]
    assert sum(callback.history[-1]["weight"].values()) == pytest.approx(1)
    # It learns from what it is given.
    assert all(callback.history[-1]["loss"][name] < loss for name, loss in callback.history[0]["loss"].items())
