"""Micro-batches found by trial: what a planted out-of-memory error leaves, and what it must not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from preceptor.errors import ConfigError, MissingExtraError
from preceptor.runs.guard import MicroBatch
from preceptor.runs.world import ALONE, World
from tests.worlds import in_world

CUDA = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.6 GiB of which 1.1 GiB is free."
)
CPU = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
ROWS = torch.randn(13, 4, generator=torch.Generator().manual_seed(0))


def computing(
    weight: nn.Parameter, *, limit: int, error: RuntimeError = CUDA, rows: Tensor = ROWS
) -> Callable[..., float]:
    """The loss of ``rows``; a pass over more than ``limit`` raises ``error`` after its backward pass has begun."""

    def compute(*, micro_batch_size: int) -> float:
        total = 0.0
        for part in rows.split(micro_batch_size):
            loss = (part @ weight).square().sum() / len(ROWS)
            loss.backward()  # what a failed pass leaves in the gradient must be taken back
            if len(part) > limit:
                raise error
            total += float(loss.detach())
        return total

    return compute


def fitted(
    micro_batch: MicroBatch, num_rows: int, compute: Callable[..., Any], weight: nn.Parameter, world: World = ALONE
) -> Any:
    """What a training step does."""
    weight.grad = None
    with micro_batch.first_trial(num_rows) as trial:
        given = compute(micro_batch_size=trial.size)
    if trial.ran_out:
        given = micro_batch.search(trial.size, compute, [weight])
    micro_batch.agree(world)
    return given


@pytest.mark.parametrize("error", [CUDA, CPU], ids=["cuda", "cpu"])
@pytest.mark.parametrize(("limit", "found"), [(13, 0), (6, 6), (5, 3), (1, 1)])
def test_the_whole_batch_is_halved_until_it_fits_and_the_gradient_is_that_of_the_whole(
    error: RuntimeError, limit: int, found: int
) -> None:
    whole, weight = (nn.Parameter(torch.ones(4)) for _ in range(2))
    expected = computing(whole, limit=13)(micro_batch_size=13)
    micro_batch, before = MicroBatch(), torch.get_rng_state()
    assert fitted(micro_batch, 13, computing(weight, limit=limit, error=error), weight) == pytest.approx(expected)
    assert whole.grad is not None
    torch.testing.assert_close(weight.grad, whole.grad, rtol=1e-6, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), before)
    assert micro_batch.found == found
    told = micro_batch.take_notices()
    assert [f"from now on {found} rows go through" in text for text in told] == [True] * bool(found)
    assert micro_batch.take_notices() == []


def test_what_was_found_is_used_at_once_and_survives_a_resume() -> None:
    weight, sizes = nn.Parameter(torch.ones(4)), []

    def compute(*, micro_batch_size: int) -> None:
        sizes.append(micro_batch_size)
        computing(weight, limit=4)(micro_batch_size=micro_batch_size)

    first, resumed = MicroBatch(), MicroBatch()
    fitted(first, 13, compute, weight)
    resumed.load_state_dict(first.state_dict())
    for micro_batch in (first, resumed):
        fitted(micro_batch, 13, compute, weight)
    fitted(micro_batch, 2, compute, weight)  # never more than there are
    assert sizes == [13, 6, 3, 3, 3, 2]


def test_another_error_is_no_lack_of_memory() -> None:
    weight = nn.Parameter(torch.ones(4))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        fitted(MicroBatch(), 13, computing(weight, limit=3, error=RuntimeError("mat1 and mat2")), weight)


def test_a_number_that_was_given_is_kept_and_its_error_is_the_devices_own() -> None:
    weight = nn.Parameter(torch.ones(4))
    with pytest.raises(torch.OutOfMemoryError):
        fitted(MicroBatch(8), 13, computing(weight, limit=3), weight)


def test_not_even_one_row_is_refused_with_what_helps() -> None:
    weight = nn.Parameter(torch.ones(4))
    with pytest.raises(ConfigError, match="does not even hold one row in a pass, down from 13; train an adapter"):
        fitted(MicroBatch(), 13, computing(weight, limit=0), weight)
    with pytest.raises(ConfigError, match=r"memory ran out with 13 rows .*give `update.micro_batch_size`, 1 to 6,"):
        fitted(MicroBatch(by_trial=False), 13, computing(weight, limit=3), weight)


def test_without_accelerate_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate.utils.memory", None)
    weight = nn.Parameter(torch.ones(4))
    with pytest.raises(
        MissingExtraError, match=r"\(or give `update.micro_batch_size`\), needs .*preceptor\[accelerate"
    ):
        fitted(MicroBatch(), 13, computing(weight, limit=3), weight)
    fitted(MicroBatch(), 13, computing(weight, limit=13), weight)  # nothing is needed where memory suffices


@pytest.mark.parametrize(("limits", "expected"), [((7, 2), (1, 1, 0)), ((3, 1), (1, 2, 0)), ((1, 3), (1, 1, 0))])
def test_processes_take_the_smallest_size_that_one_of_them_found(
    limits: tuple[int, int], expected: tuple[int, int, int]
) -> None:
    """The first process found none, a larger one, or the same: its size, and how often it told of one."""

    def found(world: World) -> tuple[int, int, int]:
        weight, micro_batch = nn.Parameter(torch.ones(4)), MicroBatch()
        rows = ROWS[world.shard(13)]
        compute = computing(weight, limit=limits[world.rank], rows=rows)
        fitted(micro_batch, len(rows), compute, weight, world)
        first = micro_batch.found, len(micro_batch.take_notices())
        fitted(micro_batch, len(rows), compute, weight, world)
        return *first, len(micro_batch.take_notices())

    first, second = in_world(2, found)
    assert first == expected
    assert second[0] == expected[0]
