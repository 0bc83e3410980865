"""A study: a policy learns which passages of a mixed pool to read, and is judged on articles that it never saw.

Before: every candidate of every case is read alone by the frozen reader, which gives a table of gains (``setup.py``).
Each update (numbers as in :func:`step`), 1 to 5 for each mode:

1. A batch of cases of the training articles is drawn.
2. The policy reads each several times: candidates without replacement, from a softmax over its scores (``policy.py``).
3. A reading is worth the mean of its candidates' gains in the table, or, in the last ``study.real_steps`` updates,
   what the reader says after really reading all of it (``scores.py``).
4. Advantages are normalised over the readings of a case, which all faced the same choice.
5. REINFORCE on projections, channel weights and temperature; one optimizer step.
6. In the last ``study.model_steps`` updates the vectors are those of a copy of the reader, whose weights take a step
   down the losses of all modes together (``encoder.py``).

At the end every method reads the held-out cases, really, beside the policy (``evaluate.py``).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from preceptor.config import to_dict
from preceptor.objectives.advantages import group_normalised
from preceptor.objectives.policy_gradient import reinforce_loss
from preceptor.runs.checkpoint import copy_tensors, load_optimizer, optimizer_state
from preceptor.runs.export import MODEL, save_model
from preceptor.runs.files import replace_file
from preceptor.runs.guard import NonFiniteGuard, guarded_step
from preceptor.systems.reading.config import ReadingConfig
from preceptor.systems.reading.study.encoder import Encoded, Encoder, Learner
from preceptor.systems.reading.study.evaluate import evaluate, result
from preceptor.systems.reading.study.policy import PoolPolicy, Readings, read
from preceptor.systems.reading.study.pool import Mode
from preceptor.systems.reading.study.setup import Setup, Split, prepare

if TYPE_CHECKING:
    from preceptor.runs.folder import Run
    from preceptor.systems.base import Services

PROGRESS_COLUMNS = {"reward": "gain", "gap_closed_train": "gap closed", "selection_entropy": "entropy"}
PROJECTIONS = ("query_projection", "key_projection")


class State:
    """What learning changes: a policy for each mode with its optimizer, the model of their vectors, and counts.

    ``learner`` is None where ``study.model_steps`` is 0: the vectors then stay the reader's.
    """

    def __init__(self, setup: Setup) -> None:
        self.policies: dict[Mode, PoolPolicy] = {mode: setup.policy(mode) for mode in setup.modes}
        self.optimizers = {mode: build_optimizer(policy, setup.config) for mode, policy in self.policies.items()}
        encoder = setup.encoder()
        self.learner = None if encoder is None else Learner(encoder, setup.config.update)
        # One for each mode, so that one whose gradient is never finite ends the run.
        self.guards = {mode: NonFiniteGuard() for mode in setup.modes}
        self.num_episodes = 0

    def state_dict(self) -> dict[str, Any]:
        """Everything above, as nested mappings of tensors and plain values."""
        return {
            **({} if self.learner is None else {"learner": self.learner.state_dict()}),
            "policies": {mode: dict(policy.state_dict()) for mode, policy in self.policies.items()},
            "optimizers": {mode: optimizer_state(optimizer) for mode, optimizer in self.optimizers.items()},
            "guards": {mode: guard.state_dict() for mode, guard in self.guards.items()},
            "num_episodes": self.num_episodes,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`, in place."""
        if self.learner is not None:
            self.learner.load_state_dict(state["learner"])
        for mode, policy in self.policies.items():
            copy_tensors(state["policies"][mode], policy.state_dict())
            load_optimizer(self.optimizers[mode], state["optimizers"][mode])
        for mode, guard in self.guards.items():  # older checkpoints have one for all modes
            guard.load_state_dict(state["guards"][mode] if "guards" in state else state["guard"])
        self.num_episodes = state["num_episodes"]


def build_optimizer(policy: PoolPolicy, config: ReadingConfig) -> torch.optim.Optimizer:
    """Adam with one learning rate for the projections and another for the few numbers around them.

    Matrices of ten thousand entries sharpen a softmax slowly; a temperature of its own does it in a few hundred steps.
    """
    few = [parameter for name, parameter in policy.named_parameters() if name not in PROJECTIONS]
    return torch.optim.Adam(
        [
            {"params": [getattr(policy, name) for name in PROJECTIONS], "lr": config.update.projection_learning_rate},
            {"params": few, "lr": config.study.learning_rate},
        ]
    )


def train(config: ReadingConfig, run: Run, services: Services, *, setup: Setup | None = None) -> dict[str, Any]:
    """Train a policy for each mode of ``config`` inside ``run`` and judge it; gives ``result.json``."""
    setup = setup or prepare(config, run, services)
    state = State(setup)
    for number in run.loop(config.update.steps, state, columns=PROGRESS_COLUMNS):
        run.log(number, step(setup, state, number))
    encoder = None if state.learner is None else state.learner.encoder
    if run.writes:
        save_policies(setup, state)
        if encoder is not None:
            save_model(encoder.lm.model, encoder.lm.tokenizer, run.path / MODEL)
    records = evaluate(setup, state.policies, encoder=encoder, first_episode=state.num_episodes)
    return result(records, config=to_dict(config), seeds=[config.seed])


def step(setup: Setup, state: State, number: int) -> dict[str, Any]:
    """Update ``number`` of every mode's policy; gives its metrics, the mean over modes and each mode's own."""
    began, learner = time.perf_counter(), state.learner
    learns = number > setup.config.update.steps - setup.config.study.model_steps
    # Once its weights have moved the policies know no other vectors, also where a run goes on past its planned end.
    encoder = learner.encoder if learner is not None and (learns or learner.has_moved) else None
    updates = {mode: _update(setup, state, mode, number, encoder=encoder) for mode in setup.modes}
    rows = {mode: row for mode, (row, _) in updates.items()}
    means = {name: sum(row[name] for row in rows.values()) / len(rows) for name in next(iter(rows.values()))}

    # 6. The weights of the model, by the losses of all modes.
    if learner is not None and learns:
        batches = [encoded for _, encoded in updates.values() if encoded is not None]
        means |= learner.step(batches, setup.run, number=number)
    return {
        **means,
        "modes": rows,
        "episodes": state.num_episodes,
        "skipped_steps": sum(guard.num_skipped for guard in state.guards.values()),
        "seconds": time.perf_counter() - began,
    }


def _update(
    setup: Setup, state: State, mode: Mode, number: int, *, encoder: Encoder | None
) -> tuple[dict[str, float], Encoded | None]:
    """One step of a mode's policy; gives its metrics, and the texts whose vectors have their gradient."""
    config, run, study = setup.config, setup.run, setup.config.study
    policy, split, budget = state.policies[mode], setup.train[mode], config.episode.budget

    # 1. Cases.
    count = min(study.cases_per_update, len(split.cases))
    chosen = torch.randperm(len(split.cases), generator=run.streams["article"])[:count]
    cases, encoded = split.batch.at(chosen), None
    if encoder is not None:
        cases, encoded = encoder.encode([split.cases[case] for case in chosen.tolist()], cases)

    # 2. Readings.
    readings = read(policy, cases, budget=budget, num_readings=study.num_readings, generator=run.streams["selection"])

    # 3. Rewards.
    really = number > config.update.steps - study.real_steps
    if really:
        rewards = torch.stack(
            [
                setup.scorer.reading_gains(split.cases[case], picks.tolist())
                for case, picks in zip(chosen.tolist(), readings.picks, strict=True)
            ]
        )
    else:
        rewards = table_rewards(cases.gains, readings)
    earned = rewards
    if config.shuffle_rewards:
        # The control in which rewards say nothing about the readings that earned them.
        flat = rewards.flatten()
        earned = flat[torch.randperm(len(flat), generator=run.streams["shuffle"])].view_as(rewards)

    # 4, 5. Advantages over the readings of a case, and one step.
    advantages = group_normalised(earned, dim=1)[..., None].expand_as(readings.log_probs)  # case reading step
    log_probs = readings.log_probs.flatten(0, 1)
    loss = reinforce_loss(log_probs, advantages.flatten(0, 1), mask=torch.ones_like(log_probs, dtype=torch.bool))
    # Every process has all cases; the mean of their gradients keeps a last bit from letting the policies drift apart.
    (loss / run.world.size).backward()
    run.world.sum_gradients(policy.parameters())
    norm = guarded_step(
        state.guards[mode],
        state.optimizers[mode],
        dict(policy.named_parameters()),
        step=number,
        clip_norm=config.update.clip_norm,
        notice=run.notice,
    )

    if number % config.record_every == 0:
        run.record(_decisions(split, chosen, readings, rewards, number=number, first=state.num_episodes, really=really))
    state.num_episodes += rewards.numel()
    best = cases.gains.sort(dim=1, descending=True).values[:, :budget].mean(1)
    chance = cases.gains.mean(1)
    metrics = {
        "reward": float(rewards.mean()),
        "gap_closed_train": float((rewards.mean(1) - chance).sum() / (best - chance).sum()),
        "on_target": float(cases.on_target[:, None].expand(-1, rewards.shape[1], -1).gather(2, readings.picks)
                           .double().mean()),
        "policy_loss": float(loss.detach()),
        "gradient_norm": norm,
        "selection_entropy": float(readings.entropy.mean()),
        "temperature": float(policy.temperature.detach()),
    }  # fmt: skip
    return metrics, encoded


def table_rewards(gains: Float[Tensor, "case candidate"], readings: Readings) -> Float[Tensor, "case reading"]:
    """Mean gain of what each reading holds, every candidate as if it had been read alone."""
    num_readings = readings.picks.shape[1]
    return gains[:, None].expand(-1, num_readings, -1).gather(2, readings.picks).mean(-1)


def _decisions(
    split: Split, chosen: Tensor, readings: Readings, rewards: Tensor, *, number: int, first: int, really: bool
) -> list[dict[str, Any]]:
    """The first reading of each case of an update."""
    probabilities = readings.log_probs.detach().exp()
    return [
        {
            "step": number,
            "episode": first + row * rewards.shape[1],
            "arm": "learned",
            "article": split.cases[case].article,
            "mode": split.cases[case].mode,
            "case": split.cases[case].name,
            "order": readings.picks[row, 0].tolist(),
            "probabilities": [round(p, 6) for p in probabilities[row, 0].tolist()],
            "reward": float(rewards[row, 0]),
            "really_read": really,
        }
        for row, case in enumerate(chosen.tolist())
    ]


def save_policies(setup: Setup, state: State) -> None:
    """Write ``study.safetensors`` and ``study.json``: the policies and what they need to know of texts in general."""
    corpus = setup.corpus
    tensors = {
        f"{mode}.{name}": tensor.detach().contiguous()
        for mode, policy in state.policies.items()
        for name, tensor in policy.state_dict().items()
    }
    tensors |= {
        "scales": setup.scales, "idf": corpus.idf, "mean": corpus.mean, "deviation": corpus.deviation,
        "token_mean": corpus.token_mean,
    }  # fmt: skip
    if corpus.written_mean is not None:
        tensors["written_mean"] = corpus.written_mean
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, setup.run.path / "study.safetensors")
    lexicon = corpus.lexicon
    description = {
        "modes": list(state.policies),
        "num_texts": lexicon.num_texts,
        "mean_length": lexicon.mean_length,
        "frequency": dict(sorted(lexicon.frequency.items())),  # the same file in every process
    }
    replace_file(setup.run.path / "study.json", json.dumps(description, ensure_ascii=False) + "\n")
