"""Patients: students that are damaged, repaired and put back, and the text that they are measured on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from preceptor.errors import DataError
from preceptor.lm.edit_targets import attention_targets, layer_targets
from preceptor.lm.load import load_language_model
from preceptor.runs.export import load_model, save_model
from preceptor.runs.world import ALONE, World
from preceptor.systems.surgery.config import DAMAGES, StudentOptions, SurgeryConfig
from preceptor.systems.surgery.damage import MERGING, Undo, add_damage
from preceptor.systems.surgery.environment import Student, build_student
from preceptor.systems.surgery.rewards import draw_windows, shared_window_losses
from preceptor.systems.surgery.setup import Setup, encode, read_text
from preceptor.systems.surgery.sites import Sites, edited_targets

Scope = Literal["attention", "layers", "model"]
"""What a damage may touch: attention matrices, all matrices of the decoder layers, or every weight."""

STUDENTS = "students"
"""Folder of a run with the undamaged students."""


class Patient:
    """A model that can be damaged, edited, and put back bit for bit.

    Args:
        name: in the records.
        model: with the attention implementation ``eager``.
        train, held_out: tokens of the text, to repair on and to judge on.
        block_size: tokens of a window.
        roles: of the attention matrices that are edited.
        mlp: whether those of the MLPs are edited too.
        kind, rank, max_factor: of the :class:`Sites`.
        scope: what damages and repairs may touch, and so what is copied to put the model back.
        world: the processes that share the windows of a measurement.

    Attributes:
        sites: the action space.
        targets: all matrices that a damage may touch, edited or not.
        parameters: all weights that it may touch, each once.
        parents: the fine-tunes that ``merging`` averages, each as a :meth:`snapshot`; the better one is first.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        *,
        train: Int[Tensor, " token"],
        held_out: Int[Tensor, " token"],
        block_size: int,
        roles: Sequence[Any],
        kind: str,
        rank: int,
        max_factor: float,
        mlp: bool = False,
        scope: Scope = "attention",
        world: World = ALONE,
    ) -> None:
        self.name = name
        self.model = model
        self.targets = tuple(attention_targets(model) if scope == "attention" else layer_targets(model))
        of_targets = dict.fromkeys(target.parameter for target in self.targets)
        self.parameters = tuple(model.parameters() if scope == "model" else of_targets)
        self.parents: tuple[list[Tensor], ...] = ()
        edited = edited_targets(model, roles, mlp=mlp)
        self.sites = Sites(model, edited, kind=kind, rank=rank, max_factor=max_factor)
        assert {target.parameter for target in edited} <= set(self.parameters), "an edit that is not put back"
        self._tokens = {"train": train, "held_out": held_out}
        self._block_size = block_size
        self._world = world
        self._clean = self.snapshot()

    def windows(self, num_windows: int, generator: torch.Generator, *, held_out: bool = False) -> Tensor:
        """Windows of the text: [window, block + 1], of which the last token is only predicted."""
        tokens = self._tokens["held_out" if held_out else "train"]
        windows = draw_windows(tokens, num_windows=num_windows, length=self._block_size + 1, generator=generator)
        return windows.to(self.model.device)

    def loss(self, windows: Int[Tensor, "window time"]) -> float:
        """Mean loss of the model as it is now, nats per token: one evaluation of a search."""
        return float(shared_window_losses(self.model, windows, self._world).mean())

    def damage(self, kind: str, *, strength: float, generator: torch.Generator) -> Undo:
        """Puts the model back and damages it; gives the exact inverse.

        ``merging`` puts the average of the two :attr:`parents`; what it is measured against is the better of them.
        """
        self.restore(kind)
        if kind != MERGING:
            return add_damage(kind, self.targets, strength=strength, generator=generator)
        first, second = self.parents
        self.put([(one + other) / 2 for one, other in zip(first, second, strict=True)])
        return lambda: self.put(first)

    def restore(self, kind: str = "") -> None:
        """Undamaged, bit for bit; where ``kind`` is ``merging``, the better of its :attr:`parents`."""
        self.put(self.parents[0] if kind == MERGING else self._clean)

    def log_norms(self) -> Float[Tensor, " site"]:
        """ln of every site's norm."""
        return torch.cat([self.sites.log_norms(target) for target in self.sites.targets])

    def snapshot(self) -> list[Tensor]:
        """Copies of all weights that a damage may touch, as they are now."""
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def put(self, snapshot: Sequence[Tensor]) -> None:
        """Back to a :meth:`snapshot`, bit for bit."""
        for parameter, copy in zip(self.parameters, snapshot, strict=True):
            parameter.copy_(copy)


def size_of(text: str) -> tuple[int, int, int]:
    """Layers, heads and width of ``"2x4x64"``."""
    layers, heads, width = map(int, text.split("x"))
    return layers, heads, width


def train_students(
    setup: Setup, sizes: Sequence[str], purpose: str, *, learn: Callable[[Student, str], None]
) -> list[Patient]:
    """A student of each of ``sizes``, from its own random weights; those in the run folder are only loaded.

    Args:
        setup: of the run.
        sizes: a student each.
        purpose: ``student`` or ``unseen``: names them, and separates their random weights.
        learn: trains one from its random weights; given its name too, which names its batches.
    """
    config = setup.config
    patients = []
    for number, size in enumerate(sizes):
        name = f"{purpose}_{number}_{size}"
        folder = setup.folder / STUDENTS / name
        layers, heads, width = size_of(size)
        options = StudentOptions(
            architecture=config.student.architecture,
            num_layers=layers,
            num_heads=heads,
            width=width,
            block_size=config.student.block_size,
        )
        seed = setup.generator(f"weights of {purpose}", number).initial_seed()
        model = build_student(options, vocab_size=setup.corpus.vocab_size, seed=seed, device=setup.device)
        if setup.world.of_first((folder / "config.json").is_file):
            model.load_state_dict(load_model(folder)[0].state_dict())
        else:
            learn(Student(model, config.learning, setup.reference_lm, world=setup.world), name)
            if setup.world.is_first:
                folder.parent.mkdir(exist_ok=True)
                save_model(model, setup.corpus.tokenizer, folder)
        patients.append(_patient(setup, name, model, setup.corpus.train, setup.corpus.held_out))
    return patients


def scope_of(config: SurgeryConfig) -> Scope:
    """What the damages and edits of a run may touch."""
    options = config.amortised
    kinds = {*options.damages, *options.unseen_damages}
    if MERGING in kinds:
        return "model"
    compressed = any(DAMAGES[kind].startswith("compression") for kind in kinds)
    return "layers" if compressed or config.edit.mlp else "attention"


def pretrained_patient(setup: Setup, name: str) -> Patient:
    """The pretrained model ``name`` over the run's text in its own tokens.

    Raises:
        ModelError: it cannot be loaded.
        DataError: the text is too short for it.
    """
    data, block = setup.config.data, setup.config.student.block_size
    model, tokenizer = load_editable(name, device=setup.device)
    text = read_text(data.text)[1]
    cut = int(data.train_share * len(text))
    train, held_out = (encode(tokenizer, part) for part in (text[:cut], text[cut:]))
    if min(len(train), len(held_out)) <= 2 * block:
        raise DataError(f"the text is too short for {name}: {len(train)} and {len(held_out)} tokens; give a longer one")
    return _patient(setup, Path(name).name, model, train, held_out)


def load_editable(name: str, *, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A pretrained model in float32 that returns its attention weights, and its tokenizer.

    Args:
        name: ``starter``, a model folder, or a name on the hub; its tokenizer needs no begin token if it is a folder.
        device: for the weights.

    Raises:
        ModelError: it cannot be loaded.
    """
    if (Path(name) / "config.json").is_file():
        loaded, tokenizer = load_model(Path(name))
        model: PreTrainedModel = loaded.float().to(device)
    else:
        lm = load_language_model(name, device=device)
        model, tokenizer = lm.model, lm.tokenizer
    model.set_attn_implementation("eager")
    model.eval()  # type: ignore[no-untyped-call]
    return model, tokenizer


def _patient(setup: Setup, name: str, model: PreTrainedModel, train: Tensor, held_out: Tensor) -> Patient:
    edit = setup.config.edit
    return Patient(
        name,
        model,
        train=train,
        held_out=held_out,
        block_size=setup.config.student.block_size,
        roles=edit.roles,
        kind=edit.kind,
        rank=edit.rank,
        max_factor=setup.config.amortised.max_factor,
        mlp=edit.mlp,
        scope=scope_of(setup.config),
        world=setup.world,
    )
