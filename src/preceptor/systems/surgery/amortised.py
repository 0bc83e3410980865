"""The amortised surgeon: trained over many damaged students by SAC or PPO, to repair models that it has never seen.

Each training step
1. takes some students and damages each in a way of its own,
2. lets the surgeon see every site of the damaged student and propose an edit,
3. pays the fall of the loss on the text that it saw,
4. lets it learn: every edit is an episode of its own, so discounts are 0.

Then every unseen student is damaged and repaired by the surgeon and by every baseline, one item (a student and a kind
of damage) a step. Both kinds of step are saved and resumed alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from preceptor.config import to_dict
from preceptor.errors import DataError
from preceptor.runs.device import peak_memory_mib
from preceptor.runs.metrics import read_jsonl
from preceptor.runs.record import read_manifest
from preceptor.systems.base import Replayed
from preceptor.systems.surgery.baselines import sac_agent
from preceptor.systems.surgery.config import SurgeryConfig
from preceptor.systems.surgery.damage import MERGING
from preceptor.systems.surgery.environment import Student, scheduled_rate
from preceptor.systems.surgery.judging import judge
from preceptor.systems.surgery.merging import find_parents
from preceptor.systems.surgery.patient import Patient, pretrained_patient, train_students
from preceptor.systems.surgery.policy import SacAgent
from preceptor.systems.surgery.ppo import PpoAgent
from preceptor.systems.surgery.repaired import result
from preceptor.systems.surgery.rewards import draw_windows
from preceptor.systems.surgery.setup import Setup, prepare
from preceptor.systems.surgery.site_policy import SURGEON, SiteNetwork, TrainedSurgeon, flat_state, site_networks
from preceptor.systems.surgery.sites import FEATURE_DIM

if TYPE_CHECKING:
    from preceptor.runs.folder import Run
    from preceptor.systems.base import Services

LEARNERS = ("amortised", "shuffled")
"""The surgeon, and the same one paid with the rewards of other damages."""

COLUMNS = {"reward": "reward", "repaired": "repaired"}
NUM_SCALE_DAMAGES = 32
"""Damages whose mean loss is the unit of rewards."""


@dataclass(frozen=True)
class Ward:
    """Who is repaired.

    Attributes:
        students: to train the surgeon on.
        unseen: to judge it on.
        items: (student, kind of damage) of each evaluation step, all of the unseen.
        num_sites: the most that any of the students has.
        reward_scale: rewards per nat; the mean damage of training is worth 1.
    """

    students: list[Patient]
    unseen: list[Patient]
    items: list[tuple[Patient, str]]
    num_sites: int
    reward_scale: float


class State:
    """The two learners, what the second is paid next, and the records so far."""

    def __init__(self, setup: Setup, ward: Ward) -> None:
        self.agents = {name: make_agent(setup, ward) for name in LEARNERS}
        self.last_rewards: list[float] = []
        self.records: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """Both learners with their buffers, the rewards of the last step, and the records."""
        return {
            **{name: agent.state_dict() for name, agent in self.agents.items()},
            "last_rewards": self.last_rewards,
            "records": self.records,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over :meth:`state_dict`.

        Raises:
            CheckpointError: it belongs to another configuration.
        """
        for name, agent in self.agents.items():
            agent.load_state_dict(state[name])
        self.last_rewards = list(state["last_rewards"])
        self.records = list(state["records"])


def make_agent(setup: Setup, ward: Ward) -> SacAgent | PpoAgent:
    """A learner as it begins, the same for every call."""
    options, generator = setup.config.agent, setup.generator("surgeon weights")
    if setup.config.amortised.learner == "ppo":
        return PpoAgent(options, generator=generator)
    return sac_agent(
        options,
        state_dim=ward.num_sites * FEATURE_DIM,
        action_dim=ward.num_sites,
        generator=generator,
        spill_folder=setup.folder,
        networks=site_networks,
    )


def train(config: SurgeryConfig, run: Run, services: Services) -> dict[str, Any]:
    """Trains the surgeon inside ``run`` and repairs every unseen student; gives ``result.json``."""
    setup = prepare(config, device=run.device, folder=run.path, notice=run.notice, world=run.world)
    ward = admit(setup, stop=run.stop_if_requested)
    state = State(setup, ward)
    num_steps = config.amortised.steps
    for n in run.loop(num_steps + len(ward.items), state, columns=COLUMNS):
        if n <= num_steps:
            metrics, decisions = step(setup, ward, state, n)
        else:
            surgeons = {name: trained_surgeon(setup, state, name) for name in LEARNERS}
            patient, kind = ward.items[n - num_steps - 1]
            metrics, decisions, records = judge(setup, patient, kind, surgeons)
            state.records += records
        run.record({"step": n, **decision} for decision in decisions)
        run.log(n, {**metrics, "peak_memory_mib": peak_memory_mib(run.device)})
        if n == num_steps and run.writes:
            trained_surgeon(setup, state, "amortised").save(run.path / SURGEON)
    return result(state.records, config=to_dict(config), seeds=[config.seed])


def admit(setup: Setup, *, stop: Any = lambda: None) -> Ward:
    """Trains or loads every student, and measures how large the damages of training are."""
    config, options = setup.config, setup.config.amortised

    def learn(student: Student, name: str) -> None:
        setup.notice(f"training {name}: {config.phases.bootstrap_steps} updates")
        for number in range(1, config.phases.bootstrap_steps + 1):
            bootstrap(setup, student, name, number)
            stop()

    sizes = [options.sizes[number % len(options.sizes)] for number in range(options.num_students)]
    students = train_students(setup, sizes, "student", learn=learn)
    unseen = train_students(setup, options.unseen_sizes, "unseen", learn=learn)
    merged = [*students, *unseen] if MERGING in options.damages else unseen[:1]
    if MERGING in (*options.damages, *options.unseen_damages):
        for patient in merged:
            find_parents(setup, patient, stop=stop)
    students += [pretrained_patient(setup, name) for name in options.models]
    unseen += [pretrained_patient(setup, name) for name in options.unseen_models]
    # Every kind of damage that the surgeon was trained on, on every unseen student; unseen kinds on the first alone.
    # Pretrained models are not fine-tuned, so there is nothing of theirs to merge.
    items: list[tuple[Patient, str]] = [
        (patient, kind) for patient in unseen for kind in options.damages if kind != MERGING or patient.parents
    ]
    items += [(patient, kind) for patient in unseen[:1] for kind in options.unseen_damages]
    num_sites = max(patient.sites.action_dim for patient in students)
    rises = []
    for number in range(NUM_SCALE_DAMAGES):
        generator = setup.generator("reward scale", number)
        patient = students[number % len(students)]
        windows = patient.windows(options.probe_windows, generator)
        kind = options.damages[number // len(students) % len(options.damages)]
        patient.restore(kind)
        clean = patient.loss(windows)
        patient.damage(kind, strength=options.strength, generator=generator)
        rises.append(patient.loss(windows) - clean)
    mean_rise = sum(rises) / len(rises)
    return Ward(students, unseen, items, num_sites, 1 / mean_rise if mean_rise > 0 else 1.0)


def bootstrap(setup: Setup, student: Student, name: str, number: int) -> None:
    """Update ``number`` (from 1) of a student by the run's objective."""
    learning = setup.config.learning
    windows = draw_windows(
        setup.corpus.train,
        num_windows=learning.batch_size,
        length=setup.config.student.block_size + 1,
        generator=setup.generator(f"batch of {name}", number),
    )
    student.learn(
        windows.to(setup.device),
        objective=learning.objective,
        learning_rate=scheduled_rate(number, setup.config.phases.bootstrap_steps, learning),
        step=number,
        generator=setup.generator(f"group of {name}", number),
        notice=setup.notice,
    )


# ---- training -------------------------------------------------------------------------------------------------------


def step(setup: Setup, ward: Ward, state: State, n: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Training step ``n`` (from 1): damages, edits of both learners, learning. Gives metrics and decisions."""
    options = setup.config.amortised
    decisions: list[dict[str, Any]] = []
    seen: dict[str, list[tuple[Tensor, Tensor, float]]] = {name: [] for name in LEARNERS}
    for index in range(options.damages_per_step):
        number = (n - 1) * options.damages_per_step + index
        patient, kind = choose(setup, ward, number)
        hurt(setup, patient, kind, number)  # the same damage for both learners, seen once
        damaged = patient.snapshot()
        first = patient.sites.features(probe(setup, patient, number, 0), gradients=options.gradients)
        for name in LEARNERS:
            patient.put(damaged)
            for edit in range(options.edits_per_damage):
                windows = probe(setup, patient, number, edit)
                # 2. The surgeon sees the damaged student and proposes.
                features, before = patient.sites.features(windows, gradients=options.gradients) if edit else first
                observation = flat_state(features, ward.num_sites)
                draws = setup.generator(f"action of {name} {edit}", number)
                action = state.agents[name].act(observation, generator=draws)
                # 3. The edit is made and paid.
                patient.sites.apply_(action[: len(features)])
                reward = before - patient.loss(windows)
                seen[name].append((observation, action, reward))
                decisions.append(
                    {
                        "arm": name,
                        "student": patient.name,
                        "damage": kind,
                        "number": number,
                        "edit": edit,
                        "action": action[: len(features)].tolist(),
                        "reward": reward,
                        "loss_before": before,
                    }
                )
        patient.restore()
    metrics: dict[str, Any] = {}
    for name, agent in state.agents.items():
        metrics[name] = {"reward": _mean([reward for _, _, reward in seen[name]])}
        rewards = [reward for _, _, reward in seen[name]]
        if name == "shuffled":
            # Those of the step before: a permutation of its own would leave some in their place. Less their mean, which
            # tells how well the policy does as a whole: from that alone a policy that drifts learns (0.35 in one edit).
            rewards, state.last_rewards = _centred(state.last_rewards) or [0.0] * len(rewards), rewards
        metrics[name] |= learn_from(setup, ward, agent, seen[name], rewards, n=n)
    return {"kind": "training", "reward": metrics["amortised"]["reward"], **metrics}, decisions


def learn_from(
    setup: Setup,
    ward: Ward,
    agent: SacAgent | PpoAgent,
    seen: list[tuple[Tensor, Tensor, float]],
    rewards: list[float],
    *,
    n: int,
) -> dict[str, float]:
    """4. The agent observes the edits of step ``n``, each with the reward that it is told, and learns."""
    generator = setup.generator("updates", n)
    for (observation, action, _), reward in zip(seen, rewards, strict=True):
        agent.observe(observation, action, ward.reward_scale * reward, observation, terminated=True)
    metrics = agent.learn(setup.config.amortised.updates_per_step, generator=generator)
    return {f"surgeon_{name}": value for name, value in metrics.items()}


def choose(setup: Setup, ward: Ward, number: int) -> tuple[Patient, str]:
    """The student and the kind of damage ``number``."""
    generator = setup.generator("patient", number)
    damages = setup.config.amortised.damages
    patient = ward.students[int(torch.randint(len(ward.students), (), generator=generator))]
    return patient, damages[int(torch.randint(len(damages), (), generator=generator))]


def hurt(setup: Setup, patient: Patient, kind: str, number: int) -> None:
    """Damage ``number`` of training."""
    patient.damage(kind, strength=setup.config.amortised.strength, generator=setup.generator("damage", number))


def probe(setup: Setup, patient: Patient, number: int, edit: int) -> Tensor:
    """What the surgeon sees, and is paid for, at ``edit`` of damage ``number``."""
    return patient.windows(setup.config.amortised.probe_windows, setup.generator(f"probe {edit}", number))


def trained_surgeon(setup: Setup, state: State, name: str) -> TrainedSurgeon:
    """A learner's policy as it is now."""
    config, actor = setup.config, state.agents[name].actor
    assert isinstance(actor, SiteNetwork), "the agents were made with site networks"
    return TrainedSurgeon(
        actor,
        kind=config.edit.kind,
        rank=config.edit.rank,
        roles=config.edit.roles,
        max_factor=config.amortised.max_factor,
        gradients=config.amortised.gradients,
        num_windows=config.amortised.probe_windows,
        mlp=config.edit.mlp,
    )


def verify(config: SurgeryConfig, folder: Path, services: Services) -> Iterator[Replayed]:
    """Every recorded reward of training, and the loss before it, beside the same number measured again.

    Raises:
        DataError: ``decisions.jsonl`` is missing or names a student that the run does not have.
    """
    setup = prepare(config, device=torch.device(read_manifest(folder)["device"]), folder=folder)
    ward = admit(setup)
    for row in read_jsonl(folder / "decisions.jsonl"):
        if "item" in row:
            continue  # a repair of an unseen student, which earns no reward
        patient, kind = choose(setup, ward, row["number"])
        if (patient.name, kind) != (row["student"], row["damage"]):
            raise DataError(f"decisions.jsonl names {row['student']} at damage {row['number']}; it is of another run")
        if row["edit"] == 0:
            hurt(setup, patient, kind, row["number"])
        windows = probe(setup, patient, row["number"], row["edit"])
        before = patient.loss(windows)
        patient.sites.apply_(torch.tensor(row["action"]))
        where = f"step {row['step']}, {row['arm']}, damage {row['number']}, edit {row['edit']}"
        yield Replayed(f"{where}, loss before", row["loss_before"], before)
        yield Replayed(f"{where}, reward", row["reward"], before - patient.loss(windows))


def _centred(values: list[float]) -> list[float]:
    return [value - _mean(values) for value in values]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
