"""How many rows go through one forward and backward pass: the configured number, or what memory holds, by trial.

The gradient of a batch is a sum over its rows, so that it does not depend, but for rounding, on how many of them go
through the model at once. The first trial is the whole batch; where the device's memory runs out, half of it is tried,
and so on. What was found stays for the rest of the run, and a checkpoint keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from preceptor.errors import ConfigError, MissingExtraError
from preceptor.runs.world import ALONE, World

T = TypeVar("T")

_NOTHING = 2**31
"""More rows than any batch has: the size of a process whose memory has not run out."""

REMEDY = (
    "train an adapter, take weights in bfloat16 or gradient checkpointing, lower the number or length of the rows, or "
    "take a larger GPU; preceptor doctor tells what fits"
)


class MicroBatch:
    """Rows per pass.

    Args:
        configured: this many; 0 finds out by trial.
        by_trial: False forbids trials: processes that share a model's weights must make equally many passes, and one of
            them cannot go back alone.

    Attributes:
        found: rows per pass that memory held where more did not fit; 0 until memory has run out.
    """

    def __init__(self, configured: int = 0, *, by_trial: bool = True) -> None:
        self.configured = configured
        self.found = 0
        self._by_trial = by_trial
        self._notices: list[str] = []

    def run(
        self, num_rows: int, compute: Callable[[int], T], parameters: Iterable[nn.Parameter], *, world: World = ALONE
    ) -> T:
        """What ``compute(size)`` gives, with the largest ``size`` of 1..``num_rows`` that fits, found by halving.

        Args:
            num_rows: of the process that has most: where each pass takes all of them, ``size`` is the same everywhere.
            compute: adds the gradient of all rows to ``parameters``, ``size`` of them a pass; it is called again after
                a trial that failed, and must change nothing else and draw no random numbers.
            parameters: what they had as gradient before is still in it afterwards; a failed trial leaves nothing.
            world: processes that compute at once; the smallest size that one of them found holds for all.

        Raises:
            ConfigError: not even one row fits, or there may be no trials.
            MissingExtraError: memory has run out, and accelerate, which knows such errors and clears up, is missing.
        """
        size = max(1, min(self.configured or self.found or num_rows, num_rows))
        if self.configured:
            return compute(size)
        parameters = list(parameters)
        earlier = _taken(parameters)
        given = _fitting(compute, size, parameters, by_trial=self._by_trial, found=self._remember)
        _add(earlier, parameters)
        self._agree(world)
        return given

    def take_notices(self) -> list[str]:
        """What to tell of sizes found since the last call."""
        taken, self._notices = self._notices, []
        return taken

    def state_dict(self) -> dict[str, int]:
        """What was found."""
        return {"found": self.found}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore :meth:`state_dict`."""
        self.found = int(state["found"])

    def _remember(self, size: int) -> None:
        self.found = size
        self._notices.append(
            f"memory ran out; from now on {size} rows go through a forward and backward pass at once, with the same "
            "gradient up to rounding (`update.micro_batch_size`)"
        )

    def _agree(self, world: World) -> None:
        """Takes the smallest size of all processes, so that a resume, which knows that of the first, is exact."""
        if world.size == 1 or not self._by_trial:
            return
        smallest = int(-world.maximum(-(self.found or _NOTHING)))
        if smallest not in (self.found, _NOTHING):
            self._remember(smallest)


def _fitting(
    compute: Callable[[int], T],
    size: int,
    parameters: list[nn.Parameter],
    *,
    by_trial: bool,
    found: Callable[[int], None],
) -> T:
    """What the first of ``size``, a half, a quarter … gives for which memory suffices."""
    try:
        return compute(size)
    except RuntimeError as error:
        if not memory_ran_out(error):
            raise
        if not by_trial:
            raise ConfigError(
                f"memory ran out with {size} rows in a pass, and no smaller number can be tried where processes share "
                f"the weights; give `update.micro_batch_size`, 1 to {max(1, size // 2)}, or {REMEDY}"
            ) from error
        _taken(parameters)
    # Here, outside of the handler, whose error would keep the activations of the failed trial alive.
    from accelerate.utils import find_executable_batch_size

    tried = size

    def halve() -> int:
        nonlocal tried
        _taken(parameters)
        if tried == 1:
            raise ConfigError(f"memory does not even hold one row in a pass, down from {size}; {REMEDY}")
        tried //= 2
        return tried

    def trial(batch_size: int) -> T:
        return compute(batch_size)

    given: T = find_executable_batch_size(trial, starting_batch_size=halve(), reduce_batch_size_fn=halve)()
    found(tried)
    return given


def memory_ran_out(error: RuntimeError) -> bool:
    """Whether ``error`` is one of a device whose memory is full, as accelerate knows them.

    Raises:
        MissingExtraError: it is torch's own, and accelerate is missing.
    """
    try:
        from accelerate.utils.memory import should_reduce_batch_size
    except ImportError:
        if isinstance(error, torch.OutOfMemoryError):
            what = "finding out how many rows fit into memory, which has run out (or give `update.micro_batch_size`),"
            raise MissingExtraError(what, package="accelerate", extra="accelerate") from error
        return False
    return bool(should_reduce_batch_size(error))


def _taken(parameters: Iterable[nn.Parameter]) -> list[Tensor | None]:
    """The gradients of ``parameters``, which then have none."""
    taken = []
    for parameter in parameters:
        taken.append(parameter.grad)
        parameter.grad = None
    return taken


def _add(earlier: Iterable[Tensor | None], parameters: Iterable[nn.Parameter]) -> None:
    for gradient, parameter in zip(earlier, parameters, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)
