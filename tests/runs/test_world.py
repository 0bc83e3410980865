"""Rows, sums and agreement over processes: against the same in one process, with uneven and empty shares."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from preceptor.errors import ConfigError, LostProcessError, NumericError, ToldElsewhere, ToldHere
from preceptor.lm.sampling import SharedStream, draw
from preceptor.runs.device import choose_world_device, device_of
from preceptor.runs.world import ALONE, World, joined
from tests.worlds import free_port, in_world, launcher_variables

# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_rows", [0, 1, 3, 8, 9])
def test_shards_are_blocks_in_rank_order_that_cover_every_row_once(size: int, num_rows: int) -> None:
    rows = list(range(num_rows))
    parts = [rows[World(rank=rank, size=size).shard(num_rows)] for rank in range(size)]
    assert [row for part in parts for row in part] == rows
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert World(rank=size - 1, size=size).most_rows(num_rows) == max(map(len, parts))


def test_a_shared_stream_gives_each_row_the_number_that_it_has_alone_and_ends_in_the_same_place() -> None:
    log_probs = torch.randn(7, 20, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    alone = torch.Generator().manual_seed(5)
    expected = [draw(log_probs, alone) for _ in range(3)]
    for rank in range(3):
        world = World(rank=rank, size=3)
        rows = world.shard(7)
        generator = torch.Generator().manual_seed(5)
        stream = world.stream(generator, rows, 7)
        assert isinstance(stream, SharedStream)
        for drawn in expected:
            assert draw(log_probs[rows], stream).tolist() == drawn[rows].tolist()
        assert torch.equal(generator.get_state(), alone.get_state())


def test_a_group_of_rows_takes_its_numbers_together() -> None:
    uniform = torch.full((6, 50), 1 / 50).log()
    expected = draw(uniform, torch.Generator().manual_seed(2))  # three prompts, two rows each
    world = World(rank=1, size=2)
    rows = world.shard(3)
    stream = world.stream(torch.Generator().manual_seed(2), rows, 3, each=2)
    assert draw(uniform[4:], stream).tolist() == expected[4:].tolist()


# ---- two processes ---------------------------------------------------------------------------------------------------


def _computed(world: World) -> dict[str, Any]:
    """Everything that processes do together, once, on seven rows."""
    values = torch.arange(7.0)[:, None] * torch.tensor([1.0, 10.0])  # row 2
    asked: list[slice] = []

    def rows_of(rows: slice) -> tuple[Tensor, ...]:
        asked.append(rows)
        return values[rows], values[rows, 0] > 2, torch.arange(7)[rows]

    gathered = world.gathered(7, rows_of)
    few = world.gathered(1, lambda rows: (values[rows],))
    (own,) = world.gather(1, values[:1][world.shard(1)])  # one process has no row
    lists = world.gathered_lists([2, 0, 3], lambda rows: [torch.full((n,), float(n)) for n in [2, 0, 3][rows]])

    linear = nn.Linear(2, 1)
    unused = nn.Linear(2, 1)
    nn.init.ones_(linear.weight)
    if world.rank == 0:  # the other process has no rows and so no gradient
        (linear(values[:3]).sum() / 3).backward()
    world.sum_gradients([*linear.parameters(), *unused.parameters()])
    return {
        "asked": asked,
        "gathered": [each.tolist() for each in gathered],
        "few": few[0].tolist(),
        "own": own.tolist(),
        "lists": [each.tolist() for each in lists],
        "gradient": None if linear.weight.grad is None else linear.weight.grad.tolist(),
        "unused": unused.weight.grad,
        "sum": world.sum(torch.tensor([1.0, 2.0])).tolist(),
        "sums": world.sums({"a": float(world.rank), "b": 1.0}),
        "maximum": world.maximum(float(world.rank)),
        "of_first": world.of_first(lambda: f"from {world.rank}"),
    }


def test_two_processes_have_every_row_every_sum_and_one_answer() -> None:
    first, second = in_world(2, _computed)
    alone = _computed(ALONE)
    assert first["asked"] == [slice(0, 4)]
    assert second["asked"] == [slice(4, 7)]
    for name in ("gathered", "few", "own", "lists", "gradient", "unused", "of_first"):
        assert first[name] == alone[name], name
        assert second[name] == alone[name], name
    for each in (first, second):
        assert each["sum"] == [2.0, 4.0]
        assert each["sums"] == {"a": 1.0, "b": 2.0}
        assert each["maximum"] == 1.0


def test_large_gradients_are_summed_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preceptor.runs.world.BUCKET", 10)

    def summed(world: World) -> list[list[float]]:
        tensors = [torch.full((n,), 1.0 + world.rank) for n in (3, 12, 4, 9)]
        world.sum_in_place(tensors)
        return [each.tolist() for each in tensors]

    assert in_world(2, summed) == [[[3.0] * n for n in (3, 12, 4, 9)]] * 2


# ---- the end ---------------------------------------------------------------------------------------------------------


def test_an_error_in_one_process_is_told_by_it_and_ends_the_other_silently() -> None:
    def failing(world: World) -> tuple[str, str, int]:
        world.resume_hint = "; resume with: torchrun again"
        try:
            with world.one_voice():
                if world.rank == 1:
                    raise NumericError("planted")
                world.sum(torch.zeros(1))
                return ("went on", "", 0)
        except (ToldHere, ToldElsewhere) as error:
            return (type(error).__name__, str(error), error.exit_code)
        finally:
            if world.rank == 1:
                torch.distributed.destroy_process_group()

    first, second = in_world(2, failing)
    assert second == ("ToldHere", "process 1 of 2: planted; resume with: torchrun again", NumericError.exit_code)
    assert first[0] == "ToldElsewhere"


def test_a_process_that_is_gone_is_one_clear_line() -> None:
    def lonely(world: World) -> str:
        world.resume_hint = "; resume with: torchrun again"
        if world.rank == 1:
            torch.distributed.destroy_process_group()
            return ""
        with pytest.raises(LostProcessError) as caught:
            world.sum(torch.zeros(1))
        return str(caught.value)

    first, _ = in_world(2, lonely)
    assert first.startswith("a process of this run has ended (2 belong to it)")
    assert first.endswith("resume with: torchrun again")


def test_the_others_wait_for_what_the_first_leaves_in_a_cache(tmp_path: Path) -> None:
    def cached(world: World) -> bool:
        found = (tmp_path / "cache").exists
        with world.first_then_others():
            if world.is_first:
                time.sleep(0.2)
                (tmp_path / "cache").touch()
            return found()

    assert in_world(2, cached) == [True, True]


# ---- the door --------------------------------------------------------------------------------------------------------


def test_without_a_launcher_the_world_is_one_process_that_touches_nothing() -> None:
    tensor = torch.randn(3, requires_grad=True)
    with joined({}) as world:
        assert world is ALONE
        assert world.gathered(3, lambda rows: (tensor,))[0] is tensor
        assert world.sum(tensor) is tensor
        assert isinstance(world.stream(torch.Generator(), slice(0, 3), 3), torch.Generator)


def test_variables_that_are_not_whole_are_refused() -> None:
    variables = launcher_variables(0, 2, free_port())
    del variables["MASTER_ADDR"]
    with pytest.raises(ConfigError, match="MASTER_ADDR is not set"), joined(variables):
        pass


def test_what_needs_one_process_is_refused_in_several() -> None:
    ALONE.refuse("this")
    with pytest.raises(ConfigError, match="this works in one process, this run has 2"):
        World(rank=1, size=2).refuse("this")


def test_each_process_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    world = World(rank=3, size=4, local_rank=1)
    assert choose_world_device("auto", world) == torch.device("cuda:1")
    assert device_of("cuda:0", world) == torch.device("cuda:1")
    assert choose_world_device("cpu", world) == torch.device("cpu")
    assert choose_world_device("cuda:1", ALONE) == torch.device("cuda:1")
    with pytest.raises(ConfigError, match="each takes a GPU of its own"):
        choose_world_device("cuda:1", world)
    with pytest.raises(ConfigError, match="process 2 of this machine has no GPU of its own, there are 2"):
        device_of("cuda:0", World(rank=2, size=3, local_rank=2))
