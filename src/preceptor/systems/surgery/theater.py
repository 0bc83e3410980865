"""The operating theater: edit weights in place; on exit they are put back bit for bit, unless the edit is committed.

Ctrl-C raises between any two bytecodes, also before the first statement of ``__exit__``, which cannot protect itself.
So ``_defer`` stands before every Python signal handler while a theater is open, and makes a signal wait whose
interrupted stack is opening or closing one.
"""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from types import FrameType
from typing import Any, NoReturn, Self

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from preceptor.errors import ModelError
from preceptor.lm.edit_targets import Target

_open: list[SurgicalTheater] = []  # of the whole process, oldest first
_waiting: list[Callable[[], Any]] = []  # handlers of the signals that came while a theater was opened or closed


class SurgicalTheater:
    """Inside the block the weights of ``targets`` may be edited in place; afterwards they are what they were.

        with SurgicalTheater(model, attention_targets(model, roles=["output"])) as theater:
            theater.targets[0].view.mul_(0.9)
            if loss(model) < loss_before:
                theater.commit()

    That holds through exceptions, closed generators and signals at any moment. Only the targets are copied. Theaters
    nest: an inner commit lasts if the outer one commits too. While one is open, saving, loading, copying and pickling
    the module or one around it, and an optimizer's step over edited weights, raise ``ModelError``. A backward pass lies
    inside the block or outside: torch refuses one across its border.

    Raises:
        ModelError: a target is foreign; the theater is entered twice, or left before a later one on the same weights.
    """

    def __init__(self, module: nn.Module, targets: Iterable[Target]) -> None:
        self.targets = tuple(targets)
        self.committed = False
        self._module = module
        self._parameters = {target.parameter for target in self.targets}
        self._copies: list[tuple[Tensor, Tensor]] = []  # live view, its values on entering
        self._hooks: list[RemovableHandle] = []
        own = set(module.parameters())
        if foreign := [target.name for target in self.targets if target.parameter not in own]:
            raise ModelError(f"{foreign[0]} is no parameter of this {type(module).__name__}; choose its own targets")

    def __enter__(self) -> Self:
        if self in _open:
            raise ModelError("this theater is open already; open a second one for an edit within an edit")
        _switch_handlers(deferring=True)
        try:
            _open.append(self)
            self.committed = False
            # The view and its copy side by side: restoring needs no second look at how the target lies in its
            # parameter.
            self._copies = [(target.view, target.view.clone()) for target in self.targets]
            # Only the modules that own an edited parameter get hooks; state_dict of any module around them reaches
            # these.
            for owner in self._module.modules():
                if not self._parameters.isdisjoint(owner.parameters(recurse=False)):
                    self._hooks.append(owner.register_state_dict_pre_hook(self._refuse))
                    self._hooks.append(owner.register_load_state_dict_pre_hook(self._refuse))
            self._hooks.append(register_optimizer_step_pre_hook(self._refuse_step))
            # A signal that waited is delivered here, inside the try, so that the weights are put back if it raises.
            _deliver()
        except BaseException:  # Ctrl-C too
            self.__exit__()
            raise
        return self

    def commit(self) -> None:
        """Keeps the weights as they are when the block ends; raises ``ModelError`` outside of the block."""
        if self not in _open:
            raise ModelError("only an open theater can commit; call it inside the block")
        self.committed = True  # a single assignment: no signal comes in between
        self._copies.clear()

    def __exit__(self, *_: object) -> None:
        if self not in _open:
            return  # put back together with an earlier one
        # An inner theater on the same weights copied them as edited; it has to be undone first, newest before oldest.
        later = [t for t in _open[_open.index(self) + 1 :] if _share_memory(self._parameters, t._parameters)]
        try:
            for theater in [*reversed(later), self]:
                theater._close()
        finally:
            _deliver()
        if later:
            raise ModelError(f"left a theater before {len(later)} opened later on the same weights; all were put back")

    def _close(self) -> None:
        for view, copy in [] if self.committed else self._copies:
            # Copied back before anything is forgotten: a failure half way can be tried again.
            view.copy_(copy)
        self._copies.clear()
        while self._hooks:
            self._hooks.pop().remove()
        _open.remove(self)
        if not _open:
            _switch_handlers(deferring=False)

    def _refuse(self, *_: Any) -> NoReturn:
        raise ModelError("an edit is not committed; leave the theater before you save, load, copy or step its weights")

    __reduce__ = _refuse  # a copy or pickle of the module takes its hooks along, and so the theater

    def _refuse_step(self, optimizer: Optimizer, *_: Any) -> None:
        if _share_memory(self._parameters, (p for group in optimizer.param_groups for p in group["params"])):
            self._refuse()


def _share_memory(some: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    first, second = ({tensor.untyped_storage().data_ptr() for tensor in tensors} for tensors in (some, others))
    # By storage and not by tensor: a tied or sliced weight is the same memory under another name.
    return not first.isdisjoint(second)


def _defer(handler: Callable[[int, FrameType | None], Any], number: int, frame: FrameType | None) -> Any:
    """Calls ``handler`` now, or later where the signal has interrupted an opening or closing theater."""
    theater = SurgicalTheater
    busy, leaving = (theater.__enter__.__code__, theater._close.__code__), theater.__exit__.__code__
    # The interrupted stack tells whether a theater is opening or closing; a flag could be set one bytecode too late.
    for caller, _ in traceback.walk_stack(frame):
        if caller.f_code in busy or (caller.f_code is leaving and caller.f_locals["self"] in _open):
            return _waiting.append(partial(handler, number, frame))
    return handler(number, frame)


def _deliver() -> None:
    """Calls the handlers of the signals that waited, every one of them, also if one raises."""
    if _waiting and threading.current_thread() is threading.main_thread():
        try:
            _waiting.pop(0)()
        finally:
            # Recursion in `finally`, so that every handler is called even if several raise.
            _deliver()


def _switch_handlers(*, deferring: bool) -> None:
    """Puts ``_defer`` before every Python handler, or takes it away again."""
    if threading.current_thread() is threading.main_thread():  # elsewhere Python runs no handlers
        for number in sorted(signal.valid_signals(), reverse=True):  # Ctrl-C, the likeliest to come in here, is 2
            handler = signal.getsignal(number)
            deferred = handler.args[0] if isinstance(handler, partial) and handler.func is _defer else None
            if deferring and callable(handler) and not deferred:
                signal.signal(number, partial(_defer, handler))
            elif deferred and not deferring:
                signal.signal(number, deferred)
