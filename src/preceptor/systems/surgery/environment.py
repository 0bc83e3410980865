"""The surgeon's environment: the student, a small transformer that learns by its objective, and what is seen of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from preceptor.errors import CheckpointError
from preceptor.lm.edit_targets import Target
from preceptor.objectives.kl import entropy
from preceptor.objectives.statistics import RunningMoments
from preceptor.runs.checkpoint import copy_tensors, load_optimizer, optimizer_state
from preceptor.runs.guard import NonFiniteGuard, guarded_step
from preceptor.runs.world import ALONE, World
from preceptor.systems.surgery.config import LearningOptions, StudentOptions
from preceptor.systems.surgery.reference_lm import TRAINING_FACTOR, ReferenceLM, flops_per_token
from preceptor.systems.surgery.rewards import needs_reference, next_token_logits, objective_loss

CLIP = 5.0
"""Standard deviations at which a feature is clipped."""

TREND_RATE = 0.1
"""Weight of the newest loss in the running mean that the trend is measured against."""


def build_student(options: StudentOptions, *, vocab_size: int, seed: int, device: torch.device) -> PreTrainedModel:
    """A GPT-2 or Llama with random weights drawn from ``seed``; no dropout, tied embeddings.

    Llama's feed-forward layer has 8/3 of the width (rounded up to a multiple of eight), which gives both architectures
    the same number of weights.
    """
    size: dict[str, Any] = {
        "vocab_size": vocab_size,
        "max_position_embeddings": options.block_size,
        "hidden_size": options.width,
        "num_hidden_layers": options.num_layers,
        "num_attention_heads": options.num_heads,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "eager",  # gives the surgeon the attention weights; no slower at this size
    }
    # The run's other random numbers stay where they are.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel
        if options.architecture == "gpt2":
            model = GPT2LMHeadModel(GPT2Config(**size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
        else:
            # 8/3 of the width for three matrices is as many weights as 4 for GPT-2's two.
            size |= {"intermediate_size": 8 * math.ceil(options.width / 3), "tie_word_embeddings": True}
            model = LlamaForCausalLM(LlamaConfig(**size, num_key_value_heads=options.num_heads))
    nn.Module.to(model, device)
    model.eval()  # type: ignore[no-untyped-call]  # without dropout both modes compute the same
    return model


@dataclass
class Costs:
    """What a student has cost since its random weights.

    Attributes:
        tokens: positions it was trained on.
        evaluations: examinations of edited weights.
        flops: of training and examining it; the training of the reference model is added where the objective uses it.
    """

    tokens: int = 0
    evaluations: int = 0
    flops: int = 0


class Student:
    """A model with its optimizer and its costs.

    Args:
        model: with random weights; its parameters stay the same objects throughout.
        learning: the optimizer's numbers and those of the objectives.
        reference_lm: for the objectives that use it.
        world: the processes that share the windows of an update.
    """

    def __init__(
        self, model: PreTrainedModel, learning: LearningOptions, reference_lm: ReferenceLM, *, world: World = ALONE
    ) -> None:
        self._world = world
        self.model = model
        self.costs = Costs()
        self.guard = NonFiniteGuard()
        self._learning = learning
        self._reference_lm = reference_lm
        self._parameters = dict(model.named_parameters())
        self.flops_per_token = flops_per_token(model, context=model.config.max_position_embeddings)
        # Matrices decay, biases and norms do not, as in nanoGPT.
        matrices = [parameter for parameter in self._parameters.values() if parameter.ndim >= 2]
        rest = [parameter for parameter in self._parameters.values() if parameter.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": learning.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            lr=learning.learning_rate,
            betas=(0.9, learning.beta2),
        )
        self._initial = self.snapshot()

    @property
    def reference_flops_per_token(self) -> int:
        """Operations of the reference model's distribution at one position."""
        return self._reference_lm.flops_per_token

    @property
    def num_bytes(self) -> int:
        """Bytes of a copy of the weights."""
        return sum(parameter.nbytes for parameter in self._parameters.values())

    def step_flops(self, objective: str, *, num_tokens: int) -> int:
        """Operations of one update on ``num_tokens`` positions, those of the reference model included."""
        reference = self._reference_lm.flops_per_token if needs_reference(self._learning, objective) else 0
        return num_tokens * (TRAINING_FACTOR * self.flops_per_token + reference)

    def learn(
        self,
        windows: Int[Tensor, "batch time"],
        *,
        objective: str,
        learning_rate: float,
        step: int,
        generator: torch.Generator,
        notice: Callable[[str], None],
    ) -> dict[str, float]:
        """One update of ``objective`` on every position of ``windows``; gives metrics.

        A step whose gradient is not finite is skipped, and ``notice`` is told.

        Raises:
            NumericError: too many steps in a row were not finite.
        """
        rows = self._world.shard(len(windows))
        share = (rows.stop - rows.start) / len(windows)
        parts = {"loss": 0.0, "reward": 0.0, "accuracy": 0.0, "entropy": 0.0}
        if share:
            loss, parts = self._loss(windows[rows], objective=objective, generator=generator, rows_before=rows.start)
            (loss * share).backward()  # every mean is over the positions of all windows, which are of one length
        self._world.sum_gradients(self._parameters.values())
        parts = self._world.sums({name: share * value for name, value in parts.items()})
        # The schedule is the caller's; the optimizer holds no scheduler whose state would have to be saved.
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = guarded_step(
            self.guard, self.optimizer, self._parameters, step=step, clip_norm=self._learning.clip_norm, notice=notice
        )
        num_tokens = windows[:, 1:].numel()
        self.costs.tokens += num_tokens
        # Counted whether or not the step was skipped: the work was done.
        self.costs.flops += self.step_flops(objective, num_tokens=num_tokens)
        return {
            **parts,
            "entropy_maximum": math.log(self.model.config.vocab_size),
            "gradient_norm": norm,
            "learning_rate": learning_rate,
        }

    def _loss(
        self, windows: Int[Tensor, "batch time"], *, objective: str, generator: torch.Generator, rows_before: int
    ) -> tuple[Tensor, dict[str, float]]:
        """The objective's loss, with gradient, and metrics; all of them are means over positions."""
        # [batch, time − 1] each: position t predicts the token at t + 1.
        inputs, targets = windows[:, :-1], windows[:, 1:]
        logits = next_token_logits(self.model, inputs)  # [batch, time - 1, vocab]
        uses_reference = needs_reference(self._learning, objective)
        loss, reward = objective_loss(
            logits,
            targets,
            objective=objective,
            reference_probs=self._reference_lm.probabilities(inputs) if uses_reference else None,
            learning=self._learning,
            generator=generator,
            positions_before=rows_before * targets.shape[1],
        )
        return loss, {
            "loss": loss.item(),
            "reward": reward,
            "accuracy": float((logits.argmax(-1) == targets).float().mean()),
            "entropy": float(entropy(logits.detach()).mean()),
        }

    def reset(self) -> None:
        """Back to the random weights, a new optimizer and no costs."""
        self.load_state_dict(self._initial)

    def snapshot(self) -> dict[str, Any]:
        """A copy of :meth:`state_dict`, which later learning leaves alone."""
        return copy.deepcopy(self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """All that learning has changed, as live tensors and plain numbers.

        Raises:
            ModelError: a theater is open.
        """
        return {
            "model": self._weights(),
            "optimizer": optimizer_state(self.optimizer),
            "costs": asdict(self.costs),
            "guard": self.guard.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over :meth:`state_dict` into the same parameters; later learning leaves ``state`` alone.

        Raises:
            CheckpointError: it belongs to another student.
            ModelError: a theater is open.
        """
        copy_tensors(state["model"], self._weights())
        # load_state_dict of an optimizer keeps the tensors that it is given, hence the copy.
        load_optimizer(
            self.optimizer, copy.deepcopy(state["optimizer"])
        )  # torch would go on in the tensors it is given
        self.costs = Costs(**state["costs"])
        self.guard.load_state_dict(state["guard"])

    def _weights(self) -> dict[str, Tensor]:
        """The live weights, each once: ``state_dict``, which an open theater refuses, has tied ones under two names."""
        state = self.model.state_dict()
        return {name: state[name] for name in self._parameters}


def scheduled_rate(step: int, num_steps: int, learning: LearningOptions) -> float:
    """The learning rate of update ``step`` (from 1): linear warm-up, then a cosine down to the final rate.

    >>> learning = LearningOptions(learning_rate=1.0, final_learning_rate=0.0, warm_up_steps=2)
    >>> [round(scheduled_rate(step, 4, learning), 3) for step in (1, 2, 3, 4)]
    [0.5, 1.0, 0.5, 0.0]
    """
    if step <= learning.warm_up_steps:
        return learning.learning_rate * step / learning.warm_up_steps
    fraction = (step - learning.warm_up_steps) / max(num_steps - learning.warm_up_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * fraction))
    return learning.final_learning_rate + (learning.learning_rate - learning.final_learning_rate) * cosine


class StateFeatures:
    """The surgeon's state: a vector of dimensionless numbers of order 1.

    In this order: ln ‖W‖ of every target (Frobenius); the attention entropy of every head over its maximum, layer by
    layer; the loss of the fixed windows and its difference from its running mean; the last action; its reward; whether
    it was committed. Each is normalised by its own running mean and standard deviation (0 until it has varied) and
    clipped at five standard deviations.

    Args:
        model: the student.
        targets: the matrices that can be edited.
        windows: text on which attention entropies are measured.
        action_dim: length of an action.

    Attributes:
        dim: length of the state.
    """

    def __init__(
        self, model: PreTrainedModel, targets: Sequence[Target], *, windows: Int[Tensor, "window time"], action_dim: int
    ) -> None:
        self._model = model
        self._targets = tuple(targets)
        self._windows = windows
        num_heads = model.config.num_hidden_layers * model.config.num_attention_heads
        self.dim = len(self._targets) + num_heads + 2 + action_dim + 2
        self._moments = [RunningMoments() for _ in range(self.dim)]
        self._mean_loss: float | None = None
        self._last_action = torch.zeros(action_dim)
        self._last_outcome = [0.0, 0.0]  # reward, committed

    def observe(self, action: Float[Tensor, " action"], *, reward: float, committed: bool) -> None:
        """Remembers the last trial."""
        self._last_action = action.detach().clone()
        self._last_outcome = [reward, float(committed)]

    def state(self, *, loss: float) -> Float[Tensor, " state"]:
        """The normalised features of the student now; ``loss`` (nats per token) is that of the fixed windows."""
        # Against the mean before this loss, or a fall would be measured partly against itself.
        trend = 0.0 if self._mean_loss is None else loss - self._mean_loss
        self._mean_loss = loss if self._mean_loss is None else self._mean_loss + TREND_RATE * trend
        norms = [math.log(float(target.matrix().norm())) for target in self._targets]
        heads = head_entropies(self._model, self._windows).flatten().tolist()
        # targets + layers · heads + loss and trend + action + reward and committed, as counted in `dim`
        raw = [*norms, *heads, loss, trend, *self._last_action.tolist(), *self._last_outcome]
        return torch.tensor(
            [self._normalised(value, moments) for value, moments in zip(raw, self._moments, strict=True)]
        )

    @staticmethod
    def _normalised(value: float, moments: RunningMoments) -> float:
        moments.update(torch.tensor([value], dtype=torch.float64))
        deviation = moments.standard_deviation
        # Rounding alone gives a constant feature a tiny deviation, and dividing by it would make noise of order 1.
        if deviation <= 1e-9 * max(abs(moments.mean), 1.0):
            return 0.0
        return min(max((value - moments.mean) / deviation, -CLIP), CLIP)

    def state_dict(self) -> dict[str, Any]:
        """Running statistics and the last trial, as plain values."""
        return {
            "moments": [moments.state_dict() for moments in self._moments],
            "mean_loss": self._mean_loss,
            "last_action": self._last_action.tolist(),
            "last_outcome": self._last_outcome,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over :meth:`state_dict`.

        Raises:
            CheckpointError: it has another number of features.
        """
        if len(state["moments"]) != self.dim:
            raise CheckpointError(f"the checkpoint has {len(state['moments'])} features, this surgeon {self.dim}")
        for moments, saved in zip(self._moments, state["moments"], strict=True):
            moments.load_state_dict(saved)
        self._mean_loss = state["mean_loss"]
        self._last_action = torch.tensor(state["last_action"])
        self._last_outcome = list(state["last_outcome"])


@torch.no_grad()
def head_entropies(model: PreTrainedModel, windows: Int[Tensor, "window time"]) -> Float[Tensor, "layer head"]:
    """Mean attention entropy of each head, over ln(visible positions): 0 attends to one token, 1 to all alike.

    The first position of a window, which sees only itself, is left out.
    """
    return attention_entropies(model(input_ids=windows, output_attentions=True, use_cache=False).attentions)


@torch.no_grad()
def attention_entropies(
    attentions: Sequence[Float[Tensor, "window head time time"]],
) -> Float[Tensor, "layer head"]:
    """The same from the attention weights of every layer."""
    time, device = attentions[0].shape[-1], attentions[0].device
    maximum = torch.arange(2, time + 1, device=device).log()  # [time - 1]: t + 1 visible at t
    layers = []
    for attention in attentions:  # [window, head, time, time]
        entropies = torch.special.entr(attention.float()).sum(-1)[..., 1:]  # [window, head, time - 1]
        layers.append((entropies / maximum).mean(dim=(0, 2)))  # [head]
    return torch.stack(layers)
