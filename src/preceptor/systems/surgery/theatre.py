"""The operating theatre: weights are edited in place, looked at, and put back bit for bit unless the edit is committed.

with SurgicalTheater(model, attention_targets(model, roles=["output"])) as theatre:
    edit.apply_(action)
    if quality_of(model) > before:
        theatre.commit()
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Literal, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from preceptor.errors import ConfigError, ModelError
from preceptor.systems.surgery.interrupts import DeferredSignals
from preceptor.systems.surgery.targets import Target

Moments = Literal["keep", "zero", "scale"]
# What Adam and SGD remember of a parameter's gradients, and the power of the gradient that it is.
_MOMENT_POWERS = {"exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}

_open: list[SurgicalTheater] = []  # of the whole process, in the order of their opening


class SurgicalTheater:
    """While entered, the weights of ``targets`` may be edited in place; when left, they are bit for bit what they were.

    That holds through exceptions, a closed generator, and signals at any moment: one that lands while the theatre is
    opened, committed or closed waits until that is done, one that lands in the block interrupts it as ever. Theatres
    of one module are a stack; a commit in an inner one lasts if the outer one commits too. Copies are held of the
    targets alone. The parameters stay the same objects, and buffers, modes and random numbers are left alone.

    While it is open, these raise ``ModelError``: ``state_dict``, ``load_state_dict``, a deep copy or a pickle of the
    module or of anything that contains it, and the step of any optimiser over an edited parameter. Code that copies
    parameters by other ways asks :func:`require_closed` first. A backward pass must lie inside the block or outside:
    torch refuses one through weights that were written in between.

    Args:
        module: what the targets belong to.
        targets: what will be edited; memory that two of them share is copied for each and put back once more.
        check: compare a checksum of every parameter and buffer, the modes and torch's random state before and after,
            at the cost of two passes over the module; for debugging.

    Attributes:
        committed: whether the edit is kept.

    Raises:
        ModelError: a target is not of this module; the theatre is entered twice; it is left before one of the same
            module that was opened later (these are put back first); ``check`` found that something else changed.
    """

    def __init__(self, module: nn.Module, targets: Iterable[Target], *, check: bool = False) -> None:
        self.module = module
        self.targets = tuple(targets)
        self.committed = False
        self._check = check
        self._is_open = False
        self._saved: list[tuple[Tensor, Tensor]] = []  # live view, copy
        self._handles: list[RemovableHandle] = []
        self._before: dict[str, str] = {}
        parameters = {id(parameter) for parameter in module.parameters()}
        if foreign := [target.name for target in self.targets if id(target.parameter) not in parameters]:
            raise ModelError(
                f"{foreign[0]} is no parameter of this {type(module).__name__}; choose targets of this model"
            )

    @property
    def bytes_held(self) -> int:
        """Bytes that the copies take now: 0 before, after, and once committed."""
        return sum(saved.nbytes for _, saved in self._saved)

    def __enter__(self) -> Self:
        if self._is_open:
            raise ModelError("this theatre is open already; open a second one for an edit within an edit")
        _signals.install()
        try:
            self._admit()
            _signals.deliver()
        except BaseException:  # Ctrl-C too: what was admitted is put back before it goes on
            self._close()
            _signals.deliver()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            later = self._opened_later()
            for theater in reversed(later):
                theater._close()
            changed = self._close()
        finally:
            _signals.deliver()
        if later:
            raise ModelError(
                f"left a theatre before {len(later)} opened later on the same model; all were put back, last one first"
            )
        if changed and kind is None:
            raise ModelError(f"changed in the theatre without being a target: {', '.join(changed)}")

    def commit(
        self, optimiser: Optimizer | None = None, *, moments: Moments = "keep", moment_scale: float = 0.5
    ) -> None:
        """Keeps the weights as they are now, and whatever else is done to them before the theatre is left.

        What an optimiser remembers of gradients was measured at the old weights, and this says what becomes of it, for
        the whole parameter also where the target is a part of it.

        Args:
            optimiser: the Adam or SGD that trains the module, if there is one.
            moments: "keep" them; "zero" them, with the count of steps, as if the parameter were new; "scale" them as
                if every gradient so far had been ``moment_scale`` times as large.
            moment_scale: in [0, 1], dimensionless.

        Raises:
            ConfigError: ``moments`` needs an optimiser, or ``moment_scale`` is out of range.
            ModelError: the theatre is not open, or the optimiser keeps something else than moments.
        """
        if not self._is_open:
            raise ModelError("only an open theatre can commit; call it inside the block")
        faults = []
        if moments != "keep" and optimiser is None:
            faults.append(f"moments={moments!r} needs the optimiser whose moments are meant")
        if not 0 <= moment_scale <= 1:
            faults.append(f"moment_scale must lie in [0, 1], got {moment_scale}")
        if faults:
            raise ConfigError(*faults)
        try:
            if optimiser is not None and moments != "keep":
                self._rescale_moments(optimiser, 0.0 if moments == "zero" else moment_scale)
            self._saved.clear()
            self.committed = True
        finally:
            _signals.deliver()

    # ---- what enter, exit and commit do; signals wait meanwhile ------------------------------------------------------

    def _admit(self) -> None:
        self.committed = False
        self._before = _fingerprint(self.module) if self._check else {}
        self._saved = [(target.view, target.view.clone()) for target in self.targets]
        self._is_open = True
        _open.append(self)
        edited = {id(target.parameter) for target in self.targets}
        for owner in self.module.modules():
            if any(id(parameter) in edited for parameter in owner.parameters(recurse=False)):
                self._handles.append(owner.register_state_dict_pre_hook(_Refusal("save the model's state")))
                self._handles.append(owner.register_load_state_dict_pre_hook(_Refusal("load a state into the model")))
        self._handles.append(register_optimizer_step_pre_hook(self._refuse_step))

    def _close(self) -> list[str]:
        """Puts back what is not committed and stops refusing; names what differs from before but for commits."""
        with torch.no_grad():  # left again while signals still wait: one in its exit would leave gradients off
            for view, saved in self._saved:
                view.copy_(saved)
        self._saved.clear()
        while self._handles:
            self._handles.pop().remove()
        changed = []
        if self._before:
            kept = {id(target.parameter) for target in self.targets} if self.committed else set()
            changed = [
                name
                for name, value in _fingerprint(self.module, leave_out=kept).items()
                if value != self._before.get(name)
            ]
            self._before = {}
        if self in _open:
            _open.remove(self)
        try:
            if not _open:
                _signals.uninstall()
        finally:
            self._is_open = False
        return changed

    def _opened_later(self) -> list[SurgicalTheater]:
        if self not in _open:
            return []
        storages = _storages(target.parameter for target in self.targets)
        return [
            other
            for other in _open[_open.index(self) + 1 :]
            if other.module is self.module or storages & _storages(target.parameter for target in other.targets)
        ]

    def _refuse_step(self, optimiser: Optimizer, *_: Any) -> None:
        parameters = (parameter for group in optimiser.param_groups for parameter in group["params"])
        if _storages(parameters) & _storages(target.parameter for target in self.targets):
            _refuse("step an optimiser over edited weights")

    def _rescale_moments(self, optimiser: Optimizer, scale: float) -> None:
        for parameter in {id(target.parameter): target.parameter for target in self.targets}.values():
            state = optimiser.state.get(parameter, {})
            moments = {name: value for name, value in state.items() if name != "step" and value is not None}
            if unknown := sorted(moments.keys() - _MOMENT_POWERS):
                raise ModelError(
                    f"{type(optimiser).__name__} keeps {unknown[0]!r}, which is no moment; use moments='keep'"
                )
            for name, value in moments.items():
                value.mul_(scale ** _MOMENT_POWERS[name])
            if scale == 0 and "step" in state:
                state["step"] *= 0  # Adam's bias correction belongs to its moments


def require_closed(module: nn.Module, what: str) -> None:
    """Raises ``ModelError`` "cannot ``what``" while a theatre is open on weights of ``module``.

    >>> require_closed(nn.Linear(2, 2), "save a checkpoint")  # no theatre: nothing happens
    """
    storages = _storages(module.parameters())
    if any(storages & _storages(target.parameter for target in theater.targets) for theater in _open):
        _refuse(what)


def checksum(tensor: Tensor) -> str:
    """A digest of the values' bytes: equal for tensors that are the same bit for bit, NaN and −0 included."""
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(values.numpy().data, digest_size=16).hexdigest()


class _Refusal:
    """Hangs among the hooks of an edited module, so that whoever would save, load or copy the module runs into it."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __call__(self, *_: Any) -> None:
        _refuse(self._what)

    def __deepcopy__(self, _: Any) -> NoReturn:
        _refuse("copy the model")

    def __reduce__(self) -> NoReturn:
        _refuse("pickle the model")


def _refuse(what: str) -> NoReturn:
    raise ModelError(f"cannot {what}: {len(_open)} surgery open, its edits are not committed; leave the theatre first")


def _storages(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def _fingerprint(module: nn.Module, *, leave_out: set[int] | None = None) -> dict[str, str]:
    """Everything that a theatre must leave as it was, but for the parameters whose ``id`` is in ``leave_out``."""
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    found = {name: checksum(tensor) for name, tensor in tensors.items() if id(tensor) not in (leave_out or set())}
    found |= {f"mode of {name or 'the model'}": str(child.training) for name, child in module.named_modules()}
    return found | {"torch's random state": checksum(torch.get_rng_state())}


# `__exit__` counts from its first bytecode on, before any statement of its own could take precautions.
_signals = DeferredSignals(
    {
        SurgicalTheater.__enter__.__code__: lambda theater: True,
        SurgicalTheater.__exit__.__code__: lambda theater: theater._is_open,
        SurgicalTheater.commit.__code__: lambda theater: not theater.committed,
    }
)
