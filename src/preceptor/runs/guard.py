"""What can go wrong in an update: numbers that are not finite, and memory that runs out.

Numbers are found by name, skipped, counted, and fatal when they do not go away. Where memory runs out, fewer rows go
through a pass, with the same gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from preceptor.errors import CheckpointError, ConfigError, MissingExtraError, NumericError
from preceptor.runs.world import World, is_sharded, local


def first_nonfinite(named_tensors: Mapping[str, Tensor | None] | Iterable[tuple[str, Tensor | None]]) -> str | None:
    """``"<name> is NaN"`` (or ``+Inf``, ``-Inf``) for the first tensor with such a number, else ``None``.

    Takes what ``named_parameters`` yields, mapped to gradients; ``None`` (no gradient) is skipped. Check gradients
    *before* clipping: one NaN makes the norm NaN and clipping then spreads it to every parameter. The device is
    waited for once.
    """
    pairs = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
    every = [(name, tensor) for name, tensor in pairs if tensor is not None]
    present = [(name, local(tensor)) for name, tensor in every]
    if not present:
        return None
    device = present[0][1].device
    # One tensor and one transfer: a question per parameter would wait for the GPU each time.
    finite = torch.stack([tensor.detach().isfinite().all().to(device) for _, tensor in present]).byte()
    over_parts(finite, (tensor for _, tensor in every), smallest=True)
    for (name, tensor), all_finite in zip(present, finite.tolist(), strict=True):
        if not all_finite:
            kinds = torch.stack([tensor.isnan().any(), tensor.isposinf().any()]).byte()
            is_nan, is_positive = over_parts(kinds, (tensor for _, tensor in every)).tolist()
            return f"{name} is {'NaN' if is_nan else '+Inf' if is_positive else '-Inf'}"
    return None


class NonFiniteGuard:
    """Counts skipped steps; more than ``limit`` in a row end the run with ``NumericError``.

    ``num_in_a_row`` and ``num_skipped`` are part of a run's state: ``state_dict``, ``load_state_dict``.
    """

    def __init__(self, limit: int = 5) -> None:
        if limit < 0:
            raise ConfigError(f"the limit of skipped steps in a row must be at least 0, got {limit}")
        self.limit = limit
        self.num_in_a_row = 0
        self.num_skipped = 0

    def skip(self, step: int, what: str) -> str:
        """Counts ``step`` as skipped because of ``what`` (``"gradient of lm_head.weight is NaN"``); returns the notice.

        Raises ``NumericError`` when that is one more in a row than allowed.
        """
        self.num_in_a_row += 1
        self.num_skipped += 1
        if self.num_in_a_row > self.limit:
            raise NumericError(
                f"step {step}: {what}; {self.num_in_a_row} steps in a row were not finite, {self.limit} are allowed; "
                "lower the learning rate or look at the rewards"
            )
        return f"step {step} skipped: {what} ({self.num_in_a_row} of {self.limit} allowed in a row)"

    def ok(self) -> None:
        """Says that a step was finite, which ends the row."""
        self.num_in_a_row = 0

    def state_dict(self) -> dict[str, int]:
        """The counters, fit for JSON."""
        return {"num_in_a_row": self.num_in_a_row, "num_skipped": self.num_skipped}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Puts the counters back; raises ``CheckpointError`` when they are not exactly those of ``state_dict``."""
        if set(state) != set(self.state_dict()):
            raise CheckpointError(f"the guard's counters differ: got {sorted(state)}, need {sorted(self.state_dict())}")
        self.num_in_a_row, self.num_skipped = state["num_in_a_row"], state["num_skipped"]


def guarded_step(
    guard: NonFiniteGuard,
    optimiser: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    *,
    step: int,
    clip_norm: float,
    notice: Callable[[str], None],
) -> float:
    """Clips the gradients and takes one step of ``optimiser``, unless a gradient is not finite; clears them.

    Gives the gradients' norm before clipping, NaN for a step that was skipped (``notice`` is told why). Raises
    ``NumericError`` as :meth:`NonFiniteGuard.skip`.
    """
    gradients = ((f"gradient of {name}", parameter.grad) for name, parameter in parameters.items())
    norm = float("nan")
    # Before clipping: one NaN makes the norm NaN, and clipping would then write it everywhere.
    if (what := first_nonfinite(gradients)) is None:
        norm = clip_gradient_norm(parameters.values(), clip_norm)
        optimiser.step()
        guard.ok()
    else:
        notice(guard.skip(step, what))
    # Also of a skipped step: its gradient must not be added to the next one.
    optimiser.zero_grad(set_to_none=True)
    return norm


# ---- gradients of which each process has a part ------------------------------------------------------------


def over_parts(values: Tensor, tensors: Iterable[Any], *, smallest: bool = False) -> Tensor:
    """The largest (or smallest) of each of ``values`` over the processes that have parts of ``tensors``, in place.

    Every one of them must call it. Without a divided tensor ``values`` stay as they are.
    """
    for tensor in tensors:
        if is_sharded(tensor):
            operation = dist.ReduceOp.MIN if smallest else dist.ReduceOp.MAX
            dist.all_reduce(values, op=operation, group=tensor.device_mesh.get_group())
            break
    return values


@torch.no_grad()
def clip_gradient_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """The norm of all gradients together, which are scaled so that it is at most ``max_norm``.

    As ``torch.nn.utils.clip_grad_norm_``, which does not take divided and whole gradients together.
    """
    parameters = list(parameters)
    gradients: list[Any] = [parameter.grad for parameter in parameters if parameter.grad is not None]
    divided = [gradient for gradient in gradients if is_sharded(gradient)]
    if not divided:
        return float(nn.utils.clip_grad_norm_(parameters, max_norm))
    whole = [gradient for gradient in gradients if not is_sharded(gradient)]
    squares = _squares([local(gradient) for gradient in divided])
    dist.all_reduce(squares, group=divided[0].device_mesh.get_group())
    norm = (squares + _squares(whole)).sqrt().float()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local(gradient).mul_(scale.to(gradient.device))
    return float(norm)


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of all numbers, in float64."""
    return nn.utils.get_total_norm(tensors).double().square()


# ---- memory that runs out ------------------------------------------------------------

T = TypeVar("T")

_NOTHING = 2**31
"""More rows than any batch has: the size of a process whose memory has not run out."""

REMEDY = (
    "train an adapter, take weights in bfloat16 or gradient checkpointing, lower the number or length of the rows, or "
    "take a larger GPU; preceptor doctor tells what fits"
)


@dataclass
class Trial:
    """The first attempt at a batch.

    Attributes:
        size: rows of a pass.
        ran_out: whether memory did not suffice; then :meth:`MicroBatch.search` is to be asked.
    """

    size: int
    ran_out: bool = False


class MicroBatch:
    """How many rows go through one forward and backward pass: the configured number, or what memory holds, by trial.

    The gradient of a batch is a sum over its rows, so that it does not depend, but for rounding, on how many of them go
    through the model at once. The first trial is the whole batch; where the device's memory runs out, half of it is
    tried, and so on. What was found stays for the rest of the run, and a checkpoint keeps it::

        with micro_batch.first_trial(num_rows) as trial:
            given = compute(micro_batch_size=trial.size)
        if trial.ran_out:
            given = micro_batch.search(trial.size, compute, parameters)
        micro_batch.agree(world)

    Args:
        configured: this many; 0 finds out by trial.
        by_trial: False forbids trials: processes that share a model's weights must make equally many passes, and one of
            them cannot go back alone.

    Attributes:
        found: rows of a pass that memory held where more did not fit; 0 until memory has run out.
    """

    def __init__(self, configured: int = 0, *, by_trial: bool = True) -> None:
        self.configured = configured
        self.found = 0
        self._by_trial = by_trial
        self._notices: list[str] = []

    @contextlib.contextmanager
    def first_trial(self, num_rows: int) -> Iterator[Trial]:
        """Ends quietly where memory runs out in the block.

        The block is in the caller, so that the way to the loss is no longer for what hardly ever happens.

        Args:
            num_rows: of the process that has most: where each pass takes all of them, the size is the same everywhere.

        Raises:
            ConfigError: memory has run out, and there may be no trials.
            MissingExtraError: memory has run out, and accelerate, which knows such errors and clears up, is missing.
        """
        trial = Trial(max(1, min(self.configured or self.found or num_rows, num_rows)))
        try:
            yield trial
        except RuntimeError as error:
            if self.configured or not memory_ran_out(error):
                raise
            if not self._by_trial:
                raise ConfigError(
                    f"memory ran out with {trial.size} rows in a pass, and no smaller number can be tried where "
                    f"processes share the weights; give `update.micro_batch_size`, 1 to {max(1, trial.size // 2)}, or "
                    + REMEDY
                ) from error
            trial.ran_out = True

    def search(self, size: int, compute: Callable[..., T], parameters: Iterable[nn.Parameter]) -> T:
        """What ``compute(micro_batch_size=…)`` gives with the first of a half, a quarter … of ``size`` that fits.

        To be called outside of the handler of the first error, which would keep that trial's activations alive.

        Args:
            size: which did not fit.
            compute: adds the gradient of all rows to ``parameters``; it is called again after a trial that failed, and
                must change nothing else and draw no random numbers.
            parameters: which had no gradient before the first trial, and get none from those that failed.

        Raises:
            ConfigError: not even one row fits.
        """
        from accelerate.utils import find_executable_batch_size

        parameters, tried = list(parameters), size

        def halve() -> int:
            nonlocal tried
            clear_gradients(parameters)
            if tried == 1:
                raise ConfigError(f"memory does not even hold one row in a pass, down from {size}; {REMEDY}")
            tried //= 2
            return tried

        def trial(batch_size: int) -> T:
            return compute(micro_batch_size=batch_size)

        given: T = find_executable_batch_size(trial, starting_batch_size=halve(), reduce_batch_size_fn=halve)()
        self._remember(tried)
        return given

    def agree(self, world: World) -> None:
        """Takes the smallest size of all processes, so that a resume, which knows that of the first, is exact."""
        if world.size == 1 or self.configured or not self._by_trial:
            return
        smallest = int(-world.maximum(-(self.found or _NOTHING)))
        if smallest not in (self.found, _NOTHING):
            self._remember(smallest)

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


def clear_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Leaves no gradient in ``parameters``."""
    for parameter in parameters:
        parameter.grad = None
