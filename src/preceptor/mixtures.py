"""Mixtures of datasets whose weights follow what a model can learn next, for training loops of your own.

A :class:`MixtureDataset` draws rows of several datasets by the weights of a :class:`MixtureSampler`. A mixture from
:func:`make_mixture` moves these weights after each measurement of the datasets' difficulty. In a loop of your own::

    losses = document_losses(lm, samples)               # of some held-out rows of each dataset
    batches = mixed.batches(batch_size=8, collate_fn=…) # of a MixtureDataset; num_workers=2 reads in two processes
    for step, batch in enumerate(batches):
        if step % 50 == 0:
            previous, losses = losses, document_losses(lm, samples)
            sampler.weights = mixture.update(document_difficulty(losses, previous=previous))
        ...                                             # one training step on the batch

For RL on tasks with a verifier, :func:`make_task_mixture` mixes tasks and their levels by what the groups of answers
earned; a trained teacher is one of its rules (``policy=load_teacher("runs/teacher")``). In a Trainer of
Transformers or of TRL, :class:`MixtureCallback` mixes datasets. Complete examples are in ``examples/`` of the
repository (``mixture_torch.py``, ``mixture_trainer.py``, ``mixture_trl.py``, ``task_mixture.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from preceptor.data.corpora.blocks import TokenBlocks, pack_blocks, split_held_out, tokenise
from preceptor.data.corpora.mixture import MixtureDataset, MixtureSampler, collate
from preceptor.data.corpora.mixture_workers import checked_lookahead
from preceptor.errors import CheckpointError, ConfigError
from preceptor.lm.load import load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.objectives import MIXTURE_RULES, Alignment, Mixture, document_difficulty, make_mixture
from preceptor.objectives.learned_rule import SourcePolicy
from preceptor.objectives.task_mixture import TASK_RULES, TaskMixture, make_task_mixture
from preceptor.objectives.task_rules import Groups
from preceptor.runs.world import ALONE, World
from preceptor.systems.curriculum.environment import document_losses, gradient_alignment
from preceptor.systems.curriculum.tasks.saved import load_teacher

__all__ = [
    "Groups",
    "MIXTURE_RULES",
    "LanguageModel",
    "Mixture",
    "MixtureCallback",
    "MixtureDataset",
    "MixtureSampler",
    "SourcePolicy",
    "TASK_RULES",
    "TaskMixture",
    "TokenBlocks",
    "collate",
    "document_difficulty",
    "document_losses",
    "gradient_alignment",
    "load_language_model",
    "load_teacher",
    "make_mixture",
    "make_task_mixture",
    "pack_blocks",
    "split_held_out",
    "tokenise",
]


class MixtureCallback(TrainerCallback, ExportableState):
    """Every ``every`` steps: measures each dataset with the model, updates ``mixture``, and sets the sampler's weights.

    It measures the same rows each time, so that a change is not due to the choice of rows. Under the rule ``alignment``
    it takes their gradients, with the optimizer's second moments, so give a few rows of each alone. Its state is
    saved in the Trainer's own ``trainer_state.json``. To resume, pass ``ignore_data_skip=True`` to the Trainer: the
    sampler knows how far it was.

    With ``dataloader_num_workers`` the workers draw the same rows as the training process would. A loader reads ahead,
    so new weights hold from a fixed row on: one batch a process (which Accelerate holds back) and ``lookahead``
    batches are still trained on under the old ones.

    In a distributed Trainer (``accelerate launch``, ``torchrun``) every process has a callback over the same mixture,
    dataset and samples, and a sampler of the same seed. The processes share the rows of a measurement, and all have the
    same weights. Each must hold the whole model: FSDP and DeepSpeed are refused.

    Args:
        mixture: the weights and the rule that moves them.
        dataset: what the Trainer trains on, over the same datasets.
        samples: rows of token ids of each dataset to measure difficulty on, ideally held out from ``dataset``.
        tokenizer: of the model.
        every: optimizer steps between measurements.
        target_samples: rows of each target, for the rule ``alignment``; None: the samples of the mixture's targets.
        lookahead: batches of one process that are still drawn under the old weights. ``None``: as few as the loader
            allows, ``dataloader_num_workers × dataloader_prefetch_factor`` (0 without workers). Given the same, the
            rows and weights are the same for any number of workers, and a run may be resumed with another number.

    Attributes:
        history: a row for each measurement: ``step``, and ``loss`` and ``weight`` of each dataset by name.

    Raises:
        ConfigError: at construction, if the arguments disagree; at the start of training, if the Trainer's arguments
            do not fit.
        CheckpointError: the checkpoint was made without this callback.
    """

    def __init__(
        self,
        mixture: Mixture,
        dataset: MixtureDataset,
        *,
        samples: Sequence[Sequence[Sequence[int]]],
        tokenizer: PreTrainedTokenizerBase,
        every: int = 50,
        target_samples: Sequence[Sequence[Sequence[int]]] | None = None,
        lookahead: int | None = None,
    ) -> None:
        names = dataset.sampler.names
        if not len(names) == mixture.num_datasets == len(samples):
            raise ConfigError(
                f"{len(names)} datasets, a mixture of {mixture.num_datasets} and samples of {len(samples)}: "
                "there must be one of each for every dataset"
            )
        if every < 1:
            raise ConfigError(f"`every` must be at least 1 step, got {every}")
        if target_samples is None and mixture.targets is not None:
            target_samples = [rows for rows, target in zip(samples, mixture.targets.tolist(), strict=True) if target]
        if isinstance(mixture.rule, Alignment) and not target_samples:
            raise ConfigError("the rule alignment needs `target_samples`, or a mixture that knows its `targets`")
        self.target_samples = target_samples or ()
        self.mixture = mixture
        self.dataset = dataset
        self.samples = samples
        self.tokenizer = tokenizer
        self.every = every
        self.lookahead = lookahead
        self._delay = 0  # rows between those trained on and the first one that new weights hold for
        self.history: list[dict[str, Any]] = []
        self._world = ALONE
        self._lm: LanguageModel | None = None
        self._optimizer: Any = None
        self._start = (0, 0)  # optimizer step and row at which this training began
        self._num_consumed = 0
        self._last: dict[str, Any] = {}  # the last measurement: `losses`, and `rows` drawn of each dataset until then

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Measures for the first time, or goes on where the checkpoint was saved."""
        self._optimizer = objects.get("optimizer")
        if args.world_size > 1:
            if args.fsdp or args.deepspeed:
                raise ConfigError("MixtureCallback measures a whole model, which FSDP and DeepSpeed cut up; use DDP")
            self._world = World(rank=args.process_index, size=args.world_size, carrier=_carrier(args.device))
        model: nn.Module = objects["model"]
        training = model.training
        self._lm = LanguageModel(model, self.tokenizer, name="the trainer's model")
        model.train(training)  # a LanguageModel is in evaluation mode
        if state.global_step == 0:
            # Rows may have been drawn before training begins (TRL inspects the first ones).
            self._start = 0, self.dataset.sampler.num_drawn
            self._num_consumed = self.dataset.sampler.num_drawn
            self._measure(step=0)
            self._share(args)
            return
        if not args.ignore_data_skip:
            raise ConfigError("set `ignore_data_skip=True` to resume: the mixture knows how far it is in the data")
        callbacks: Any = state.stateful_callbacks  # by name, each as `state` gave it
        saved = callbacks.get(type(self).__name__)
        if not isinstance(saved, dict):
            raise CheckpointError("the checkpoint has no state of a MixtureCallback; resume from one that has")
        attributes = saved["attributes"]
        self.mixture.load_state_dict(attributes["mixture"])
        self.dataset.load_state_dict(attributes["sampler"])
        self._last = attributes["measured"]
        self.history = attributes["history"]
        self._num_consumed = self.dataset.sampler.num_drawn
        self._start = state.global_step, self._num_consumed
        self._share(args)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Counts the rows that were trained on, and measures every ``every`` steps."""
        # The loader reads a batch ahead, so more rows were drawn than trained on.
        first_step, first_row = self._start
        rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * self._world.size
        self._num_consumed = first_row + (state.global_step - first_step) * rows_per_step
        self.dataset.sampler.advance(self._num_consumed)  # what workers drew, or the first process
        if state.global_step % self.every == 0:
            self._measure(step=state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Another loader may read the mixture now."""
        self.dataset.unshare()
        self._delay = 0

    def state(self) -> dict[str, Any]:
        """What the Trainer saves beside its own state."""
        return {
            "args": {},
            "attributes": {
                "mixture": self.mixture.state_dict(),
                "sampler": self.dataset.state_dict(num_consumed=self._num_consumed),
                "measured": self._last,
                "history": self.history,
            },
        }

    def _share(self, args: TrainingArguments) -> None:
        """Tells the loader's workers, which start next, how the Trainer reads."""
        num_workers, size = args.dataloader_num_workers, args.train_batch_size
        if num_workers and (args.dataloader_persistent_workers or not args.dataloader_in_order):
            raise ConfigError(
                "workers of a mixture start with its loader and give batches in order; leave "
                "`dataloader_persistent_workers` off and `dataloader_in_order` on"
            )
        accelerator: Any = args.accelerator_config
        if num_workers and args.world_size > 1 and (accelerator.split_batches or accelerator.dispatch_batches is False):
            raise ConfigError(
                "with loader workers the first process reads a mixture and hands out whole batches; leave "
                "`split_batches` and `dispatch_batches` of `accelerator_config` alone, or set dataloader_num_workers=0"
            )
        lookahead = checked_lookahead(
            self.lookahead, num_workers=num_workers, prefetch_factor=args.dataloader_prefetch_factor
        )
        # Accelerate holds one batch of each process back.
        self.dataset.share(batch_size=size, num_workers=num_workers, lookahead=lookahead + args.world_size)
        self._delay = (lookahead + args.world_size) * size

    def _measure(self, *, step: int) -> None:
        assert self._lm is not None, "on_train_begin comes first"
        model: Any = self._lm.model
        training = model.training
        model.eval()
        alignment = None
        if isinstance(self.mixture.rule, Alignment):
            optimizer = getattr(
                self._optimizer, "optimizer", self._optimizer
            )  # Accelerate's wrapper holds the real one
            with torch.enable_grad():
                alignment, losses = gradient_alignment(
                    self._lm, self.samples, self.target_samples, optimizer=optimizer, world=self._world
                )
        else:
            losses = document_losses(self._lm, self.samples, world=self._world)
        model.train(training)
        previous = [torch.tensor(values) for values in self._last["losses"]] if self._last else losses
        # Accelerate reads an iterable dataset in the first process and hands the rows out, so that one alone counts.
        rows = self._world.of_first(lambda: self.dataset.state_dict(num_consumed=self._num_consumed)["counts"])
        before = self._last["rows"] if self._last else rows
        tokens = [
            (rows[blocks.name] - before[blocks.name]) * blocks.num_tokens / len(blocks)
            for blocks in self.dataset.datasets
        ]
        difficulty = replace(document_difficulty(losses, previous=previous), alignment=alignment)
        weights = self.mixture.update(difficulty, tokens=torch.tensor(tokens))
        # At least from the next row: a loader of another kind may have drawn more.
        begin = max(self._num_consumed + self._delay, self.dataset.sampler.num_drawn)
        self.dataset.set_weights(weights, begin=begin)
        self._last = {"losses": [values.tolist() for values in losses], "rows": rows}
        names = self.dataset.sampler.names
        self.history.append(
            {
                "step": step,
                "loss": dict(zip(names, difficulty.mean.tolist(), strict=True)),
                "weight": dict(zip(names, weights.tolist(), strict=True)),
            }
        )


def _carrier(device: torch.device) -> torch.device:
    """Where the tensors of a process group travel: the CPU, unless the group has no backend for it."""
    return device if "gloo" not in str(torch.distributed.get_backend_config()) else torch.device("cpu")
