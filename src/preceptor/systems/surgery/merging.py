"""Fine-tunes of a student on different halves of the text, which ``merging`` averages.

That averaging costs anything is not a matter of course: after a short fine-tune at a low rate the average is as good as
the better of the two, and often better. The rate is therefore an option of the run (``amortised.fine_tune_rate``).
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Int
from torch import Tensor

from preceptor.runs.export import load_model, save_model
from preceptor.systems.surgery.environment import Student
from preceptor.systems.surgery.patient import STUDENTS, Patient
from preceptor.systems.surgery.rewards import draw_windows
from preceptor.systems.surgery.setup import Setup

COMPARED_WINDOWS = 64
"""Windows of the whole training text on which the better of the two is found."""


def find_parents(setup: Setup, patient: Patient, *, stop: Callable[[], None] = lambda: None) -> None:
    """Gives ``patient`` its two fine-tunes, the better one first; those in the run folder are only loaded.

    The better one has the lower loss on the training text, so that no held-out text decides what a damage is.
    """
    tokens = setup.corpus.train
    halves = (tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :])
    windows = patient.windows(COMPARED_WINDOWS, setup.generator(f"better parent of {patient.name}"))
    parents = []
    for number, half in enumerate(halves):
        patient.restore()
        _fine_tune(setup, patient, f"{patient.name}_parent_{number}", half, stop)
        parents.append((patient.loss(windows), patient.snapshot()))
    patient.parents = tuple(snapshot for _, snapshot in sorted(parents, key=lambda parent: parent[0]))
    patient.restore()


def _fine_tune(
    setup: Setup, patient: Patient, name: str, tokens: Int[Tensor, " token"], stop: Callable[[], None]
) -> None:
    """Trains the model of ``patient`` on ``tokens`` by the run's objective, at a rate that falls to 0."""
    config, folder = setup.config, setup.folder / STUDENTS / name
    if setup.world.of_first((folder / "config.json").is_file):
        patient.model.load_state_dict(load_model(folder)[0].state_dict())
        return
    num_steps = config.amortised.fine_tune_steps
    setup.notice(f"training {name}: {num_steps} updates")
    student = Student(patient.model, config.learning, setup.reference_lm, world=setup.world)
    for number in range(1, num_steps + 1):
        windows = draw_windows(
            tokens,
            num_windows=config.learning.batch_size,
            length=config.student.block_size + 1,
            generator=setup.generator(f"batch of {name}", number),
        )
        student.learn(
            windows.to(setup.device),
            objective=config.learning.objective,
            learning_rate=config.amortised.fine_tune_rate * (1 - (number - 1) / num_steps),
            step=number,
            generator=setup.generator(f"group of {name}", number),
            notice=setup.notice,
        )
        stop()
    if setup.world.is_first:
        save_model(patient.model, setup.corpus.tokenizer, folder)
