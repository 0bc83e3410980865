"""The mixture in a Trainer of Transformers (and so of TRL): a callback that measures and moves the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from preceptor.data.corpora.mixture import MixtureDataset
from preceptor.errors import CheckpointError, ConfigError
from preceptor.lm.model import LanguageModel
from preceptor.objectives import Mixture, document_difficulty
from preceptor.systems.curriculum.difficulty import document_losses


class MixtureCallback(TrainerCallback, ExportableState):
    """Every ``every`` steps: measure the datasets with the model as it is, update ``mixture``, weight what is drawn.

    It measures the same rows each time, so that chance is small. What it needs to resume is in the Trainer's own
    ``trainer_state.json``; resume under ``ignore_data_skip=True``, since the mixture finds its place by itself.
    It works in one process and refuses more.

    Args:
        mixture: the weights and their rule.
        dataset: what the Trainer trains on, over the same datasets.
        samples: rows of token ids of each dataset on which difficulty is measured, best held out from ``dataset``.
        tokenizer: of the model.
        every: optimiser steps between measurements.

    Attributes:
        history: a row for each measurement: ``step``, and ``loss`` and ``weight`` of each dataset by name.

    Raises:
        ConfigError: at construction, where the arguments disagree; at the start of training, where the Trainer's
            arguments do not fit.
        CheckpointError: a checkpoint was made without this callback.
    """

    def __init__(
        self,
        mixture: Mixture,
        dataset: MixtureDataset,
        *,
        samples: Sequence[Sequence[Sequence[int]]],
        tokenizer: PreTrainedTokenizerBase,
        every: int = 50,
    ) -> None:
        names = dataset.sampler.names
        if not len(names) == mixture.num_datasets == len(samples):
            raise ConfigError(
                f"{len(names)} datasets, a mixture of {mixture.num_datasets} and samples of {len(samples)}: "
                "there must be one of each for every dataset"
            )
        if every < 1:
            raise ConfigError(f"`every` must be at least 1 step, got {every}")
        self.mixture = mixture
        self.dataset = dataset
        self.samples = samples
        self.tokenizer = tokenizer
        self.every = every
        self.history: list[dict[str, Any]] = []
        self._lm: LanguageModel | None = None
        self._start = (0, 0)  # optimiser step and row at which this training began
        self._num_consumed = 0
        self._measured: dict[str, Any] = {}  # what the last measurement leaves for the next: losses, rows by dataset

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Measure for the first time, or go on where the checkpoint was saved."""
        if args.world_size > 1:
            raise ConfigError(f"MixtureCallback works in one process, this run has {args.world_size}")
        model: nn.Module = objects["model"]
        training = model.training
        self._lm = LanguageModel(model, self.tokenizer, name="the trainer's model")
        model.train(training)  # a LanguageModel is in evaluation mode
        if state.global_step == 0:
            # Somebody may have looked at the first rows before training begins (TRL does).
            self._start = 0, self.dataset.sampler.num_drawn
            self._num_consumed = self.dataset.sampler.num_drawn
            self._measure(step=0)
            return
        if not args.ignore_data_skip:
            raise ConfigError(
                "set `ignore_data_skip=True` to resume: the mixture finds its place in the data by itself"
            )
        callbacks: Any = state.stateful_callbacks  # by name, each as `state` gave it
        saved = callbacks.get(type(self).__name__)
        if not isinstance(saved, dict):
            raise CheckpointError("the checkpoint has no state of a MixtureCallback; resume from one that has")
        attributes = saved["attributes"]
        self.mixture.load_state_dict(attributes["mixture"])
        self.dataset.load_state_dict(attributes["sampler"])
        self._measured = attributes["measured"]
        self.history = attributes["history"]
        self._num_consumed = self.dataset.sampler.num_drawn
        self._start = state.global_step, self._num_consumed

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Count what was trained on; measure when it is time."""
        # The loader reads a batch ahead, so what was drawn is more than what was trained on.
        first_step, first_row = self._start
        rows_per_step = args.train_batch_size * args.gradient_accumulation_steps
        self._num_consumed = first_row + (state.global_step - first_step) * rows_per_step
        if state.global_step % self.every == 0:
            self._measure(step=state.global_step)

    def state(self) -> dict[str, Any]:
        """What the Trainer writes beside its own state."""
        return {
            "args": {},
            "attributes": {
                "mixture": self.mixture.state_dict(),
                "sampler": self.dataset.state_dict(num_consumed=self._num_consumed),
                "measured": self._measured,
                "history": self.history,
            },
        }

    def _measure(self, *, step: int) -> None:
        assert self._lm is not None, "on_train_begin comes first"
        model: Any = self._lm.model
        training = model.training
        model.eval()
        losses = document_losses(self._lm, self.samples)
        model.train(training)
        previous = [torch.tensor(values) for values in self._measured["losses"]] if self._measured else losses
        rows = self.dataset.state_dict(num_consumed=self._num_consumed)["counts"]
        before = self._measured["rows"] if self._measured else rows
        tokens = [
            (rows[blocks.name] - before[blocks.name]) * blocks.num_tokens / len(blocks)
            for blocks in self.dataset.datasets
        ]
        difficulty = document_difficulty(losses, previous=previous)
        weights = self.mixture.update(difficulty, tokens=torch.tensor(tokens))
        self.dataset.sampler.weights = weights
        self._measured = {"losses": [values.tolist() for values in losses], "rows": rows}
        names = self.dataset.sampler.names
        self.history.append(
            {
                "step": step,
                "loss": dict(zip(names, difficulty.mean.tolist(), strict=True)),
                "weight": dict(zip(names, weights.tolist(), strict=True)),
            }
        )
