"""The transitions that an off-policy agent has seen: a ring, in memory or, above a limit, in a mapped file."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from preceptor.errors import CheckpointError, ConfigError, NumericError, ShapeError
from preceptor.run.files import storage_errors

_BYTES_PER_NUMBER = 4  # float32
_ZEROS = bytes(1 << 20)


class Transitions(NamedTuple):
    """A batch of what happened; ``terminated`` says that ``next_states`` are terminal and have no value."""

    states: Float[Tensor, "batch state"]
    actions: Float[Tensor, "batch action"]
    rewards: Float[Tensor, " batch"]
    next_states: Float[Tensor, "batch state"]
    terminated: Bool[Tensor, " batch"]


class ReplayBuffer:
    """The last ``capacity`` transitions, in float32 on the CPU.

    A mapped file has no name any more once it is open: the disk space comes back when the process ends, however it
    ends, and a checkpoint holds what was in it.

    Args:
        capacity: transitions kept; the oldest makes room for the newest.
        state_dim: numbers in a state.
        action_dim: numbers in an action.
        memory_limit_bytes: a larger buffer lives in a file, of which the system keeps in memory what it has room for.
        spill_folder: an existing folder for that file; needed when the limit is exceeded.

    Attributes:
        num_added: transitions seen so far.
        spilled: whether the buffer lives in a file.

    Raises:
        ConfigError: a value out of range, or no folder for a buffer above the limit.
        StorageError: the disk has no room for it.
    """

    def __init__(
        self,
        capacity: int,
        *,
        state_dim: int,
        action_dim: int,
        memory_limit_bytes: int = 256 << 20,
        spill_folder: Path | None = None,
    ) -> None:
        sizes = {"capacity": capacity, "state_dim": state_dim, "action_dim": action_dim}
        if faults := [f"{name} must be at least 1, got {size}" for name, size in sizes.items() if size < 1]:
            raise ConfigError(*faults)
        self.capacity = capacity
        self.num_added = 0
        self._widths = [state_dim, action_dim, 1, state_dim, 1]
        num_bytes = capacity * sum(self._widths) * _BYTES_PER_NUMBER
        self.spilled = num_bytes > memory_limit_bytes
        if not self.spilled:
            self._table = torch.zeros(capacity, sum(self._widths))
        elif spill_folder is None:
            raise ConfigError(
                f"a replay buffer of {num_bytes} bytes exceeds memory_limit_bytes={memory_limit_bytes}; "
                "give spill_folder, raise the limit or lower the capacity"
            )
        else:
            self._table = _mapped_zeros(spill_folder, num_bytes).view(capacity, -1)

    def __len__(self) -> int:
        return min(self.num_added, self.capacity)

    @property
    def memory_bytes(self) -> int:
        """Bytes that must stay in memory: 0 for a mapped file."""
        return 0 if self.spilled else self._table.nbytes

    def add(
        self,
        state: Float[Tensor, " state"],
        action: Float[Tensor, " action"],
        reward: float,
        next_state: Float[Tensor, " state"],
        *,
        terminated: bool,
    ) -> None:
        """Remembers one transition.

        Args:
            state: before the action.
            action: as the agent gave it.
            reward: any unit.
            next_state: after the action.
            terminated: True = ``next_state`` is terminal. A time limit is no termination.

        Raises:
            ShapeError: the sizes are not this buffer's.
            NumericError: a number is NaN or infinite; it would reach every weight of the agent.
        """
        parts = [state, action, torch.tensor([reward]), next_state, torch.tensor([float(terminated)])]
        if [tuple(part.shape) for part in parts] != [(width,) for width in self._widths]:
            raise ShapeError(
                f"state, action and next state have shapes {tuple(state.shape)}, {tuple(action.shape)}, "
                f"{tuple(next_state.shape)}; this buffer holds ({self._widths[0]},), ({self._widths[1]},), "
                f"({self._widths[3]},)"
            )
        row = torch.cat([part.detach().to("cpu", torch.float32) for part in parts])
        if not row.isfinite().all():
            raise NumericError(f"a transition with a NaN or an infinity (reward {reward}) cannot teach; leave it out")
        self._table[self.num_added % self.capacity] = row
        self.num_added += 1

    def sample(self, batch_size: int, *, generator: torch.Generator) -> Transitions:
        """``batch_size`` transitions drawn uniformly with replacement.

        Raises:
            ShapeError: the buffer is empty.
        """
        if not len(self):
            raise ShapeError("an empty replay buffer has nothing to sample; add a transition first")
        rows = self._table[torch.randint(len(self), (batch_size,), generator=generator)]
        states, actions, rewards, next_states, terminated = rows.split(self._widths, dim=1)
        return Transitions(states, actions, rewards[:, 0], next_states, terminated[:, 0] > 0)

    def state_dict(self) -> dict[str, Any]:
        """The transitions, as a live view of the part in use, and the count; write them before adding more."""
        return {"num_added": self.num_added, "transitions": self._table[: len(self)]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts the buffer where ``state_dict`` found it.

        Raises:
            CheckpointError: the saved buffer has another capacity or other widths; nothing has changed then.
        """
        num_added, transitions = state["num_added"], state["transitions"]
        shape = (min(num_added, self.capacity), sum(self._widths))
        if tuple(transitions.shape) != shape:
            raise CheckpointError(
                f"the saved replay buffer has shape {tuple(transitions.shape)}, this one {shape}; "
                "resume with the same capacity, state and action"
            )
        self.num_added = num_added
        self._table[: len(self)] = transitions


def _mapped_zeros(folder: Path, num_bytes: int) -> Float[Tensor, " numbers"]:
    """Zeros in a file of ``folder`` that has no name any more.

    They are written, not left to be filled in: a mapped file with holes ends the process when the disk is full.
    """
    with (
        storage_errors(f"make room for a replay buffer of {num_bytes} bytes in {folder}"),
        tempfile.NamedTemporaryFile(dir=folder, prefix="replay-buffer-") as file,
    ):
        for start in range(0, num_bytes, len(_ZEROS)):
            file.write(_ZEROS[: num_bytes - start])
        file.flush()
        return torch.from_file(file.name, shared=True, size=num_bytes // _BYTES_PER_NUMBER, dtype=torch.float32)
