"""Micro-batches found by trial: what a planted out-of-memory error leaves, and what it must not."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from preceptor.errors import ConfigError, MissingExtraError
from preceptor.runs.guard import MicroBatch
from preceptor.runs.world import World
from tests.worlds import in_world

CUDA = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.6 GiB of which 1.1 GiB is free."
)
CPU = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
ROWS = torch.randn(13, 4, generator=torch.Generator().manual_seed(0))


def computing(
    weight: nn.Parameter, *, limit: int, error: RuntimeError = CUDA, rows: Tensor = ROWS
) -> Callable[[int], float]:
    """The loss of ``rows``; a pass over more than ``limit`` raises ``error`` after its backward pass has begun."""

    def compute(size: int) -> float:
        total = 0.0
        for part in rows.split(size):
            loss = (part @ weight).square().sum() / len(ROWS)
            loss.backward()  # what a failed pass leaves in the gradient must be taken back
            if len(part) > limit:
                raise error
            total += float(loss.detach())
        return total

    return compute


@pytest.mark.parametrize("error", [CUDA, CPU], ids=["cuda", "cpu"])
@pytest.mark.parametrize(("limit", "found"), [(13, 0), (6, 6), (5, 3), (1, 1)])
def test_the_whole_batch_is_halved_until_it_fits_and_the_gradient_is_that_of_the_whole(
    error: RuntimeError, limit: int, found: int
) -> None:
    whole, weight = (nn.Parameter(torch.ones(4)) for _ in range(2))
    expected = computing(whole, limit=13)(13)
    micro_batch, before = MicroBatch(), torch.get_rng_state()
    assert micro_batch.run(13, computing(weight, limit=limit, error=error), [weight]) == pytest.approx(expected)
    assert whole.grad is not None
    torch.testing.assert_close(weight.grad, whole.grad, rtol=1e-6, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), before)
    assert micro_batch.found == found
    told = micro_batch.take_notices()
    assert [f"from now on {found} rows go through" in text for text in told] == [True] * bool(found)
    assert micro_batch.take_notices() == []


def test_what_was_found_is_used_at_once_and_survives_a_resume() -> None:
    weight, sizes = nn.Parameter(torch.ones(4)), []

    def compute(size: int) -> None:
        sizes.append(size)
        computing(weight, limit=4)(size)

    first, resumed = MicroBatch(), MicroBatch()
    first.run(13, compute, [weight])
    resumed.load_state_dict(first.state_dict())
    for micro_batch in (first, resumed):
        micro_batch.run(13, compute, [weight])
    micro_batch.run(2, compute, [weight])  # never more than there are
    assert sizes == [13, 6, 3, 3, 3, 2]


def test_an_earlier_gradient_stays() -> None:
    weight = nn.Parameter(torch.ones(4))
    weight.grad = earlier = torch.arange(4.0)
    alone = nn.Parameter(torch.ones(4))
    computing(alone, limit=13)(13)
    assert alone.grad is not None
    expected = earlier + alone.grad
    MicroBatch().run(13, computing(weight, limit=3), [weight])
    torch.testing.assert_close(weight.grad, expected)


def test_another_error_is_no_lack_of_memory() -> None:
    weight = nn.Parameter(torch.ones(4))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        MicroBatch().run(13, computing(weight, limit=3, error=RuntimeError("mat1 and mat2")), [weight])


def test_a_number_that_was_given_is_kept_and_its_error_is_the_devices_own() -> None:
    weight = nn.Parameter(torch.ones(4))
    with pytest.raises(torch.OutOfMemoryError):
        MicroBatch(8).run(13, computing(weight, limit=3), [weight])


def test_not_even_one_row_is_refused_with_what_helps() -> None:
    weight = nn.Parameter(torch.ones(4))
    with pytest.raises(ConfigError, match="does not even hold one row in a pass, down from 13; train an adapter"):
        MicroBatch().run(13, computing(weight, limit=0), [weight])
    with pytest.raises(ConfigError, match=r"memory ran out with 13 rows .*give `update.micro_batch_size`, 1 to 6,"):
        MicroBatch(by_trial=False).run(13, computing(weight, limit=3), [weight])


def test_without_accelerate_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate.utils.memory", None)
    weight = nn.Parameter(torch.ones(4))
    with pytest.raises(
        MissingExtraError, match=r"\(or give `update.micro_batch_size`\), needs .*preceptor\[accelerate"
    ):
        MicroBatch().run(13, computing(weight, limit=3), [weight])
    MicroBatch().run(13, computing(weight, limit=13), [weight])  # nothing is needed where memory suffices


def test_processes_take_the_smallest_size_that_one_of_them_found() -> None:
    def found(world: World) -> tuple[int, int, int]:
        weight, micro_batch = nn.Parameter(torch.ones(4)), MicroBatch()
        rows = ROWS[world.shard(13)]
        compute = computing(weight, limit=(7, 2)[world.rank], rows=rows)
        micro_batch.run(len(rows), compute, [weight], world=world)
        first = micro_batch.found, len(micro_batch.take_notices())
        micro_batch.run(len(rows), compute, [weight], world=world)
        return *first, len(micro_batch.take_notices())

    assert in_world(2, found) == [(1, 1, 0), (1, 1, 0)]
