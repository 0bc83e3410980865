"""The callback driven by hand, step by step, as a Trainer drives it; the examples' tests drive it by the Trainer."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState

from preceptor.data.corpora.blocks import TokenBlocks
from preceptor.data.corpora.mixture import MixtureDataset, MixtureSampler
from preceptor.errors import ConfigError
from preceptor.lm.load import load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.mixtures import MixtureCallback
from preceptor.objectives import make_mixture

ROWS = [[[0, 40 + place, 50, 60], [0, 70, 80 + place]] for place in range(2)]
ARGUMENTS: Any = SimpleNamespace(
    world_size=1,
    train_batch_size=4,
    gradient_accumulation_steps=2,
    ignore_data_skip=True,
    dataloader_num_workers=0,
    dataloader_prefetch_factor=None,
    dataloader_persistent_workers=False,
    dataloader_in_order=True,
    accelerator_config=SimpleNamespace(split_batches=False, dispatch_batches=None),
)
BATCH = 4 * 2


def test_alignment_takes_gradients_and_finds_the_target(lm: LanguageModel) -> None:
    """The first dataset is the target itself, the second its rows with other tokens."""
    rows = [[[0, 40, 50, 60, 70]], [[0, 90, 80, 30, 20]]]
    sampler = MixtureSampler({"a": 2, "b": 2}, seed=0)
    datasets = [TokenBlocks(name, ROWS[0]) for name in "ab"]
    mixture = make_mixture("alignment", num_datasets=2, targets=[True, False], target_share=0.0)
    callback = MixtureCallback(
        mixture, MixtureDataset(datasets, sampler=sampler), samples=rows, tokenizer=lm.tokenizer, every=1
    )
    state = TrainerState()
    state.global_step = 0
    with torch.no_grad():  # whatever the caller's mode is
        callback.on_train_begin(ARGUMENTS, state, TrainerControl(), model=lm.model)
    assert sampler.weights[0] > 0.5
    assert all(parameter.grad is None for parameter in lm.model.parameters())


def test_alignment_needs_to_know_the_targets(lm: LanguageModel) -> None:
    datasets = [TokenBlocks(name, rows) for name, rows in zip("ab", ROWS, strict=True)]
    with pytest.raises(ConfigError, match="`target_samples`"):
        MixtureCallback(
            make_mixture("alignment", num_datasets=2),
            MixtureDataset(datasets, sampler=MixtureSampler({"a": 2, "b": 2}, seed=0)),
            samples=ROWS,
            tokenizer=lm.tokenizer,
        )


class Training:
    """A callback, its sampler, and steps in which a loader reads one batch of four rows ahead."""

    def __init__(self, lm: LanguageModel, *, looked_at: int = 0) -> None:
        datasets = [TokenBlocks(name, rows) for name, rows in zip("ab", ROWS, strict=True)]
        self.lm = lm
        self.sampler = MixtureSampler({"a": 2, "b": 2}, seed=0)
        for _ in range(looked_at):
            self.sampler.draw()
        self.callback = MixtureCallback(
            make_mixture("second_order", num_datasets=2),
            MixtureDataset(datasets, sampler=self.sampler),
            samples=ROWS,
            tokenizer=lm.tokenizer,
            every=1,
        )
        self.state = TrainerState()

    def begin(self, saved: dict[str, Any] | None = None, step: int = 0) -> None:
        self.state.global_step = step
        self.state.stateful_callbacks = {} if saved is None else {"MixtureCallback": saved}
        self.callback.on_train_begin(ARGUMENTS, self.state, TrainerControl(), model=self.lm.model)
        self.read(4)

    def read(self, num: int) -> None:
        for _ in range(num):
            self.sampler.draw()

    def step(self, change: float) -> None:
        self.read(BATCH)
        with torch.no_grad():
            for parameter in self.lm.model.parameters():
                parameter.mul_(change)
        self.state.global_step += 1
        self.callback.on_step_end(ARGUMENTS, self.state, TrainerControl())


@pytest.fixture
def lm() -> LanguageModel:
    return load_language_model("starter", device=torch.device("cpu"))


def test_rows_that_somebody_looked_at_count_once(lm):
    training = Training(lm, looked_at=3)
    training.begin()
    for _ in range(2):
        training.step(0.99)
    saved = json.loads(json.dumps(training.callback.state()))
    assert sum(saved["attributes"]["sampler"]["counts"].values()) == 3 + 2 * BATCH
    assert training.sampler.num_drawn == 3 + 4 + 2 * BATCH


def test_resumed_callback_goes_on_as_if_nothing_had_been(lm):
    whole = Training(lm, looked_at=3)
    whole.begin()
    for change in (0.99, 0.98):
        whole.step(change)
    saved = json.loads(json.dumps(whole.callback.state()))
    frozen = Training(lm.frozen_copy(), looked_at=1)  # somebody looks again, at another number of rows
    frozen.begin(saved, step=2)
    for training in (whole, frozen):
        for change in (0.97, 1.01):
            training.step(change)
    assert frozen.callback.history == whole.callback.history
    assert frozen.callback.state() == whole.callback.state()
    assert [row["step"] for row in frozen.callback.history] == [0, 1, 2, 3, 4]
    assert len({row["weight"]["a"] for row in frozen.callback.history}) > 2  # there is something to compare


def test_measuring_leaves_the_model_in_its_mode(lm):
    training = Training(lm)
    lm.model.train()
    training.begin()
    assert lm.model.training
    lm.model.train()
    training.step(0.99)
    assert lm.model.training


@pytest.mark.parametrize(
    ("workers", "factor", "lookahead", "batches"), [(0, None, None, 0), (2, 3, None, 6), (1, 2, 5, 5)]
)
def test_new_weights_wait_for_what_the_loader_reads_ahead(lm, workers, factor, lookahead, batches):
    """Rows of 4: those that Accelerate holds back, a batch of each of two processes, and those that workers begin."""
    training = Training(lm)
    training.callback.lookahead = lookahead
    arguments = SimpleNamespace(**vars(ARGUMENTS))
    arguments.world_size, arguments.dataloader_num_workers, arguments.dataloader_prefetch_factor = 2, workers, factor
    training.callback._share(arguments)
    assert training.callback._delay == training.sampler.delay == 4 * (2 + batches)
    readers = training.callback.dataset._readers
    assert (readers and (readers.num_workers, readers.batch_size)) == ((workers, 4) if workers else None)
    training.callback.on_train_end(arguments, training.state, TrainerControl())
    assert training.callback._delay == training.sampler.delay == 0
    assert training.callback.dataset._readers is None


def test_what_does_not_fit_is_refused(lm):
    training = Training(lm)
    cut_up = {"world_size": 2, "fsdp": [], "deepspeed": None}
    for how in ({"fsdp": ["full_shard"]}, {"deepspeed": "zero.json"}):
        with pytest.raises(ConfigError, match="measures a whole model, which FSDP and DeepSpeed cut up; use DDP"):
            training.callback.on_train_begin(
                SimpleNamespace(**vars(ARGUMENTS) | cut_up | how), training.state, TrainerControl(), model=lm.model
            )
    for how in ({"split_batches": True}, {"dispatch_batches": False}):
        given = {"world_size": 2, "process_index": 0, "device": torch.device("cpu"), "dataloader_num_workers": 1}
        accelerator = SimpleNamespace(**vars(ARGUMENTS.accelerator_config) | how)
        arguments = SimpleNamespace(**vars(ARGUMENTS) | given | {"accelerator_config": accelerator})
        with pytest.raises(ConfigError, match="leave `split_batches` and `dispatch_batches`"):
            training.callback._share(arguments)
    with pytest.raises(ConfigError, match="2 datasets, a mixture of 3 and samples of 2"):
        MixtureCallback(
            make_mixture("uniform", num_datasets=3),
            training.callback.dataset,
            samples=ROWS,
            tokenizer=lm.tokenizer,
        )
    with pytest.raises(ConfigError, match="`every` must be at least 1 step, got 0"):
        MixtureCallback(
            training.callback.mixture, training.callback.dataset, samples=ROWS, tokenizer=lm.tokenizer, every=0
        )
