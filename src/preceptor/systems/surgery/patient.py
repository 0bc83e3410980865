"""The patient: a student with its optimiser and what it has cost; copied at a phase's end, put back for an arm."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from preceptor.objectives.entropy import entropy
from preceptor.run.guard import NonFiniteGuard, first_nonfinite
from preceptor.run.state import copy_tensors, load_optimizer, optimizer_state
from preceptor.systems.surgery.config import LearningOptions
from preceptor.systems.surgery.flops import TRAINING_FACTOR, flops_per_token
from preceptor.systems.surgery.objective import judge, needs_referee
from preceptor.systems.surgery.referee import Referee
from preceptor.systems.surgery.student import next_token_logits
from preceptor.systems.surgery.theatre import require_closed


@dataclass
class Costs:
    """What a student has cost since its random weights.

    Attributes:
        tokens: that taught it.
        evaluations: examinations of edited weights.
        flops: of learning and examining; a referee's own training is added where it was asked.
    """

    tokens: int = 0
    evaluations: int = 0
    flops: int = 0


class Patient:
    """A student that learns by an objective and can be copied and put back.

    Args:
        model: with random weights; its parameters stay the same objects whatever happens.
        learning: the optimiser's numbers; the objective may differ from step to step.
        referee: for the objectives that ask it.
    """

    def __init__(self, model: PreTrainedModel, learning: LearningOptions, referee: Referee) -> None:
        self.model = model
        self.costs = Costs()
        self.guard = NonFiniteGuard()
        self._learning = learning
        self._referee = referee
        self._parameters = dict(model.named_parameters())
        self.flops_per_token = flops_per_token(model, context=model.config.max_position_embeddings)
        self.optimiser = self._new_optimiser()
        self._initial = self.snapshot()

    @property
    def referee_flops_per_token(self) -> int:
        """Operations of the referee's answer at one position."""
        return self._referee.flops_per_token

    @property
    def num_bytes(self) -> int:
        """Bytes of a copy of the weights."""
        return sum(parameter.nbytes for parameter in self._parameters.values())

    def step_flops(self, learning: LearningOptions, *, num_tokens: int) -> int:
        """Operations of one update on ``num_tokens`` positions, the referee's answers included."""
        asked = self._referee.flops_per_token if needs_referee(learning) else 0
        return num_tokens * (TRAINING_FACTOR * self.flops_per_token + asked)

    def learn(
        self,
        windows: Int[Tensor, "batch time"],
        *,
        learning: LearningOptions,
        learning_rate: float,
        step: int,
        generator: torch.Generator,
    ) -> tuple[dict[str, float], str | None]:
        """One update of the objective on every position of ``windows``; metrics, and a notice if it was skipped.

        Raises:
            NumericError: too many steps in a row were not finite.
        """
        inputs, targets = windows[:, :-1], windows[:, 1:]
        logits = next_token_logits(self.model, inputs)
        referee_probs = self._referee.probabilities(inputs) if needs_referee(learning) else None
        judged = judge(logits, targets, referee_probs=referee_probs, learning=learning, generator=generator)
        judged.loss.backward()
        notice = None
        if (what := first_nonfinite((f"gradient of {n}", p.grad) for n, p in self._parameters.items())) is not None:
            notice = self.guard.skip(step, what)
            norm = math.nan
        else:
            self.guard.ok()
            norm = float(nn.utils.clip_grad_norm_(self._parameters.values(), self._learning.clip_norm))
            for group in self.optimiser.param_groups:
                group["lr"] = learning_rate
            self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.costs.tokens += targets.numel()
        self.costs.flops += self.step_flops(learning, num_tokens=targets.numel())
        metrics = {
            "loss": judged.loss.item(),
            "reward": judged.reward,
            "accuracy": float((logits.argmax(-1) == targets).float().mean()),
            "entropy": float(entropy(logits.detach()).mean()),
            "entropy_maximum": math.log(logits.shape[-1]),
            "gradient_norm": norm,
            "learning_rate": learning_rate,
        }
        return metrics, notice

    def reset(self) -> None:
        """Back to the random weights, a new optimiser and no costs."""
        self.load_state_dict(self._initial)

    def snapshot(self) -> dict[str, Any]:
        """A copy of :meth:`state_dict`, which later learning leaves alone."""
        return copy.deepcopy(self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """All that learning has changed, as live tensors and plain numbers.

        Raises:
            ModelError: a surgery is open.
        """
        require_closed(self.model, "copy the student")
        return {
            "model": {name: parameter.detach() for name, parameter in self._parameters.items()},
            "optimiser": optimizer_state(self.optimiser),
            "costs": asdict(self.costs),
            "guard": self.guard.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over :meth:`state_dict`, into the same parameters; ``state`` stays apart from what comes after.

        Raises:
            CheckpointError: it is of another student.
            ModelError: a surgery is open.
        """
        require_closed(self.model, "put back the student")
        copy_tensors(state["model"], self._parameters)
        load_optimizer(self.optimiser, copy.deepcopy(state["optimiser"]))
        self.costs = Costs(**state["costs"])
        self.guard.load_state_dict(state["guard"])

    def _new_optimiser(self) -> torch.optim.AdamW:
        """AdamW; matrices decay, biases and norms do not, as in nanoGPT."""
        matrices = [parameter for parameter in self._parameters.values() if parameter.ndim >= 2]
        rest = [parameter for parameter in self._parameters.values() if parameter.ndim < 2]
        return torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": self._learning.weight_decay},
                {"params": rest, "weight_decay": 0.0},
            ],
            lr=self._learning.learning_rate,
            betas=(0.9, self._learning.beta2),
        )


def scheduled_rate(step: int, num_steps: int, learning: LearningOptions) -> float:
    """The learning rate of update ``step`` (from 1): linear warm-up, then a cosine down to the final rate.

    >>> learning = LearningOptions(learning_rate=1.0, final_learning_rate=0.0, warm_up_steps=2)
    >>> [round(scheduled_rate(step, 4, learning), 3) for step in (1, 2, 3, 4)]
    [0.5, 1.0, 0.5, 0.0]
    """
    if step <= learning.warm_up_steps:
        return learning.learning_rate * step / learning.warm_up_steps
    share = (step - learning.warm_up_steps) / max(num_steps - learning.warm_up_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * share))
    return learning.final_learning_rate + (learning.learning_rate - learning.final_learning_rate) * cosine
