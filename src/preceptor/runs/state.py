"""State in and out: what a checkpoint asks of a system, and parameters and optimizers as parts of a ``state_dict``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from preceptor.errors import CheckpointError


@runtime_checkable
class Stateful(Protocol):
    """What can be put into a checkpoint and taken back: torch's own protocol of this name."""

    def state_dict(self) -> dict[str, Any]:
        """All that learning has changed, as nested mappings, lists, tensors and plain values."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Takes over what ``state_dict`` gave, perhaps in another process."""
        ...


@torch.no_grad()
def copy_tensors(
    saved: Mapping[str, Tensor], live: Mapping[str, Tensor], *, only: Collection[str] | None = None
) -> None:
    """Writes ``saved`` into ``live`` in place, so that whoever holds these tensors goes on with them.

    ``only`` names those to write; None is all of them. Raises ``CheckpointError`` when the names differ; then nothing
    is changed.
    """
    # Names first: a checkpoint of another model must not change half of this one.
    if saved.keys() != live.keys():
        name = sorted(saved.keys() ^ live.keys())[0]
        raise CheckpointError(
            f"the checkpoint's parameters are not this model's ('{name}'); resume with the same model"
        )
    # In place: the optimizer and its callers hold these very tensors.
    for name in live if only is None else only:
        live[name].copy_(saved[name])


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The whole state of any torch optimizer and what it is the state of; ``load_optimizer`` is the inverse."""
    return {"kind": type(optimizer).__name__, "shapes": _shapes(optimizer), "state": optimizer.state_dict()}


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Puts ``optimizer`` where ``optimizer_state`` found another one of the same kind over the same parameters.

    Learning rates and all other settings come from the saved state: this is a resume, not a warm start. Raises as
    :func:`check_optimizer`, before anything changes.
    """
    check_optimizer(optimizer, state)
    saved = state["state"]
    optimizer.load_state_dict(saved)
    # torch casts floating-point state to the parameter's dtype; what was kept in another one must stay in it.
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entries in saved["state"].items():
        if not isinstance(index, int):
            continue  # not about a parameter: torch passes it through as it is
        loaded = optimizer.state[parameters[index]]
        for name, value in entries.items():
            if isinstance(value, Tensor) and loaded[name].dtype != value.dtype:
                loaded[name] = value.to(loaded[name].device)


def check_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Raises ``CheckpointError`` when kind, parameter shapes or settings' names are not those of ``optimizer``."""
    kind = type(optimizer).__name__
    if state["kind"] != kind:
        raise CheckpointError(f"the checkpoint's optimizer is {state['kind']}, this run's is {kind}")
    # Shapes and not names: torch's optimizers know parameters by their place.
    if state["shapes"] != _shapes(optimizer):
        raise CheckpointError(f"the checkpoint's {kind} has other parameters: {_first_difference(state, optimizer)}")
    for index, (old, new) in enumerate(zip(state["state"]["param_groups"], optimizer.param_groups, strict=True)):
        if differing := set(old) ^ set(new):
            raise CheckpointError(f"settings of {kind} group {index} differ: {', '.join(sorted(differing))}")


def _shapes(optimizer: torch.optim.Optimizer) -> list[list[list[int]]]:
    return [[list(parameter.shape) for parameter in group["params"]] for group in optimizer.param_groups]


def _first_difference(state: Any, optimizer: torch.optim.Optimizer) -> str:
    saved, own = ([shape for group in groups for shape in group] for groups in (state["shapes"], _shapes(optimizer)))
    for index, (old, new) in enumerate(zip(saved, own, strict=False)):
        if old != new:
            return f"parameter {index} is {old}, here {new}"
    return f"{len(saved)} in {len(state['shapes'])} groups, here {len(own)} in {len(optimizer.param_groups)}"
