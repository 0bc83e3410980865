"""One run on many processes: which rows are this process's, and what all of them agree on.

A launcher (``torchrun``, ``accelerate launch``) starts the same command in every process; here they find each other.
Every process holds the whole state and draws the whole batch's random numbers, which is cheap. What is dear (forward
and backward passes, sampling, scoring) is done for this process's rows, and the results are put together in the order
of the rows. So a row's numbers do not depend on how many processes share the batch, but for rounding.

``ALONE`` is the world of one process, in which every method gives back what it was given.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from preceptor.errors import ConfigError, Interrupted, LostProcessError, PreceptorError, ToldElsewhere, ToldHere
from preceptor.lm.sampling import SharedStream, Stream

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

BUCKET = 2**24
"""Numbers of gradients that are summed in one call, 64 MiB in float32: the copy is never as large as the model."""

TIMEOUT = timedelta(hours=2)
"""For which a process waits for the others: rank 0 may download, and a dead process is noticed at once in any case."""

TELLER = "teller"
"""Counter in the launcher's store; the process that raises it from 0 is the one that tells what happened."""


class World:
    """The processes of one run, of which this is number ``rank`` of ``size``.

    Args:
        rank: of this process, from 0; the first one writes the run folder.
        size: number of processes.
        local_rank: among those of this machine: which GPU is this process's.
        store: of the launcher, through which processes that can no longer compute together still agree on who speaks.
        carrier: device of the tensors that travel; the CPU needs gloo, a GPU suits a process group of NCCL alone.

    Attributes:
        around: entered by each process around what it computes of its own rows; keeps processes in step that share a
            model's weights (:mod:`preceptor.runs.sharding`).
    """

    def __init__(
        self,
        *,
        rank: int = 0,
        size: int = 1,
        local_rank: int = 0,
        store: Store | None = None,
        carrier: torch.device | None = None,
    ) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.resume_hint = ""
        self.around: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        self._store = store
        self._carrier = carrier or torch.device("cpu")

    @property
    def shares_weights(self) -> bool:
        """Whether a pass through a model takes all processes, which then must make equally many."""
        return self.around is not contextlib.nullcontext

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def refuse(self, what: str) -> None:
        """Raises ``ConfigError`` in a world of several processes: ``what`` works in one alone."""
        if self.size > 1:
            raise ConfigError(f"{what} works in one process, this run has {self.size}; start it without a launcher")

    def resume_command(self, folder: Path) -> str:
        """What goes on with the run in ``folder`` in as many processes."""
        command = f"preceptor resume {folder}"
        return command if self.size == 1 else f"torchrun --nproc-per-node {self.size} -m {command}"

    # Rows

    def most_rows(self, num_rows: int) -> int:
        """The length of the longest of the processes' shards, the first one."""
        return -(-num_rows // self.size)

    def shard(self, num_rows: int, rank: int | None = None) -> slice:
        """This process's rows (or another's): a block in rank order, blocks of equal size to within one row.

        >>> [World(rank=rank, size=2).shard(5) for rank in (0, 1)]
        [slice(0, 3, None), slice(3, 5, None)]
        """
        rank = self.rank if rank is None else rank
        size, rest = divmod(num_rows, self.size)
        start = rank * size + min(rank, rest)
        return slice(start, start + size + (rank < rest))

    def stream(self, generator: torch.Generator, rows: slice, num_rows: int, *, each: int = 1) -> Stream:
        """``generator`` as this process uses it for ``rows`` of ``num_rows``, of which each takes ``each`` numbers."""
        if rows == slice(0, num_rows):
            return generator
        return SharedStream(generator, total=each * num_rows, rows=slice(each * rows.start, each * rows.stop))

    def gathered(self, num_rows: int, compute: Callable[[slice], Sequence[Tensor]]) -> tuple[Tensor, ...]:
        """What ``compute`` gives for all rows: tensors whose first axis is the row, each process computing its own.

        Where there are fewer rows than processes each process computes all of them. No gradient passes through.
        """
        if self.size == 1 or num_rows < self.size:
            return tuple(compute(slice(0, num_rows)))
        with self.around():
            mine = compute(self.shard(num_rows))
        return self.gather(num_rows, *mine)

    def gather(self, num_rows: int, *parts: Tensor) -> tuple[Tensor, ...]:
        """Each of ``parts``, which holds this process's rows (perhaps none), with those of all processes."""
        if self.size == 1:
            return parts
        sizes = [self.shard(num_rows, rank) for rank in range(self.size)]
        return self._gather(parts, [rows.stop - rows.start for rows in sizes])

    def gathered_lists(self, lengths: Sequence[int], compute: Callable[[slice], Sequence[Tensor]]) -> list[Tensor]:
        """The same where each row has a tensor of its own length: ``compute`` gives one per row, ``lengths`` in all."""
        if self.size == 1 or len(lengths) < self.size:
            return list(compute(slice(0, len(lengths))))
        with self.around():
            mine = compute(self.shard(len(lengths)))
        sizes = [sum(lengths[self.shard(len(lengths), rank)]) for rank in range(self.size)]
        (flat,) = self._gather((torch.cat(list(mine)),), sizes)
        return list(flat.split(list(lengths)))

    def _gather(self, tensors: tuple[Tensor, ...], sizes: Sequence[int]) -> tuple[Tensor, ...]:
        """``tensors`` of every process one after another; ``sizes[rank]`` is the length of their first axis there.

        All of them travel as bytes in one message, padded to the longest.
        """
        raw = [tensor.detach().cpu().contiguous() for tensor in tensors]
        row_bytes = [math.prod(tensor.shape[1:]) * tensor.element_size() for tensor in raw]
        total = sum(row_bytes)
        message = torch.zeros(max(sizes) * total, dtype=torch.uint8, device=self._carrier)
        place = 0
        for tensor in raw:
            flat = tensor.view(-1).view(torch.uint8)
            message[place : place + len(flat)] = flat
            place += len(flat)
        messages = [torch.empty_like(message) for _ in range(self.size)]
        with self._together():
            dist.all_gather(messages, message)
        parts: list[list[Tensor]] = [[] for _ in raw]
        for size, received in zip(sizes, messages, strict=True):
            place = 0
            for tensor, num_bytes, out in zip(raw, row_bytes, parts, strict=True):
                piece = received[place : place + size * num_bytes].clone().cpu()
                out.append(piece.view(tensor.dtype).view(size, *tensor.shape[1:]))
                place += size * num_bytes
        return tuple(torch.cat(part).to(tensor.device) for part, tensor in zip(parts, tensors, strict=True))

    # Sums

    def sum(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over the processes, in float64 arithmetic and back in their dtype; no gradient."""
        if self.size == 1:
            return values
        total = values.detach().to(self._carrier, torch.float64)
        with self._together():
            dist.all_reduce(total)
        return total.to(values)

    def sums(self, values: Mapping[str, float]) -> dict[str, float]:
        """The sum of each value over the processes, which must have the same names."""
        if self.size == 1 or not values:
            return dict(values)
        total = self.sum(torch.tensor(list(values.values()), dtype=torch.float64))
        return dict(zip(values, total.tolist(), strict=True))

    def maximum(self, value: float) -> float:
        """The largest of the processes' values."""
        if self.size == 1:
            return value
        largest = torch.tensor(value, dtype=torch.float64, device=self._carrier)
        with self._together():
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return float(largest)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Adds up the gradients of all processes, in place; a process without one of a parameter counts as 0.

        A loss is a sum over a count of the whole batch, so that what the processes' rows give adds up to its gradient
        and nothing is left to divide. A parameter without a gradient anywhere keeps none, and those of divided weights
        are summed already.
        """
        if self.size == 1:
            return
        # Gradients of divided weights were summed in the backward pass.
        parameters = [each for each in parameters if each.requires_grad and not is_sharded(each)]
        # Every process must sum the same parameters: whoever has no rows has no gradients, and gives zeros.
        here = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.float64)
        present = self.sum(here) > 0
        taken = [parameter for parameter, anywhere in zip(parameters, present.tolist(), strict=True) if anywhere]
        for parameter in taken:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.sum_in_place([parameter.grad for parameter in taken if parameter.grad is not None])

    @torch.no_grad()
    def sum_in_place(self, tensors: Sequence[Tensor]) -> None:
        """Adds up each of ``tensors`` over the processes, a bucket of them at a time."""
        if self.size == 1:
            return
        bucket: list[Tensor] = []
        for number, tensor in enumerate(tensors):
            bucket.append(tensor)
            following = tensors[number + 1] if number + 1 < len(tensors) else None
            full = sum(each.numel() for each in bucket) >= BUCKET
            if full or following is None or (following.dtype, following.device) != (tensor.dtype, tensor.device):
                flat = torch.cat([each.reshape(-1) for each in bucket])
                with self._together():
                    dist.all_reduce(flat)
                for each, total in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
                    each.copy_(total.view_as(each))
                bucket = []

    # Agreement

    def of_first(self, value: Callable[[], T]) -> T:
        """What ``value`` gives in the first process, in all of them; it is called there alone."""
        if self.size == 1:
            return value()
        held = [value() if self.is_first else None]
        with self._together():
            dist.broadcast_object_list(held, device=self._carrier)
        return held[0]  # type: ignore[return-value]

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.size > 1:
            with self._together():
                dist.all_reduce(torch.zeros(1, device=self._carrier))

    @contextlib.contextmanager
    def first_then_others(self) -> Iterator[None]:
        """Around what leaves files in a cache: the first process does it, then the others, which find them."""
        if not self.is_first:
            self.barrier()
        yield
        if self.is_first:
            self.barrier()

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Around a collective call: a process that is gone becomes one clear error."""
        try:
            yield
        except RuntimeError as error:  # gloo's and NCCL's are of this kind, and say which socket or rank
            raise LostProcessError(
                f"a process of this run has ended ({self.size} belong to it), so the others end too; what was saved "
                f"is safe{self.resume_hint}"
            ) from error

    # The end

    @contextlib.contextmanager
    def one_voice(self) -> Iterator[None]:
        """Around everything that a process does: an error anywhere is told by one process, and the others end silently.

        The first to come tells: it is the one in which it happened, unless that one was killed.

        Raises:
            ToldHere: in the process that tells, with its number and how to go on.
            ToldElsewhere: in all others, with the error's exit code.
        """
        try:
            yield
        except Interrupted:  # all of them stop at the same step
            raise
        except Exception as error:  # whatever happened, it is told once
            if self.size == 1:
                raise
            if not self._is_teller():
                raise ToldElsewhere(getattr(error, "exit_code", 1)) from error
            if not isinstance(error, PreceptorError):
                raise
            faults = error.faults if isinstance(error, ConfigError) else (str(error),)
            raise ToldHere(map(self._placed, faults), error.exit_code) from error

    def _placed(self, fault: str) -> str:
        """``fault`` with the process in which it happened and how to go on, unless that is said already."""
        where = "" if self.is_first or self.resume_hint in fault else f"process {self.rank} of {self.size}: "
        return f"{where}{fault}{'' if self.resume_hint in fault else self.resume_hint}"

    def _is_teller(self) -> bool:
        if self._store is None:
            return self.is_first
        try:
            return int(self._store.add(TELLER, 1)) == 1
        except RuntimeError:  # the store is gone with the process that kept it, which can no longer tell
            return True


ALONE = World()
"""One process."""


@contextlib.contextmanager
def joined(environ: Mapping[str, str]) -> Iterator[World]:
    """The world that the launcher's variables (``WORLD_SIZE``, ``RANK``, …) name, left again at the end.

    Sums of CPU tensors go through gloo, those of CUDA tensors through NCCL.

    Raises:
        ConfigError: the variables are not whole.
        ToldElsewhere: another process has told an error.
    """
    if environ.get("WORLD_SIZE", "1") == "1":
        yield ALONE
        return
    names = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if not environ.get(name)]:
        raise ConfigError(
            f"WORLD_SIZE is {environ['WORLD_SIZE']} and {', '.join(missing)} is not set; start with torchrun or "
            "accelerate launch, or unset WORLD_SIZE"
        )
    # Imported here: a torch without distributed computing still runs in one process.
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # its stubs do not name them

    rank, size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    local_rank = int(environ.get("LOCAL_RANK", rank))
    # torchrun keeps the store in a process of its own, which outlives ours; else the first process keeps it.
    kept_by_launcher = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = PrefixStore(
        f"preceptor/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}",
        TCPStore(
            environ["MASTER_ADDR"],
            int(environ["MASTER_PORT"]),
            size,
            is_master=rank == 0 and not kept_by_launcher,
            timeout=TIMEOUT,
            multi_tenant=True,
        ),
    )
    if torch.cuda.is_available() and local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)  # where NCCL and broadcast objects live
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=PrefixStore("group", store), rank=rank, world_size=size, timeout=TIMEOUT)
    world = World(rank=rank, size=size, local_rank=local_rank, store=store)
    try:
        with world.one_voice():
            yield world
    finally:
        # Not waited for: a process that failed must not wait for others that wait for it.
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process has a part of ``tensor``, which is a ``DTensor`` of the full shape."""
    if not (dist.is_available() and dist.is_initialized()):
        return False  # without the import of what few runs need
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Any) -> Tensor:
    """The part of ``tensor`` that this process has, sharing its memory; all of it where it is not divided."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return part
